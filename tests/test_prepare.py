"""prepare/: VOC and COCO become our layout, as XML and pycocotools read them; the toy world."""
import functools
import hashlib
import http.server
import importlib
import io
import json
import re
import shutil
import tarfile
import threading
from pathlib import Path

import coco
import numpy as np
import pytest
import toy as toy_world
import voc
from conftest import ROOT, call, error_line, files_in
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from common import InputError, Split, write_labels

pytestmark = pytest.mark.filterwarnings(  # pycocotools' own, with NumPy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
REAL = ROOT.parent / "shared" / "data"
needs_photos = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")


def listed(root, split):
    """-> {name: classes}, as the scripts read it"""
    split = Split(root, split)
    return {name: np.array(split.classes)[split.labels[name]].tolist() for name in split.names}


def labels_in(path):
    return np.asarray(Image.open(path))


def xml(*classes):
    box = "<object><name>{}</name><difficult>1</difficult><part><name>head</name></part></object>"
    return f"<annotation>{''.join(box.format(name) for name in classes)}</annotation>"


def voc_root(root, objects, **lists):
    """A VOC folder: photos of all names in objects and lists, XML of those in objects"""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, names in lists.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    for name, classes in objects.items():
        (root / f"Annotations/{name}.xml").write_text(xml(*classes))
    for name in set(objects).union(*lists.values()):
        (root / f"JPEGImages/{name}.jpg").touch()
    return root


def test_voc(tmp_path, capsys):
    """Every list becomes a csv, train_xml is the rest. Difficult boxes count, parts do not."""
    root = voc_root(tmp_path / "VOC2012", train=["a"], val=["b"], mine=["c", "a"], test=["t"],
                    objects={"a": ["dog", "cat", "dog"], "b": [], "c": ["person"], "d": ["sofa"]})
    write_labels(root / "SegmentationClass/a.png", np.full((2, 3), 8, np.uint8))
    call("voc", "--voc", root)
    assert {path.stem: listed(root, path.stem) for path in root.glob("*.csv")} == {
        "train": {"a": ["cat", "dog"]}, "val": {"b": []}, "test": {"t": []},
        "mine": {"c": ["person"], "a": ["cat", "dog"]},
        "train_xml": {"a": ["cat", "dog"], "c": ["person"], "d": ["sofa"]}}
    assert (root / "train.csv").read_text() == "JPEGImages/a.jpg,cat;dog\n"
    assert (root / "masks/a.png").read_bytes() == (root / "SegmentationClass/a.png").read_bytes()
    assert (root / "classes.txt").read_text().splitlines() == ["# exif: ignore", *voc.CLASSES]
    assert "test.csv: 1 images, without labels" in capsys.readouterr().out
    before = files_in(root)
    call("voc", "--voc", root)
    assert files_in(root) == before  # again, with its own classes.txt; nothing temporary is left


def test_another_place_other_classes_and_lists(tmp_path):
    root = voc_root(tmp_path / "disk/VOC2012", {"a": ["ant"], "b c": ["zebu", "ant"]})
    (root / "ImageSets/Segmentation/dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb c\r\n")
    (root / "classes.txt").write_text("zebu: humped cow\nant\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    call("voc", "--voc", root, "--out", tmp_path / "link")
    assert set(files_in(tmp_path / "home")) == {"classes.txt", "dos.csv", "train_xml.csv"}
    assert listed(tmp_path / "home", "dos") == {"a": ["ant"], "b c": ["zebu", "ant"]}
    assert (tmp_path / "home/classes.txt").read_text() == "# exif: ignore\nzebu: humped cow\nant\n"


def test_train_xml_leaves_out_images_of_other_tasks(tmp_path):
    """Their XML names people alone; so does that of the few test images that have one."""
    root = voc_root(tmp_path, dict.fromkeys("abcdxy", ["dog"]), train=["c"], val=["d"],
                    trainval=["c", "d"], test=["x", "z"])
    (root / "ImageSets/Main/trainval.txt").write_text("a\nb\nd\n")
    call("voc", "--voc", root)
    assert list(listed(root, "train_xml")) == ["a", "b", "c"]


def test_sbd(tmp_path, capsys):
    """train_aug is a list, or SegmentationClassAug's files without val; VOC's masks go first."""
    root = voc_root(tmp_path, dict.fromkeys("abv", ["dog"]), train=["a"], val=["v"])
    write_labels(root / "SegmentationClass/a.png", np.full((2, 3), 1, np.uint8))
    for name in "abv":
        write_labels(root / f"SegmentationClassAug/{name}.png", np.full((2, 3), 2, np.uint8))
    call("voc", "--voc", root)
    assert list(listed(root, "train_aug")) == ["a", "b"]
    assert [labels_in(root / f"masks/{name}.png")[0, 0] for name in "abv"] == [1, 2, 2]
    for name, text in (("train_aug", "/JPEGImages/b.jpg /SegmentationClassAug/b.png\n"),  # DeepLab
                       ("trainaug", "b\n")):  # mmsegmentation
        path = root / f"ImageSets/Segmentation/{name}.txt"
        path.write_text(text)
        call("voc", "--voc", root)
        assert list(listed(root, "train_aug")) == ["b"]
        path.unlink()
    path.write_text("\n".join(["b"] * 12031))
    line = error_line(capsys, "voc", "--voc", root)
    assert "12,031 images; expected 10,582" in line and "without val" in line


@pytest.mark.parametrize("file, content, says", [
    ("Annotations/a.xml", None, "a.xml: no readable annotation"),
    ("Annotations/a.xml", b"<obj", "a.xml: no readable annotation"),
    ("Annotations/a.xml", xml("elk").encode(), "class 'elk'; expected one"),
    ("ImageSets/Segmentation/train.txt", b"\xff", "train.txt: not readable"),
    ("classes.txt", b"\xff", "classes.txt: not readable")])
def test_mistakes_in_voc(file, content, says, tmp_path, capsys):
    root = voc_root(tmp_path, {"a": ["cat"]}, train=["a"])
    (root / file).write_bytes(content) if content else (root / file).unlink()
    assert says in error_line(capsys, "voc", "--voc", root)
    assert "no VOC data set" in error_line(capsys, "voc", "--voc", root / "ImageSets")
    assert not list(root.glob("*.csv"))


def archive(members):
    """{path: bytes} -> a tar file"""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, data in members.items():
            info = tarfile.TarInfo(f"VOCdevkit/VOC2012/{path}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """mirror(payload): torchvision is told that this is VOC 2012, from a server here"""
    folder = tmp_path / "served"
    folder.mkdir()
    Handler, Server = http.server.SimpleHTTPRequestHandler, http.server.ThreadingHTTPServer
    monkeypatch.setattr(Handler, "log_message", lambda *_: None)
    monkeypatch.setattr(Server, "handle_error", lambda *_: None)  # torchvision hangs up once
    monkeypatch.setenv("no_proxy", "*")
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(payload, md5=None):
        (folder / "voc.tar").write_bytes(payload)
        years = importlib.import_module("torchvision.datasets.voc").DATASET_YEAR_DICT
        monkeypatch.setitem(years, "2012", {
            "url": f"http://127.0.0.1:{server.server_port}/voc.tar", "filename": "voc.tar",
            "md5": md5 or hashlib.md5(payload).hexdigest(), "base_dir": "VOCdevkit/VOC2012"})
    yield serve
    server.shutdown()
    server.server_close()


TINY_VOC = {"JPEGImages/a.jpg": b"photo" * 9000, "Annotations/a.xml": xml("cow").encode(),
            "ImageSets/Segmentation/train.txt": b"a\n", "SegmentationClass/a.png": b"mask"}


def test_download(mirror, tmp_path):
    """A second call finds the archive, and repairs what a kill left half unpacked."""
    mirror(archive(TINY_VOC))
    root = tmp_path / "data/VOCdevkit/VOC2012"
    call("voc", "--download", tmp_path / "data")
    assert listed(root, "train") == {"a": ["cow"]}
    assert (root / "masks/a.png").read_bytes() == b"mask"
    (root / "JPEGImages/a.jpg").write_bytes(b"half")
    (tmp_path / "served/voc.tar").unlink()
    call("voc", "--download", tmp_path / "data")
    assert (root / "JPEGImages/a.jpg").read_bytes() == b"photo" * 9000


@pytest.mark.parametrize("payload, md5", [
    (archive(TINY_VOC), "0" * 32), (b"no archive" * 99, None), (archive(TINY_VOC)[:20_000], None),
    (archive({**TINY_VOC, "../../../evil.txt": b"evil"}), None)],
    ids=["digest", "text", "cut", "leaves its folder"])
def test_download_of_something_else(payload, md5, mirror, tmp_path, capsys):
    mirror(payload, md5)
    with pytest.raises(SystemExit):
        call("voc", "--download", tmp_path / "data")
    line = capsys.readouterr().err.splitlines()[-1]  # after torchvision's progress bar
    assert re.match("error: .*VOC 2012 cannot be downloaded .* pass --voc .*VOC2012$", line)
    assert not list(tmp_path.rglob("evil.txt"))
    mirror(archive(TINY_VOC))
    call("voc", "--download", tmp_path / "data")  # a broken archive is not kept for good


def test_an_old_python_does_not_unpack_unchecked(tmp_path, capsys, monkeypatch):
    """Python 3.10 before 3.10.12 would write wherever the archive says."""
    monkeypatch.delattr(tarfile, "data_filter")
    assert "update Python, or unpack" in error_line(capsys, "voc", "--download", tmp_path)


IDS = [1, 2, 13, 44, 90]  # of five classes: with gaps, as COCO's
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


def coco_root(root, objects, years=("train2014", "val2014")):
    """objects: (image, category, crowd, segmentation), the same for both splits"""
    keys = ("image_id", "category_id", "iscrowd", "segmentation")
    whole = {"annotations": [dict(zip(keys, each)) for each in objects],
             "categories": [{"id": i, "name": f"class {i}"} for i in reversed(IDS)]}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for year in years:
        (root / year).mkdir(exist_ok=True)
        names = [f"{year}_{i}.jpg" for i in range(4)]
        whole["images"] = [{"id": i, "file_name": name, "height": 8, "width": 10}
                           for i, name in enumerate(names)]
        (root / f"annotations/instances_{year}.json").write_text(json.dumps(whole))
        for name in names:
            (root / year / name).touch()
    return root


def test_coco(tmp_path):
    """Classes in the order of their ids; images without objects are left out; crowds count."""
    objects = [(3, 90, 1, SQUARE), (0, 13, 0, SQUARE), (3, 1, 0, SQUARE), (0, 13, 0, SQUARE)]
    root = coco_root(tmp_path, objects, ["train2017", "val2017"])
    call("coco", "--coco", root, "--workers", 1)
    assert (root / "classes.txt").read_text().split("\n")[1:-1] == [f"class {i}" for i in IDS]
    assert (root / "train.csv").read_text() == (
        "train2017/train2017_0.jpg,class 13\ntrain2017/train2017_3.jpg,class 1;class 90\n")
    assert listed(root, "val") == {"val2017_0": ["class 13"], "val2017_3": ["class 1", "class 90"]}
    assert len(list((root / "masks").glob("*.png"))) == 4
    assert np.bincount(labels_in(root / "masks/train2017_0.png").ravel()).tolist() == [64, 0, 0, 16]


def test_no_masks_take_neither_pycocotools_nor_outlines(tmp_path, monkeypatch, capsys):
    root = coco_root(tmp_path / "coco", [(0, 1, 0, None)])
    monkeypatch.setattr(coco, "coco_mask", None)
    assert "pip install pycocotools" in error_line(capsys, "coco", "--coco", root)
    call("coco", "--coco", root, "--no-masks", "--out", tmp_path / "out")
    assert set(files_in(tmp_path / "out")) == {"classes.txt", "train.csv", "val.csv"}
    assert listed(tmp_path / "out", "train") == {"train2014_0": ["class 1"]}


def draw(objects):
    objects = [(k, json.dumps(outline)) for k, outline in objects]
    return coco.draw_objects((4, 4), objects, "the file").tolist()


def test_outlines():
    """Polygons and both kinds of run lengths. The first object wins, whatever its size."""
    left, top = [[0, 0, 2, 0, 2, 4, 0, 4]], [[0, 0, 4, 0, 4, 1, 0, 1]]
    assert draw([(0, left), (2, top)]) == [[1, 1, 3, 3], *[[1, 1, 0, 0]] * 3]
    assert draw([(2, top), (0, left)]) == [[3, 3, 3, 3], *[[1, 1, 0, 0]] * 3]
    mask = np.kron([[1, 0], [0, 1]], np.ones((2, 2))).astype(np.uint8)
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    for outline in ([[0, 0, 2, 0, 2, 2, 0, 2], [2, 2, 4, 2, 4, 4, 2, 4]],
                    {"size": [4, 4], "counts": packed},
                    {"size": [4, 4], "counts": [0, 2, 2, 2, 4, 2, 2, 2]}):
        assert draw([(4, outline)]) == (5 * mask).tolist()
    for outline in (None, "text", {}, [], {"counts": [3]}, [["a", "b"]], [None]):
        with pytest.raises(InputError, match="the file: an object without a readable outline"):
            draw([(0, outline)])


def test_masks_of_other_annotations_are_drawn_anew_or_refused(tmp_path, capsys):
    root = coco_root(tmp_path, [(0, 1, 0, SQUARE), (3, 2, 0, SQUARE)])
    flags, mask = ["--coco", root, "--workers", 1], root / "masks/train2014_3.png"
    call("coco", *flags)
    coco_root(root, [(0, 1, 0, SQUARE), (3, 1, 0, SQUARE)])
    assert "made_of.json: made with train" in error_line(capsys, "coco", *flags, "--resume")
    assert labels_in(mask).max() == 2
    call("coco", *flags)
    assert labels_in(mask).max() == 1
    assert "--workers 0: expected" in error_line(capsys, "coco", *flags[:2], "--workers", 0)


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', '{"x": [{"category_id": 1}]}'])
def test_a_json_that_is_not_cocos(text, tmp_path, capsys):
    root = coco_root(tmp_path, [(0, 1, 0, SQUARE)])
    (root / "annotations/instances_train2014.json").write_text(text)
    assert "instances_train2014.json: not COCO's" in error_line(capsys, "coco", "--coco", root)
    shutil.rmtree(root / "annotations")
    assert "instances_train2014.json: no such file" in error_line(capsys, "coco", "--coco", root)


@needs_photos
def test_real_voc(tmp_path):
    """Labels equal the XML, masks are the same files, no photo is copied."""
    root = REAL / "voc_mini"
    call("voc", "--voc", root, "--out", tmp_path)
    for split in ("train", "val"):
        found = listed(tmp_path, split)
        assert list(found) == (root / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        for name, classes in found.items():
            text = (root / f"Annotations/{name}.xml").read_text()
            assert set(classes) == set(re.findall("<object><name>([a-z]+)", text))
    found = files_in(tmp_path / "masks")
    assert found.pop("made_of.json") and found == files_in(root / "SegmentationClass")
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".png", ".csv", ".txt", ".json"}


@needs_photos
def test_real_coco(tmp_path):
    """Every label and every pixel, against pycocotools' own reader of the json"""
    root = REAL / "coco_mini"
    call("coco", "--coco", root, "--out", tmp_path, "--workers", 2)
    for split in ("train", "val"):
        found, classes = listed(tmp_path, split), Split(tmp_path, split).classes
        api = COCO(str(root / f"annotations/instances_{split}2014.json"))
        shown = [image for i, image in api.imgs.items() if api.getAnnIds(i)]
        assert list(found) == [Path(image["file_name"]).stem for image in shown]
        for name, image in zip(found, shown):
            truth, names = np.zeros((image["height"], image["width"]), np.uint8), set()
            for entry in reversed(api.loadAnns(api.getAnnIds(image["id"]))):  # the first wins
                names.add(kind := api.cats[entry["category_id"]]["name"])
                truth[api.annToMask(entry) > 0] = 1 + classes.index(kind)
            assert set(found[name]) == names and len(classes) == 80
            assert np.array_equal(labels_in(tmp_path / f"masks/{name}.png"), truth)


def test_the_same_seed_makes_the_same_toy_world(tmp_path, capsys):
    """Photos have the classes that their masks show."""
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        toy_world.write_data(tmp_path / name, toy_world.USUAL, 6, 1, seed, 0.95)
    a, b, c = (files_in(tmp_path / name) for name in "abc")
    assert a == b and a != c and len(a) == 17  # 7 photos and masks; two lists and the classes
    for name, classes in listed(tmp_path / "a", "train").items():
        shown = np.unique(labels_in(tmp_path / f"a/masks/{name}.png"))
        assert classes == [toy_world.OBJECTS[k - 1] for k in shown if k]
    for pairs in ("boat", "boat:mars", "ufo:grass", "boat:water:rails"):
        assert "expected OBJECT:BACKGROUND" in error_line(
            capsys, "toy", "--out", tmp_path, "--pairs", pairs)


@pytest.mark.parametrize("make", ["voc", "coco", "toy"])
def test_the_next_commands_are_ones(make, tmp_path, capsys):
    """Each of the four scripts takes the flags that it is said to take."""
    if make == "toy":
        call("toy", "--out", tmp_path, "--train", 1, "--val", 1)
    elif make == "coco":
        call("coco", "--coco", coco_root(tmp_path, [(0, 1, 0, SQUARE)]))
    else:
        call("voc", "--voc", voc_root(tmp_path, {"a": ["cat"]}, train=["a"], val=["a"]))
    text = capsys.readouterr().out.partition("next:\n")[2].replace("\\\n", " ")
    commands = [line.split()[1:] for line in text.splitlines()]
    assert len(commands) == 4
    for script, *flags in commands:
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert (Path(args.data) / f"{args.split}.csv").is_file()
