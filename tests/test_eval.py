"""eval.py: counts against set arithmetic and torchmetrics, pictures, prediction of any photos."""
import json
import shutil
import weakref
from argparse import Namespace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import CPU, call, check_label_png, error_line, files_in
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from test_data import photos
from torchmetrics import JaccardIndex

import eval
from common import Split, digest, read_image, write_labels
from eval import SWEEP, confusion_matrix, iou, predict, slide, sweep_matrices
from make_pseudo import average_in_segments, dense_crf, score_labels
from mask_generator import ViT
from train_seg import Segmenter

PETS = ["cat", "dog", "été"]
labels = arrays(np.uint8, (5, 4), elements=st.sampled_from([0, 1, 2, 3, 255]))


@given(labels, labels)
def test_counts_and_iou_equal_set_arithmetic(pred, truth):
    """[eq. E1] A predicted 255 is background, a true 255 is left out, counts of parts add up."""
    scored = {i for i, t in enumerate(truth.flat) if t != 255}
    says = [{i for i in scored if pred.flat[i] == k or (k == 0 and pred.flat[i] == 255)}
            for k in range(4)]
    holds = [{i for i in scored if truth.flat[i] == k} for k in range(4)]
    matrix = confusion_matrix(pred, truth, 4)
    assert matrix.tolist() == [[len(t & p) for p in says] for t in holds]
    expected = [len(p & t) / len(p | t) if p | t else np.nan for p, t in zip(says, holds)]
    np.testing.assert_allclose(iou(matrix), expected)
    assert np.array_equal(matrix, sum(confusion_matrix(p, t, 4) for p, t in zip(pred, truth)))


def score(root, *flags):
    call("eval", "--data", root, "--split", "train", "--json", root / "s.json", *flags)
    return json.loads((root / "s.json").read_text())


@pytest.fixture
def pets(tmp_path):
    """Three photos; masks and pred of random labels, 255 among them; cams of random values"""
    table = "images/a.jpg,cat\nimages/b.JPG,cat;été\nimages/c.PNG,\n"
    root, rng = photos(tmp_path / "pets", table, "\n".join(PETS)), np.random.default_rng(0)
    (root / "cams").mkdir()
    for name, maps in (("a", 1), ("b", 2), ("c", 0)):
        for folder, choice in (("masks", [0, 0, 1, 1, 2, 2, 3, 255]), ("pred", [0, 1, 2, 255])):
            label = rng.choice(choice, (8, 12)).astype(np.uint8)
            write_labels(root / folder / f"{name}.png", label)
        np.save(root / f"cams/{name}.npy", rng.random((maps, 2, 3)).astype(np.float16))
    return root


def test_iou_equals_torchmetrics(pets):
    metric = JaccardIndex(task="multiclass", num_classes=4, average="none", ignore_index=255)
    for name in "abc":
        pred, truth = (torch.from_numpy(np.array(Image.open(pets / folder / f"{name}.png")))[None]
                       for folder in ("pred", "masks"))
        metric.update(torch.where(pred == 255, 0, pred), truth)
    expected, result = 100 * metric.compute().double().numpy(), score(pets, "--pred", pets / "pred")
    assert list(result["iou"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert result["miou"] == pytest.approx(expected.mean(), abs=1e-4) and result["iou"]["été"] == 0
    assert score(pets, "--pred", pets / "masks")["miou"] == 100


def test_the_sweep_finds_the_best_of_single_scores(pets, monkeypatch):
    """And writes them all; the score given is one of them. "dog", in neither truth nor prediction,
    is left out of the means"""
    flags, sweep = ["--cams", pets / "cams", "--background-score"], (0.3, 0.5, 0.7)
    for name in "abc":
        truth = np.array(Image.open(pets / f"masks/{name}.png"))
        write_labels(pets / f"masks/{name}.png", np.where(truth == 2, 0, truth).astype(np.uint8))
    ious = {t: [*score(pets, *flags, t)["iou"].values()] for t in sweep}
    assert all(row[2] is None for row in ious.values())
    single = {t: round(sum(row[:2] + row[3:]) / 3, 6) for t, row in ious.items()}
    worst, middle, best = sorted(sweep, key=single.get)
    assert len(set(single.values())) == 3
    for score_given, swept in ((worst, (best, middle)), (best, (middle, worst))):
        monkeypatch.setattr(eval, "SWEEP", sorted(swept))
        oracle = score(pets, *flags, score_given, "--oracle-sweep")["oracle"]
        assert (oracle["background_score"], oracle["miou"]) == (best, oracle["curve"][str(best)])
        assert [*oracle["curve"]] == [*map(str, sweep)]
        assert [*oracle["curve"].values()] == pytest.approx([*single.values()], abs=2e-6)


def test_the_sweep_counts_as_score_by_score():
    """[eq. P1] Against its slow twin. Values equal to scores, in float32, the next ones above and
    below, and equal maps; a photo without a class, classes that are not the first ones"""
    rng, at = np.random.default_rng(0), np.array([0, *SWEEP, 1], np.float32)
    values = np.concatenate([at, np.nextafter(at, np.float32(2)), np.nextafter(at, -at)])
    assert any(float(x) > t for x, t in zip(at[1:], SWEEP))  # in float64 these were no ties
    assert any(float(x) < t for x, t in zip(at[1:], SWEEP))
    for present in ([], [2], [0, 1, 3], [1, 3]):
        maps = torch.from_numpy(rng.choice(values.clip(0, 1), (len(present), 60, 50)))
        maps[1:, :20] = maps[:1, :20]
        truth, present = rng.choice([0, 1, 2, 3, 4, 255], (60, 50)).astype(np.uint8), np.array(
            present, int)
        slow = [confusion_matrix(score_labels(maps, present, t), truth, 5) for t in SWEEP]
        assert np.array_equal(sweep_matrices(maps, present, truth, 5), slow)


def test_counts_are_exact(pets, monkeypatch):
    """2^24 pixels and one more, which float32 does not tell apart"""
    counts = iter([2**24, 0, 0])
    def matrix(labels, truth, C):
        found = np.zeros((C, C), np.int64)
        found[1, 1] = next(counts)
        found[1, 2] = 1 - bool(found[1, 1])
        return found
    monkeypatch.setattr(eval, "confusion_matrix", matrix)
    assert score(pets, "--pred", pets / "pred")["iou"]["cat"] == round(
        100 * 2**24 / (2**24 + 2), 6) < 100


def test_the_side_is_the_short_one(monkeypatch):
    """A photo of 100 x 50 goes into the model with 64 pixels of height."""
    shapes = []

    def model(x):
        shapes.append(tuple(x.shape))
        return torch.zeros(len(x), 3, *x.shape[2:])
    model.backbone = Namespace(patch=4)
    predict(model, Image.new("RGB", (100, 50)), RECIPE | {"scales": (1,)}, False, CPU)
    assert shapes == [(1, 3, 64, 128)]


def test_no_photo_is_decoded_to_score_files(pets):
    """Its size is in the header. Photos that are cut behind it, of which one is to be turned"""
    turned, flags = Image.Exif(), (["--pred", pets / "pred"], ["--cams", pets / "cams"])
    turned[0x0112] = 6
    expected = [score(pets, *each) for each in flags]
    for name, exif in (("a.jpg", turned), ("b.JPG", Image.Exif())):
        path = pets / "images" / name
        Image.effect_noise((8, 12) if exif else (12, 8), 99).convert("RGB").save(path, exif=exif)
        path.write_bytes(path.read_bytes()[:-20])
    assert [score(pets, *each) for each in flags] == expected


def test_sizes_are_those_of_the_photo(pets, capsys):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (12, 8)).save(pets / "images/a.jpg", exif=turned)
    flags = ["eval", "--data", pets, "--split", "train"]
    for source, file in (("pred", "pred/a.png"), ("cams", "masks/a.png")):
        line = error_line(capsys, *flags, f"--{source}", pets / source)
        assert file in line and "(8, 12) pixels (height, width), its photo (12, 8)" in line


def test_score_labels_by_hand():
    """[eq. P1]"""
    cams = torch.tensor([[[0.9, 0.3, 0.5]], [[0.1, 0.4, 0.8]]])
    assert score_labels(cams, np.array([1, 4]), 0.45).tolist() == [[2, 0, 5]]
    assert score_labels(cams, np.array([1, 4]), 0.9).tolist() == [[0, 0, 0]]  # a tie: background
    assert score_labels(cams[:0], np.array([], int), 0.5).tolist() == [[0] * 3]


def test_average_in_segments_by_hand():
    """[eq. P2] Segment 1 has the mean 0.4, segment 3 one pixel; pixels of none keep their own."""
    cams = torch.tensor([[[0.2, 0.6, 0.9], [0.1, 0.3, 0.5]]])
    segments = torch.tensor([[1, 1, 0], [3, 0, 0]])
    expected = torch.tensor([[[0.4, 0.4, 0.9], [0.1, 0.3, 0.5]]])
    torch.testing.assert_close(average_in_segments(cams, segments), expected)
    both = torch.cat([cams, 1 - cams])  # each map by itself
    torch.testing.assert_close(average_in_segments(both, segments)[1], 1 - expected[0])


def test_the_mean_of_a_large_segment():
    """Added up in float32, 12 million values of 0.70 have a mean of 0.61."""
    cams = torch.full((1, 3000, 4000), 0.7)
    assert average_in_segments(cams, torch.ones(3000, 4000, dtype=torch.long)).allclose(cams)


RECIPE = eval.TEST["toy"] | {"side": 64, "scales": (1, 1.5)}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A model of random weights for PETS, saved as train_seg.py saves one"""
    torch.manual_seed(0)
    model, path = Segmenter(ViT(8, 64, 1, (4, 4)), 4), tmp_path_factory.mktemp("model") / "seg.pt"
    torch.nn.init.normal_(model.label_vectors)
    torch.save({"segmenter": model.state_dict(), "vit": model.backbone.sizes, "classes": PETS,
                "recipe": "toy", "side": 64, "record": {}}, path)
    return path


@pytest.mark.parametrize("W, H", [(37, 21), (5, 3), (8, 40)])
def test_predict_any_size(W, H, segmenter):
    """Smaller than a patch, too; a mirrored photo gives the mirrored prediction."""
    model, rng = eval.load_segmenter(segmenter)[0], np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8))
    prob = predict(model, photo, RECIPE, True, CPU)
    torch.testing.assert_close(prob.sum(0), torch.ones(H, W))
    mirrored = predict(model, photo.transpose(Image.FLIP_LEFT_RIGHT), RECIPE, True, CPU)
    torch.testing.assert_close(mirrored.flip(2), prob, atol=1e-6, rtol=0)  # measured 1e-7


def test_labels_of_a_large_photo(monkeypatch):
    """Predicted on a view of at most LARGEST pixels, here half the size; after the published CRF
    among the labels that win there; of the photo's size, none blended"""
    photo = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    photo, prob = Image.fromarray(photo), torch.full((5, 10, 16), 0.29)
    prob[0], prob[3, :, :8] = 0.3, 0.31
    monkeypatch.setattr(eval, "LARGEST", 16)
    monkeypatch.setattr(eval, "predict", lambda model, view, *_: prob[:, :view.height, :view.width])
    view = photo.copy()
    view.thumbnail((16, 16))
    view = torch.from_numpy(np.array(view))
    among_winners, among_all = (dense_crf(view, each, (3, 3), (83, 5, 3)).argmax(0)
                                for each in (prob[[0, 3]], prob))
    for crf, expected in (("none", prob.argmax(0)), ("weaktr-test", 3 * among_winners)):
        labels = eval.predict_labels(None, photo, {"crf": crf}, True, CPU)
        assert np.array_equal(labels, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert not among_all.equal(3 * among_winners)


def test_a_model_is_tested_at_the_size_it_was_trained_at(segmenter, pets, monkeypatch):
    """--set side=40 stands in the file; the recipe's is 64"""
    torch.save(torch.load(segmenter, weights_only=True) | {"side": 40}, pets / "seg.pt")
    sides, view = set(), eval.predict
    monkeypatch.setattr(eval, "predict", lambda model, photo, test, *rest: (
        sides.add(test["side"]), view(model, photo, test, *rest))[1])
    score(pets, "--checkpoint", pets / "seg.pt", "--scales", 1, "--crf", "none")
    assert sides == {40}


@torch.no_grad()
@pytest.mark.parametrize("H, W", [(32, 61), (50, 32), (45, 70), (32, 32)])
def test_windows_are_added_up_batch_by_batch(H, W):
    """The same bits as from the scores of all windows at once; no batch's outlive the next one's,
    which for 81 labels and large photos would take gigabytes"""
    torch.manual_seed(0)
    model, x, alive = Segmenter(ViT(8, 64, 1, (4, 4)), 5).eval(), torch.randn(2, 3, H, W), []
    corners = list(product([*range(0, H - 32, 20), H - 32], [*range(0, W - 32, 20), W - 32]))
    windows = torch.cat([x[:, :, top:top + 32, left:left + 32] for top, left in corners])
    scores = torch.cat([model(part) for part in windows.split(3)]).unflatten(0, (len(corners), 2))
    total, seen = torch.zeros(2, 5, H, W), torch.zeros(H, W)
    for part, (top, left) in zip(scores, corners):
        total[:, :, top:top + 32, left:left + 32] += part
        seen[top:top + 32, left:left + 32] += 1

    def watch(module, inputs, output):
        assert sum(x() is not None for x in alive) <= 1
        alive.append(weakref.ref(output))
    model.register_forward_hook(watch)
    assert slide(model, x, 32, 20, batch=3).equal(total / seen)
    assert len(alive) == -(-2 * len(corners) // 3)


def test_any_photos_are_predicted(segmenter, tmp_path, capsys):
    """Any file that shows a picture; hidden files and other kinds are passed over."""
    ramp = np.linspace(0, 255, 1200).reshape(30, 40).astype(np.uint8)
    folder, out, turned = tmp_path / "mine", tmp_path / "new/out", Image.Exif()
    turned[0x0112] = 6
    folder.mkdir()
    for file, mode in (("a.jpg", "CMYK"), ("b.gif", "P"), ("c.png", "RGBA"), ("à la.JPEG", "1")):
        Image.fromarray(ramp).convert(mode).save(folder / file)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "16 bit.large.TIFF")
    Image.fromarray(ramp).save(folder / "turned.jpg", exif=turned)
    photos = {path.stem: path for path in folder.iterdir()}
    for file in ("notes.txt", ".hidden.jpg"):
        (folder / file).write_text("no photo")
    call("eval", "--images", folder, "--checkpoint", segmenter, "--save", out, "--crf", "none",
         "--scales", 1, 1.5)
    assert "labels of 6 photos" in capsys.readouterr().out and len(files_in(out)) == 2 * 6 + 1
    model = eval.load_segmenter(segmenter)[0]
    for name, path in photos.items():
        photo = read_image(path)  # upright
        check_label_png(out / f"{name}.png", photo.size, range(4))
        expected = predict(model, photo, RECIPE, True, CPU).argmax(0).numpy()
        assert np.array_equal(np.array(Image.open(out / f"{name}.png")), expected)


def test_a_split_without_masks_is_predicted_not_scored(segmenter, pets, tmp_path, capsys):
    flags = ["--data", pets, "--split", "train", "--checkpoint", segmenter, "--present-only"]
    (pets / "masks/a.png").unlink()
    line = error_line(capsys, "eval", *flags, "--save", tmp_path / "a")  # some have masks
    assert "masks/a.png: no readable label picture" in line and not (tmp_path / "a").exists()
    shutil.rmtree(pets / "masks")
    call("eval", *flags, "--save", tmp_path / "saved")
    printed, split = capsys.readouterr().out, Split(pets, "train")
    assert "not scored" in printed and "present only True" in printed and "mIoU" not in printed
    assert "colours: 0 background #000000, 1 cat #800000, 2 dog #008000" in printed  # VOC's
    for name in split.names:
        shown = {0, *(1 + np.flatnonzero(split.labels[name])).tolist()}
        check_label_png(tmp_path / f"saved/{name}.png", (12, 8), shown)
    assert "masks/a.png" in error_line(capsys, "eval", *flags)


def test_saved_labels_replace_nothing(segmenter, pets, capsys):
    """Neither truth, nor what another script made, nor an earlier prediction, nor what is scored"""
    images = f"--images {pets}/images --checkpoint {segmenter} --crf none --scales 1 --save {pets}/"
    call("eval", *f"{images}saved".split())
    assert json.loads((pets / "saved/made_of.json").read_text()) == {
        "script": "eval.py", "predicted_by": digest(segmenter), "scales": [1.0], "flip": True,
        "crf": "none", "present_only": False}
    for folder in ("other", "new"):
        (pets / folder).mkdir()
    (pets / "other/made_of.json").write_text('{"script": "make_pseudo.py"}')
    before = files_in(pets)
    for flags, says in (
            (f"{images}masks", "masks/a.png: is there already"),
            (f"{images}images", "this run reads from there"),
            (f"{images}other", 'made with script "make_pseudo.py", now it is "eval.py"'),
            (f"{images}saved", "of the same inputs"),
            (f"--data {pets} --split train --pred {pets}/pred --save {pets}/pred", "reads from")):
        line = error_line(capsys, "eval", *flags.split())
        assert says in line and "pass another folder" in line and "--resume" not in line
        assert files_in(pets) == before


@pytest.mark.parametrize("flags, says", [
    ("--pred p --crf voc", "--crf: only with --checkpoint"),
    ("--pred p --no-flip", "--flip: only with --checkpoint"),
    ("--cams c --present-only", "--present-only: only with --checkpoint"),
    ("--pred p --oracle-sweep", "--oracle-sweep: only with --cams"),
    ("--pred p --background-score 0.4", "--background-score: only with --cams"),
    ("--cams c --background-score 1", "--background-score 1.0: expected a number in (0, 1)"),
    ("--checkpoint s --scales 0", "expected numbers above 0"),
    ("--pred none", "none: not there"),
    ("--checkpoint s --scales 1 nan", "expected numbers above 0")])
def test_flags_that_the_mode_ignores_are_refused(flags, says, capsys):
    assert says in error_line(capsys, "eval", "--data", "none", *flags.split())


@pytest.mark.parametrize("flags, says", [
    ("--data {pets} --split bare --present-only --checkpoint {model}", "no class of any photo"),
    ("--images {pets}/images --checkpoint {model}", "pass --save"),
    ("--images {pets}/images --checkpoint {model} --present-only --save {pets}/new", "no labels"),
    ("--data {pets} --split train --pred {pets}/pred --json {pets}/s.json", "every pixel is 255")])
def test_what_cannot_be_scored(flags, says, segmenter, pets, capsys):
    """Photos without any label; truth that is all 255; predictions that go nowhere"""
    (pets / "bare.csv").write_text("images/a.jpg,\nimages/c.PNG,\n")
    for name in "abc":
        write_labels(pets / f"masks/{name}.png", np.full((8, 12), 255, np.uint8))
    line = error_line(capsys, "eval", *flags.format(pets=pets, model=segmenter).split())
    assert says in line and not (pets / "s.json").exists()
