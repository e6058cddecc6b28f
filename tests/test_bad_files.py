"""Files that users bring x damage: one line that names the file, exit code 2; nothing is executed,
no file half-written."""
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import TINY, call, error_line, files_in
from PIL import Image

CAM = ("train_cam --data {w}/data --split few --clip {w}/clip.pt --vit {w}/vit.pth --resnet "
       "{w}/resnet.pth --out {w}/new " + " ".join(TINY) + " --phase ")
PSEUDO = "make_pseudo --data {w}/data --split few --cams {w}/cams --out {w}/new --device cpu"
EVAL = "eval --data {w}/data --split few --device cpu "
KINDS = {  # kind: (the file, script and flags)
    "photo": ("data/images/train_00001.jpg", PSEUDO),
    "csv": ("data/few.csv", PSEUDO),
    "classes": ("data/classes.txt", PSEUDO),
    "label": ("masks/train_00001.png", EVAL + "--pred {w}/masks"),
    "segments": ("masks/train_00001.png", PSEUDO + " --segments {w}/masks"),
    "cam": ("cams/train_00001.npy", PSEUDO),
    "generator": ("refine.pt", CAM + "export --checkpoint {w}/refine.pt"),
    "seg": ("seg.pt", EVAL + "--checkpoint {w}/seg.pt"),
    "CLIP": ("clip.pt", CAM + "match"),
    "DeiT": ("vit.pth", CAM + "classify"),
    "ResNet": ("resnet.pth", CAM + "classify --generator resnet")}
TEXTS, CHECKPOINTS = ["csv", "classes"], list(KINDS)[6:]


class Executed:
    """A pickle that would make a file if it were loaded as a pickle"""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}/executed",)


# ---- Damage: path -> None ------------------------------------------------------------------------

def text(data):
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def picture(mode, value=0, size=(64, 64), kind="PNG"):
    return lambda path: Image.new(mode, size, value).save(path, kind)


def huge_png(path):
    """A header that says 60,000 x 60,000 pixels, and no more"""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
                     + struct.pack(">I", zlib.crc32(header)) + bytes(4) + b"IDAT")


def array(value):
    return lambda path: np.save(path, value, allow_pickle=True)


def huge_array(path):
    """An .npy whose header says 10^12 values"""
    said = repr({"descr": "<f2", "fortran_order": False, "shape": (10**6, 10**6)}).ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said.encode())


def first_tensor(value):
    """Another value for a checkpoint's first tensor"""
    def damage(path):
        state = torch.load(path, weights_only=True)
        parts = [state, *(part for part in state.values() if isinstance(part, dict))]
        tensors = next(part for part in parts if any(map(torch.is_tensor, part.values())))
        tensors[next(key for key, part in tensors.items() if torch.is_tensor(part))] = value
        torch.save(state, path)
    return damage


def vit_of(sizes):
    def damage(path):
        state = torch.load(path, weights_only=True)
        torch.save(state | {"vit": state["vit"] | sizes if sizes else {}}, path)
    return damage


ANY = {"empty": text(""), "text": text("hello\nworld\n"),
       "cut": lambda path: path.write_bytes(path.read_bytes()[:-99]),
       "hostile pickle": lambda path: path.write_bytes(pickle.dumps(Executed(path.parent)))}
WEIGHTS = {"a list": lambda path: torch.save([1], path), "text for a tensor": first_tensor("text"),
           "10^12 values": first_tensor(torch.zeros(1).expand(10**6, 10**6)),
           "hostile checkpoint": lambda path: torch.save({"model": Executed(path.parent)}, path)}
OWN = {
    "photo": {"60,000 x 60,000": huge_png},
    "csv": {"empty": text(""), "text": text("hello\nworld\n"), "NUL": text("a\0b,bird\n"),
            "an open quote": text('"images/train_00001.jpg,bird\n' * 6000),
            "a cell of 1 MB": text("a" * 10**6 + ",bird\n"), "a folder": text("images,\n"),
            "a class of none": text("images/train_00001.jpg,unicorn\n"),
            "not UTF-8": text(b"\xff\xfe\x00\xd8")},
    "classes": {"empty": text(""), "300": text("".join(f"c{i}\n" for i in range(300))),
                "background": text("background\n"), "no name": text(": boat\n")},
    "label": {"colours": picture("RGB"), "another size": picture("L", size=(30, 20)),
              "label 254": picture("L", 254), "60,000 x 60,000": huge_png},
    "segments": {"colours": picture("RGB"), "real": picture("F", 1e9, kind="TIFF"),
                 "60,000 x 60,000": huge_png},
    "cam": {"10^12 values": huge_array, "objects": array(np.array([{}])),
            "NaN": array(np.full((1, 16, 16), np.nan)), "above 1": array(np.full((1, 4, 4), 1.5)),
            "another shape": array(np.zeros((5, 16, 16))), "no rows": array(np.zeros((1, 16, 0)))},
    **dict.fromkeys(CHECKPOINTS, WEIGHTS)}
for kind in ("generator", "seg"):
    OWN[kind] = WEIGHTS | {"width 10^7": vit_of({"width": 10**7}), "no sizes": vit_of({})}
CASES = {(kind, title): damage for kind in KINDS
         for title, damage in ({} if kind in TEXTS else ANY | OWN[kind]).items()}
CASES |= {(kind, title): damage for kind in TEXTS for title, damage in OWN[kind].items()}


@pytest.fixture(scope="module")
def world(toy, chain, tmp_path_factory):
    """Two photos and what belongs to them, all weights"""
    w = tmp_path_factory.mktemp("bad")
    for file in ("clip.pt", "vit.pth", "resnet.pth", "data/classes.txt"):
        (w / file).parent.mkdir(exist_ok=True)
        shutil.copy(toy / file, w / file)
    for folder, source in (("data/images", toy / "data/images"), ("data/masks", toy / "data/masks"),
                           ("masks", chain / "masks"), ("cams", chain / "cam/cams")):
        (w / folder).mkdir()
        for path in source.glob("train_0000[12].*"):
            shutil.copy(path, w / folder)
    shutil.copy(chain / "cam/refine.pt", w)
    shutil.copy(chain / "seg/seg.pt", w)
    (w / "data/few.csv").write_text("".join((toy / "data/train.csv").open().readlines()[1:3]))
    return w


@pytest.mark.parametrize("kind, title", CASES)
def test_bad_file(kind, title, world, tmp_path, capsys):
    file, command = KINDS[kind]
    kept = shutil.copytree(world, tmp_path / "w", copy_function=os.link)  # a new file is no link
    (kept / file).unlink()
    shutil.copy(world / file, kept / file)
    CASES[kind, title](kept / file)
    line = error_line(capsys, *command.format(w=kept).split())
    assert line.startswith(f"error: {kept / file}: "), line
    assert not [name for name in files_in(kept) if "executed" in name or ".writing." in name]


class Scripted(torch.nn.Module):
    """TorchScript whose code says so if it runs, which it does while it is loaded"""

    @torch.jit.export
    def __getstate__(self) -> int:
        return 0

    @torch.jit.export
    def __setstate__(self, state: int):
        self.training = False
        print("executed")

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")  # torch's, of TorchScript
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_torchscript_is_not_run(kind, world, tmp_path, capsys):
    """torch.load of torch before 2.6 runs it, with weights_only=True too."""
    file, command = KINDS[kind]
    kept = shutil.copytree(world, tmp_path / "w")
    torch.jit.script(Scripted()).save(kept / file)
    with pytest.raises(SystemExit):
        call(*command.format(w=kept).split())
    out, line = capsys.readouterr()
    assert line.startswith(f"error: {kept / file}: ") and "executed" not in out
