"""The data sets: three layouts, COCO's outlines against pycocotools, photos as they come, downloads from a local server."""
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO as PyCOCO
from test_clip import server, sha256  # noqa: F401
from test_scripts import REAL, call, files_in

import train_cam
from clip_model import InputError, read_image
from eval import decode_runs, draw_objects, draw_outline, draw_polygon, read_truth, unpack_runs
from make_pseudo import read_labels, write_labels
from train_cam import Data

needs_photos = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def ends_with(code, script, *flags):
    with pytest.raises(SystemExit) as end:
        call(script, *flags)
    assert end.value.code == code


# ------------------------------------------------------------------------------------------ VOC

def voc_root(root, classes=None, **lists):
    """A VOC root of names alone; read_names and the counts look at nothing else."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, names in lists.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    if classes:
        (root / "classes.txt").write_text("\n".join(classes))
    return root


def numbered(start, stop):
    return [f"{i:06d}" for i in range(start, stop)]


OFFICIAL = {"train": 1464, "val": 1449, "trainval": 2913, "test": 1456, "train_aug": 10582}


@pytest.mark.parametrize("split, count", OFFICIAL.items())
def test_official_counts_of_voc(split, count, tmp_path):
    """The official count passes, a wrong VOC stops, a small subset passes with a note, another data set is nobody's business."""
    assert len(Data(voc_root(tmp_path / "right", **{split: numbered(0, count)}), split).names) == count
    for wrong in (count - 1, count + 1):
        with pytest.raises(InputError, match=f"{split}.txt: {wrong:,} images.*expected {count:,}; a list of your own"):
            Data(voc_root(tmp_path / str(wrong), **{split: numbered(0, wrong)}), split)
    small = Data(voc_root(tmp_path / "small", **{split: numbered(0, 97)}), split)
    assert len(small.names) == 97 and f"the official {split} has {count:,}" in small.note
    other = Data(voc_root(tmp_path / "other", ["cat"], **{split: numbered(0, count + 1)}), split)
    assert len(other.names) == count + 1 and "official" not in other.note


def test_train_aug_from_the_files_present(tmp_path):
    root = voc_root(tmp_path, val=numbered(500, 500 + 1449))
    (root / "SegmentationClassAug").mkdir()
    *most, last = (root / f"SegmentationClassAug/{name}.png" for name in numbered(0, 12031))
    for path in most:
        os.close(os.open(path, os.O_CREAT))  # empty: only its name is looked at
    with pytest.raises(InputError, match="10,581 images.*12,031 PNGs.*unpack SegmentationClassAug again"):
        Data(root, "train_aug")
    last.touch()
    assert Data(root, "train_aug").names == [*numbered(0, 500), *numbered(1949, 12031)]


def test_train_aug_lists_of_others(tmp_path):
    """DeepLab's list holds paths; the list of all 12,031 is named; neither list nor folder is one line."""
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in numbered(0, 10582)]
    assert Data(voc_root(tmp_path / "a", train_aug=lines), "train_aug").names == numbered(0, 10582)
    with pytest.raises(InputError, match="12,031 is the full SBD folder"):
        Data(voc_root(tmp_path / "b", train_aug=numbered(0, 12031)), "train_aug")
    with pytest.raises(InputError, match="train_aug.txt: no such list"):
        Data(voc_root(tmp_path / "c", train=["a"]), "train_aug")
    with pytest.raises(InputError, match="train.txt: a is there twice"):
        Data(voc_root(tmp_path / "d", train=["a", "b", "a"]), "train")


def test_voc_labels_difficult_and_the_test_split(tmp_path):
    root = voc_root(tmp_path, train=["a"], test=["t"])
    (root / "ImageSets/Segmentation/dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb c\r\n")  # a byte order mark, Windows' line ends
    assert Data(root, "dos").names == ["a", "b c"]
    (root / "Annotations").mkdir()
    (root / "Annotations/a.xml").write_text("<annotation><object><name>cat</name><difficult>1</difficult></object></annotation>")
    data = Data(root, "train")
    assert [data.classes[k] for k in np.flatnonzero(data.labels("a"))] == ["cat"]
    with pytest.raises(InputError, match="t.xml: VOC's test images come without labels.*predict"):
        Data(root, "test").labels("t")
    with pytest.raises(InputError, match="t.png: no such mask.*--voc-server"):
        read_truth(Data(root, "test"), "t", (2, 3))


def test_sbd_masks_serve_where_voc_has_none(tmp_path):
    root = voc_root(tmp_path, train=["a", "b"])
    write_labels(root / "SegmentationClass/a.png", np.full((2, 3), 1, np.uint8))
    for name in "ab":
        write_labels(root / f"SegmentationClassAug/{name}.png", np.full((2, 3), 2, np.uint8))
    data = Data(root, "train")
    assert [read_truth(data, name, (2, 3))[0, 0] for name in "ab"] == [1, 2]


@pytest.mark.parametrize("text", ["", "VOCdevkit"])
def test_no_data_set_at_all(text, tmp_path):
    with pytest.raises(InputError, match="no folder JPEGImages in it, no annotations/instances.*no labels.csv.*pass --data"):
        Data(tmp_path / text, "train")


# ------------------------------------------------------------------------------------------ COCO

IDS = [1, 2, 13, 44, 90]  # of five classes: with gaps, as COCO's
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


def coco_root(root, annotations, images=4, size=(8, 10), split="train"):
    """annotations: (image, category, crowd, segmentation). Photos are grey; image 2 has a colour per image number."""
    whole = {"images": [{"id": 7 * i, "file_name": f"COCO_{i}.jpg", "height": size[0], "width": size[1]} for i in range(images)],
             "categories": [{"id": i, "name": f"class {i}"} for i in reversed(IDS)],
             "annotations": [{"id": n, "image_id": 7 * i, "category_id": c, "iscrowd": crowd, "segmentation": outline}
                             for n, (i, c, crowd, outline) in enumerate(annotations)]}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{split}2014").mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(whole))
    for i in range(images):
        Image.new("RGB", size[::-1], (90, 90, 90)).save(root / f"{split}2014/COCO_{i}.jpg")
    return root


def test_coco_labels(tmp_path):
    """Contiguous classes in the order of their ids, images without objects left out, crowds count, objects in any order."""
    root = coco_root(tmp_path, [(3, 90, 1, SQUARE), (0, 13, 0, SQUARE), (3, 1, 0, SQUARE), (0, 13, 0, SQUARE)])
    for split in ("train", "train2014"):
        data = Data(root, split)
        assert data.names == ["COCO_0", "COCO_3"] and data.classes == data.words == [f"class {i}" for i in IDS]
        assert [np.flatnonzero(data.labels(name)).tolist() for name in data.names] == [[2], [0, 4]]
        assert data.image("COCO_3").size == (10, 8)
        assert data.objects("COCO_3") == ((8, 10), [(4, True, SQUARE), (0, False, SQUARE)])
    assert type(data.classes[0]) is str  # numpy's strings cannot be read back from a checkpoint
    with pytest.raises(InputError, match="no instances_val2014.json"):
        Data(root, "val")


def test_coco_json_is_read_once(tmp_path, monkeypatch):
    root = coco_root(tmp_path, [(1, 1, 0, SQUARE)])
    path, cache = root / "annotations/instances_train2014.json", root / "annotations/instances_train2014.npz"
    parsed, parse = [], train_cam.parse_coco
    monkeypatch.setattr(train_cam, "parse_coco", lambda path: parsed.append(path) or parse(path))

    def look():
        data = Data(root, "train")
        return data.names, data.objects(data.names[0])[1]
    first = look()
    assert look() == first and len(parsed) == 1
    assert {p.name for p in path.parent.iterdir()} == {path.name, cache.name}  # nothing temporary
    for damage in (lambda b: b[:-100], lambda b: b"", lambda b: b"no archive", lambda b: b[:200] + b"\0" * 50 + b[250:]):
        cache.write_bytes(damage(cache.read_bytes()))
        count = len(parsed)
        assert look() == first and len(parsed) == count + 1  # a broken cache is made again ...
        assert look() == first and len(parsed) == count + 1  # ... once
    os.utime(path, ns=(1, 1))
    assert look() == first and len(parsed) == 6  # another time: perhaps another file
    coco_root(tmp_path, [(2, 1, 0, SQUARE)])
    assert look()[0] == ["COCO_2"]
    path.unlink()
    with pytest.raises(InputError, match="no folder JPEGImages"):
        Data(root, "train")


def test_cache_in_the_users_folder_where_the_data_cannot_be_written(tmp_path, monkeypatch):
    root, write = coco_root(tmp_path, [(1, 1, 0, SQUARE)]), train_cam.write_file
    refused = [root]

    def read_only(path, how):
        if any(folder in Path(path).parents for folder in refused):
            raise InputError(f"{path}: read-only")
        write(path, how)
    monkeypatch.setattr(train_cam, "write_file", read_only)
    Data(root, "train")
    cache, = (Path.home() / ".cache/semples").iterdir()
    assert cache.name.startswith("instances_train2014-") and not list(root.rglob("*.npz"))
    with monkeypatch.context() as patch:
        patch.setattr(train_cam, "parse_coco", None)
        assert Data(root, "train").names == ["COCO_1"]
    cache.unlink()
    refused.append(Path.home())
    assert Data(root, "train").names == ["COCO_1"] and not cache.exists()  # no place at all: it is read every time


@pytest.mark.parametrize("text, says", [
    ("", "JSONDecodeError"), ("[]", "TypeError"), ('{"images": []}', "KeyError"), ('{"images": [', "JSONDecodeError"),
    ('{"images": [], "categories": [], "annotations": [{"id": 1, "image_id": 3, "category_id": 1}]}', "KeyError"),
    ('{"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}', "empty")])
def test_broken_json_is_one_line(text, says, tmp_path):
    root = coco_root(tmp_path, [])
    (root / "annotations/instances_train2014.json").write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        Data(root, "train")
    assert "instances_train2014.json" in str(caught.value) and "\n" not in str(caught.value)


def test_official_counts_of_coco(tmp_path):
    objects = [(i, 1, 0, None) for i in range(1001)]
    (root := tmp_path).joinpath("annotations").mkdir()
    whole = {"images": [{"id": i, "file_name": f"{i}.jpg", "height": 1, "width": 1} for i in range(1001)],
             "categories": [{"id": 1, "name": "a"}],
             "annotations": [{"image_id": i, "category_id": c, "segmentation": s} for i, c, _, s in objects]}
    for name in ("val2014", "mine"):
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="1,001 images.*expected 40,137"):
        Data(root, "val")
    assert len(Data(root, "mine").names) == 1001


@needs_photos
def test_no_outline_is_needed_before_eval(toy, tmp_path, capsys):
    """coco_mini without its segmentations: labels, classification and export run; eval.py says what is missing."""
    root = coco_mini(tmp_path / "coco", 2, keep_outlines=False)
    flags = ["--data", root, "--split", "train"]
    call("train_cam", *flags, "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", tmp_path / "cam", *TINY,
         "--scales", 0.2)
    call("make_pseudo", *flags, "--cams", tmp_path / "cam/cams", "--out", tmp_path / "masks", "--crf", "none", "--device", "cpu")
    assert len(files_in(tmp_path / "masks")) == 2
    capsys.readouterr()
    ends_with(2, "eval", *flags, "--pred", tmp_path / "masks", "--device", "cpu")
    assert "without a readable outline" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ COCO's outlines

def theirs(outline, size):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outline, *size))).astype(bool)


numbers = st.one_of(st.integers(-3, 33), st.integers(-30, 330).map(lambda n: n / 10), st.floats(-3, 33, width=32),
                    st.integers(-300, 3300).map(lambda n: n / 100))
points = st.lists(st.tuples(numbers, numbers), min_size=3, max_size=12)


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(points, min_size=1, max_size=3), H=st.integers(1, 30), W=st.integers(1, 30), repeat=st.booleans(),
       inside=st.booleans())
def test_polygons_equal_pycocotools(parts, H, W, repeat, inside):
    """Every pixel: parts, self-crossings, points twice, on the border and beyond it, in fractions of a pixel."""
    if repeat:
        parts = [[part[0], *part, part[-1]] for part in parts]
    if inside:
        parts = [[(min(max(x, 0), W), min(max(y, 0), H)) for x, y in part] for part in parts]
    outline = [[float(number) for point in part for number in point] for part in parts]
    np.testing.assert_array_equal(draw_outline(outline, (H, W)), theirs(outline, (H, W)))


@pytest.mark.parametrize("polygon, pixels", [
    ([1, 1, 5, 1, 5, 5, 1, 5], 16), ([0, 0, 10, 0, 10, 8, 0, 8], 80), ([-9, -9, 99, -9, 99, 99, -9, 99], 80),
    ([2, 2, 2, 2, 2, 2], 0), ([1, 1, 6, 1, 3, 1], 0), ([3, 0, 3, 8, 3, 4], 0), ([50, 50, 60, 50, 60, 60], 0)])
def test_polygons_by_hand(polygon, pixels):
    mask = draw_polygon(polygon, (8, 10))
    assert mask.shape == (8, 10) and mask.sum() == pixels
    assert np.array_equal(mask, theirs([[float(number) for number in polygon]], (8, 10)))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_run_lengths_equal_pycocotools(data):
    H, W = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    mask = (rng.random((H, W)) < data.draw(st.sampled_from([0, 0.02, 0.5, 1])))
    if data.draw(st.booleans()):
        mask = np.kron(mask, np.ones((25, 25))).astype(bool)  # long runs
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    counts = unpack_runs(packed)
    assert np.array_equal(decode_runs(counts, mask.shape), mask)
    for form in (packed, counts):
        assert np.array_equal(draw_outline({"size": list(mask.shape), "counts": form}, mask.shape), mask)
    with pytest.raises(ValueError, match="runs of"):
        decode_runs([*counts, 1], mask.shape)


def test_the_smaller_object_wins_and_crowds_lie_below():
    everything, half, dot = [[0, 0, 4, 0, 4, 4, 0, 4]], [[0, 0, 2, 0, 2, 4, 0, 4]], [[0, 0, 1, 0, 1, 1, 0, 1]]
    objects = [(0, False, dot), (4, True, everything), (2, False, half)]
    for order in (objects, objects[::-1]):
        assert draw_objects((4, 4), order, (4, 4), "").tolist() == [[1, 3, 255, 255], *[[3, 3, 255, 255]] * 3]
    small_crowd = [(0, False, everything), (4, True, dot)]
    assert (draw_objects((4, 4), small_crowd, (4, 4), "") == 1).all()
    assert (draw_objects((4, 4), [(0, False, [])], (4, 4), "") == 0).all()


@pytest.mark.parametrize("outline", [None, "text", {}, {"counts": [3]}, {"counts": "~~~"}, [[1, 2, 3]], [["a", "b"]], [None],
                                     {"counts": [16], "size": [2, 8]}, [[0, 0, 1e9, 0, 1, 1]], [[0, 0, float("nan"), 0, 1, 1]]])
def test_what_is_no_outline(outline):
    with pytest.raises(InputError, match="the file: an object without a readable outline"):
        draw_objects((4, 4), [(0, False, outline)], (4, 4), "the file")
    with pytest.raises(InputError, match="4x4 .*its photo is 4x5"):
        draw_objects((4, 4), [], (4, 5), "the file")


def test_masks_with_91_ids_are_named(tmp_path):
    write_labels(tmp_path / "a.png", np.array([[0, 90, 255]], np.uint8))
    with pytest.raises(InputError, match="label 90.*COCO's 91 category ids"):
        read_labels(tmp_path / "a.png", (1, 3), 81)
    with pytest.raises(InputError, match="label 90.*another class list"):
        read_labels(tmp_path / "a.png", (1, 3), 21)


@pytest.mark.weights
@needs_photos
def test_real_outlines_equal_pycocotools(tmp_path):
    """Every object and every mask of coco_mini: all pixels."""
    root = coco_mini(tmp_path / "coco", None)
    for split in ("train", "val"):
        data, api = Data(root, split), PyCOCO(str(root / f"annotations/instances_{split}2014.json"))
        number = {c: 1 + k for k, c in enumerate(sorted(api.cats))}
        for image in (api.imgs[i] for i in api.getImgIds() if api.getAnnIds(i)):
            size, objects = data.objects(Path(image["file_name"]).stem)
            found = api.loadAnns(api.getAnnIds(image["id"]))
            masks = [api.annToMask(entry).astype(bool) for entry in found]
            assert all(np.array_equal(draw_outline(outline, size), mask) for (_, _, outline), mask in zip(objects, masks))
            truth = np.zeros(size, np.uint8)
            for mask, entry in sorted(zip(masks, found), key=lambda pair: -pair[0].sum()):
                truth[mask] = number[entry["category_id"]]
            assert np.array_equal(read_truth(data, Path(image["file_name"]).stem, size), truth)


# ------------------------------------------------------------------------------------------ own photos

def photos_root(root, table, files=("a.jpg", "b.JPG", "c.PNG"), classes="cat\ndog: puppy\n", **lists):
    (root / "images").mkdir(parents=True)
    for file in files:
        Image.new("RGB", (12, 8), (10, 200, 30)).save(root / "images" / file)
    (root / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    (root / "classes.txt").write_text(classes)
    for split, text in lists.items():
        (root / f"{split}.txt").write_text(text)
    return root


@pytest.mark.parametrize("table", [
    "a.jpg,cat\nb.JPG,cat;dog\nc.PNG,\n", "file,classes\na.jpg,cat\nb.JPG,dog;cat\nc.PNG\n", "a,cat\nb,cat,dog\nc\n",
    "a.jpg;cat\r\nb.JPG;cat;dog\r\nc.PNG;\r\n", ' "a.jpg" , "cat"\n"b.JPG","cat; dog"\n\nc.PNG,\n',
    "b.JPG,cat\nb.JPG,dog\na.jpg,cat\nc.PNG,\n",
    "\ufeffa.jpg,cat\nb.JPG,cat ; dog\nc.PNG, ,\n", "file\tclasses\na.jpg\tcat\nb.JPG\tcat\tdog\nc.PNG\t\n",
    '"a.jpg";"cat"\n"b.JPG";"cat";"dog"\n"c.PNG"\n'])
def test_tables_of_labels_as_people_write_them(table, tmp_path):
    data = Data(photos_root(tmp_path, table), "train")
    assert data.names == ["a", "b", "c"] and data.classes == ["cat", "dog"] and data.words == ["cat", "puppy"]
    assert [data.labels(name).tolist() for name in data.names] == [[True, False], [True, True], [False, False]]
    assert data.photo_path("b").name == "b.JPG" and data.image("c").size == (12, 8)


@pytest.mark.parametrize("change, says", [
    (dict(table="a.jpg,unicorn\n"), "labels.csv, line 1: class 'unicorn'.*classes.txt"),
    (dict(table="a.jpg,cat\nz.jpg,cat\n"), "labels.csv, line 2: no photo 'z.jpg'"),
    (dict(table="a.jpg,cat\n"), "no row for b.JPG"), (dict(table=b"\xff\xfe\x00a"), "labels.csv: not readable"),
    (dict(table="", files=["a.jpg", "a.png"]), "a.png: a.jpg has the same name before the dot"),
    (dict(table="", files=[]), "images: the list is empty"), (dict(table="", classes=""), "classes.txt: no class"),
    (dict(table="", val="z.jpg\n"), "val.txt: no photo 'z.jpg'"), (dict(table="", val="a.jpg\na\n"), "val.txt: a is there twice"),
    (dict(table="", train="a.jpg\nb.JPG\nc.PNG\n", val=""), "val.txt: the list is empty")],
    ids=["class", "photo", "row", "encoding", "stem", "empty", "classes", "val", "twice", "empty val"])
def test_mistakes_in_a_folder_of_photos(change, says, tmp_path):
    root = photos_root(tmp_path, **change)
    with pytest.raises(InputError, match=says) as caught:
        Data(root, "val" if "val" in change else "train").describe()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, says", [
    ("cat\r\ndog: puppy\r\n", None), ("\ufeffcat:\r\n\r\n dog :puppy", None),
    ("caté".encode("latin-1"), "not readable.*save it as UTF-8"),
    ("cat".encode("utf-16"), "not readable.*save it as UTF-8"), ("\n\n", "no class"), ("cat\ncat: lion", "a class twice"),
    ("cat\n: puppy", "a line without a name"), ("background\ncat\ndog", "background, which is label 0 anyway"),
    ("\n".join(["cat", *map(str, range(254))]), "255 classes; expected at most 254")],
    ids=["Windows", "mark", "Latin-1", "UTF-16", "none", "twice", "nameless", "background", "many"])
def test_lists_of_classes_as_people_write_them(text, says, tmp_path):
    root = photos_root(tmp_path, "a.jpg,cat\n", ["a.jpg"])
    (root / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    if says:
        with pytest.raises(InputError, match=says):
            Data(root, "train")
    else:
        data = Data(root, "train")
        assert data.classes == ["cat", "dog"] and data.words == ["cat", "puppy"]


def test_photos_held_out(tmp_path):
    root = photos_root(tmp_path / "a", "a.jpg,cat\n", val="b.JPG\n")
    assert Data(root, "train").names == ["a", "c"] and Data(root, "val").names == ["b"]
    with pytest.raises(InputError, match="val.txt: no such list"):
        Data(photos_root(tmp_path / "b", ""), "val")
    (tmp_path / "a/classes.txt").unlink()
    with pytest.raises(InputError, match="classes.txt: no such file"):
        Data(root, "train")


def test_accents_in_either_spelling(tmp_path):
    """macOS stores é as e and an accent; a table typed elsewhere has one letter."""
    root = photos_root(tmp_path, "été à la mer.jpg,cat\n", files=[unicodedata.normalize("NFD", "été à la mer.jpg")])
    data = Data(root, "train")
    assert data.labels(data.names[0]).tolist() == [True, False] and data.image(data.names[0]).size == (12, 8)


# ------------------------------------------------------------------------------------------ photos as they come

RAMP = np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(RAMP).convert("RGB").save(path, exif=exif)


def cut_off(path):
    Image.fromarray(RAMP).convert("RGB").resize((400, 300)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


GOOD = {  # file: (how it is made, its width and height)
    "cmyk.jpg": (lambda p: Image.fromarray(RAMP).convert("CMYK").save(p), (40, 30)),
    "grey.jpg": (lambda p: Image.fromarray(RAMP).save(p), (40, 30)),
    "palette.png": (lambda p: Image.fromarray(RAMP).convert("P").save(p), (40, 30)),
    "see through.gif": (lambda p: Image.fromarray(RAMP).convert("P").save(p, transparency=3), (40, 30)),
    "rgba.png": (lambda p: Image.fromarray(RAMP).convert("RGBA").save(p), (40, 30)),
    "one bit.png": (lambda p: Image.fromarray(RAMP).convert("1").save(p), (40, 30)),
    "16 bit.png": (lambda p: Image.fromarray(RAMP.astype(np.uint16) * 257).save(p), (40, 30)),
    "16 bit.large.tiff": (lambda p: Image.fromarray(RAMP.astype(np.uint16) * 257).save(p), (40, 30)),
    "rotated.jpg": (rotated, (30, 40)),
    "one pixel.png": (lambda p: Image.new("RGB", (1, 1), (200, 0, 0)).save(p), (1, 1)),
    "long.jpg": (lambda p: Image.fromarray(RAMP).convert("RGB").resize((9000, 50)).save(p), (9000, 50)),
    "été à la plage 海.JPEG": (lambda p: Image.fromarray(RAMP).convert("RGB").save(p), (40, 30)),
}
BAD = {"truncated.jpg": cut_off, "nothing.jpg": lambda p: p.write_bytes(b""), "text.jpg": lambda p: p.write_text("not a photo"),
       "floats.tiff": lambda p: Image.fromarray(RAMP / np.float32(255)).save(p)}


def test_16_bits_are_scaled_and_exif_is_obeyed(tmp_path):
    for file in ("16 bit.png", "16 bit.large.tiff", "grey.jpg"):
        GOOD[file][0](tmp_path / file)
        error = np.abs(np.asarray(read_image(tmp_path / file))[..., 0].astype(int) - RAMP).max()
        assert error <= (8 if file == "grey.jpg" else 1), file
    rotated(tmp_path / "r.jpg")
    upright, stored = read_image(tmp_path / "r.jpg"), read_image(tmp_path / "r.jpg", upright=False)
    assert upright.size == (30, 40) and stored.size == (40, 30)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(stored), -1))
    root = voc_root(tmp_path / "voc", train=["r"])
    shutil.copy(tmp_path / "r.jpg", root / "JPEGImages/r.jpg")
    assert Data(root, "train").image("r").size == (40, 30)  # boxes and masks of VOC refer to the stored pixels


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(GOOD)), cut=st.floats(0, 1), where=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_photo_is_read_or_named(kind, cut, where, value):
    if kind == "long.jpg":
        kind = "rotated.jpg"
    path = Path(os.environ["HOME"]) / kind
    GOOD[kind][0](path)
    data = bytearray(path.read_bytes())
    data[where % len(data)] = value
    path.write_bytes(data[:round(len(data) * cut) if cut < 0.7 else len(data)])
    try:
        assert read_image(path).mode == "RGB"
    except InputError as error:
        assert kind in str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def album(toy, tmp_path_factory):
    """Own photos of every odd kind, good and bad ones, the classes of the toy world."""
    root = tmp_path_factory.mktemp("album")
    (root / "images").mkdir()
    for i, (file, make) in enumerate({**{file: make for file, (make, _) in GOOD.items()}, **BAD}.items()):
        make(root / "images" / file)
        with open(root / "labels.csv", "a", encoding="utf-8", newline="") as table:
            csv.writer(table).writerow([file, ["boat", "train;bird", ""][i % 3]])
    shutil.copy(toy / "VOC2012/classes.txt", root)
    return root


def test_the_chain_with_odd_photos(album, toy, tmp_path, capsys):
    """--skip-bad: every good photo goes through, masks have its size as shown; every bad one is listed; exit code 3."""
    bad = {Path(file).stem for file in BAD}
    for file, (_, size) in GOOD.items():
        write_labels(tmp_path / f"truth/{Path(file).stem}.png", np.zeros(size[::-1], np.uint8))
    root = shutil.copytree(album, tmp_path / "album")
    shutil.copytree(tmp_path / "truth", root / "masks")

    def run(script, *flags):
        ends_with(3, script, "--data", root, "--split", "train", "--skip-bad", "--device", "cpu", *flags)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == f"done, but {len(BAD)} left out:" and len(lines) == 1 + len(BAD)
        assert all(any(f"{stem}." in line for line in lines[1:]) for stem in bad)
    run("train_cam", "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", tmp_path / "cam", *TINY, "--scales", 1)
    run("make_pseudo", "--cams", tmp_path / "cam/cams", "--out", tmp_path / "masks")
    run("train_seg", "--labels", tmp_path / "masks", "--vit", toy / "vit.pth", "--out", tmp_path / "seg", "--epochs", 1,
        "--crop", 32, "--batch", 4, "--workers", 0)
    run("eval", "--checkpoint", tmp_path / "seg/seg.pt", "--no-flip", "--save", tmp_path / "saved", "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["images"] == len(GOOD)
    for folder in ("masks", "saved"):
        assert files_in(tmp_path / folder).keys() == {f"{Path(file).stem}.png" for file in GOOD}
        for file, (_, size) in GOOD.items():
            with Image.open(tmp_path / folder / f"{Path(file).stem}.png") as picture:
                assert picture.size == size, file


@pytest.mark.parametrize("file", BAD)
def test_one_bad_photo_is_one_line(file, album, toy, tmp_path, capsys):
    root = photos_root(tmp_path / "root", f"a.jpg,boat\n{file},boat\n", files=["a.jpg"], classes="boat\n")
    shutil.copy(album / "images" / file, root / "images")
    flags = ["--data", root, "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", tmp_path / "cam", *TINY]
    ends_with(2, "train_cam", *flags, *(["--workers", 1] if file == "text.jpg" else []))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.match(rf"error: .*{file}: not a readable image", lines[0])
    (root / "images/a.jpg").write_bytes(b"")
    ends_with(2, "train_cam", *flags, "--skip-bad")
    assert "--skip-bad left no image of split train" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ --fetch

def archive(members):
    """A tar file of {path: bytes}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, data in members.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def mirror(server, monkeypatch):  # noqa: F811
    """What --fetch asks for, from a server here; the digests are those of server.payload."""
    def serve(payload):
        server.payload, digest = payload, sha256(payload)
        base = server.url.removesuffix("weights.pt")
        monkeypatch.setattr(train_cam, "OPENAI", base)
        monkeypatch.setitem(train_cam.MODELS, "ViT-B/32", f"{digest}/ViT-B-32.pt")
        monkeypatch.setattr(train_cam, "DEIT", f"{base}deit_small_patch16_224-{digest[:8]}.pth")
        monkeypatch.setattr(train_cam, "VOC_ARCHIVE", {"url": f"{base}voc.tar", "filename": "voc.tar", "base_dir":
                                                       "VOCdevkit/VOC2012", "md5": hashlib.md5(payload).hexdigest()})
        return server
    return serve


def fetch(root, *what):
    train_cam.main(train_cam.parse_args(["--fetch", *what, "--root", str(root)]))


def test_official_sources():
    """What is not ours to choose: whoever changes these knows what they do."""
    assert train_cam.VOC_ARCHIVE["md5"] == "6cd6e144f989b92b3379bac3b3de84fd"
    assert train_cam.VOC_ARCHIVE["base_dir"] == "VOCdevkit/VOC2012" and train_cam.DEIT[-12:] == "cd65a155.pth"


def test_fetch_weights(mirror, tmp_path, capsys):
    web = mirror(b"weights" * 9000)
    for _ in range(2):
        fetch(tmp_path / "data", "clip", "deit")
    clip, deit = tmp_path / "data/ViT-B-32.pt", tmp_path / "data" / train_cam.DEIT.split("/")[-1]
    assert clip.read_bytes() == deit.read_bytes() == web.payload and web.log == [None, None]  # each once
    assert capsys.readouterr().out.splitlines() == [f"--clip {clip}", f"--vit {deit}"] * 2


def test_fetch_voc_goes_on_after_a_cut_and_unpacks(mirror, tmp_path, capsys):
    web = mirror(archive({"VOCdevkit/VOC2012/JPEGImages/a.jpg": b"photo" * 9000, "VOCdevkit/VOC2012/ImageSets/x": b"x"}))
    web.cut = 20_000
    with pytest.raises(InputError, match="broke off after 20000.*run again.*voc.tar"):
        fetch(tmp_path, "voc")
    assert [path.name for path in tmp_path.iterdir()] == ["voc.tar.part"]
    web.cut = None
    for _ in range(2):
        fetch(tmp_path, "voc")
    assert web.log == [None, "bytes=20000-"]
    voc = tmp_path / "VOCdevkit/VOC2012"
    assert (voc / "JPEGImages/a.jpg").read_bytes() == b"photo" * 9000 and f"--data {voc}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"voc.tar", "VOCdevkit"}  # and no half-unpacked folder


@pytest.mark.parametrize("payload, says", [
    (b"this is no tar file" * 99, "cannot be unpacked"), (archive({"other/a.jpg": b"x"}), "cannot be unpacked"),
    (archive({"VOCdevkit/VOC2012/../../../evil": b"x"}), "cannot be unpacked.*outside"),
    (archive({"VOCdevkit/VOC2012/a.jpg": b"x" * 9000})[:5000], "cannot be unpacked")], ids=["text", "other", "evil", "cut"])
def test_archives_that_are_none(payload, says, mirror, tmp_path):
    mirror(payload)
    with pytest.raises(InputError, match=says):
        fetch(tmp_path / "data", "voc")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["voc.tar"] and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("what, file", [("voc", "voc.tar"), ("clip", "ViT-B-32.pt"), ("deit", "deit_small.*pth")])
def test_wrong_digest_and_no_source(what, file, mirror, tmp_path):
    web = mirror(b"right" * 999)
    web.payload = b"wrong" * 999
    with pytest.raises(InputError, match="expected .*nothing was kept"):
        fetch(tmp_path, what)
    assert not list(tmp_path.iterdir())
    web.shutdown()
    web.server_close()
    with pytest.raises(InputError, match=f"cannot download http.*by hand and save it as {tmp_path}/{file}"):
        fetch(tmp_path, what)


def test_fetch_needs_no_other_flag(capsys):
    assert train_cam.parse_args(["--fetch", "voc"]).root == "data"
    with pytest.raises(SystemExit):
        train_cam.parse_args(["--root", "data"])
    assert "--data" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ real photos in three layouts

def coco_mini(root, count, keep_outlines=True):
    """A copy of coco_mini's annotations beside links to its photos; count: of images with objects; None: all."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2014").symlink_to(REAL / f"coco_mini/{split}2014")
        whole = json.loads((REAL / f"coco_mini/annotations/instances_{split}2014.json").read_text())
        shown = {entry["image_id"] for entry in whole["annotations"]}
        if count:
            whole["images"] = [image for image in whole["images"] if image["id"] in shown][:count]
        kept = {image["id"] for image in whole["images"]}
        whole["annotations"] = [entry for entry in whole["annotations"] if entry["image_id"] in kept]
        for entry in whole["annotations"] if not keep_outlines else ():
            del entry["segmentation"]
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(whole))
    return root


def photos_of_coco_mini(root, count):
    """The first photos of coco_mini and their truth, as somebody's own folder."""
    coco = coco_mini(root.parent / "as coco", count)
    (root / "images").mkdir(parents=True)
    rows = []
    for split in ("train", "val"):
        data = Data(coco, split)
        for name in data.names:
            shutil.copy(data.photo_path(name), root / f"images/{name}.jpg")
            write_labels(root / f"masks/{name}.png", read_truth(data, name, data.image(name).size[::-1]))
            rows.append(f"{name}.jpg," + ";".join(np.array(data.classes)[data.labels(name)]))
    (root / "labels.csv").write_text("\n".join(["file,classes", *rows]))
    (root / "val.txt").write_text("\n".join(f"{name}.jpg" for name in data.names))
    (root / "classes.txt").write_text("\n".join(data.classes))
    return root


def count_voc(root, split):
    names = (root / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    trees = [ElementTree.parse(root / f"Annotations/{name}.xml") for name in names]
    return Counter(name for tree in trees for name in {box.findtext("name") for box in tree.iter("object")})


def count_coco(root, split):
    api = PyCOCO(str(root / f"annotations/instances_{split}2014.json"))
    return Counter({entry["name"]: len(api.getImgIds(catIds=[i])) for i, entry in api.cats.items()})


@pytest.mark.weights
@needs_photos
@pytest.mark.parametrize("layout", ["voc", "coco"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_counts_and_truth_of_real_photos(layout, split, tmp_path, capsys):
    """The classes counted are those of the annotations; the truth against itself scores 100.0."""
    root, count = (REAL / "voc_mini", count_voc) if layout == "voc" else (coco_mini(tmp_path / "coco", None), count_coco)
    line = Data(root, split).describe()
    found = {name: int(n) for name, n in re.findall(r"([a-z ]+) (\d+)(?:,|$)", line.split("classes: ")[1])}
    assert {name.strip(): n for name, n in found.items() if n} == {name: n for name, n in count(root, split).items() if n}
    assert len(found) == {"voc": 20, "coco": 80}[layout]
    flags = ["--data", root, "--split", split, "--device", "cpu"]
    call("eval", *flags, "--save-truth", tmp_path / "truth")
    capsys.readouterr()
    call("eval", *flags, "--pred", tmp_path / "truth", "--json", tmp_path / "s.json")
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["miou"] == 100.0 and {value for value in result["iou"].values()} <= {100.0, None}


@pytest.mark.weights
@pytest.mark.slow
@needs_photos
@pytest.mark.parametrize("make, labels", [(coco_mini, "truth"), (photos_of_coco_mini, "masks")])
def test_chain_on_real_photos_in_other_layouts(make, labels, toy, tmp_path, capsys):
    """As test_scripts.py does on VOC: native sizes, DeiT-Tiny, full supervision too; the counts open train_cam.py's output."""
    root, vit, small = make(tmp_path / "data", 2), REAL / "deit_tiny_patch16_224.pth", ["--workers", 0, "--device", "cpu"]
    train, val = (["--data", root, "--split", split] for split in ("train", "val"))
    capsys.readouterr()
    call("train_cam", *train, "--clip", toy / "clip.pt", "--vit", vit, "--out", tmp_path / "cam", *TINY, "--scales", 1)
    assert Data(root, "train").describe() in capsys.readouterr().out
    call("make_pseudo", *train, "--cams", tmp_path / "cam/cams", "--out", tmp_path / "masks", "--crf", "none", "--device", "cpu")
    call("eval", *train, "--save-truth", tmp_path / "truth", "--device", "cpu")
    call("train_seg", *train, "--labels", tmp_path / labels, "--vit", vit, "--out", tmp_path / "seg", "--epochs", 1,
         "--batch", 2, "--crop", 64, *small)
    call("eval", *val, "--checkpoint", tmp_path / "seg/seg.pt", "--no-flip", "--json", tmp_path / "s.json", "--device", "cpu")
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["images"] == 2 and len(result["classes"]) == 81 and 0 <= result["miou"] <= 100
