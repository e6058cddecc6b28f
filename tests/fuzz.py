"""Over three hundred broken or odd inputs, of every kind that the scripts read. Each one works, or ends in one line.

    python tests/fuzz.py                # all, about ten minutes; prints how many of each kind worked and were refused
    python tests/fuzz.py --every 12     # each twelfth
    python tests/fuzz.py --only photo   # of this kind

A case damages a copy of a tiny toy world, then runs one script in a process of its own. Well is exit code 0, or exit code 2 with
one line `error: ...` that names the file and says what was expected, within 10 seconds and 2 GB, and no pickle executed.
"""

import argparse
import importlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the cases are forked from this process
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from clip_model import run  # noqa: E402

SECONDS, BYTES = 10, 2 * 2**30


class Executed:
    """A pickle that would write a file if it was loaded as a pickle"""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# ---------------------------------------------------------------------------------------------------------------------
# Damage that any file may take: path -> None
# ---------------------------------------------------------------------------------------------------------------------


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(seed, count=16, first=None):
    """Other values for some bytes, among the first ones or all"""

    def damage(path):
        rng, data = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(count):
            data[rng.randrange(min(len(data), first or len(data)))] = rng.randrange(256)
        path.write_bytes(data)

    return damage


def replace_by(data):
    return lambda path: path.write_bytes(data)


def folder(path):
    path.unlink()
    path.mkdir()


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def zipped(names):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name in names:
            archive.writestr(name, b"text")
    return memory.getvalue()


ANY = {
    "gone": Path.unlink,
    "empty": cut(0),
    **{f"cut at {share}": cut(share) for share in (0.001, 0.1, 0.5, 0.9, 0.999)},
    **{f"bytes flipped, {i}": flip(i) for i in range(6)},
    **{f"header flipped, {i}": flip(i, 6, 64) for i in range(6)},
    "zeros": zeros,
    "a folder": folder,
    "a link to itself": loop,
    "text": replace_by(b"hello\nworld\n"),
    "an empty zip": replace_by(zipped([])),
    "a zip that leaves its folder": replace_by(zipped(["../../evil", "/tmp/evil"])),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Executed(path.parent / "executed"))),
    "not UTF-8": replace_by(b"\xff\xfe\x00\xd8"),
    "twice": lambda path: path.write_bytes(2 * path.read_bytes()),
}


# ---------------------------------------------------------------------------------------------------------------------
# Photos and label pictures
# ---------------------------------------------------------------------------------------------------------------------


def png(width, height, colour=2, depth=8, data=b""):
    """A PNG with any header"""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(picture, kind, **options):
    memory = io.BytesIO()
    picture.save(memory, kind, **options)
    return memory.getvalue()


def modes():
    """Photos of every mode, in formats that have it"""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
    for mode, kind in (
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
        ("L", "JPEG"),
        ("F", "TIFF"),
        ("I", "TIFF"),
        ("LAB", "TIFF"),
        ("CMYK", "TIFF"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
        ("1", "TIFF"),
    ):
        yield (
            f"{mode} {kind}",
            replace_by(saved(noise.convert("L").convert("I;16") if mode == "I;16" else noise.convert(mode), kind)),
        )


PHOTOS = {
    **dict(modes()),
    **{f"{w} x {h}": replace_by(saved(Image.new("RGB", (w, h)), "PNG")) for w, h in ((1, 1), (1, 400), (400, 1), (2, 3))},
    "60,000 x 60,000": replace_by(png(60000, 60000)),
    "60,000 x 60,000, grey": replace_by(png(60000, 60000, 0)),
    "2^31 x 1": replace_by(png(2**31 - 1, 1)),
    "0 x 0": replace_by(png(0, 0)),
    "12,000 x 12,000, all there": replace_by(png(12000, 12000, 0, 1, bytes(1501 * 12000))),
    "a bomb of 4 GB": replace_by(png(50, 37, 2, 8, bytes(200_000_000))),
    "depth 99": replace_by(png(50, 37, 2, 99)),
    "animated": replace_by(saved(Image.new("P", (50, 37)), "GIF", save_all=True, append_images=[Image.new("P", (50, 37), 1)])),
    **{
        f"EXIF orientation {i}": replace_by(
            saved(
                Image.new("RGB", (50, 37)),
                "JPEG",
                exif=Image.Exif() | {274: i}
                if False
                else b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + struct.pack("<HH", i, 0) + bytes(4),
            )
        )
        for i in (0, 6, 9, 255)
    },
}
LABELS = {
    "colour": replace_by(saved(Image.new("RGB", (50, 37)), "PNG")),
    "alpha": replace_by(saved(Image.new("LA", (50, 37)), "PNG")),
    "16 bits": replace_by(saved(Image.new("I;16", (50, 37)), "PNG")),
    "1 bit": replace_by(saved(Image.new("1", (50, 37)), "PNG")),
    "of another size": replace_by(saved(Image.new("L", (37, 50)), "PNG")),
    "label 7": replace_by(saved(Image.new("L", (50, 37), 7), "PNG")),
    "label 254": replace_by(saved(Image.new("P", (50, 37), 254), "PNG")),
    "all 255": replace_by(saved(Image.new("L", (50, 37), 255), "PNG")),
    "a JPEG": replace_by(saved(Image.new("L", (50, 37)), "JPEG")),
    "60,000 x 60,000": replace_by(png(60000, 60000, 0)),
    "12,000 x 12,000": replace_by(png(12000, 12000, 0, 1, bytes(1501 * 12000))),
    "floating point": replace_by(saved(Image.new("F", (50, 37)), "TIFF")),
    "animated": PHOTOS["animated"],
}


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def text(content):
    return lambda path: path.write_text(content, encoding="utf-8")


def edited(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


ROW = "images/train_00000.jpg,bird\n"
CSV = {
    "a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "Windows' ends of lines": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    "a header": lambda path: path.write_text("image,label\n" + path.read_text()),
    "semicolons between cells": edited(",", ";"),
    "tabs between cells": edited(",", "\t"),
    "an open quote": text(f'"{ROW}'),
    "quotes": text('"images/train_00000.jpg","bird"\n'),
    "only commas": text(",,,\n"),
    "only a path": text("images/train_00000.jpg\n"),
    "no class at all": text("images/train_00000.jpg,\n"),
    "an absolute path": text("/etc/passwd,bird\n"),
    "a folder for a photo": text("images,bird\n"),
    "a path that climbs": text("../../../etc/passwd,bird\n"),
    "a photo twice": text(2 * ROW),
    "NUL": text("a\0b,bird\n"),
    "a cell of 10 MB": text("a" * 10_000_000 + ",bird\n"),
    "10^6 empty lines": text("\n" * 10**6 + ROW),
    "a class twice": text("images/train_00000.jpg,bird;bird\n"),
    "an empty class": text("images/train_00000.jpg,bird;;\n"),
    "case": text(ROW.replace("b", "B", 1)),
    "a class of 10^6 letters": text(f"images/train_00000.jpg,{'x' * 10**6}\n"),
    "a photo without an ending": text("images/train_00000,bird\n"),
    "spaces": text(" images/train_00000.jpg , bird \n"),
    "blank lines": text(f"\n\n{ROW}\n"),
    "more cells": text("images/train_00000.jpg,bird,cow\n"),
}
CLASSES = {
    "a class twice": edited("boat", "bird"),
    "one class fewer": edited("boat\n", ""),
    "one more": edited("boat", "boat\nship"),
    "background": edited("boat", "background"),
    "300 classes": text("".join(f"c{i}\n" for i in range(300))),
    "no name": edited("boat", ": boat"),
    "an empty description": edited("boat", "boat:"),
    "a description of 10^5 letters": edited("boat", "boat: " + "x " * 50000),
    "emoji": edited("boat", "boat: 🛶"),
    "comments": edited("boat", "# a comment\nboat"),
    "a byte order mark": CSV["a byte order mark"],
    "a semicolon": edited("boat", "bo;at"),
    "Windows' ends of lines": CSV["Windows' ends of lines"],
    "10^6 lines": text("a\n" * 10**6),
}
WORDS = {
    "a class missing": text("boat: water\n"),
    "no words": text("boat:\ntrain:\nbird:\ncow:\ncar:\nbottle:\n"),
    "no colon": text("boat water\n"),
    "words of 10^5 letters": text("".join(f"{c}: {'x' * 10**5}\n" for c in ("boat", "train", "bird", "cow", "car", "bottle"))),
    "a class twice": text("boat: water\nboat: sky\n"),
    "only commas": text("boat: ,,,\n"),
}
SCORE = {
    name: text(content)
    for name, content in {
        "a list": "[1]",
        "a string": '{"background_score": "high"}',
        "null": '{"background_score": null}',
        "2": '{"background_score": 2}',
        "-1": '{"background_score": -1}',
        "NaN": '{"background_score": NaN}',
        "nested deep": "[" * 100_000,
        "no key": "{}",
        "10^400": '{"background_score": 1' + "0" * 400 + "}",
        "a list in it": '{"background_score": [0.4]}',
    }.items()
}


# ---------------------------------------------------------------------------------------------------------------------
# Arrays: our CAMs, other programs', segments
# ---------------------------------------------------------------------------------------------------------------------


def array(value):
    def damage(path):
        with open(path, "wb") as file:
            np.save(file, value, allow_pickle=True)

    return damage


def header(shape, kind="<f2", more=b"", fortran=False):
    """An .npy file with any header"""
    said = repr({"descr": kind, "fortran_order": fortran, "shape": shape}).encode()
    said += b" " * (-(len(said) + 11) % 64) + b"\n"
    return replace_by(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said + more)


CAMS = {
    **{
        f"shape {shape}": array(np.zeros(shape, np.float16))
        for shape in ((), (0,), (1,), (10, 13), (2, 10, 13), (1, 13, 10), (0, 10, 13), (1, 1, 10, 13), (1, 10, 0))
    },
    **{f"type {kind}": array(np.zeros((1, 10, 13), kind)) for kind in ("f8", ">f4", "i4", "u1", "?", "c8", "S4", "M8[s]", "V3")},
    **{f"all {value}": array(np.full((1, 10, 13), value, np.float32)) for value in (np.nan, np.inf, -1, 5, 1e38)},
    "header of 10^12 values": header((10**6, 10**6)),
    "of 10^9": header((1, 10**5, 10**4)),
    "of -1": header((-1, 10, 13)),
    "of 10^30": header((10**30,)),
    "columns first": header((1, 10, 13), more=bytes(260), fortran=True),
    "of objects": header((1,), "|O"),
    "of text": header("(1, 10"),
    "version 9": replace_by(b"\x93NUMPY\x09\x00" + bytes(99)),
    "of many dimensions": header((1,) * 99),
    "a header of 10 MB": replace_by(b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**7) + b" " * 10**7),
}


def foreign(value):
    return array(np.array(value, dtype=object))


MAP = np.zeros((10, 13), np.float32)
FOREIGN = {
    "{}": foreign({}),
    "{'keys'}": foreign({"keys": [2]}),
    "no map": foreign({"keys": [2], "cam": []}),
    "a class of text": foreign({"bird": MAP}),
    "class 99": foreign({99: MAP}),
    "class -1": foreign({-1: MAP}),
    "a map of one dimension": foreign({2: MAP[0]}),
    "of none": foreign({2: 1.5}),
    "of three": foreign({2: MAP[None]}),
    "an empty map": foreign({2: MAP[:0]}),
    "NaN": foreign({2: MAP * np.nan}),
    "10^38": foreign({2: MAP + 1e38}),
    "integers": foreign({2: MAP.astype(int)}),
    "text": foreign({2: MAP.astype(str)}),
    "complex": foreign({2: MAP.astype(complex)}),
    "tensors": foreign({2: torch.zeros(10, 13)}),
    "a list": foreign([MAP]),
    "lists": foreign({2: MAP.tolist()}),
    "None": foreign({2: None}),
    "maps of unlike sizes": foreign({"keys": [2, 3], "high_res": [MAP, MAP[:5]]}),
    "keys in excess": foreign({"keys": [2, 3, 4], "high_res": MAP[None]}),
    "sets": foreign({2: {1, 2}}),
    "a class": foreign({2: Path("x")}),
    "well, high_res": foreign({"keys": np.array([2]), "high_res": MAP[None] + 0.5}),
    "well, class: map": foreign({2: MAP + 0.5}),
    "a bomb of lists": foreign({2: [[[0] * 100] * 100] * 100}),
}


def coded(value):
    def damage(path):
        path.with_suffix(".png").unlink(missing_ok=True)
        path.with_suffix(".json").write_text(value if isinstance(value, str) else json.dumps(value))

    return damage


def packed(value):
    def damage(path):
        path.with_suffix(".png").unlink(missing_ok=True)
        np.savez_compressed(path.with_suffix(".npz"), value)

    return damage


def rle(counts, size=(37, 50)):
    return [{"segmentation": {"size": list(size), "counts": counts}}]


SEGMENTS = {
    **{
        f"json {name}": coded(value)
        for name, value in {
            "{}": {},
            "[]": [],
            "null": None,
            "a number": 7,
            "torn": "[{",
            "nested deep": "[" * 100_000,
            "no segmentation": [{}],
            "whole": rle([0, 1850]),
            "too long": rle([0, 1851]),
            "negative": rle([-5, 1855]),
            "text": rle("abc"),
            "letters beyond": rle("zzzz\x7f€"),
            "10^30": rle([10**30]),
            "of NaN": '[{"segmentation": {"size": [37, 50], "counts": [NaN]}}]',
            "floating point": rle([0.5, 1849.5]),
            "no runs": rle([]),
            "another size": rle([3.6e9], (60000, 60000)),
            "size of text": rle([0, 1850], ("a", "b")),
            "a polygon": [{"segmentation": [[1, 1, 9, 9, 1, 9]]}],
            "annotations of SAM": {"annotations": rle([0, 1850])},
        }.items()
    },
    "npz well": packed(np.ones((2, 37, 50), bool)),
    "npz empty": packed(np.ones((0, 37, 50), bool)),
    "npz numbers": packed(np.ones((2, 37, 50))),
    "npz another size": packed(np.ones((2, 50, 37), bool)),
    "npz two dimensions": packed(np.ones((37, 50), bool)),
    "npz objects": packed(np.array([{}], dtype=object)),
    "npz of 4 GB": packed(np.broadcast_to(np.zeros((), bool), (1_200_000, 37, 50))),
    "png colour": LABELS["colour"],
    "png 16 bits": LABELS["16 bits"],
    "png of another size": LABELS["of another size"],
    "png 60,000 x 60,000": LABELS["60,000 x 60,000"],
}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint(change):
    """change(state) alters a checkpoint in place, or returns another one"""

    def damage(path):
        state = torch.load(path, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, path)

    return damage


def first_tensor(change):
    """Change the first tensor in a state dict"""

    def change_state(state):
        tensors = next(
            (value for key, value in state.items() if isinstance(value, dict) and any(map(torch.is_tensor, value.values()))), state
        )
        key = next(key for key, value in tensors.items() if torch.is_tensor(value))
        tensors[key] = change(tensors[key])

    return checkpoint(change_state)


STATES = {
    "a list": checkpoint(lambda state: [1]),
    "a tensor": checkpoint(lambda state: torch.zeros(3)),
    "{}": checkpoint(lambda state: {"a": 1}),
    "a tensor of another shape": first_tensor(lambda t: torch.zeros(3, 5)),
    "of other values": first_tensor(lambda t: "text"),
    "a tensor fewer": checkpoint(
        lambda state: (
            next(v for v in [*state.values(), state] if isinstance(v, dict) and any(map(torch.is_tensor, v.values()))).popitem()
            and None
        )
    ),
    "an expanded tensor of 10^12": first_tensor(lambda t: torch.zeros(1).expand(10**6, 10**6)),
    "sparse": first_tensor(lambda t: torch.zeros(9, 9).to_sparse()),
    "an object": lambda path: torch.save({"generator": Executed(path.parent / "executed")}, path),
    "the old format": lambda path: torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False),
    "an object in the old format": lambda path: torch.save(
        Executed(path.parent / "executed"), path, _use_new_zipfile_serialization=False
    ),
}
OURS = {
    "no recipe": checkpoint(lambda state: state.pop("recipe") and None),
    "no classes": checkpoint(lambda state: state.pop("classes") and None),
    "other sizes": checkpoint(
        lambda state: state["vit"].update(width=64) if "vit" in state else state.update(vectors=torch.zeros(2, 3, 4))
    ),
    "absurd sizes": checkpoint(
        lambda state: (
            state["vit"].update(width=10**7) if "vit" in state else state.update(vectors=torch.zeros(1).expand(6, 10**6, 10**6))
        )
    ),
    "sizes of text": checkpoint(
        lambda state: state["vit"].update(width="wide") if "vit" in state else state.update(vectors="text")
    ),
    "no sizes": checkpoint(lambda state: state.update(vit={})),
}


# ---------------------------------------------------------------------------------------------------------------------
# Which script reads what
# ---------------------------------------------------------------------------------------------------------------------


def kinds(w):
    """{kind: (the file that is damaged, script and flags, the damages)}; w is the world's folder"""
    data, cam = f"--data {w}/data --split train", f"{w}/cam"
    phase = (
        f"train_cam {data} --clip {w}/clip.pt --vit {w}/vit.pth --resnet {w}/resnet.pth --out {cam} "
        "--recipe toy --steps 1 --batch 1 --workers 0 --device cpu --phase"
    )
    pseudo = f"make_pseudo {data} --cams {cam}/cams --out {w}/new --device cpu"
    few = "--recipe toy --steps 1 --batch 1 --workers 0 --device cpu"
    seg = f"train_seg {data} --vit {w}/vit.pth --out {w}/new --labels {w}/masks {few}"
    name = "train_00000"
    return {
        "photo": (f"data/images/{name}.jpg", pseudo + " --background-score 0.4", PHOTOS),
        "photo, training": (f"data/images/{name}.jpg", f"{phase} classify", PHOTOS),
        "photo, prediction": (
            f"photos/{name}.jpg",
            f"eval --images {w}/photos --checkpoint {w}/seg/seg.pt --save {w}/new --device cpu",
            PHOTOS,
        ),
        "csv": ("data/train.csv", f"{phase} classify", CSV),
        "classes.txt": ("data/classes.txt", f"{phase} classify", CLASSES),
        "background words": ("words.txt", f"{phase} export --background-words {w}/words.txt", WORDS),
        "label picture, training": (f"masks/{name}.png", seg, LABELS),
        "label picture, scored": (f"masks/{name}.png", f"eval {data} --pred {w}/masks --device cpu", LABELS),
        "CAMs": (f"cam/cams/{name}.npy", pseudo, CAMS),
        "CAMs of others": (f"cam/cams/{name}.npy", pseudo, FOREIGN),
        "background.json": ("cam/cams/background.json", pseudo, SCORE),
        "segments": (f"segments/{name}.png", f"{pseudo} --segments {w}/segments", SEGMENTS),
        "generator": ("cam/match.pt", f"{phase} export --checkpoint {cam}/match.pt --cams {w}/new", STATES | OURS),
        "classify.pt": ("cam/classify.pt", f"{phase} match", STATES | OURS),
        "prompts": ("cam/prompts.pt", f"{phase} refine", STATES | OURS),
        ".part": ("cam/match.part", f"{phase} match --resume", STATES),
        "segmenter": ("seg/seg.pt", f"eval {data} --checkpoint {w}/seg/seg.pt --device cpu", STATES | OURS),
        "CLIP": ("clip.pt", f"{phase} match", STATES),
        "DeiT": ("vit.pth", f"{phase} classify", STATES),
        "ResNet": ("resnet.pth", f"{phase} classify --generator resnet", STATES),
        "COCO's json": (
            "coco/annotations/instances_train2014.json",
            f"coco --coco {w}/coco --workers 1 --out {w}/new",
            {
                name: text(content)
                for name, content in {
                    "{}": "{}",
                    "[]": "[]",
                    "nested deep": '{"a":' * 50_000,
                    "no images": '{"images": [], "annotations": [], "categories": []}',
                    "a category less": json.dumps(
                        {
                            "images": [{"id": 1, "file_name": "train_00000.jpg", "height": 37, "width": 50}],
                            "categories": [],
                            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": []}],
                        }
                    ),
                    "an absurd size": json.dumps(
                        {
                            "images": [{"id": 1, "file_name": "train_00000.jpg", "height": 10**6, "width": 10**6}],
                            "categories": [{"id": 1, "name": "a"}],
                            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 5, 1, 5]]}],
                        }
                    ),
                    "a path that climbs": json.dumps(
                        {
                            "images": [{"id": 1, "file_name": "../../evil.jpg", "height": 37, "width": 50}],
                            "categories": [{"id": 1, "name": "a"}],
                            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": []}],
                        }
                    ),
                }.items()
            },
        ),
        "VOC's xml": (
            f"voc/Annotations/{name}.xml",
            f"voc --voc {w}/voc --out {w}/new",
            {
                name: text(content)
                for name, content in {
                    "no object": "<annotation/>",
                    "no name": "<a><object/></a>",
                    "another class": "<a><object><name>ship</name></object></a>",
                    "a billion laughs": '<!DOCTYPE a [<!ENTITY a "ha">'
                    + "".join(f'<!ENTITY {b} "{10 * f"&{a};"}">' for a, b in zip("abcdefghi", "bcdefghij"))
                    + "]><a><object><name>&j;</name></object></a>",
                    "a file as an entity": '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><a><object>'
                    "<name>&e;</name></object></a>",
                    "nested deep": "<a>" * 100_000,
                }.items()
            },
        ),
        "VOC's list": (
            "voc/ImageSets/Segmentation/train.txt",
            f"voc --voc {w}/voc --out {w}/new",
            {
                name: text(content)
                for name, content in {
                    "a photo that is not there": "nowhere\n",
                    "a path": "/JPEGImages/train_00000.jpg /x.png\n",
                    "a path that climbs": "../../evil\n",
                    "twice": "train_00000\ntrain_00000\n",
                }.items()
            },
        ),
    }


def make_world(world):
    """A tiny toy world, and one run of all scripts on it"""
    from crash import make_world

    crash, few = world / "crash", "--recipe toy --steps 1 --batch 2 --workers 0 --device cpu"
    make_world(crash)
    for name in ("clip.pt", "vit.pth", "resnet.pth"):
        shutil.copy(crash / f"toy/{name}", world)
    shutil.move(crash / "voc", world / "voc")
    shutil.move(crash / "coco", world / "coco")
    data = world / "data"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    (data / "classes.txt").write_text("boat\ntrain\nbird\ncow\ncar\nbottle\n")
    (data / "train.csv").write_text(ROW)
    with Image.open(crash / "toy/data/images/train_00000.jpg") as photo:
        photo.crop((5, 20, 55, 57)).save(data / "images/train_00000.jpg")
    for folder in ("data/masks", "masks", "segments"):
        (world / folder).mkdir(exist_ok=True)
        Image.fromarray(np.tile(np.arange(50, dtype=np.uint8) // 25 * 3, (37, 1))).save(world / folder / "train_00000.png")
    shutil.copytree(data / "images", world / "photos")
    (world / "words.txt").write_text("boat: water\ntrain: rails\nbird: sky\ncow: grass\ncar: road\nbottle: table\n")
    for command in (
        f"train_cam --data {data} --clip {world}/clip.pt --vit {world}/vit.pth --out {world}/cam {few}",
        f"train_seg --data {data} --labels {world}/masks --vit {world}/vit.pth --out {world}/seg {few}",
    ):
        assert call(command, world / "made")[0] == 0, (world / "made").read_text()
    state = torch.load(world / "cam/match.pt", weights_only=True)
    torch.save(
        {"model": state["generator"], "optimizer": {}, "scaler": {}, "step": 1, "recipe": state["recipe"]}, world / "cam/match.part"
    )
    (world / "cam/match.part").rename(world / "match.part")  # it is put there by the one case that wants it
    shutil.rmtree(crash)


# ---------------------------------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------------------------------


def call(command, output):
    """A script in a forked process, stderr into a file -> (exit code, None where it was stopped; seconds; bytes at most)"""
    script, *flags = command.split()
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        code = 70
        try:
            with open(output, "w") as file:
                os.dup2(file.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                module = importlib.import_module(script)
                try:
                    run(module.main, module.parse_args(flags))
                    code = 0
                except SystemExit as end:
                    code = end.code
                except BaseException:
                    import traceback

                    traceback.print_exc()
                sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        took = time.monotonic() - began
        if done:
            return os.waitstatus_to_exitcode(status), took, usage.ru_maxrss * 1024
        if took > 3 * SECONDS or took > SECONDS and usage.ru_utime > SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return None, took, 0
        time.sleep(0.005)


def fault(code, took, most, lines, path, world):
    """What is wrong with how a case ended, or None"""
    if (world / "executed").exists() or list(world.rglob("executed")):
        return "a pickle was executed"
    if code is None or took > SECONDS:
        return f"took {took:.0f} s"
    if most > BYTES:
        return f"took {most / 2**30:.1f} GB"
    if code == 0:
        return None
    errors = [line for line in lines if line.strip()]
    if code != 2 or len(errors) != 1 or not errors[0].startswith("error: "):
        return f"exit code {code}, {len(errors)} lines: {(errors or [''])[-1][:300]}"
    elsewhere = ("error: /", "error: text of", "error: classify: the loss is nan", "error: match: the loss is nan")
    if path.stem not in errors[0] and not errors[0].startswith(elsewhere):  # the file a csv names; bytes of a weight
        return f"does not name the file: {errors[0][:300]}"
    return (
        None if "expected" in errors[0] or "but CLIP reads" in errors[0] else f"does not say what was expected: {errors[0][:300]}"
    )


def run_case(world, scratch, kind, title, path, command, damage):
    """-> (worked, fault or None, the line)"""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(world, scratch, copy_function=os.link)  # hard links: a damaged file is a new one, below
    target = scratch / path
    target.unlink(missing_ok=True)
    shutil.copy(scratch / "match.part" if kind == ".part" else world / path, target)
    if kind == ".part":
        (scratch / "cam/match.pt").unlink()
    damage(target)
    code, took, most = call(command, scratch / "stderr")
    lines = (scratch / "stderr").read_text(errors="replace").splitlines()
    return code == 0, fault(code, took, most, lines, target, scratch), (lines or [""])[-1]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Broken inputs: each works, or ends in one line.")
    parser.add_argument("--every", type=int, default=1, help="only each Nth case")
    parser.add_argument("--only", default="", help="only the kinds whose name contains this")
    parser.add_argument("--title", default="", help="only the cases whose title contains this")
    parser.add_argument("--show", action="store_true", help="print the line that each case ends with")
    return parser.parse_args(argv)


def main(args):
    torch.set_num_threads(1)
    for script in ("train_cam", "make_pseudo", "train_seg", "eval", "coco", "voc"):
        importlib.import_module(script)
    found, faults, i = {}, [], 0
    with tempfile.TemporaryDirectory(prefix="fuzz") as base:
        world, scratch = Path(base, "world"), Path(base, "scratch")
        world.mkdir()
        make_world(world)
        for kind, (path, command, own) in kinds(scratch).items():
            for title, damage in {**ANY, **own}.items():
                i += 1
                if i % args.every or args.only not in kind or args.title not in title:
                    continue
                worked, wrong, line = run_case(world, scratch, kind, title, path, command, damage)
                found.setdefault(kind, Counter())["worked" if worked else "refused"] += 1
                if wrong:
                    found[kind]["faults"] += 1
                    faults.append(f"{kind}, {title}: {wrong}")
                    print(f"FAULT {faults[-1]}", flush=True)
                elif args.show:
                    print(f"{kind}, {title}: {'works' if worked else line}", flush=True)
    found["all"] = sum(found.values(), Counter())
    print(f"\n{'kind':<26}{'cases':>6}{'worked':>8}{'refused':>9}{'faults':>8}")
    for kind, count in found.items():
        print(f"{kind:<26}{count['worked'] + count['refused']:>6}{count['worked']:>8}{count['refused']:>9}{count['faults']:>8}")
    return faults


if __name__ == "__main__":
    sys.exit(bool(main(parse_args())))
