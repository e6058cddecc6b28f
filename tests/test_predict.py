"""eval.py for people without ground truth: masks and overlays for any photos, the archive for VOC's server; and its counting:
against torchmetrics, over several processes, over many thresholds at once."""
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_data import BAD, GOOD, ends_with, photos_root, voc_root
from test_scripts import bytes_in, call, check_label_png, files_in
from torchmetrics import JaccardIndex

import eval
from clip_model import InputError, read_image
from eval import SERVER, Predictions, confusion_matrix, pack_for_server, predict
from make_pseudo import read_cams, score_labels, write_labels
from mask_generator import ViT
from train_cam import VOC_CLASSES, Data, vit_sizes
from train_seg import Segmenter, load_segmenter

PETS = ["cat", "dog", "été"]


def segmenter(path, classes):
    """A model of random weights, saved as train_seg.py saves one."""
    torch.manual_seed(0)
    model = Segmenter(ViT(8, 64, 1, (4, 4)), len(classes) + 1, "linear")
    torch.nn.init.normal_(model.head.weight, std=3)  # so that different patches get different labels
    torch.save({"segmenter": model.state_dict(), "vit": vit_sizes(model.trunk), "decoder": "linear", "classes": classes}, path)
    return path


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return segmenter(tmp_path_factory.mktemp("model") / "seg.pt", PETS)


def error_line(capsys, script, *flags):
    """The one line with which the script refuses."""
    ends_with(2, script, *flags)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# ------------------------------------------------------------------------------------------ --images

def test_masks_and_overlays_for_photos_of_every_kind(pets, tmp_path, capsys):
    photos, saved = tmp_path / "my photos", tmp_path / "new/saved"
    photos.mkdir()
    for file, (make, _) in GOOD.items():
        make(photos / file)
    (photos / "notes.txt").write_text("no photo")
    (photos / ".hidden.jpg").write_bytes(b"")
    call("eval", "--images", photos, "--checkpoint", pets, "--save", saved, "--scales", 1, 1.5, "--strip", tmp_path / "strip.png",
         "--device", "cpu")
    assert f"masks of {len(GOOD)} images of my photos, scales [1.0, 1.5], flip True" in capsys.readouterr().out
    stems = {Path(file).stem for file in GOOD}
    assert files_in(saved).keys() == {f"{stem}.png" for stem in stems} | {f"overlays/{stem}.jpg" for stem in stems}
    model, seen = load_segmenter(pets), set()
    for file, (_, size) in GOOD.items():  # sizes are those of the upright photos
        check_label_png(saved / f"{Path(file).stem}.png", size, {0, 1, 2, 3})
        photo, labels = read_image(photos / file), np.array(Image.open(saved / f"{Path(file).stem}.png"))
        if max(size) <= 1024:
            assert np.array_equal(labels, predict(model, photo, [1, 1.5], True, torch.device("cpu")).argmax(0).numpy())
        with Image.open(saved / f"overlays/{Path(file).stem}.jpg") as overlay:
            assert overlay.size == size and overlay.mode == "RGB"
        seen |= set(np.unique(labels).tolist())
    assert len(seen) > 1
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (2 * 132, 8 * 132 + 16)  # photo and prediction of the first eight


def test_an_overlay_shows_the_photo_and_the_things():
    photo, labels = np.full((6, 9, 3), 100, np.uint8), np.zeros((6, 9), np.uint8)
    labels[:, 6:] = 1
    picture = np.asarray(eval.overlay(photo, labels))
    assert (picture[:, :6] == 100).all()                        # background: the photo itself
    assert (picture[:, 6] == 255).all()                         # the outline
    assert (picture[:, 7:] == [(100 + 128) // 2, 50, 50]).all()  # half photo, half the class's dark red


@pytest.mark.parametrize("file", BAD)
def test_a_bad_photo_stops_or_is_left_out(file, pets, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    BAD[file](photos / file)
    GOOD["grey.jpg"][0](photos / "a.jpg")
    flags = ["--images", photos, "--checkpoint", pets, "--save", tmp_path / "saved", "--device", "cpu"]
    assert f"{photos / file}: not a readable image" in error_line(capsys, "eval", *flags)
    ends_with(3, "eval", *flags, "--skip-bad")
    printed = capsys.readouterr()
    assert printed.err.startswith("done, but 1 left out:") and f"{file}: not a readable image" in printed.err
    assert "masks of 1 images" in printed.out and files_in(tmp_path / "saved").keys() == {"a.png", "overlays/a.jpg"}
    (photos / "a.jpg").unlink()
    assert "--skip-bad left no image" in error_line(capsys, "eval", *flags, "--skip-bad")


@pytest.mark.parametrize("files, says", [
    (["a.jpg", "a.png", "b.jpg"], "a.png: a.jpg has the same name before the dot"), ([], "no photo in it; expected files that end"),
    (["notes.txt"], "no photo in it"), (None, "no such folder")], ids=["twins", "empty", "text", "none"])
def test_folders_that_cannot_be_predicted(files, says, pets, tmp_path, capsys):
    photos = tmp_path / "photos"
    if files is not None:
        photos.mkdir()
    for file in files or ():
        GOOD["grey.jpg"][0](photos / "a.jpg") if file == "a.jpg" else (photos / file).write_bytes(b"not looked at")
    flags = ["--images", photos, "--checkpoint", pets, "--device", "cpu"]
    line = error_line(capsys, "eval", *flags, "--save", tmp_path / "saved")
    assert str(photos) in line and says in line and not (tmp_path / "saved").exists()


def test_photos_are_not_overwritten(pets, tmp_path, capsys):
    GOOD["palette.png"][0](tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    line = error_line(capsys, "eval", "--images", tmp_path, "--checkpoint", pets, "--save", tmp_path, "--device", "cpu")
    assert "would be overwritten" in line and (tmp_path / "a.png").read_bytes() == before


# ------------------------------------------------------------------------------------------ --voc-server

TEST = ["2008_000006", "2008_000011", "2008_000012", "2008_000018", "2008_000024"]


@pytest.fixture
def voc_test(tmp_path):
    """VOC's test images as their archive has them: photos and a list, no masks, no annotations; and a model."""
    root = voc_root(tmp_path / "VOC2012", test=TEST)
    for i, name in enumerate(TEST):
        noise = np.random.default_rng(i).integers(0, 256, (20 + i, 33, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((66, 40)).save(root / f"JPEGImages/{name}.jpg")
    return root, segmenter(tmp_path / "seg.pt", VOC_CLASSES)


def test_the_archive_for_vocs_server(voc_test, tmp_path, capsys):
    root, model = voc_test
    out = tmp_path / "out"
    flags = ["--data", root, "--split", "test", "--save", out, "--voc-server", "--device", "cpu"]
    call("eval", *flags, "--checkpoint", model, "--no-flip", "--scales", 0.5)
    assert "out/results.tar.gz: 5 PNGs for the evaluation server, competition comp6" in capsys.readouterr().out
    paths = {f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in TEST}
    assert files_in(out).keys() == paths | {"results.tar.gz"}
    for path in paths:
        check_label_png(out / path, (66, 40), set(range(21)))
    with tarfile.open(out / "results.tar.gz", "r:gz") as archive:
        assert {member.name for member in archive if member.isfile()} == paths
        assert all(archive.extractfile(path).read() == (out / path).read_bytes() for path in paths)
    predicted = bytes_in(out / SERVER)

    # PNGs of somebody else, with pixels that are to be ignored: the server knows no 255
    for name in TEST:
        write_labels(tmp_path / f"pred/{name}.png", np.array([[0, 20, 255]], np.uint8).repeat(22, axis=1).repeat(40, axis=0))
    call("eval", *flags, "--pred", tmp_path / "pred")
    assert bytes_in(out / SERVER) != predicted  # made again
    for path in paths:
        assert np.unique(Image.open(out / path)).tolist() == [0, 20]


def test_what_the_server_would_refuse(voc_test, tmp_path, capsys):
    root, model = voc_test
    out = tmp_path / "out"
    flags = ["--data", root, "--split", "test", "--save", out, "--voc-server", "--checkpoint", model, "--device", "cpu"]
    write_labels(out / SERVER / "2007_000001.png", np.zeros((2, 3), np.uint8))
    assert "2007_000001.png is no image of the split" in error_line(capsys, "eval", *flags)
    (out / SERVER / "2007_000001.png").unlink()
    for name in TEST[1:]:
        write_labels(out / SERVER / f"{name}.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(InputError, match=f"{TEST[0]}.png is missing; expected the PNGs of all 5 images"):
        pack_for_server(out, TEST)
    assert not (out / "results.tar.gz").exists()
    (root / "classes.txt").write_text("\n".join(PETS))
    assert "has 3 classes (cat, dog, été, ...); the server expects VOC's 20" in error_line(capsys, "eval", *flags)
    (root / "classes.txt").write_text("\n".join(reversed(VOC_CLASSES)))
    assert "in their order" in error_line(capsys, "eval", *flags)


def test_a_split_without_masks_is_predicted_not_scored(voc_test, tmp_path, capsys):
    root, model = voc_test
    flags = ["--data", root, "--split", "test", "--checkpoint", model, "--device", "cpu"]
    call("eval", *flags, "--save", tmp_path / "saved")
    assert "masks of 5 images of test" in (printed := capsys.readouterr().out) and "mIoU" not in printed
    assert files_in(tmp_path / "saved").keys() == {f"{name}.png" for name in TEST}
    line = error_line(capsys, "eval", *flags)
    assert f"{TEST[0]}.png: no such mask" in line and "--voc-server" in line
    assert "no score for --json" in error_line(capsys, "eval", *flags, "--save", tmp_path / "b", "--json", tmp_path / "s.json")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_two_processes_predict_as_one(voc_test, tmp_path, capsys):
    root, model = voc_test
    flags = ["--data", root, "--split", "test", "--checkpoint", model, "--voc-server", "--device", "cpu"]
    call("eval", *flags, "--save", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "eval.py", *flags,
               "--save", tmp_path / "two"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 PNGs for the evaluation server") == 1
    assert bytes_in(tmp_path / "two" / SERVER) == bytes_in(tmp_path / "one" / SERVER)
    with tarfile.open(tmp_path / "two/results.tar.gz") as archive:
        assert len([member for member in archive if member.isfile()]) == 5


# ------------------------------------------------------------------------------------------ flags that do not go together

SEG, TO = "--checkpoint seg.pt", "--save out"


@pytest.mark.parametrize("flags, says", [
    ("", "expected one of --pred, --cams, --checkpoint"), ("--data D", "expected one of --pred, --cams, --checkpoint"),
    ("--data D --pred P --cams C", "expected one of --pred"), ("--data D --pred P --save-truth T", "expected one of --pred"),
    ("--pred P", "expected one of --data ROOT, a data set, and --images"), (f"--data D --images I {SEG} {TO}", "one of --data"),
    (f"--images I --pred P {TO}", "--images: photos alone can only be predicted; expected --checkpoint"),
    (f"--images I --cams C {TO}", "--images: photos alone"), ("--images I --save-truth T", "--images: photos alone"),
    (f"--images I {SEG}", "--images: expected --save"), (f"--images I {SEG} {TO} --json s", "--json: photos of --images have no"),
    (f"--images I {SEG} {TO} --voc-server", "--voc-server: expected --data VOCdevkit/VOC2012 --split test --save"),
    (f"--data D {SEG} {TO} --voc-server", "--voc-server: expected"), (f"--data D {SEG} --split test --voc-server", "--voc-server"),
    ("--data D --split test --save-truth T --voc-server", "--voc-server: expected"),
    (f"--data D {SEG} {TO} --split test --voc-server --skip-bad", "--skip-bad: the server wants every image"),
    (f"--data D {SEG} {TO} --split test --voc-server --json s", "--json: only the server has the masks"),
    (f"--data D --save-truth T {TO}", "--save-truth: nothing is predicted"), ("--data D --save-truth T --json s", "--save-truth"),
    ("--data D --save-truth T --strip s", "--save-truth: nothing"), ("--data D --pred P --oracle-sweep", "--oracle-sweep: tries"),
    (f"--data D {SEG} --threshold 0.4", "--threshold: cuts CAMs"), ("--data D --pred P --crf voc", "--crf: sharpens"),
    ("--data D --cams C --crf voc", "make_pseudo.py --crf"), ("--data D --pred P --scales 1 2", "--scales: of what a model sees"),
    (f"--data D {SEG} --scales 1 0", "--scales 1.0 0.0: expected numbers above 0"),
    (f"--data D {SEG} --scales -1", "--scales -1.0: expected"), (f"--data D {SEG} --scales nan", "--scales nan: expected numbers"),
    (f"--data D {SEG} --scales inf", "--scales inf"),
    ("--data D --pred P --columns a=b", "--columns: columns of a picture strip; expected --strip"),
    ("--data D --pred P --strip s --columns ab c=d", "--columns ab: expected CAPTION=DIR")])
def test_flags_that_do_not_go_together(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert says in error_line(capsys, "eval", *flags.split())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ counting

def masks_root(root, count, sizes, predicted=(0, 1, 2, 3, 255)):
    """A VOC root with masks of three classes and 255, and predictions in root/pred; no photos: scoring PNGs opens none."""
    root = voc_root(root, PETS, val=(names := [f"{i:03d}" for i in range(count)]))
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        H, W = sizes[i % len(sizes)]
        for folder, labels in (("SegmentationClass", [0, 1, 2, 3, 255]), ("pred", predicted)):
            write_labels(root / folder / f"{name}.png", rng.choice(labels, (H, W)).astype(np.uint8))
    return root


def score(root, *flags):
    call("eval", "--data", root, "--json", root / "s.json", "--device", "cpu", *flags)
    return json.loads((root / "s.json").read_text())


def test_iou_equals_torchmetrics(tmp_path):
    """Masks of random pixels, and one class of three never predicted and in few masks; 255 in the truth."""
    root = masks_root(tmp_path / "root", 12, [(1, 1), (3, 17), (30, 41), (64, 64)], predicted=[0, 1, 2])
    metric = JaccardIndex(task="multiclass", num_classes=4, average="none", ignore_index=255)
    for name in Data(root, "val").names:
        pred, truth = (torch.from_numpy(np.array(Image.open(root / folder / f"{name}.png")))[None]
                       for folder in ("pred", "SegmentationClass"))
        metric.update(pred, truth)
    result = score(root, "--pred", root / "pred")
    expected = metric.compute().double().numpy()
    np.testing.assert_allclose([value / 100 for value in result["iou"].values()], expected, atol=1e-6, rtol=0)
    assert result["miou"] / 100 == pytest.approx(expected.mean(), abs=1e-6) and 0 < result["miou"] < 50
    assert result["iou"]["été"] == 0


def test_workers_count_as_none(tmp_path, monkeypatch):
    """64 images are a worker's portion: 200 are three whole ones and a rest."""
    root, asked = masks_root(tmp_path / "root", 200, [(5, 9), (9, 5)]), []

    class Spy(eval.DataLoader):
        def __init__(self, *args, num_workers, **others):
            asked.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **others)
    monkeypatch.setattr(eval, "DataLoader", Spy)
    results = []
    for workers in (0, 1, 2):
        eval.main(eval.parse_args(["--data", str(root), "--pred", str(root / "pred"), "--json", str(root / "s.json"), "--device",
                                   "cpu", "--workers", str(workers), "--save", str(tmp_path / f"saved {workers}")]))
        results.append((root / "s.json").read_text())
    assert asked == [0, 1, 2] and results[0] == results[1] == results[2] and json.loads(results[0])["images"] == 200
    for workers in (0, 1, 2):
        assert bytes_in(tmp_path / f"saved {workers}") == bytes_in(root / "pred")


def test_the_sweep_counts_what_single_thresholds_count(tmp_path, capsys):
    root = photos_root(tmp_path / "root", "a.jpg,cat\nb.jpg,cat;été\nc.jpg,\n", ["a.jpg", "b.jpg", "c.jpg"], "\n".join(PETS))
    rng = np.random.default_rng(0)
    (root / "cams").mkdir()
    for name, maps in (("a", 1), ("b", 2), ("c", 0)):
        np.save(root / f"cams/{name}.npy", rng.random((maps, 2, 3)).astype(np.float16))
        write_labels(root / f"masks/{name}.png", rng.choice([0, 1, 3, 255], (8, 12)).astype(np.uint8))
    flags = ["--split", "train", "--cams", root / "cams", "--workers", 0]
    swept = score(root, *flags, "--oracle-sweep")
    assert "TUNED ON GROUND TRUTH" in capsys.readouterr().out
    steps = [round(0.02 * i, 2) for i in range(1, 50)]
    single = {t: score(root, *flags, "--threshold", t)["miou"] for t in steps}
    best = max(single, key=single.get)
    assert swept["oracle"] == {"miou": round(single[best], 3), "threshold": best, "threshold_chosen": "tuned on ground truth"}
    assert len(set(single.values())) > 10 and swept["miou"] == score(root, *flags, "--threshold", swept["threshold"])["miou"]

    data, args = Data(root, "train"), eval.parse_args(["--data", str(root), "--cams", str(root / "cams")])
    counts = Predictions(args, data, data.names, None, steps, True, torch.device("cpu"))
    for i, name in enumerate(data.names):
        present, truth = np.flatnonzero(data.labels(name)), np.array(Image.open(root / f"masks/{name}.png"))
        cams = read_cams(root / "cams", name, present, (8, 12))
        assert np.array_equal(counts[i], [confusion_matrix(score_labels(cams, present, t), truth, 4) for t in steps])
