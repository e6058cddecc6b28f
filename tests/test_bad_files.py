"""Every kind of file that the scripts read x damage. A case passes if the script exits with 0, or
with 2 and a one-line error, leaves no half-written file and executes nothing."""
import os
import pickle
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import TINY, call, files_in
from PIL import Image

NAME = "train_00001"
PHASE = ("train_cam --data {w}/data --split few --clip {w}/clip.pt --vit {w}/vit.pth --resnet "
         "{w}/resnet.pth --out {w}/cam " + " ".join(TINY) + " --steps 2 --batch 2 --phase ")
PSEUDO = "make_pseudo --data {w}/data --split few --cams {w}/cam/cams --out {w}/new --device cpu"
EVAL = "eval --data {w}/data --split few --device cpu "
KINDS = {  # kind: (the file, script and flags)
    "photo": (f"data/images/{NAME}.jpg", PSEUDO),
    "csv": ("data/few.csv", PHASE + "classify"),
    "classes": ("data/classes.txt", PHASE + "classify"),
    "label": (f"masks/{NAME}.png", EVAL + "--pred {w}/masks"),
    "segments": (f"segments/{NAME}.png", f"{PSEUDO} --segments {{w}}/segments"),
    "cam": (f"cam/cams/{NAME}.npy", PSEUDO),
    "generator": ("cam/refine.pt", PHASE + "export --cams {w}/new"),
    "seg": ("seg/seg.pt", EVAL + "--checkpoint {w}/seg/seg.pt --scales 1 --no-flip --crf none"),
    "CLIP": ("clip.pt", PHASE + "match"),
    "DeiT": ("vit.pth", PHASE + "classify"),
    "ResNet": ("resnet.pth", PHASE + "classify --generator resnet"),
}
CHECKPOINTS = list(KINDS)[6:]


class Executed:
    """A pickle that would make a file if it were loaded as a pickle"""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}/executed",)


# ---- Damage: path -> None ------------------------------------------------------------------------

def replaced(data):
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def flipped(path, first=None):
    """Other values for eight bytes, among the first ones or all"""
    rng, data = random.Random(50), bytearray(path.read_bytes())
    for _ in range(8):
        data[rng.randrange(min(len(data), first or len(data)))] = rng.randrange(256)
    path.write_bytes(data)


def png(width, height):
    """A grey PNG whose header says so, and no more"""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return replaced(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
                    + struct.pack(">I", zlib.crc32(header)) + bytes(4) + b"IDAT")


def picture(mode, value=0, size=(64, 64)):
    return lambda path: Image.new(mode, size, value).save(path, "PNG")


def array(value):
    return lambda path: np.save(path, value, allow_pickle=True)


def header(shape):
    """An .npy that says it has this shape"""
    said = repr({"descr": "<f2", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return replaced(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said.encode())


def changed(change):
    """change(state) alters a checkpoint in place, or returns another one"""
    def damage(path):
        state = torch.load(path, weights_only=True)
        other = change(state)
        torch.save(state if other is None else other, path)
    return damage


def first_tensor(value):
    def change(state):
        parts = [state, *(part for part in state.values() if isinstance(part, dict))]
        tensors = next(part for part in parts if any(map(torch.is_tensor, part.values())))
        tensors[next(key for key, part in tensors.items() if torch.is_tensor(part))] = value
    return changed(change)


ANY = {
    "empty": replaced(""), "cut": lambda path: path.write_bytes(path.read_bytes()[:-99]),
    "bytes flipped": flipped,
    "text": replaced("hello\nworld\n"),
    "hostile pickle": lambda path: path.write_bytes(pickle.dumps(Executed(path.parent))),
}
OWN = {
    "photo": {"60,000 x 60,000": png(60_000, 60_000), "1 x 1": picture("L", size=(1, 1))},
    "csv": {"NUL": replaced("a\0b,bird\n"), "an open quote": replaced(f'"images/{NAME}.jpg,bird\n'),
            "a cell of 1 MB": replaced("a" * 10**6 + ",bird\n"), "a folder": replaced("images,\n"),
            "not UTF-8": replaced(b"\xff\xfe\x00\xd8")},
    "classes": {"300 classes": replaced("".join(f"c{i}\n" for i in range(300))),
                "background": replaced("background\n"), "no name": replaced(": boat\n")},
    "label": {"colours": picture("RGB"), "another size": picture("L", size=(30, 20)),
              "label 254": picture("P", 254), "60,000 x 60,000": png(60_000, 60_000)},
    "segments": {"colours": picture("RGB"), "real": lambda path: Image.new("F", (64, 64), 1e9).save(
        path, "TIFF"), "60,000 x 60,000": png(60_000, 60_000)},
    "cam": {"10^12 values": header((10**6, 10**6)), "10^30 values": header((10**30,)),
            "objects": array(np.array([{}])), "NaN": array(np.full((1, 16, 16), np.nan)),
            "another shape": array(np.zeros((5, 16, 16))), "no rows": array(np.zeros((1, 16, 0))),
            "header flipped": lambda path: flipped(path, 64)},
    **{kind: {"a list": changed(lambda state: [1]),
              "text for a tensor": first_tensor("text"),
              "10^12 values": first_tensor(torch.zeros(1).expand(10**6, 10**6)),
              "NaN": first_tensor(torch.full((2, 3), torch.nan))} for kind in CHECKPOINTS},
}
for sized in ("generator", "seg"):
    OWN[sized] |= {"width 10^7": changed(lambda state: state["vit"].update(width=10**7)),
                   "no sizes": changed(lambda state: state.update(vit={}))}
CASES = [(kind, title) for kind in KINDS for title in {**ANY, **OWN[kind]}]


@pytest.fixture(scope="module")
def world(toy, chain, tmp_path_factory):
    """Two photos, all weights, and what the stages make of them"""
    w = tmp_path_factory.mktemp("bad")
    for file in ("clip.pt", "vit.pth", "resnet.pth"):
        shutil.copy(toy / file, w / file)
    for source in (toy / "data", chain / "cam", chain / "masks", chain / "seg"):
        shutil.copytree(source, w / source.name)
    shutil.copytree(w / "masks", w / "segments")
    (w / "data/few.csv").write_text("".join((w / "data/train.csv").open().readlines()[1:3]))
    return w


@pytest.mark.parametrize("kind, title", CASES)
def test_bad_file(kind, title, world, tmp_path, capsys):
    place, command = KINDS[kind]
    kept = shutil.copytree(world, tmp_path / "w", copy_function=os.link)  # a new file is no link
    path = kept / place
    path.unlink()
    shutil.copy(world / place, path)
    {**ANY, **OWN[kind]}[title](path)
    code = 0
    try:
        call(*command.format(w=kept).split())
    except SystemExit as end:
        code = end.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 0 or code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not [name for name in files_in(kept) if "executed" in name or ".writing." in name]
