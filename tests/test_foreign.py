"""prepare/foreign.py: CAMs and segments of other programs become ours, and nothing is executed."""
import io
import json
import os
import pickle
import re
import shutil

import coco
import numpy as np
import pytest
import torch
from conftest import call, error_line
from foreign import foreign_cams
from PIL import Image

from common import InputError, Split

coco_mask = pytest.importorskip("pycocotools.mask")
pytestmark = pytest.mark.filterwarnings(  # pycocotools' own, with NumPy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
SHOWN = {"a": ["ant"], "b": ["bee", "cat"], "c": [], "d": ["ant", "bee", "cat"], "e": ["cat"]}
CLASSES, SIZE, MAP = ["ant", "bee", "cat"], (14, 18), np.zeros((3, 3))


@pytest.fixture
def data(tmp_path):
    """Five photos of three classes. Beside them, in ours/, CAMs as train_cam.py writes them."""
    [(tmp_path / folder).mkdir() for folder in ("data", "ours")]
    (tmp_path / "data/classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "data/train.csv").write_text(
        "".join(f"{name}.png,{';'.join(shown)}\n" for name, shown in SHOWN.items()))
    rng = np.random.default_rng(0)
    for name, shown in SHOWN.items():
        Image.fromarray(rng.integers(0, 256, SIZE, np.uint8)).save(tmp_path / f"data/{name}.png")
        if shown:
            np.save(tmp_path / f"ours/{name}", rng.random((len(shown), 4, 5)).astype(np.float16))
    return tmp_path / "data"


def pseudo_masks(data, cams, out, *flags):
    flags = ["--background-score", 0.4, "--crf", "none", "--device", "cpu", *flags]
    call("make_pseudo", "--data", data, "--cams", cams, "--out", out, *flags)
    return {path.stem: path.read_bytes() for path in out.glob("*.png")}


def as_another_program(program, maps, present):
    """maps (n, h, w) of the present classes (n,) -> what this program gives to np.save"""
    keys, tensor, maps = torch.from_numpy(present), torch.from_numpy(maps), maps.astype(np.float32)
    background = np.concatenate([np.full_like(maps[:1], 0.3), maps])
    return {
        "IRN, CLIMS": {"keys": keys, "cam": tensor[:, ::2].clone(), "high_res": maps},
        "AMN": {"keys": np.array([0, *(1 + present)]), "high_res": background},
        "CLIP-ES": {"keys": present, "cam": maps[:, ::2], "attn_highres": maps.astype(np.float16)},
        "PSA, MCTformer": dict(zip(present.tolist(), np.asfortranarray(maps))),
        "WeakTr": {np.int64(k): each for k, each in zip(present, tensor)}}[program]


@pytest.mark.parametrize("program", ["IRN, CLIMS", "AMN", "CLIP-ES", "PSA, MCTformer", "WeakTr"])
def test_cams_of_other_programs(program, data, tmp_path, capsys):
    """They become the files that we would have written, and give the same masks."""
    split, paths = Split(data, "train"), list((tmp_path / "ours").iterdir())
    (tmp_path / "theirs").mkdir()
    for path in paths:
        present = np.flatnonzero(split.labels[path.stem])
        theirs = as_another_program(program, np.load(path), present)
        np.save(tmp_path / "theirs" / path.name, theirs, allow_pickle=True)
    call("foreign", "--data", data, "--cams", tmp_path / "theirs", "--out", tmp_path / "cams")
    numbering = "from 1, background 0" if program == "AMN" else "from 0"
    assert f"classes are numbered {numbering}\n" in capsys.readouterr().out
    for path in paths:
        assert np.array_equal(np.load(tmp_path / "cams" / path.name), np.load(path))
    assert pseudo_masks(data, tmp_path / "ours", tmp_path / "masks 1") == pseudo_masks(
        data, tmp_path / "cams", tmp_path / "masks 2")


def write_dicts(folder, numbers):
    """{photo: numbers of the maps in its file}; a map's values are its number / 100"""
    for name, keys in numbers.items():
        np.save(folder / name, {k: np.full((2, 2), k / 100) for k in keys}, allow_pickle=True)


@pytest.mark.parametrize("numbers, numbering", [
    ({name: [0, 1, 2] for name in "abde"}, "from 0"),  # all classes for every photo
    ({name: [0, 1, 2, 3] for name in "abde"}, "from 1, background 0"),
    ({"a": [0, 1], "b": [0, 2, 3], "d": [0, 1, 2, 3], "e": [0, 3]}, "from 1, background 0"),
    ({"a": [1], "b": [2, 3], "d": [1, 2, 3], "e": [3]}, "from 1, background 0"),
    ({"a": [0], "b": [1, 2], "d": [1, 2, 3], "e": [2]}, None),  # a mixture
    ({"a": [5], "b": [1, 2], "d": [0, 1, 2], "e": [2]}, None)])
def test_the_whole_list_decides_how_classes_are_numbered(numbers, numbering, data, tmp_path,
                                                         capsys):
    """With maps of all classes, the photo that shows the first class alone would mislead."""
    (tmp_path / "theirs").mkdir()
    write_dicts(tmp_path / "theirs", numbers)
    flags = ["--data", data, "--cams", tmp_path / "theirs", "--out", tmp_path / "cams"]
    if numbering is None:
        assert "fit no numbering" in error_line(capsys, "foreign", *flags)
        return
    call("foreign", *flags)
    for name, first in (("a", 0), ("e", 2)):
        expected = (first + (numbering != "from 0")) / 100
        assert np.load(tmp_path / f"cams/{name}.npy")[0, 0, 0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("keys, numbering", [
    (lambda ids: range(90), "COCO's category ids less 1"),
    (lambda ids: [i - 1 for i in ids], "COCO's category ids less 1"),
    (lambda ids: [0, *ids], "COCO's category ids, background 0")])
def test_maps_by_coco_category_ids(keys, numbering, tmp_path, capsys):
    """80 of 90 numbers: person 1, toaster 80, toothbrush 90, whose numbers with us are 0, 70, 79"""
    known = [i for i in range(1, 91) if i not in coco.MISSING_IDS]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i}" for i in known))
    rows = {"a": [1], "b": [80, 90], "c": [18, 90]}
    (tmp_path / "train.csv").write_text("".join(
        f"{name}.png,{';'.join(f'c{i}' for i in ids)}\n" for name, ids in rows.items()))
    for name in rows:
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    write_dicts(tmp_path / "theirs", {name: keys(ids) for name, ids in rows.items()})
    call("foreign", "--data", tmp_path, "--cams", tmp_path / "theirs", "--out", tmp_path / "cams")
    assert numbering in capsys.readouterr().out
    found = np.load(tmp_path / "cams/b.npy")[:, 0, 0] * 100
    assert found.round().tolist() == [i - ("less" in numbering) for i in rows["b"]]


def test_maps_beyond_0_and_1_are_scaled(tmp_path):
    for values, expected in (([-2.0, 0, 6], [0, 0.25, 1]), ([0.5, 1.0005], [0.5, 1])):
        np.save(tmp_path / "a.npy", {3: np.array([values])}, allow_pickle=True)
        assert foreign_cams(tmp_path / "a.npy", [3])[0].tolist() == [expected]
    ranges = {3: np.array([[-2.0, 0, 6]]), 5: np.array([[0, 15, 20.0]])}  # each by its own
    np.save(tmp_path / "a.npy", ranges, allow_pickle=True)
    assert foreign_cams(tmp_path / "a.npy", [5, 3])[:, 0].tolist() == [[0, 0.75, 1], [0, 0.25, 1]]


@pytest.mark.parametrize("content", [
    {0: MAP[None]}, {0: 0.5}, {0: MAP * np.nan}, {0: "map"}, {0: MAP[:0]}, {7: MAP}, [1, 2],
    {"keys": [0], "highres": 1}, {"keys": [0]}, {"keys": [0, 1], "cam": MAP[None]},
    {0: torch.zeros(1).expand(2**14, 2**14)}])  # 1 GB out of 4 bytes
def test_dicts_of_something_else_are_refused(content, tmp_path):
    np.save(tmp_path / "a.npy", np.array(content, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="a.npy: no readable CAMs"):
        foreign_cams(tmp_path / "a.npy", [0])


class Malicious:
    def __init__(self, function, *flags):
        self.function, self.flags = function, flags

    def __reduce__(self):
        return self.function, self.flags


@pytest.mark.parametrize("function", [os.mkdir, eval, torch.load, np.load, shutil.rmtree])
def test_a_malicious_pickle_executes_nothing(function, data, tmp_path, capsys, monkeypatch):
    """Our scripts name the command that converts a pickle; that one names what it asks for."""
    monkeypatch.chdir(tmp_path)
    np.save("ours/a.npy", {0: Malicious(function, "executed")}, allow_pickle=True)
    flags = ["--data", data, "--split", "train", "--cams", "ours"]
    line = error_line(capsys, "foreign", *flags, "--out", "cams")
    assert re.search(f"its pickle asks for .*{function.__name__}, which is not executed", line)
    for script, more in (("make_pseudo", ["--out", "masks"]), ("eval", [])):
        line = error_line(capsys, script, *flags, "--background-score", 0.4, *more)
        assert "a.npy: no readable CAMs" in line and "prepare/foreign.py" in line
    assert not (tmp_path / "executed").exists() and not list(tmp_path.glob("cams/*.npy"))


INNER = io.BytesIO()  # a tensor's storage is a pickle within the pickle
torch.save(Malicious(os.mkdir, "executed"), INNER)


@pytest.mark.parametrize("content, why", {
    Malicious(torch.storage._load_from_bytes, INNER.getvalue()): "Weights only load failed",
    Malicious(np.ndarray, (1,), np.dtype("O"), b"8 bytes."): "not callable",  # as a pointer
    pickle.dumps({0: np.zeros(2, "i4,O")}): "values of type V",
    pickle.dumps({0: 1})[:-1] + b"\x85" * 6000 + b".": "more parts",  # nested
    b"\x80\x04}r\x00\xc2\xeb\x0b.": "more parts"}.items())  # a memo of 200 million places
def test_pickles_that_take_pointers_or_memory_are_refused(content, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("a.npy", "wb") as file:
        head = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, head)
        file.write(content if isinstance(content, bytes) else pickle.dumps({0: content}))
    with pytest.raises(InputError, match=f"a.npy: no readable CAMs .*{why}"):
        foreign_cams("a.npy", [0])
    assert not (tmp_path / "executed").exists()


def test_segments_of_every_format(data, tmp_path, capsys):
    """Packed run lengths, plain ones and booleans give one picture; small segments lie on top."""
    masks = np.zeros((3, *SIZE), bool)
    masks[0, 4:8, 3:16] = masks[1, 2:10, 1:12] = masks[2, 12:, ::2] = True
    expected = np.select(masks, [1, 2, 3])
    [(tmp_path / kind).mkdir() for kind in ("packed", "plain", "npz")]
    packed, plain = [], []
    for mask in masks:
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        packed.append({"segmentation": {**rle, "counts": rle["counts"].decode()}, "area": 1})
        ends = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=~mask[-1, -1]))
        plain.append({"segmentation": {**rle, "counts": np.diff(ends, prepend=0).tolist()}})
    for name in SHOWN:
        (tmp_path / f"packed/{name}.json").write_text(json.dumps(packed))
        (tmp_path / f"plain/{name}.json").write_text(json.dumps({"annotations": plain}))
        np.savez(tmp_path / f"npz/{name}.npz", masks)
    for kind in ("packed", "plain", "npz"):
        out = tmp_path / f"{kind} converted"
        call("foreign", "--data", data, "--segments", tmp_path / kind, "--out", out)
        for name in SHOWN:
            with Image.open(out / f"{name}.png") as picture:
                assert picture.mode in ("I;16", "I")  # so Pillow 10 calls 16 bits
                assert np.array_equal(np.array(picture), expected)
    pseudo_masks(data, tmp_path / "ours", tmp_path / "masks", "--segments", out)
    labels = np.array(Image.open(tmp_path / "masks/a.png"))
    assert all(len(set(labels[expected == segment])) == 1 for segment in (1, 2, 3))
    flags = ["--cams", tmp_path / "ours", "--out", tmp_path / "new", "--segments",
             tmp_path / "packed"]
    assert "prepare/foreign.py" in error_line(
        capsys, "make_pseudo", "--data", data, "--background-score", 0.4, *flags)


@pytest.mark.parametrize("content, why", [
    ("[{", "JSONDecode"), ([[60000, 60000], [3600000000]], "of size"),
    ([SIZE, [2**62] * 4 + [252]], "run lengths"), ([SIZE, [100, 100]], "run lengths"),
    ([SIZE, [-1, 253]], "run lengths"), ([SIZE, "o" * 30], ""), (MAP[None] > 0, "array of bool"),
    (np.zeros((2, *SIZE)), "array of float64"), (MAP, "more than 512 MB")])
def test_segments_that_do_not_fit_are_refused(content, why, data, tmp_path, capsys):
    path = tmp_path / "sam/a.npz"
    path.parent.mkdir()
    for name in SHOWN:
        np.savez(path.with_name(f"{name}.npz"), np.ones((1, *SIZE), bool))
    if isinstance(content, np.ndarray):
        np.savez(path, content)
    else:
        path.unlink()
        runs = json.dumps([{"segmentation": dict(zip(("size", "counts"), content))}])
        path.with_suffix(".json").write_text(content if content == "[{" else runs)
    if "512" in why:  # so says the archive's list of contents
        archive = path.read_bytes()
        at = archive.rindex(b"PK\x01\x02") + 24
        path.write_bytes(archive[:at] + (2**29 + 1).to_bytes(4, "little") + archive[at + 4:])
    line = error_line(capsys, "foreign", "--data", data, "--segments", path.parent,
                      "--out", tmp_path / "out")
    assert re.search(f"a.(json|npz): no readable segments .*{why}", line)
    assert not list(tmp_path.glob("out/*.png"))
