"""prepare/foreign.py: CAMs and segments of other programs become ours, and nothing is executed."""
import io
import json
import os
import pickle
import re

import coco
import foreign
import numpy as np
import pytest
import torch
from conftest import call, error_line, files_in
from foreign import foreign_cams
from PIL import Image

import make_pseudo
from common import InputError, Split, read_record

coco_mask = pytest.importorskip("pycocotools.mask")
pytestmark = pytest.mark.filterwarnings(  # pycocotools' own, with NumPy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
SHOWN = {"a": ["ant"], "b": ["bee", "cat"], "c": [], "d": ["ant", "bee", "cat"], "e": ["cat"]}
CLASSES, SIZE, MAP = ["ant", "bee", "cat"], (14, 18), np.zeros((3, 3))


def photos(root, classes, shown):
    """{name: its classes} -> a data set of grey photos, and a folder theirs/ beside it"""
    [(root / folder).mkdir() for folder in ("data", "theirs")]
    (root / "data/classes.txt").write_text("\n".join(classes))
    (root / "data/train.csv").write_text(
        "".join(f"{name}.png,{';'.join(names)}\n" for name, names in shown.items()))
    rng = np.random.default_rng(0)
    for name in shown:
        Image.fromarray(rng.integers(0, 256, SIZE, np.uint8)).save(root / f"data/{name}.png")
    return root / "data"


@pytest.fixture
def data(tmp_path):
    return photos(tmp_path, CLASSES, SHOWN)


@pytest.fixture
def flags(data, tmp_path):
    return ["--data", data, "--cams", tmp_path / "theirs", "--out", tmp_path / "cams"]


def save_pickled(path, content):
    np.save(path, np.array(content, dtype=object), allow_pickle=True)


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
def test_cams_of_other_programs(program, flags, data, tmp_path, capsys):
    """They become the maps that we would have written, float16."""
    split, rng = Split(data, "train"), np.random.default_rng(0)
    ours = {name: rng.random((len(shown), 4, 5)).astype(np.float16)
            for name, shown in SHOWN.items() if shown}
    for name, maps in ours.items():
        theirs = as_another_program(program, maps, split.present(name))
        save_pickled(tmp_path / f"theirs/{name}.npy", theirs)
    call("foreign", *flags)
    numbering = "from 1, background 0" if program == "AMN" else "from 0"
    assert f"classes are numbered {numbering}\n" in capsys.readouterr().out
    for name, maps in ours.items():
        found = np.load(tmp_path / f"cams/{name}.npy")
        assert found.dtype == np.float16 and np.array_equal(found, maps)


def write_dicts(folder, numbers):
    """{photo: numbers of the maps in its file}; a map's values are its number / 100"""
    for name, keys in numbers.items():
        save_pickled(folder / f"{name}.npy", {k: np.full((2, 2), k / 100) for k in keys})


@pytest.mark.parametrize("numbers, numbering", [
    ({name: [0, 1, 2] for name in "abde"}, "from 0"),  # all classes for every photo
    ({name: [0, 1, 2, 3] for name in "abde"}, "from 1, background 0"),
    ({"a": [0, 1], "b": [0, 2, 3], "d": [0, 1, 2, 3], "e": [0, 3]}, "from 1, background 0"),
    ({"a": [1], "b": [2, 3], "d": [1, 2, 3], "e": [3]}, "from 1, background 0"),
    ({"a": [0], "b": [1, 2], "d": [1, 2, 3], "e": [2]}, None),  # a mixture
    ({"a": [5], "b": [1, 2], "d": [0, 1, 2], "e": [2]}, None)])
def test_the_whole_list_decides_how_classes_are_numbered(numbers, numbering, flags, tmp_path,
                                                         capsys):
    """With maps of all classes, the photo that shows the first class alone would mislead."""
    write_dicts(tmp_path / "theirs", numbers)
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
    rows = {"a": [1], "b": [80, 90], "c": [18, 90]}
    data = photos(tmp_path, [f"c{i}" for i in known],
                  {name: [f"c{i}" for i in ids] for name, ids in rows.items()})
    write_dicts(tmp_path / "theirs", {name: keys(ids) for name, ids in rows.items()})
    call("foreign", "--data", data, "--cams", tmp_path / "theirs", "--out", tmp_path / "cams")
    assert numbering in capsys.readouterr().out
    found = np.load(tmp_path / "cams/b.npy")[:, 0, 0] * 100
    assert found.round().tolist() == [i - ("less" in numbering) for i in rows["b"]]


def test_new_cams_of_the_same_size_are_noticed(flags, data, tmp_path, capsys):
    numbers = {"a": [0], "b": [1, 2], "d": [0, 1, 2], "e": [2]}
    write_dicts(tmp_path / "theirs", numbers)
    call("foreign", *flags)
    before = files_in(tmp_path / "cams")
    (tmp_path / "cams/a.npy").unlink()
    (tmp_path / "cams/mine.npy").write_bytes(b"mine")
    call("foreign", *flags, "--resume")
    assert files_in(tmp_path / "cams") == before | {"mine.npy": b"mine"}
    size = (tmp_path / "theirs/e.npy").stat().st_size
    save_pickled(tmp_path / "theirs/e.npy", {2: np.full((2, 2), 0.5)})
    assert (tmp_path / "theirs/e.npy").stat().st_size == size
    assert "holds an earlier run made with files" in error_line(capsys, "foreign", *flags,
                                                                "--resume")
    assert files_in(tmp_path / "cams") == before | {"mine.npy": b"mine"}


def test_the_record_names_what_each_photo_shows(flags, data, tmp_path, capsys):
    """So make_pseudo.py refuses CAMs whose label was corrected since."""
    write_dicts(tmp_path / "theirs", {"a": [0], "b": [1, 2], "d": [0, 1, 2], "e": [2]})
    call("foreign", *flags)
    record = read_record(tmp_path / "cams")
    shown = {name: [CLASSES.index(x) for x in classes] for name, classes in SHOWN.items()}
    assert (record["script"], record["classes"], record["shown"]) == ("foreign.py", CLASSES, shown)
    masks = ["make_pseudo", "--data", data, "--cams", tmp_path / "cams", "--crf", "none", "--out"]
    call(*masks, tmp_path / "masks")
    lines = (data / "train.csv").read_text()
    (data / "train.csv").write_text(lines.replace("e.png,cat", "e.png,ant"))
    assert "other labels of e" in error_line(capsys, *masks, tmp_path / "other")


def test_maps_beyond_0_and_1_are_scaled(tmp_path):
    for values, expected in (([-2.0, 0, 6], [0, 0.25, 1]), ([0.5, 1.0005], [0.5, 1])):
        save_pickled(tmp_path / "a.npy", {3: np.array([values])})
        assert foreign_cams(tmp_path / "a.npy", [3])[0].tolist() == [expected]
    ranges = {3: np.array([[-2.0, 0, 6]]), 5: np.array([[0, 15, 20.0]])}  # each by its own
    save_pickled(tmp_path / "a.npy", ranges)
    assert foreign_cams(tmp_path / "a.npy", [5, 3])[:, 0].tolist() == [[0, 0.75, 1], [0, 0.25, 1]]


class Malicious:
    def __init__(self, function, *flags):
        self.function, self.flags = function, flags

    def __reduce__(self):
        return self.function, self.flags


INNER = io.BytesIO()  # a tensor's storage is a pickle within the pickle
torch.save(Malicious(os.mkdir, "executed"), INNER)


@pytest.mark.parametrize("content, why", [
    ({0: MAP[None]}, "shape"), ({0: 0.5}, ""), ({0: MAP * np.nan}, "not finite"), ({0: "map"}, ""),
    ({0: MAP[:0]}, "shape"), ([1, 2], ""), ({"keys": [0], "highres": 1}, ""),
    ({"keys": [0, 1], "cam": MAP[None]}, ""), ({0: MAP, 1: MAP[1:]}, "several sizes"),
    ({0: torch.zeros(1).expand(2**14, 2**14)}, "shape"),  # 1 GB out of 4 bytes
    ({0: Malicious(torch.storage._load_from_bytes, INNER.getvalue())}, "Weights only load failed"),
    ({0: Malicious(np.ndarray, (1,), np.dtype("O"), b"8 bytes.")}, "not callable"),  # as a pointer
    ({0: Malicious(os.mkdir, "executed")}, "asks for .*mkdir, which is not executed"),
    ({0: Malicious(pickle.loads, pickle.dumps(0))}, "asks for .*loads, which is not executed"),
    ({0: np.zeros((2, 2), "i4,O")}, "values of type V")])
def test_pickles_of_something_else_are_refused(content, why, tmp_path, monkeypatch):
    """And nothing that a pickle names is executed."""
    monkeypatch.chdir(tmp_path)
    save_pickled("a.npy", content)
    with pytest.raises(InputError, match=f"a.npy: (no readable CAMs|maps of).*{why}"):
        foreign_cams("a.npy", list(content)[:2])
    assert not (tmp_path / "executed").exists()


def test_segments_of_every_format(data, tmp_path, monkeypatch, capsys):
    """Packed run lengths, plain ones and booleans give one picture; small segments lie on top.
    None of them takes pycocotools. A log has a line for each tenth."""
    monkeypatch.setattr(coco, "coco_mask", None)
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
        maps = np.random.default_rng(0).random((len(SHOWN[name]), 4, 5))
        np.save(tmp_path / f"theirs/{name}", maps.astype(np.float16))
    for kind in ("packed", "plain", "npz"):
        out = tmp_path / f"{kind} converted"
        call("foreign", "--data", data, "--segments", tmp_path / kind, "--out", out)
        text = capsys.readouterr().out
        assert "converted: 1 of 5\n" in text and "converted: 5 of 5\n" in text
        assert f"{out}: 5 files, 5 of them new; next:\n    python make_pseudo.py" in text
        for name in SHOWN:
            with Image.open(out / f"{name}.png") as picture:
                assert picture.mode in ("I;16", "I")  # so Pillow 10 calls 16 bits
                assert np.array_equal(np.array(picture), expected)
    call("make_pseudo", "--data", data, "--cams", tmp_path / "theirs", "--segments", out,
         "--out", tmp_path / "masks", "--background-score", 0.4, "--crf", "none")
    labels = np.array(Image.open(tmp_path / "masks/a.png"))
    assert all(len(set(labels[expected == segment])) == 1 for segment in (1, 2, 3))


def test_more_segments_than_a_byte_can_number(tmp_path):
    """300 segments of one pixel, written and read again: 16 bits"""
    masks = np.eye(300, dtype=bool).reshape(300, 15, 20)
    np.savez(tmp_path / "a.npz", masks)
    found = foreign.read_segments(tmp_path, "a", (15, 20))
    assert found.ravel().tolist() == list(range(1, 301))
    Image.fromarray(found).save(tmp_path / "a.png")
    assert np.array_equal(make_pseudo.read_segments(tmp_path, "a", (15, 20)), found)


@pytest.mark.parametrize("content, why", [
    ("[{", "JSONDecode"), ([[60000, 60000], [3600000000]], "of size"),
    ([SIZE, [2**62] * 4 + [252]], "run lengths"), ([SIZE, [100, 100]], "run lengths"),
    ([SIZE, [-1, 253]], "run lengths"), ([SIZE, "o" * 30], "run lengths"),
    ([SIZE, "PPY41"], "run lengths"), ([SIZE, [252.0]], "run lengths"),
    (MAP[None] > 0, "array of bool"), (np.zeros((2, *SIZE)), "array of float64")])
def test_segments_that_do_not_fit_are_refused(content, why, data, tmp_path, capsys):
    for name in SHOWN:
        np.savez(tmp_path / f"theirs/{name}.npz", np.ones((1, *SIZE), bool))
    if isinstance(content, np.ndarray):
        np.savez(tmp_path / "theirs/a.npz", content)
    else:
        (tmp_path / "theirs/a.npz").unlink()
        runs = json.dumps([{"segmentation": dict(zip(("size", "counts"), content))}])
        (tmp_path / "theirs/a.json").write_text(content if content == "[{" else runs)
    line = error_line(capsys, "foreign", "--data", data, "--segments", tmp_path / "theirs",
                      "--out", tmp_path / "out")
    assert re.search(f"a.(json|npz): no readable segments .*{why}", line)
    assert not list(tmp_path.glob("out/*.png"))


# ---- CAMs for FMA-WSSS ---------------------------------------------------------------------------

def test_cams_for_fma_wsss(flags, data, tmp_path, capsys):
    """Maps of the shown classes at the photo's size, by their numbers; what is finished is kept."""
    write_dicts(tmp_path / "theirs", {"a": [0], "b": [1, 2], "d": [0, 1, 2], "e": [2]})
    call("foreign", *flags)
    maps = np.random.default_rng(0).random((2, 4, 5)).astype(np.float16)
    np.save(tmp_path / "cams/b.npy", maps)
    command = ["fma", "--data", data, "--cams", tmp_path / "cams", "--out", tmp_path / "fma"]
    capsys.readouterr()
    call(*command)
    text = capsys.readouterr().out
    assert "converted: 4 of 4\n" in text and "fma: 4 files; docs/data.md says" in text
    before = files_in(tmp_path / "fma")
    assert before.keys() == {"made_of.json", "a.npz", "b.npz", "d.npz", "e.npz"}
    for name, classes in (("a", [0]), ("b", [1, 2]), ("d", [0, 1, 2]), ("e", [2])):
        with np.load(tmp_path / f"fma/{name}.npz") as file:
            cam, numbers = file["cam"], file["fg_cls"]
        assert numbers.tolist() == classes and numbers.dtype == np.int64
        assert cam.dtype == np.float32 and cam.shape == (len(classes), *SIZE)
        assert cam.min() >= 0 and cam.max() <= 1
        if name == "b":
            expected = [Image.fromarray(each.astype(np.float32)).resize(SIZE[::-1], Image.BILINEAR)
                        for each in maps]
            assert np.array_equal(cam, np.stack([np.array(each) for each in expected]))
        else:
            assert abs(cam - np.array(classes)[:, None, None] / 100).max() < 1e-4
    assert "add --resume" in error_line(capsys, *command)
    (tmp_path / "fma/b.npz").unlink()
    for name in ("a.npz", "mine.npz"):
        (tmp_path / "fma" / name).write_bytes(b"mine")
    call(*command, "--resume")
    assert files_in(tmp_path / "fma") == before | {"a.npz": b"mine", "mine.npz": b"mine"}
    lines = (data / "train.csv").read_text()
    (data / "train.csv").write_text(lines.replace("e.png,cat", "e.png,ant"))
    line = error_line(capsys, *command[:-1], tmp_path / "other")
    assert "other labels of e" in line and not (tmp_path / "other").exists()
