"""prepare/: VOC and COCO become our layout, as XML and pycocotools read them."""
import hashlib
import importlib
import json
import re
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import coco
import numpy as np
import pytest
import voc
from conftest import ROOT, call, error_line, files_in
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from common import InputError, Split, write_labels

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


def check_next_command(text):
    """The script takes the flags that it is said to take, and finds the list."""
    script, *flags = text.partition("next:\n    python ")[2].split()
    args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
    assert (Path(args.data) / f"{args.split}.csv").is_file()


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
    assert (root / "classes.txt").read_text().splitlines() == [": ignore exif", *voc.CLASSES]
    text = capsys.readouterr().out
    assert "test.csv: 1 images, 1 without labels" in text
    assert "no train_aug: it takes SBD's list, as" in text and "--split train_xml" in text
    assert f"{root}: 5 lists, 1 masks; next:" in text
    check_next_command(text)
    before = files_in(root)
    assert "add --resume to go on" in error_line(capsys, "voc", "--voc", root)
    call("voc", "--voc", root, "--resume")
    assert files_in(root) == before  # again, with its own classes.txt; nothing temporary is left


def test_another_place_other_classes_and_lists(tmp_path):
    root = voc_root(tmp_path / "disk/VOC2012", {"a": ["ant"], "b c": ["zebu", "ant"]})
    (root / "ImageSets/Segmentation/dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb c\r\n")
    (root / "classes.txt").write_text("# mine\nzebu: humped cow\nant\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    call("voc", "--voc", root, "--out", tmp_path / "link")
    assert set(files_in(tmp_path / "home")) == {"made_of.json", "classes.txt", "dos.csv",
                                                "train_xml.csv"}
    assert listed(tmp_path / "home", "dos") == {"a": ["ant"], "b c": ["zebu", "ant"]}
    split = Split(tmp_path / "home", "dos")
    assert split.words == ["humped cow", "ant"] and not split.upright
    call("voc", "--voc", root)  # beside the user's classes, which stay as they are
    assert (root / "classes.txt").read_text() == "# mine\nzebu: humped cow\nant\n"
    assert listed(root, "dos") == {"a": ["ant"], "b c": ["zebu", "ant"]}


def test_train_xml_leaves_out_images_of_other_tasks(tmp_path):
    """Their XML names people alone; so does that of the few test images that have one."""
    root = voc_root(tmp_path, dict.fromkeys("abcdxy", ["dog"]), train=["c"], val=["d"],
                    trainval=["c", "d"], test=["x", "z"])
    (root / "ImageSets/Main/trainval.txt").write_text("a\nb\nd\n")
    call("voc", "--voc", root)
    assert list(listed(root, "train_xml")) == ["a", "b", "c"]
    assert listed(root, "test") == {"x": [], "z": []}


def test_a_test_photo_has_the_labels_of_its_own_xml(tmp_path, capsys):
    """Another one without XML changes nothing, least of all for a photo that is in train too."""
    root = voc_root(tmp_path, {"a": ["cat"], "b": ["dog"], "x": ["cow"]}, train=["a", "b"],
                    test=["a", "x", "z"])
    call("voc", "--voc", root)
    assert listed(root, "train") == {"a": ["cat"], "b": ["dog"]}
    assert listed(root, "test") == {"a": ["cat"], "x": ["cow"], "z": []}
    assert listed(root, "train_xml") == {"b": ["dog"]}  # no photo of test
    assert "test.csv: 3 images, 1 without labels" in capsys.readouterr().out
    (root / "Annotations/a.xml").unlink()
    line = error_line(capsys, "voc", "--voc", root, "--out", tmp_path / "other")
    assert "a.xml: no readable annotation" in line


def test_sbd(tmp_path, capsys):
    """train_aug is a list, or SegmentationClassAug's files without val; VOC's masks go first."""
    root = voc_root(tmp_path, dict.fromkeys("abv", ["dog"]), train=["a"], val=["v"])
    write_labels(root / "SegmentationClass/a.png", np.full((2, 3), 1, np.uint8))
    for name in "abv":
        write_labels(root / f"SegmentationClassAug/{name}.png", np.full((2, 3), 2, np.uint8))
    call("voc", "--voc", root)
    assert list(listed(root, "train_aug")) == ["a", "b"]
    assert "no train_aug" not in capsys.readouterr().out
    assert [labels_in(root / f"masks/{name}.png")[0, 0] for name in "abv"] == [1, 2, 2]
    for name, text in (("train_aug", "/JPEGImages/b.jpg /SegmentationClassAug/b.png\n"),  # DeepLab
                       ("trainaug", "b\n")):  # mmsegmentation
        path = root / f"ImageSets/Segmentation/{name}.txt"
        path.write_text(text)
        call("voc", "--voc", root, "--out", tmp_path / f"of {name}")
        assert list(listed(tmp_path / f"of {name}", "train_aug")) == ["b"]
        path.unlink()
    path.write_text("\n".join(["b"] * 12031))
    assert "12,031 images; expected 10,582" in error_line(capsys, "voc", "--voc", root)


@pytest.mark.parametrize("content, says", [
    (None, "a.xml: no readable annotation"), ("<obj", "a.xml: no readable annotation"),
    (xml("elk"), "class 'elk'; expected one")])
def test_mistakes_in_voc(content, says, tmp_path, capsys):
    root = voc_root(tmp_path, {"a": ["cat"]}, train=["a"])
    path = root / "Annotations/a.xml"
    path.write_text(content) if content else path.unlink()
    assert says in error_line(capsys, "voc", "--voc", root)
    assert "no VOC data set" in error_line(capsys, "voc", "--voc", root / "ImageSets")
    assert not list(root.glob("*.csv"))


def test_download(tmp_path, monkeypatch, capsys):
    """From the first address that serves the archive; the line names what each of them said. A
    second call repairs what a kill left half unpacked."""
    source, served = voc_root(tmp_path / "a", {"a": ["cow"]}, train=["a"]), tmp_path / "served"
    (source / "JPEGImages/a.jpg").write_bytes(b"photo")
    served.mkdir()
    with tarfile.open(served / "voc.tar", "w") as tar:
        tar.add(source, "VOCdevkit/VOC2012")
    (served / "blocked.tar").write_text("blocked by firewall policy")
    years = importlib.import_module("torchvision.datasets.voc").DATASET_YEAR_DICT
    monkeypatch.setitem(years, "2012", {
        "url": "http://127.0.0.1:1/voc.tar", "filename": "voc.tar",
        "md5": hashlib.md5((served / "voc.tar").read_bytes()).hexdigest()})
    handler = partial(SimpleHTTPRequestHandler, directory=served)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirrors = [f"http://127.0.0.1:{server.server_port}/{name}" for name in (
            "none.tar", "blocked.tar", "voc.tar")]
        monkeypatch.setattr(voc, "MIRRORS", mirrors[:2])
        with pytest.raises(SystemExit):
            call("voc", "--download", tmp_path / "b")
        line = capsys.readouterr().err.splitlines()[-1]  # behind the progress bars
        assert "VOC 2012 cannot be downloaded (http://127.0.0.1:1/voc.tar: " in line
        assert re.search("none.tar: .*404.*; http.*blocked.tar: File not found or corrupted", line)
        assert not list((tmp_path / "b").glob("*"))
        monkeypatch.setattr(voc, "MIRRORS", mirrors)
        root = tmp_path / "b/VOCdevkit/VOC2012"
        for _ in range(2):
            call("voc", "--download", tmp_path / "b", "--resume")
            assert (root / "JPEGImages/a.jpg").read_bytes() == b"photo"
            (root / "JPEGImages/a.jpg").write_bytes(b"half")
        server.shutdown()
    assert listed(root, "train") == {"a": ["cow"]}
    (tmp_path / "b/voc.tar").write_bytes(b"other")
    line = error_line(capsys, "voc", "--download", tmp_path / "b")
    assert "voc.tar: not VOC's archive" in line and "move it away" in line
    assert (tmp_path / "b/voc.tar").read_bytes() == b"other"


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


def test_coco(tmp_path, capsys):
    """Classes in the order of their ids; images without objects are left out; crowds count."""
    objects = [(3, 90, 1, SQUARE), (0, 13, 0, SQUARE), (3, 1, 0, SQUARE), (0, 13, 0, SQUARE)]
    root = coco_root(tmp_path, objects, ["train2017", "val2017"])
    call("coco", "--coco", root)
    text = capsys.readouterr().out
    check_next_command(text)
    assert "masks of val: 2 of 2" in text  # in a log
    assert f"{root}: classes.txt, train.csv, val.csv, masks/; next:" in text
    lines = [": ignore exif", *(f"class {i}" for i in IDS)]
    assert (root / "classes.txt").read_text().splitlines() == lines
    assert (root / "train.csv").read_text() == (
        "train2017/train2017_0.jpg,class 13\ntrain2017/train2017_3.jpg,class 1;class 90\n")
    assert listed(root, "val") == {"val2017_0": ["class 13"], "val2017_3": ["class 1", "class 90"]}
    assert len(list((root / "masks").glob("*.png"))) == 4
    assert np.bincount(labels_in(root / "masks/train2017_0.png").ravel()).tolist() == [64, 0, 0, 16]


def test_no_masks_take_neither_pycocotools_nor_outlines(tmp_path, monkeypatch, capsys):
    """And masks may follow later."""
    root, out = coco_root(tmp_path / "coco", [(0, 1, 0, None)]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(coco, "coco_mask", None)
        assert "pip install pycocotools" in error_line(capsys, "coco", "--coco", root)
        call("coco", "--coco", root, "--no-masks", "--out", out)
    before = files_in(out)
    assert set(before) == {"made_of.json", "classes.txt", "train.csv", "val.csv"}
    assert listed(out, "train") == {"train2014_0": ["class 1"]}
    coco_root(root, [(0, 1, 0, SQUARE)])  # the lists stay the same
    line = error_line(capsys, "coco", "--coco", root, "--out", out)
    assert "add --resume to go on, or pass another --out" in line and "remove" not in line
    call("coco", "--coco", root, "--out", out, "--resume")
    masks = {f"masks/{name}" for name in ("made_of.json", "train2014_0.png", "val2014_0.png")}
    assert files_in(out).keys() == set(before) | masks and before.items() <= files_in(out).items()


def draw(objects):
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


def test_packed_run_lengths_against_pycocotools():
    rng = np.random.default_rng(0)
    for i in range(60):
        size = tuple(map(int, rng.integers(1, 300, 2)))
        blocks = np.kron(rng.random((size[0] // 9 + 1, size[1] // 9 + 1)), np.ones((9, 9)))
        mask = (blocks[:size[0], :size[1]] if i % 2 else rng.random(size)) < rng.random() ** 3
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert (coco.outline_mask({"size": size, "counts": packed}, size) == mask).all()


@pytest.mark.parametrize("outline", [
    None, "text", {}, [], {"counts": [3]}, [["a", "b"]], [None],
    [[0, 0, 1e9, 0, 1e9, 4]], [[0, 0, float("nan"), 0, 2, 4]], [[0, 0, 2, 0, 2, -float("inf")]],
    [[0, 0, 2, 0, 2, 4], [0, 0, 1e9, 0, 1e9, 4]], [[0, 0, 1e9, 1e9]],
    *({"size": [4, 4], "counts": counts} for counts in (
        [0, 2**30], [3], [20, -4], [8.0, 8], [2**62] * 4 + [16], "", "0", "oooo", "P0", "`0`0")),
    {"size": [8, 2], "counts": [16]}, {"size": [2**15, 2**15], "counts": [2**30]}])
def test_outlines_that_do_not_fit(outline):
    """pycocotools takes huge memory for a coordinate of 1e9 and writes beyond it for run lengths
    of another sum."""
    with pytest.raises(InputError, match="the file: an object without a readable outline"):
        draw([(0, outline)])


@pytest.mark.parametrize("train, val", [("a/x.jpg", "x.png"), ("x.jpg b/x.jpg", "y.jpg")])
def test_two_photos_of_one_name(train, val, tmp_path, capsys):
    """The second one would have the first one's mask."""
    coco_root(tmp_path, [(0, 1, 0, SQUARE), (1, 1, 0, SQUARE)])
    for split, names in (("train", train.split()), ("val", val.split())):
        path = tmp_path / f"annotations/instances_{split}2014.json"
        whole = json.loads(path.read_text())
        for image, name in zip(whole["images"], names):
            image["file_name"] = name
        path.write_text(json.dumps(whole | {"images": whole["images"][:len(names)]}))
    line = error_line(capsys, "coco", "--coco", tmp_path)
    assert "2 photos named x in train and val" in line
    assert not list(tmp_path.glob("*.csv")) and not (tmp_path / "masks").exists()


def test_masks_of_other_annotations_are_refused(tmp_path, capsys):
    root = coco_root(tmp_path, [(0, 1, 0, SQUARE), (3, 2, 0, SQUARE)])
    call("coco", "--coco", root)
    before = files_in(root)
    coco_root(root, [(0, 1, 0, SQUARE), (3, 2, 0, [[1, 1, 3, 1, 3, 3]])])
    line = error_line(capsys, "coco", "--coco", root, "--resume")
    assert "masks: holds an earlier run made with train" in line and "remove this one" in line
    coco_root(root, [(0, 1, 0, SQUARE), (3, 1, 0, SQUARE)])
    line = error_line(capsys, "coco", "--coco", root, "--resume")
    assert "holds an earlier run made with lists" in line and "remove" not in line
    assert files_in(root / "masks") == {
        name[6:]: data for name, data in before.items() if name.startswith("masks/")}


# ---- What is there already -----------------------------------------------------------------------

@pytest.fixture
def commands(tmp_path):
    """{script: a command line that writes into OUT, beside the data}"""
    out, source = tmp_path / "out", tmp_path / "VOC"
    voc_root(source, {"a": ["cat"], "b": []}, train=["a"])
    for name in "ab":
        write_labels(source / f"SegmentationClass/{name}.png", np.ones((4, 5), np.uint8))
    coco_root(tmp_path / "coco", [(0, 1, 0, SQUARE), (3, 2, 0, SQUARE)])
    return {"voc": ["voc", "--voc", source, "--out", out],
            "coco": ["coco", "--coco", tmp_path / "coco", "--out", out],
            "toy": ["toy", "--out", out, "--train", 2, "--val", 1]}


@pytest.mark.parametrize("script", ["voc", "coco"])
def test_resume_makes_what_is_missing_and_replaces_nothing(script, commands, tmp_path):
    out = tmp_path / "out"
    call(*commands[script])
    made, masks = files_in(out), sorted((out / "masks").glob("*.png"))
    (out / "train.csv").unlink()
    masks[0].unlink()
    for path in (masks[-1], out / "masks/mine.png"):
        path.write_bytes(b"mine")
    call(*commands[script], "--resume")
    assert files_in(out) == made | {f"masks/{masks[-1].name}": b"mine", "masks/mine.png": b"mine"}


@pytest.mark.parametrize("script", ["voc", "coco", "toy"])
@pytest.mark.parametrize("file", ["classes.txt", "train.csv", "val.csv", "masks/NAME.png"])
def test_the_users_files_are_refused_before_any_is_written(script, file, commands, tmp_path,
                                                           capsys):
    """Also where a --resume is given"""
    name = {"voc": "a", "coco": "val2014_3", "toy": "train_00001"}[script]
    path = tmp_path / ("out/data" if script == "toy" else "out") / file.replace("NAME", name)
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    if (script, file) == ("voc", "val.csv"):  # which it does not write
        call(*commands[script])
    else:
        for resume in ((), ("--resume",)):
            assert f"{path}: is there already, and no made_of.json says that a run of ours made " \
                   "it; pass another --out" in error_line(capsys, *commands[script], *resume)
        assert files_in(tmp_path / "out").keys() == {str(path.relative_to(tmp_path / "out"))}
    assert path.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', None])
def test_a_json_that_is_not_cocos(text, tmp_path, capsys):
    root = coco_root(tmp_path, [(0, 1, 0, SQUARE)])
    if text is None:
        shutil.rmtree(root / "annotations")
    else:
        (root / "annotations/instances_train2014.json").write_text(text)
    says = "no such file" if text is None else "not COCO's"
    assert f"instances_train2014.json: {says}" in error_line(capsys, "coco", "--coco", root)


# ---- Real photos ---------------------------------------------------------------------------------

@needs_photos
def test_real_voc(tmp_path):
    """Labels equal the XML, masks are the same files."""
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


@needs_photos
def test_real_coco(tmp_path):
    """Every label and every pixel, against pycocotools' own reader of the json"""
    root = REAL / "coco_mini"
    call("coco", "--coco", root, "--out", tmp_path)
    found, classes = listed(tmp_path, "train"), Split(tmp_path, "train").classes
    api = COCO(str(root / "annotations/instances_train2014.json"))
    shown = [image for i, image in api.imgs.items() if api.getAnnIds(i)]
    assert list(found) == [Path(image["file_name"]).stem for image in shown]
    for name, image in zip(found, shown):
        truth, names = np.zeros((image["height"], image["width"]), np.uint8), set()
        for entry in reversed(api.loadAnns(api.getAnnIds(image["id"]))):  # the first wins
            names.add(kind := api.cats[entry["category_id"]]["name"])
            truth[api.annToMask(entry) > 0] = 1 + classes.index(kind)
        assert set(found[name]) == names and len(classes) == 80
        assert np.array_equal(labels_in(tmp_path / f"masks/{name}.png"), truth)
