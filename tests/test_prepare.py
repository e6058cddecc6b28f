"""prepare/: VOC and COCO in the scripts' own layout, against their XML, pycocotools and what users get wrong; the toy world."""
import csv
import functools
import hashlib
import http.server
import importlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "prepare"))
import coco  # noqa: E402
import toy as toy_world  # noqa: E402
import voc as pascal  # noqa: E402

from clip_model import InputError, run  # noqa: E402
from make_pseudo import write_labels  # noqa: E402

REAL = ROOT.parent / "shared" / "data"
needs_photos = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")


def call(module, *flags):
    run(module.main, module.parse_args([str(flag) for flag in flags]))


def error_of(capsys, module, *flags):
    """The one line that a wrong call ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(module, *flags)
    line, = [line for line in capsys.readouterr().err.splitlines() if line and "|" not in line]  # but for progress bars
    assert end.value.code == 2 and line.startswith("error: ")
    return line


def read_csv(path):
    """{name: classes}; every photo must lie where its row says, seen from the csv's folder."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert all((path.parent / photo).is_file() for photo, _ in rows)
    return {Path(photo).stem: classes.split(";") if classes else [] for photo, classes in rows}


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def labels_in(path):
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.asarray(picture)


def numbered(start, stop):
    return [f"{i:06d}" for i in range(start, stop)]


# ------------------------------------------------------------------------------------------ VOC

def xml(*classes):
    box = "<object><name>{}</name><difficult>1</difficult><part><name>head</name></part></object>"
    return f"<annotation>{''.join(box.format(name) for name in classes)}</annotation>"


def voc_root(root, objects=None, **lists):
    """A VOC root: a photo of every name in objects and of every listed one, XML of those in objects."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "ImageSets/Main", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for split, names in lists.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for name, classes in (objects or {}).items():
        (root / f"Annotations/{name}.xml").write_text(xml(*classes))
    for name in {*(objects or {}), *(name for names in lists.values() for name in names)}:
        (root / f"JPEGImages/{name}.jpg").touch()
    return root


def test_voc(tmp_path, capsys):
    """Every list becomes a csv; train_xml is the rest; labels are those of the boxes, difficult ones too, parts of people not."""
    root = voc_root(tmp_path / "VOC2012", {"a": ["dog", "cat", "dog"], "b": [], "c": ["person"], "d": ["sofa"]},
                    train=["a"], val=["b"], trainval=["a", "b"], mine=["c", "a"], test=["t"])
    write_labels(root / "SegmentationClass/a.png", np.full((2, 3), 8, np.uint8))
    call(pascal, "--voc", root)
    assert {path.stem: read_csv(path) for path in root.glob("*.csv")} == {
        "train": {"a": ["cat", "dog"]}, "val": {"b": []}, "trainval": {"a": ["cat", "dog"], "b": []},
        "mine": {"c": ["person"], "a": ["cat", "dog"]}, "test": {"t": []},
        "train_xml": {"a": ["cat", "dog"], "c": ["person"], "d": ["sofa"]}}
    assert (root / "train.csv").read_text() == "JPEGImages/a.jpg,cat;dog\n"
    assert (root / "masks/a.png").read_bytes() == (root / "SegmentationClass/a.png").read_bytes()
    lines = (root / "classes.txt").read_text().splitlines()
    assert lines[0] == "# exif: ignore" and len(lines) == 21
    assert [line for line in lines if ":" in line[1:]][1:] == [
        "diningtable: dining table", "person: player", "pottedplant: potted plant", "tvmonitor: tv monitor"]
    out = capsys.readouterr().out
    assert "test.csv: 1 images, without labels" in out and f"--data {root} --split train_xml --recipe voc" in out
    before = bytes_in(root)
    call(pascal, "--voc", root)
    assert bytes_in(root) == before  # again, with its own classes.txt there; nothing temporary is left


def test_another_place_and_no_photo_copied(tmp_path):
    root = voc_root(tmp_path / "disk/VOC2012", {"a": ["dog"]}, train=["a"], val=["a"])
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    call(pascal, "--voc", root, "--out", tmp_path / "link")
    assert set(bytes_in(tmp_path / "home")) == {"classes.txt", "train.csv", "val.csv", "train_xml.csv"}
    assert read_csv(tmp_path / "home/train.csv") == read_csv(tmp_path / "link/train.csv") == {"a": ["dog"]}
    assert not list(root.glob("*.csv"))


def test_train_xml_leaves_out_images_of_other_tasks(tmp_path):
    """Their XML names people alone; so does that of the few test images that have one."""
    root = voc_root(tmp_path, dict.fromkeys("abcdxy", ["dog"]), train=["c"], val=["d"], trainval=["c", "d"], test=["x", "z"])
    (root / "ImageSets/Main/trainval.txt").write_text("a\nb\nd\n")
    call(pascal, "--voc", root)
    assert list(read_csv(root / "train_xml.csv")) == ["a", "b", "c"]
    assert read_csv(root / "test.csv") == {"x": [], "z": []}
    (root / "ImageSets/Main/trainval.txt").unlink()
    call(pascal, "--voc", root)
    assert list(read_csv(root / "train_xml.csv")) == ["a", "b", "c", "y"]


def test_sbd(tmp_path, capsys):
    """train_aug from the files in SegmentationClassAug, without val; its masks serve where VOC has none; a list comes first."""
    root = voc_root(tmp_path, dict.fromkeys("abv", ["dog"]), train=["a"], val=["v"])
    write_labels(root / "SegmentationClass/a.png", np.full((2, 3), 1, np.uint8))
    for name in "abv":
        write_labels(root / f"SegmentationClassAug/{name}.png", np.full((2, 3), 2, np.uint8))
    call(pascal, "--voc", root)
    assert list(read_csv(root / "train_aug.csv")) == ["a", "b"]
    assert [labels_in(root / f"masks/{name}.png")[0, 0] for name in "abv"] == [1, 2, 2]
    assert "--split train_aug --recipe voc" in capsys.readouterr().out
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("/JPEGImages/b.jpg /SegmentationClassAug/b.png\n")  # as DeepLab's
    call(pascal, "--voc", root)
    assert list(read_csv(root / "train_aug.csv")) == ["b"]
    (root / "ImageSets/Segmentation/train_aug.txt").rename(root / "ImageSets/Segmentation/trainaug.txt")  # mmsegmentation's name
    call(pascal, "--voc", root)
    assert list(read_csv(root / "train_aug.csv")) == ["b"] and not (root / "trainaug.csv").exists()
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("\n".join(["b"] * 12031))
    assert "12,031 images for split train_aug; expected 10,582" in error_of(capsys, pascal, "--voc", root)


def test_lists_as_people_write_them(tmp_path):
    root = voc_root(tmp_path, {"a": [], "b c": ["cat"]}, train=["a"])
    (root / "ImageSets/Segmentation/dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb c\r\n")
    call(pascal, "--voc", root)
    assert read_csv(root / "dos.csv") == {"a": [], "b c": ["cat"]}


def test_another_data_set_in_this_layout(tmp_path):
    """Its classes, in its order, with its words, and nobody's counts."""
    root = voc_root(tmp_path, {name: ["zebu", "ant"] for name in numbered(0, 1001)}, train=numbered(0, 1001))
    (root / "classes.txt").write_text("zebu: humped cow\nant\n")
    call(pascal, "--voc", root)
    assert read_csv(root / "train.csv")["000000"] == ["zebu", "ant"]
    assert (root / "classes.txt").read_text() == "# exif: ignore\nzebu: humped cow\nant\n"


@pytest.mark.parametrize("split, count", pascal.OFFICIAL.items())
def test_official_counts_of_voc(split, count, tmp_path, capsys):
    """A wrong VOC stops before anything is written; the official count and small subsets pass."""
    root = voc_root(tmp_path)
    source = root / f"ImageSets/Segmentation/{split}.txt"
    for wrong in (count - 1, count + 1):
        source.write_text("\n".join(numbered(0, wrong)))
        assert f"{split}.txt: {wrong:,} images for split {split}; expected {count:,}; a list of your own" in error_of(
            capsys, pascal, "--voc", root)
    for right in (count, 97):
        source.write_text("\n".join(numbered(0, right)))
        assert f"000000.jpg: no such photo, but {split} lists it" in error_of(capsys, pascal, "--voc", root)
    assert not (root / "classes.txt").exists()


def test_counts_of_sbd(tmp_path, capsys):
    root = voc_root(tmp_path)
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(numbered(500, 500 + 1449)))
    (root / "SegmentationClassAug").mkdir()
    for name in numbered(0, 12030):
        os.close(os.open(root / f"SegmentationClassAug/{name}.png", os.O_CREAT))  # empty: only its name is looked at
    assert re.search("10,581 images.*12,031 PNGs.*unpack SegmentationClassAug again", error_of(capsys, pascal, "--voc", root))
    (root / "SegmentationClassAug/012030.png").touch()
    assert "no such photo" in error_of(capsys, pascal, "--voc", root)
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(numbered(0, 12031)))
    assert "12,031 is the full SBD folder, val included" in error_of(capsys, pascal, "--voc", root)


VOC_MISTAKES = {
    "no folder": (lambda root: shutil.rmtree(root / "JPEGImages"), "no VOC data set; expected JPEGImages and ImageSets"),
    "no photo": (lambda root: (root / "JPEGImages/a.jpg").unlink(), "a.jpg: no such photo, but train lists it"),
    "no xml": (lambda root: (root / "Annotations/a.xml").unlink(), "a.xml: no readable annotation"),
    "broken xml": (lambda root: (root / "Annotations/a.xml").write_text("<annotation><obj"), "a.xml: no readable annotation"),
    "class": (lambda root: (root / "Annotations/a.xml").write_text(xml("unicorn")),
              "a.xml: class 'unicorn' is not among the 20 classes.*classes.txt"),
    "list": (lambda root: (root / "ImageSets/Segmentation/train.txt").write_bytes(b"\xff\xfe\x00"), "train.txt: not readable"),
    "classes": (lambda root: (root / "classes.txt").write_bytes(b"\xff\xfe\x00"), "classes.txt: not readable"),
    "place": (lambda root: (root / "classes.txt").mkdir(), "classes.txt: cannot be written"),
}


@pytest.mark.parametrize("change, says", VOC_MISTAKES.values(), ids=VOC_MISTAKES)
def test_mistakes_in_voc(change, says, tmp_path, capsys):
    root = voc_root(tmp_path, {"a": ["cat"]}, train=["a"])
    change(root)
    assert re.search(says, error_of(capsys, pascal, "--voc", root))
    assert not list(root.glob("*.csv"))


# ------------------------------------------------------------------------------------------ the download

def archive(members):
    """A tar file of {path: bytes}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, data in members.items():
            info = tarfile.TarInfo(f"VOCdevkit/VOC2012/{path}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """mirror(payload): torchvision is told that this is VOC 2012, from a server here. Returns the requests served."""
    log, folder = [], tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, text, *args):
            log.append(self.command)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # torchvision hangs up once, when it looks for redirects

    monkeypatch.setenv("no_proxy", "*")
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def serve(payload, md5=None):
        (folder / "voc.tar").write_bytes(payload)
        monkeypatch.setitem(importlib.import_module("torchvision.datasets.voc").DATASET_YEAR_DICT, "2012", {
            "url": f"http://127.0.0.1:{server.server_port}/voc.tar", "filename": "voc.tar",
            "md5": md5 or hashlib.md5(payload).hexdigest(), "base_dir": "VOCdevkit/VOC2012"})
        return log
    yield serve
    server.shutdown()
    server.server_close()
    thread.join()


TINY_VOC = {"JPEGImages/a.jpg": b"photo" * 9000, "Annotations/a.xml": xml("cow").encode(),
            "ImageSets/Segmentation/train.txt": b"a\n", "SegmentationClass/a.png": b"mask"}


def test_download(mirror, tmp_path, capsys):
    log = mirror(archive(TINY_VOC))
    call(pascal, "--download", tmp_path / "data")
    asked = len(log)
    call(pascal, "--download", tmp_path / "data")
    voc = tmp_path / "data/VOCdevkit/VOC2012"
    assert len(log) == asked > 0  # the second call found the archive
    assert read_csv(voc / "train.csv") == {"a": ["cow"]} and (voc / "masks/a.png").read_bytes() == b"mask"
    assert f"--data {voc} --split" in capsys.readouterr().out
    (voc / "JPEGImages/a.jpg").write_bytes(b"half")  # killed while it unpacked
    call(pascal, "--download", tmp_path / "data")
    assert (voc / "JPEGImages/a.jpg").read_bytes() == b"photo" * 9000


@pytest.mark.parametrize("payload, md5", [(archive(TINY_VOC), "0" * 32), (b"no archive" * 99, None), (archive({"x": b""}), None),
                                          (archive(TINY_VOC)[:20_000], None)], ids=["digest", "text", "other", "cut"])
def test_download_of_something_else(payload, md5, mirror, tmp_path, capsys):
    mirror(payload, md5)
    assert re.search("data: VOC 2012 cannot be downloaded .*run again, or unpack it by hand and pass --voc .*data/VOCdevkit",
                     error_of(capsys, pascal, "--download", tmp_path / "data"))
    mirror(archive(TINY_VOC))
    call(pascal, "--download", tmp_path / "data")  # a broken archive is not kept for good


def test_an_archive_cannot_write_outside_its_folder(mirror, tmp_path, capsys):
    mirror(archive({**TINY_VOC, "../../../evil.txt": b"evil"}))  # its digest is the expected one
    assert "cannot be downloaded" in error_of(capsys, pascal, "--download", tmp_path / "data")
    assert not list(tmp_path.rglob("evil.txt"))


def test_offline(mirror, tmp_path, capsys, monkeypatch):
    mirror(b"")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert "cannot be downloaded (no network)" in error_of(capsys, pascal, "--download", tmp_path / "data")


# ------------------------------------------------------------------------------------------ COCO

IDS = [1, 2, 13, 44, 90]  # of five classes: with gaps, as COCO's
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]


def coco_root(root, annotations, size=(8, 10), years=("train2014", "val2014"), ids=IDS):
    """annotations: (image, category, crowd, segmentation), the same for both splits."""
    for year in years:
        photo = {"height": size[0], "width": size[1]}
        whole = {"images": [{"id": 7 * i, "file_name": f"{year}_{i}.jpg", **photo} for i in range(4)],
                 "annotations": [{"id": n, "image_id": 7 * i, "category_id": c, "iscrowd": crowd, "segmentation": outline}
                                 for n, (i, c, crowd, outline) in enumerate(annotations)],
                 "categories": [{"id": i, "name": f"class {i}"} for i in reversed(ids)]}
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / f"annotations/instances_{year}.json").write_text(json.dumps(whole))
        (root / year).mkdir(exist_ok=True)
        for i in range(4):
            (root / year / f"{year}_{i}.jpg").touch()
    return root


@pytest.mark.parametrize("years", [("train2014", "val2014"), ("train2017", "val2017"), ("train", "val")])
def test_coco(years, tmp_path, capsys):
    """Contiguous classes in the order of their ids, images without objects left out, crowds count, objects in any order."""
    root = coco_root(tmp_path, [(3, 90, 1, SQUARE), (0, 13, 0, SQUARE), (3, 1, 0, SQUARE), (0, 13, 0, SQUARE)], years=years)
    call(coco, "--coco", root, "--workers", 1)
    train, val = years
    assert (root / "classes.txt").read_text().splitlines() == ["# exif: ignore", *(f"class {i}" for i in IDS)]
    assert (root / "train.csv").read_text() == f"{train}/{train}_0.jpg,class 13\n{train}/{train}_3.jpg,class 1;class 90\n"
    assert read_csv(root / "val.csv") == {f"{val}_0": ["class 13"], f"{val}_3": ["class 1", "class 90"]}
    assert {path.name for path in (root / "masks").iterdir()} == {f"{year}_{i}.png" for year in years for i in (0, 3)}
    square = np.zeros((8, 10), np.uint8)
    square[1:5, 1:5] = 3
    assert np.array_equal(labels_in(root / f"masks/{train}_0.png"), square)
    assert f"--data {root} --split train --recipe coco" in capsys.readouterr().out


def test_no_masks_take_neither_pycocotools_nor_outlines(tmp_path, monkeypatch, capsys):
    root = coco_root(tmp_path / "coco", [(0, 1, 0, None)])
    monkeypatch.setattr(coco, "coco_mask", None)
    assert "pip install pycocotools, or pass --no-masks: training needs none" in error_of(capsys, coco, "--coco", root)
    call(coco, "--coco", root, "--no-masks", "--out", tmp_path / "out")
    assert set(bytes_in(tmp_path / "out")) == {"classes.txt", "train.csv", "val.csv"}
    assert read_csv(tmp_path / "out/train.csv") == {"train2014_0": ["class 1"]}


def draw(size, objects):
    return coco.draw_objects(size, [(k, json.dumps(outline)) for k, outline in objects], "the file").tolist()


def test_the_first_object_wins():
    """Two drawn objects that overlap: the field's rule, whatever their sizes."""
    left, top = [[0, 0, 2, 0, 2, 4, 0, 4]], [[0, 0, 4, 0, 4, 1, 0, 1]]
    assert draw((4, 4), [(0, left), (2, top)]) == [[1, 1, 3, 3], *[[1, 1, 0, 0]] * 3]
    assert draw((4, 4), [(2, top), (0, left)]) == [[3, 3, 3, 3], *[[1, 1, 0, 0]] * 3]


def test_all_forms_of_an_outline():
    mask = np.kron(np.random.default_rng(0).random((5, 7)) < 0.4, np.ones((3, 2))).astype(np.uint8)                  # (15, 14)
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    column = mask.T.ravel()
    ends = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff([0, *ends, column.size]).tolist()
    for counts in (packed, [0, *runs] if column[0] else runs):
        assert draw(mask.shape, [(4, {"size": list(mask.shape), "counts": counts})]) == (5 * mask).tolist()
    parts = [[0, 0, 3, 0, 3, 3, 0, 3], [5, 5, 8, 5, 8, 8, 5, 8]]
    expected = np.zeros((10, 10), int)
    expected[:3, :3] = expected[5:8, 5:8] = 1
    assert draw((10, 10), [(0, parts)]) == expected.tolist()


@pytest.mark.parametrize("outline", [None, "text", {}, [], {"counts": [3]}, [["a", "b"]], [None]])
def test_what_is_no_outline(outline):
    with pytest.raises(InputError, match="the file: an object without a readable outline"):
        draw((4, 4), [(0, outline)])


def test_a_killed_run_goes_on(tmp_path):
    """Masks already there are not drawn again, unless the annotations are newer."""
    root = coco_root(tmp_path, [(0, 1, 0, SQUARE), (3, 2, 0, SQUARE)])
    for path in (root / "annotations").iterdir():
        os.utime(path, (10 ** 9, 10 ** 9))
    flags, gone, kept = ["--coco", root, "--workers", 1], root / "masks/train2014_0.png", root / "masks/train2014_3.png"
    call(coco, *flags)
    before = bytes_in(root)
    gone.unlink()
    kept.write_bytes(b"what a run before left")
    call(coco, *flags)
    assert bytes_in(root) == {**before, "masks/train2014_3.png": b"what a run before left"}
    os.utime(root / "annotations/instances_train2014.json", (4e9, 4e9))
    call(coco, *flags)
    assert bytes_in(root) == before


def test_official_counts_of_coco(tmp_path, capsys):
    def write(name, count):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{name}.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": 1, "width": 1} for i in range(count)],
            "annotations": [{"image_id": i, "category_id": 1, "segmentation": []} for i in range(count)],
            "categories": [{"id": 1, "name": "a"}]}))
    for count, says in ((1001, "train2014.json: 1,001 images; expected 82,081"), (82081, "no such photo"), (1000, "no such photo")):
        write("train2014", count)
        assert says in error_of(capsys, coco, "--coco", tmp_path, "--no-masks")


COCO_MISTAKES = {
    "nothing": (lambda root: shutil.rmtree(root / "annotations"), "annotations: no instances_train2014.json"),
    "no val": (lambda root: (root / "annotations/instances_val2014.json").unlink(), "annotations: no instances_val2014.json"),
    "no photo": (lambda root: (root / "train2014/train2014_0.jpg").unlink(), "train2014_0.jpg: no such photo"),
    "other categories": (lambda root: coco_root(root, [(0, 1, 0, SQUARE)], years=["val2014"], ids=IDS[:3]),
                         "instances_val2014.json: other categories than train's"),
    "no outline": (lambda root: coco_root(root, [(0, 1, 0, {})]), "json: train2014_0.jpg: an object without a readable outline"),
    "place": (lambda root: (root / "masks").touch(), "masks.*: cannot be written"),
    **{text[:40] or "empty": (lambda root, text=text: (root / "annotations/instances_train2014.json").write_text(text),
                              f"instances_train2014.json: not COCO's instances .{says}") for text, says in {
        "": "JSONDecodeError", "[]": "TypeError", '{"images": []}': "KeyError", '{"images": [': "JSONDecodeError",
        '{"annotations": [{"category_id": 1}]}': "KeyError",
        '{"images": [{"id": 3, "file_name": "a", "height": 1, "width": 1}], "categories": [], "annotations": '
        '[{"image_id": 3, "category_id": 1, "segmentation": []}]}': "KeyError"}.items()},
}


@pytest.mark.parametrize("change, says", COCO_MISTAKES.values(), ids=COCO_MISTAKES)
def test_mistakes_in_coco(change, says, tmp_path, capsys):
    root = coco_root(tmp_path, [(0, 1, 0, SQUARE)])
    change(root)
    assert re.search(says, error_of(capsys, coco, "--coco", root, "--workers", 1))


# ------------------------------------------------------------------------------------------ real photos

@needs_photos
def test_voc_mini(tmp_path):
    """Labels equal the XML, masks are the same files, no photo is copied."""
    root, out = REAL / "voc_mini", tmp_path / "out"
    call(pascal, "--voc", root, "--out", out)
    names = {split: (root / f"ImageSets/Segmentation/{split}.txt").read_text().split() for split in ("train", "val")}
    for split, listed in names.items():
        found = read_csv(out / f"{split}.csv")
        assert list(found) == listed
        for name in listed:
            assert set(found[name]) == set(re.findall("<object><name>([a-z]+)", (root / f"Annotations/{name}.xml").read_text()))
            assert (out / f"masks/{name}.png").read_bytes() == (root / f"SegmentationClass/{name}.png").read_bytes()
    assert set(read_csv(out / "train_xml.csv")) == {path.stem for path in root.glob("Annotations/*")} - set(names["val"])
    assert {path.suffix for path in out.rglob("*.*")} == {".png", ".csv", ".txt"}


@needs_photos
def test_coco_mini(tmp_path):
    """Every label and every pixel, against pycocotools' own reader of the json."""
    root, out = REAL / "coco_mini", tmp_path / "out"
    call(coco, "--coco", root, "--out", out, "--workers", 2)
    classes = (out / "classes.txt").read_text().splitlines()[1:]
    assert len(classes) == 80
    for split in ("train", "val"):
        found, api = read_csv(out / f"{split}.csv"), COCO(str(root / f"annotations/instances_{split}2014.json"))
        shown = [image for i, image in api.imgs.items() if api.getAnnIds(i)]
        assert list(found) == [Path(image["file_name"]).stem for image in shown]
        for image in shown:
            entries, name = api.loadAnns(api.getAnnIds(image["id"])), Path(image["file_name"]).stem
            assert set(found[name]) == {api.cats[entry["category_id"]]["name"] for entry in entries}
            masks = [api.annToMask(entry).astype(bool) for entry in entries]
            truth = np.zeros((image["height"], image["width"]), np.uint8)
            for mask, entry in reversed(list(zip(masks, entries))):  # the first annotation wins
                truth[mask] = 1 + classes.index(api.cats[entry["category_id"]]["name"])
            assert np.array_equal(labels_in(out / f"masks/{name}.png"), truth)
    assert {path.suffix for path in out.rglob("*.*")} == {".png", ".csv", ".txt"}


# ------------------------------------------------------------------------------------------ the toy world

def test_toy_labels_are_what_the_masks_show(tmp_path):
    toy_world.write_data(tmp_path, dict(zip(toy_world.OBJECTS, toy_world.BACKGROUNDS)), 12, 2, seed=0, cooccurrence=0.9)
    assert (tmp_path / "classes.txt").read_text().split() == toy_world.OBJECTS
    for split, count in (("train", 12), ("val", 2)):
        found = read_csv(tmp_path / f"{split}.csv")
        assert list(found) == [f"{split}_{i:05d}" for i in range(count)]
        for name, classes in found.items():
            assert classes == [toy_world.OBJECTS[k - 1] for k in np.unique(labels_in(tmp_path / f"masks/{name}.png")) if k]
    assert max(len(classes) for classes in read_csv(tmp_path / "train.csv").values()) == 2
    assert {path.parent.name for path in tmp_path.rglob("*.*")} == {tmp_path.name, "images", "masks"}


@pytest.mark.parametrize("pairs", ["boat", "boat:mars", "ufo:grass", "boat:water:rails", "boat=grass"])
def test_wrong_pairs(pairs, tmp_path, capsys):
    assert re.match(rf"error: --pairs {pairs}: expected OBJECT:BACKGROUND,.*backgrounds: water",
                    error_of(capsys, toy_world, "--out", tmp_path / "out", "--pairs", pairs))
    assert not (tmp_path / "out").exists()


def test_toy_weights_stand_beside_the_script():
    assert toy_world.WEIGHTS == ROOT / "prepare/toy_weights.npz" and toy_world.WEIGHTS.is_file()


# ------------------------------------------------------------------------------------------ what all three print at the end

@pytest.mark.parametrize("make", ["voc", "coco", "toy"])
def test_next_commands_are_ones(make, tmp_path, capsys):
    """Each of the four scripts takes the flags it is said to take."""
    module, flags = {
        "voc": lambda: (pascal, ["--voc", voc_root(tmp_path, {"a": ["cat"]}, train=["a"], val=["a"])]),
        "coco": lambda: (coco, ["--coco", coco_root(tmp_path, [(0, 1, 0, SQUARE)]), "--workers", 1]),
        "toy": lambda: (toy_world, ["--out", tmp_path, "--train", 1, "--val", 1])}[make]()
    call(module, *flags)
    commands = [line.split() for line in capsys.readouterr().out.partition("next:\n")[2].splitlines()]
    assert [script for _, script, *_ in commands] == ["train_cam.py", "make_pseudo.py", "train_seg.py", "eval.py"]
    for _, script, *flags in commands:
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert (Path(args.data) / f"{args.split}.csv").is_file()
