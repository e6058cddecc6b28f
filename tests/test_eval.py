"""eval.py: counts against set arithmetic and torchmetrics, label PNGs, pictures, prediction of any photos."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import call, error_line, files_in
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from test_data import photos
from test_scripts import check_label_png
from torchmetrics import JaccardIndex

import eval
from clip_model import InputError, read_image
from eval import confusion_matrix, iou, predict
from make_pseudo import PALETTE, read_cams, read_labels, score_labels, write_labels
from mask_generator import ViT
from train_cam import Split
from train_seg import RECIPES, Segmenter

PETS = ["cat", "dog", "été"]


# ------------------------------------------------------------------------------------------ confusion matrix and IoU

labels = arrays(np.uint8, st.tuples(st.integers(1, 6), st.just(5)), elements=st.sampled_from([0, 1, 2, 3, 255]))


@given(labels, labels)
def test_counts_and_iou_equal_set_arithmetic(pred, truth):
    """A predicted 255 is background, a true 255 is left out, counts of parts add up, the arguments stay as they are."""
    height = min(len(pred), len(truth))
    pred, truth = pred[:height], truth[:height]
    given, scored = (pred.copy(), truth.copy()), {i for i, t in enumerate(truth.flat) if t != 255}
    says = [{i for i in scored if pred.flat[i] == k or (k == 0 and pred.flat[i] == 255)} for k in range(4)]
    holds = [{i for i in scored if truth.flat[i] == k} for k in range(4)]
    matrix = confusion_matrix(pred, truth, 4)
    assert matrix.dtype == np.int64 and matrix.tolist() == [[len(t & p) for p in says] for t in holds]
    expected = [len(p & t) / len(p | t) if p | t else np.nan for p, t in zip(says, holds, strict=True)]
    np.testing.assert_allclose(iou(matrix), expected)
    assert np.array_equal(matrix, sum(confusion_matrix(p, t, 4) for p, t in zip(pred, truth, strict=True)))
    assert np.array_equal(pred, given[0]) and np.array_equal(truth, given[1])


@pytest.mark.parametrize("pred, truth", [([[0, 1]], [[0], [1]]), ([[0, 4]], [[0, 0]]), ([[0, 0]], [[0, 4]]), ([[-1]], [[0]])])
def test_other_shapes_and_foreign_labels_raise(pred, truth):
    with pytest.raises(ValueError, match="shape|labels"):
        confusion_matrix(np.array(pred), np.array(truth), 4)


def score(root, *flags):
    call("eval", "--data", root, "--json", root / "s.json", "--device", "cpu", *flags)
    return json.loads((root / "s.json").read_text())


@pytest.fixture
def pets(tmp_path):
    """Three photos; masks of random labels, 255 among them, été rarely; predictions without été in pred/, random CAMs in cams/."""
    root = photos(tmp_path / "pets", "images/a.jpg,cat\nimages/b.JPG,cat;été\nimages/c.PNG,\n", "\n".join(PETS))
    rng = np.random.default_rng(0)
    (root / "cams").mkdir()
    for name, maps in (("a", 1), ("b", 2), ("c", 0)):
        write_labels(root / f"masks/{name}.png", rng.choice([0, 0, 1, 1, 2, 2, 3, 255], (8, 12)).astype(np.uint8))
        write_labels(root / f"pred/{name}.png", rng.choice([0, 1, 2, 255], (8, 12)).astype(np.uint8))
        np.save(root / f"cams/{name}.npy", rng.random((maps, 2, 3)).astype(np.float16))
    return root


def test_iou_equals_torchmetrics(pets):
    metric = JaccardIndex(task="multiclass", num_classes=4, average="none", ignore_index=255)
    for name in "abc":
        pred, truth = (torch.from_numpy(np.array(Image.open(pets / folder / f"{name}.png")))[None] for folder in ("pred", "masks"))
        metric.update(torch.where(pred == 255, 0, pred), truth)
    result, expected = score(pets, "--split", "train", "--pred", pets / "pred"), 100 * metric.compute().double().numpy()
    assert list(result["iou"].values()) == pytest.approx(expected.tolist(), abs=1e-4) and result["iou"]["été"] == 0
    assert result["miou"] == pytest.approx(expected.mean(), abs=1e-4) and 0 < result["miou"] < 50


def test_the_sweep_counts_what_single_background_scores_count(pets, capsys):
    """The truth is what a score of 0.6 gives, so the best lies inside."""
    split, flags = Split(pets, "train"), ["--split", "train", "--cams", pets / "cams", "--background-score"]
    for name in split.names:
        present = np.flatnonzero(split.labels[name])
        write_labels(pets / f"masks/{name}.png", score_labels(read_cams(pets / "cams", name, present, (8, 12)), present, 0.6))
    swept = score(pets, *flags, 0.3, "--oracle-sweep")
    assert "TUNED ON GROUND TRUTH" in capsys.readouterr().out
    single = {t: score(pets, *flags, t)["miou"] for t in eval.SWEEP}
    best = max(single, key=single.get)
    assert swept["oracle"] == {"miou": 100, "background_score": best, "background_score_chosen": "tuned on ground truth"}
    assert single[0.6] == 100 > swept["miou"] == single[0.3] and 0.5 < best <= 0.6 and len(set(single.values())) > 10


@pytest.mark.parametrize("split", ["train", "val"])
def test_truth_against_itself_is_100(split, toy, tmp_path, capsys):
    call("eval", "--data", toy / "data", "--split", split, "--pred", toy / "data/masks", "--json", tmp_path / "s.json")
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["miou"] == 100 and set(result["iou"].values()) <= {100, None} and result["iou"]["background"] == 100
    assert "100.00" in capsys.readouterr().out


def test_truth_of_another_folder(pets):
    (pets / "masks").rename(pets / "elsewhere")
    flags = ["--split", "train", "--pred", pets / "elsewhere", "--truth"]
    assert score(pets, *flags, pets / "elsewhere")["miou"] == 100 > score(pets, *flags, pets / "pred")["miou"]


# ------------------------------------------------------------------------------------------ labels

def test_score_labels():
    """[eq. P1] by hand"""
    cams = torch.tensor([[[0.9, 0.3, 0.5]], [[0.1, 0.4, 0.8]]])
    labels = score_labels(cams, np.array([1, 4]), 0.45)
    assert labels.dtype == np.uint8 and labels.tolist() == [[2, 0, 5]]
    assert score_labels(cams, np.array([1, 4]), 0.9).tolist() == [[0, 0, 0]]  # on a tie background wins
    assert score_labels(torch.zeros(0, 2, 3), np.array([], int), 0.5).tolist() == [[0] * 3] * 2


LABELS = np.array([[0, 1, 2], [6, 255, 0]], np.uint8)


def test_labels_survive_a_file(tmp_path):
    assert PALETTE[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]          # VOC's: background, aeroplane, bicycle, bird
    assert PALETTE[45:48] == [192, 128, 128] and PALETTE[-3:] == [224, 224, 192]  # person, ignore
    write_labels(tmp_path / "a.png", LABELS)
    check_label_png(tmp_path / "a.png", (3, 2), {0, 1, 2, 6, 255})
    read = read_labels(tmp_path / "a.png", (2, 3), 7)
    assert read.dtype == np.uint8 and np.array_equal(read, LABELS) and list(files_in(tmp_path)) == ["a.png"]


def damage(data):
    """A PNG whose first data chunk has a wrong length: Pillow says SyntaxError, not OSError."""
    at = data.index(b"IDAT")
    return data[:at - 4] + (3).to_bytes(4, "big") + data[at:]


@pytest.mark.parametrize("size, num_labels, change, says", [
    ((3, 2), 7, None, "2x3 .*its photo is 3x2"), ((2, 3), 6, None, "label 6"), ((2, 3), 7, lambda data: data[:60], "no readable"),
    ((2, 3), 7, lambda data: b"no picture", "no readable"), ((2, 3), 7, damage, "no readable"),
    ((2, 3), 7, lambda data: b"", "no readable")], ids=["size", "class", "cut", "text", "chunk", "empty"])
def test_what_is_no_label_image(size, num_labels, change, says, tmp_path):
    write_labels(tmp_path / "a.png", LABELS)
    if change:
        (tmp_path / "a.png").write_bytes(change((tmp_path / "a.png").read_bytes()))
    with pytest.raises(InputError, match=f"a.png: .*{says}"):
        read_labels(tmp_path / "a.png", size, num_labels)


def test_masks_with_91_ids_are_named(tmp_path):
    write_labels(tmp_path / "a.png", np.array([[0, 90, 255]], np.uint8))
    for num_labels, says in ((81, "COCO's 91 category ids"), (21, "another class list")):
        with pytest.raises(InputError, match=f"label 90.*{says}"):
            read_labels(tmp_path / "a.png", None, num_labels)


# ------------------------------------------------------------------------------------------ pictures

def test_overlay_shows_the_photo_and_the_things():
    photo, labels = np.full((6, 9, 3), 100, np.uint8), np.zeros((6, 9), np.uint8)
    labels[:, 6:] = 1
    picture = np.asarray(eval.overlay(photo, labels))
    assert (picture[:, :6] == 100).all()                        # background: the photo itself
    assert (picture[:, 6] == 255).all()                         # the outline
    assert (picture[:, 7:] == [(100 + 128) // 2, 50, 50]).all()  # half photo, half the class's dark red


def test_heat_goes_from_blue_to_red():
    cams = torch.tensor([[[0, 0.5, 1.0]], [[0, 0, 0.2]]])  # the strongest counts
    picture = np.asarray(eval.heat(np.zeros((1, 3, 3), np.uint8), cams))[0]
    assert picture.argmax(axis=1).tolist() == [2, 1, 0]
    empty = np.asarray(eval.heat(np.full((1, 3, 3), 200, np.uint8), cams[:0]))  # no class: the photo in grey, in blue
    assert (empty[..., 2] > empty[..., 0]).all() and len(np.unique(empty.reshape(-1, 3), axis=0)) == 1


def test_examples_show_a_photo_of_each_class(tmp_path):
    names = [f"{i}.jpg" for i in range(5)]
    table = "".join(f"images/{name},{shows}\n" for name, shows in zip(names, ("", "cat;dog", "cat", "cat", "dog;été"), strict=True))
    split = Split(photos(tmp_path, table, "\n".join(PETS), names), "train")
    assert eval.examples(split, 8) == ["2", "1", "4", "0", "3"]  # cat alone, dog, été, then the others
    assert eval.examples(split, 2) == ["2", "1"]


def test_strip_of_labels_and_cams(pets, tmp_path):
    call("eval", "--data", pets, "--split", "train", "--pred", pets / "pred", "--strip", tmp_path / "strip.png", "--strip-count", 2,
         "--columns", f"CAM={pets / 'cams'}", f"mask={pets / 'masks'}", "--device", "cpu")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (5 * 132, 2 * 132 + 16)  # photo, two columns, prediction, truth; height for captions
        cells = [np.asarray(strip.crop((132 * i + 1, 16 + 22, 132 * i + 127, 16 + 105))).astype(int) for i in range(5)]
    colours = {tuple(PALETTE[3 * k:3 * k + 3]) for k in (0, 1, 2, 3, 255)}
    assert all({tuple(pixel) for pixel in cells[i].reshape(-1, 3)} <= colours for i in (2, 3, 4))
    assert np.array_equal(cells[2], cells[4]) and not np.array_equal(cells[3], cells[4])  # mask is truth, prediction is not
    assert not np.array_equal(cells[0], cells[1])


# ------------------------------------------------------------------------------------------ prediction

@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A model of random weights for PETS, saved as train_seg.py saves one."""
    torch.manual_seed(0)
    trunk = ViT(8, 64, 1, (4, 4))
    model, path = Segmenter(trunk, 4), tmp_path_factory.mktemp("model") / "seg.pt"
    torch.nn.init.normal_(model.label_vectors)
    torch.save({"segmenter": model.state_dict(), "vit": trunk.sizes, "classes": PETS, "recipe": RECIPES["toy"]}, path)
    return path


TWO_SCALES = RECIPES["toy"] | {"test_scales": (1, 1.5)}


@pytest.mark.parametrize("W, H", [(37, 21), (5, 3), (8, 40)])
def test_predict_any_size(W, H, segmenter):
    """Probabilities at the photo's size, for a photo smaller than a patch too; flipping photo = flipping prediction."""
    model, cpu = eval.load_segmenter(segmenter)[0], torch.device("cpu")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8))
    prob = predict(model, photo, TWO_SCALES, True, cpu)
    assert prob.shape == (4, H, W)
    torch.testing.assert_close(prob.sum(0), torch.ones(H, W))
    mirrored = predict(model, photo.transpose(Image.FLIP_LEFT_RIGHT), TWO_SCALES, True, cpu)
    torch.testing.assert_close(mirrored.flip(2), prob, atol=1e-6, rtol=0)  # measured 1e-7
    with torch.no_grad():
        assert model(torch.randn(2, 3, H, W)).shape == (2, 4, H, W)


RAMP = np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8)
ODD = {  # file: (mode, more for save, width and height of the photo as shown)
    "cmyk.jpg": ("CMYK", {}, (40, 30)), "grey.jpg": ("L", {}, (40, 30)), "palette.png": ("P", {}, (40, 30)),
    "see through.gif": ("P", {"transparency": 3}, (40, 30)), "rgba.png": ("RGBA", {}, (40, 30)), "one bit.png": ("1", {}, (40, 30)),
    "16 bit.png": ("I;16", {}, (40, 30)), "16 bit.large.TIFF": ("I;16", {}, (40, 30)),
    "rotated.jpg": ("RGB", {"exif": 6}, (30, 40)),
    "one pixel.png": ("RGB", {}, (1, 1)), "long.jpg": ("RGB", {}, (3000, 9)),
    "été à la plage 海.JPEG": ("RGB", {}, (40, 30))}


def odd_photos(folder):
    folder.mkdir()
    for file, (mode, save, size) in ODD.items():
        photo = Image.fromarray(RAMP.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(RAMP).convert(mode)
        if "exif" in save:
            save = {"exif": Image.Exif()}
            save["exif"][0x0112] = 6
        elif size != photo.size:
            photo = photo.resize(size)
        photo.save(folder / file, **save)
    return folder


def test_masks_and_overlays_of_odd_photos(segmenter, tmp_path, capsys):
    """Any file that shows a picture; hidden files and other kinds are passed over."""
    folder, saved = odd_photos(tmp_path / "my photos"), tmp_path / "new/saved"
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden.jpg").write_bytes(b"")
    call("eval", "--images", folder, "--checkpoint", segmenter, "--save", saved, "--scales", 1, 1.5, "--crf", "none",
         "--device", "cpu")
    assert f"masks of {len(ODD)} photos; 0 background, 1 cat, 2 dog, 3 été" in capsys.readouterr().out
    stems = {os.path.splitext(file)[0]: file for file in ODD}
    assert files_in(saved).keys() == {f"{stem}.png" for stem in stems} | {f"overlays/{stem}.jpg" for stem in stems}
    model, seen = eval.load_segmenter(segmenter)[0], set()
    for stem, file in stems.items():  # sizes are those of the upright photos
        check_label_png(saved / f"{stem}.png", ODD[file][2], {0, 1, 2, 3})
        with Image.open(saved / f"overlays/{stem}.jpg") as overlay:
            assert overlay.size == ODD[file][2] and overlay.mode == "RGB"
        labels = np.array(Image.open(saved / f"{stem}.png"))
        if file != "long.jpg":  # the model sees a smaller copy
            expected = predict(model, read_image(folder / file), TWO_SCALES, True, torch.device("cpu")).argmax(0).numpy()
            assert np.array_equal(labels, expected)
        seen |= set(np.unique(labels).tolist())
    assert len(seen) > 1


def test_a_split_without_masks_is_predicted_not_scored(segmenter, pets, tmp_path, capsys):
    flags = ["--data", pets, "--split", "train", "--checkpoint", segmenter, "--device", "cpu"]
    (pets / "masks/a.png").unlink()
    assert "masks/a.png: no readable label image" in error_line(capsys, "eval", *flags, "--save", tmp_path / "a")  # some have masks
    shutil.rmtree(pets / "masks")
    call("eval", *flags, "--save", tmp_path / "saved", "--strip", tmp_path / "strip.png")
    printed = capsys.readouterr().out
    assert "masks of 3 photos of train, scales" in printed and "not scored" in printed and "mIoU" not in printed
    assert files_in(tmp_path / "saved").keys() == {"a.png", "b.png", "c.png"}
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (2 * 132, 3 * 132 + 16)
    assert "masks/a.png" in error_line(capsys, "eval", *flags)
    assert "no score for --json" in error_line(capsys, "eval", *flags, "--save", tmp_path / "b", "--json", tmp_path / "s.json")
    assert not (tmp_path / "b").exists()
