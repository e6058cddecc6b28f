"""eval.py: counts against set arithmetic, thresholds, label PNGs."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from clip_model import InputError
from eval import confusion_matrix, iou, predict
from make_pseudo import PALETTE, otsu, picture_strip, read_labels, score_labels, write_labels
from mask_generator import ViT
from train_seg import Segmenter

# ------------------------------------------------------------------------------------------ confusion matrix and IoU

@pytest.mark.parametrize("seed", range(5))
def test_counts_and_iou_equal_set_arithmetic(seed):
    rng = np.random.default_rng(seed)
    C = 4
    pred, truth = rng.choice([0, 1, 2, 3, 255], (2, 13, 7)).astype(np.uint8)
    scored = {i for i, t in enumerate(truth.flat) if t != 255}
    says = [{i for i in scored if pred.flat[i] == k or (k == 0 and pred.flat[i] == 255)} for k in range(C)]
    holds = [{i for i in scored if truth.flat[i] == k} for k in range(C)]
    matrix = confusion_matrix(pred, truth, C)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[len(t & p) for p in says] for t in holds]
    np.testing.assert_allclose(iou(matrix), [len(p & t) / len(p | t) for p, t in zip(says, holds, strict=True)], rtol=1e-12)


def test_absent_class_is_nan_and_a_missed_one_zero():
    matrix = confusion_matrix(np.array([[0, 1, 1]]), np.array([[0, 1, 2]]), 4)
    np.testing.assert_array_equal(iou(matrix), [1, 0.5, 0, np.nan])


def test_truth_of_only_255_counts_nothing():
    matrix = confusion_matrix(np.array([[0, 3, 255]]), np.full((1, 3), 255), 4)
    assert matrix.shape == (4, 4) and matrix.sum() == 0 and np.isnan(iou(matrix)).all()


def test_predicted_255_is_background_and_inputs_stay():
    pred = np.array([[255, 255]], np.uint8)
    assert confusion_matrix(pred, np.array([[0, 1]], np.uint8), 2).tolist() == [[1, 0], [1, 0]]
    assert pred.tolist() == [[255, 255]]


@pytest.mark.parametrize("pred, truth", [([[0, 1]], [[0], [1]]), ([[0, 4]], [[0, 0]]), ([[0, 0]], [[0, 4]]), ([[-1]], [[0]])])
def test_other_shapes_and_foreign_labels_raise(pred, truth):
    with pytest.raises(ValueError, match="shape|labels"):
        confusion_matrix(np.array(pred), np.array(truth), 4)


def test_a_foreign_prediction_under_255_is_ignored():
    assert confusion_matrix(np.array([9, 1]), np.array([255, 1]), 2).tolist() == [[0, 0], [0, 1]]


# ------------------------------------------------------------------------------------------ thresholds, CAMs -> labels

def test_otsu_splits_two_humps():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.04, 3000), rng.normal(0.8, 0.04, 1000)])
    threshold = otsu(torch.from_numpy(np.histogram(values, 100, (0, 1))[0]).float())
    assert ((values > threshold) == (np.arange(4000) >= 3000)).all()


def test_otsu_equals_trying_every_threshold():
    histogram = torch.from_numpy(np.random.default_rng(1).integers(0, 50, 20)).float()
    values = np.repeat((np.arange(20) + 0.5) / 20, histogram.int().numpy())

    def between(t):
        low, high = values[values < t], values[values >= t]
        return len(low) * len(high) * (high.mean() - low.mean()) ** 2
    best = max((i / 20 for i in range(1, 20)), key=between)
    assert otsu(histogram) == pytest.approx(best)


def test_score_labels():
    cams = torch.tensor([[[0.9, 0.3, 0.5]], [[0.1, 0.4, 0.8]]])
    labels = score_labels(cams, np.array([1, 4]), 0.45)
    assert labels.dtype == np.uint8 and labels.tolist() == [[2, 0, 5]]
    assert score_labels(cams, np.array([1, 4]), 0.9).tolist() == [[0, 0, 0]]  # on a tie background wins
    assert score_labels(torch.zeros(0, 2, 3), np.array([], int), 0.5).tolist() == [[0] * 3] * 2


# ------------------------------------------------------------------------------------------ label PNGs

def test_palette_is_vocs():
    assert PALETTE[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]     # background, aeroplane, bicycle, bird
    assert PALETTE[45:48] == [192, 128, 128] and PALETTE[60:63] == [0, 64, 128]  # person, tvmonitor
    assert PALETTE[-3:] == [224, 224, 192] and len(PALETTE) == 768               # ignore


def test_labels_survive_a_file(tmp_path):
    labels = np.array([[0, 1, 2], [6, 255, 0]], np.uint8)
    write_labels(tmp_path / "a.png", labels)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P" and picture.getpalette() == PALETTE
    read = read_labels(tmp_path / "a.png", (2, 3), 7)
    assert read.dtype == np.uint8 and np.array_equal(read, labels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]  # and nothing temporary


def damage(data):
    """A PNG whose first data chunk has a wrong length: Pillow says SyntaxError, not OSError."""
    at = data.index(b"IDAT")
    return data[:at - 4] + (3).to_bytes(4, "big") + data[at:]


@pytest.mark.parametrize("size, num_labels, change, complaint", [
    ((3, 2), 7, None, "2x3"), ((2, 3), 6, None, "label 6"), ((2, 3), 7, lambda data: data[:60], "readable"),
    ((2, 3), 7, lambda data: b"no picture", "readable"), ((2, 3), 7, damage, "readable")],
    ids=["size", "class", "cut", "text", "chunk"])
def test_what_is_no_label_image(tmp_path, size, num_labels, change, complaint):
    path = tmp_path / "a.png"
    write_labels(path, np.array([[0, 1, 2], [6, 255, 0]], np.uint8))
    if change:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=complaint):
        read_labels(path, size, num_labels)


def test_colours_and_a_missing_file_are_no_labels(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="mode RGB"):
        read_labels(tmp_path / "a.png", (2, 3), 7)
    with pytest.raises(InputError, match="b.png"):
        read_labels(tmp_path / "b.png", (2, 3), 7)


def test_picture_strip(tmp_path):
    rows = [[Image.new("RGB", (5, 9), colour) for colour in ("red", "blue")] for _ in range(3)]
    picture_strip(rows, ["photo", "truth"], tmp_path / "strip.png", side=20)
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (2 * 24, 3 * 24 + 16)
        assert strip.getpixel((10, 70)) == (255, 0, 0) and strip.getpixel((34, 70)) == (0, 0, 255)


# ------------------------------------------------------------------------------------------ the whole script

@pytest.mark.parametrize("split, images", [("train", 12), ("val", 4)])
def test_truth_against_itself_is_100(toy, tmp_path, capsys, split, images):
    voc = toy / "VOC2012"
    eval.main(eval.parse_args(["--data", str(voc), "--split", split, "--pred", str(voc / "SegmentationClass"),
                               "--json", str(tmp_path / "scores.json"), "--save", str(tmp_path / "saved")]))
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["miou"] == 100 and set(result["iou"].values()) <= {100, None} and result["iou"]["background"] == 100
    assert result["images"] == images and len(list((tmp_path / "saved").iterdir())) == images
    assert "100.00" in capsys.readouterr().out


def test_one_wrong_file_by_hand(toy, tmp_path, capsys):
    """All background: its IoU is its share of the pixels that are not 255, every class that occurs gets 0."""
    voc = toy / "VOC2012"
    names = (voc / "ImageSets/Segmentation/val.txt").read_text().split()
    truth = [np.asarray(Image.open(voc / f"SegmentationClass/{name}.png")) for name in names]
    for name, labels in zip(names, truth, strict=True):
        write_labels(tmp_path / f"{name}.png", np.zeros_like(labels))
    eval.main(eval.parse_args(["--data", str(voc), "--pred", str(tmp_path), "--json", str(tmp_path / "s.json")]))
    pixels = np.concatenate([labels.flatten() for labels in truth])
    share = 100 * (pixels == 0).sum() / (pixels != 255).sum()
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["iou"]["background"] == pytest.approx(share, abs=1e-3)
    assert result["miou"] == pytest.approx(share / len(set(pixels.tolist()) - {255}), abs=1e-3)


@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_predict_any_size(decoder):
    """Probabilities at the photo's size, for a photo smaller than a patch too; flipping photo = flipping prediction."""
    torch.manual_seed(0)
    model = Segmenter(ViT(8, 64, 1, (4, 4)), 3, decoder).eval()
    for W, H in ((37, 21), (5, 3), (8, 40)):
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8))
        prob = predict(model, photo, [1.0, 1.5], True, torch.device("cpu"))
        assert prob.shape == (3, H, W)
        torch.testing.assert_close(prob.sum(0), torch.ones(H, W))
        mirrored = predict(model, photo.transpose(Image.FLIP_LEFT_RIGHT), [1.0, 1.5], True, torch.device("cpu"))
        torch.testing.assert_close(mirrored.flip(2), prob, atol=1e-6, rtol=0)  # measured 1e-7
    with torch.no_grad():
        assert model(torch.randn(2, 3, 13, 30)).shape == (2, 3, 13, 30)
