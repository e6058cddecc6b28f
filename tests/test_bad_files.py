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
from conftest import TINY, error_line, files_in
from PIL import Image

CAM = ("train_cam --data {w}/data --split few --clip {w}/clip.pt --vit {w}/vit.pth --resnet "
       "{w}/resnet.pth --out {w}/new " + " ".join(TINY) + " --phase ")
PSEUDO = ("make_pseudo --data {w}/data --split few --cams {w}/cams --out {w}/new --device cpu "
          "--workers 0")
EVAL = "eval --data {w}/data --split few --device cpu "
KINDS = {  # kind: the file, script and flags
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


# ---- Damage: path -> None ------------------------------------------------------------------------

class Executed:
    """A pickle that would make a file if it were loaded as a pickle"""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}/executed",)


def text(data):
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-99])


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
        state = state.get("model", state)  # DeiT's
        torch.save(state | {next(iter(state)): value}, path)
    return damage


def of_width_10_7(path):
    state = torch.load(path, weights_only=True)
    torch.save(state | {"vit": state["vit"] | {"width": 10**7}}, path)


OURS = {"cut": cut, "a list": lambda path: torch.save([1], path), "of another width": of_width_10_7,
        "hostile": lambda path: torch.save({"model": Executed(path.parent)}, path)}
WEIGHTS = {"empty": text(""), "cut": cut, "a list": OURS["a list"], "hostile": OURS["hostile"],
           "hostile pickle": lambda path: path.write_bytes(pickle.dumps(Executed(path.parent))),
           "text for a tensor": first_tensor("text"),
           "10^12 values": first_tensor(torch.zeros(1).expand(10**6, 10**6))}
DAMAGES = {
    "photo": {"empty": text(""), "cut": cut, "60,000 x 60,000": huge_png,
              "real numbers": picture("F", 0.5, kind="TIFF")},
    "csv": {"empty": text(""), "NUL": text("a\0b,bird\n"), "a folder": text("images,\n"),
            "an open quote": text('"images/train_00001.jpg,bird\n' * 6000),
            "no photo": text("images/train_00001.jpg,bird\n,boat\n"),
            "a cell of 1 MB": text("a" * 10**6 + ",bird\n"),
            "a class of none": text("images/train_00001.jpg,unicorn\n"),
            "not UTF-8": text(b"\xff\xfe\x00\xd8")},
    "classes": {"empty": text(""), "300": text("".join(f"c{i}\n" for i in range(300))),
                "background": text("background\n"), "no name": text(": boat\n")},
    "label": {"cut": cut, "colours": picture("RGB"), "another size": picture("L", size=(30, 20)),
              "label 254": picture("L", 254), "60,000 x 60,000": huge_png},
    "segments": {"cut": cut, "colours": picture("RGB"), "real": picture("F", 1e9, kind="TIFF"),
                 "60,000 x 60,000": huge_png},
    "cam": {"cut": cut, "10^12 values": huge_array, "objects": array(np.array([{}])),
            "NaN": array(np.full((1, 16, 16), np.nan)), "above 1": array(np.full((1, 4, 4), 1.5)),
            "another shape": array(np.zeros((5, 16, 16))), "no rows": array(np.zeros((1, 16, 0)))},
    "generator": OURS, "seg": OURS, "DeiT": WEIGHTS, "ResNet": WEIGHTS, "CLIP": WEIGHTS | {
        "a ResNet": lambda path: torch.save({"visual.layer1.0.conv1.weight": torch.ones(1)}, path),
        "a short vocabulary": lambda path: torch.save({
            key: x[:9] if key == "token_embedding.weight" else x
            for key, x in torch.load(path, weights_only=True).items()}, path)}}


@pytest.fixture(scope="module")
def world(toy, chain, tmp_path_factory):
    """Three photos and what belongs to them, all weights"""
    w = tmp_path_factory.mktemp("bad")
    for source, folder in ((toy / "data/images", "data/images"), (toy / "data/masks", "data/masks"),
                           (chain / "masks", "masks"), (chain / "cam/cams", "cams")):
        (w / folder).mkdir(parents=True)
        for path in source.glob("train_0000[012].*"):
            shutil.copy(path, w / folder)
    for path in (toy / "clip.pt", toy / "vit.pth", toy / "resnet.pth", chain / "cam/refine.pt",
                 chain / "seg/seg.pt"):
        shutil.copy(path, w)
    for file in ("classes.txt", "few.csv"):
        shutil.copy(toy / "data" / file, w / "data")
    return w


@pytest.mark.parametrize("kind, title", [(kind, title) for kind, damages in DAMAGES.items()
                                         for title in damages])
def test_bad_file(kind, title, world, tmp_path, capsys):
    file, command = KINDS[kind]
    kept = shutil.copytree(world, tmp_path / "w", copy_function=os.link)  # a new file is no link
    (kept / file).unlink()
    shutil.copy(world / file, kept / file)
    DAMAGES[kind][title](kept / file)
    line = error_line(capsys, *command.format(w=kept).split())
    assert line.startswith(f"error: {kept / file}: "), line
    assert not [name for name in files_in(kept) if "executed" in name or ".writing." in name]
