"""The scripts by their command lines: the whole chain, what they write, processes, mistakes."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    PHASES, TINY, call, check_label_png, error_line, files_in, moved, two_processes)
from PIL import Image
from test_official import published_cam
from test_prepare import voc_root
from voc import CLASSES

import eval
import make_pseudo
import train_seg
from clip_model import class_texts, load_clip
from common import Split, Training, digest, write_labels
from mask_generator import MaskGenerator, ViT

OBJECTS = ["boat", "train", "bird", "cow", "car", "bottle"]


# ---- The whole chain -----------------------------------------------------------------------------

def test_checkpoints_and_logs(chain):
    """On data without masks, so no stage before eval.py opened one; nothing is left over."""
    assert not (chain / "data/masks").exists()
    files = {*(f"{phase}.{end}" for phase in PHASES for end in ("pt", "jsonl")), "prompts.txt"}
    assert {path.name for path in (chain / "cam").iterdir()} == files | {"cams"}
    assert {path.name for path in (chain / "seg").iterdir()} == {"seg.pt", "seg.jsonl"}
    for path in (*(chain / f"cam/{phase}.pt" for phase in PHASES), chain / "seg/seg.pt"):
        state = torch.load(path, weights_only=True)
        assert state["classes"] == OBJECTS and state["record"]["batch"] == 4
        rows = [json.loads(line) for line in path.with_suffix(".jsonl").open()]
        assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["epoch"] == 1
        assert all(np.isfinite(row["loss"]) and {"lr", "images_per_s", "eta_s", "gib"} <= row.keys()
                   for row in rows)


def test_words_of_the_prompts(toy, chain):
    """prompts.txt: five of the data set's nouns.txt for each class, those nearest to its own prompt
    first"""
    nouns = {*(chain / "data/nouns.txt").read_text().split()}
    clip, u_b = load_clip(toy / "clip.pt"), torch.load(chain / "cam/prompts.pt")["u_b"]
    lines = (chain / "cam/prompts.txt").read_text().splitlines()
    for name, line, u in zip(OBJECTS, lines, u_b, strict=True):
        found = re.findall(r"(\w[\w ]*) (0\.\d+)", line.removeprefix(f"{name}: "))
        words, cosines = [word for word, _ in found], [float(value) for _, value in found]
        assert line.startswith(name) and len(words) == 5 and nouns >= {*words}
        expected = torch.cosine_similarity(class_texts(clip, words), u, dim=1).tolist()
        assert cosines == pytest.approx(expected, abs=6e-4)
        assert cosines == sorted(cosines, reverse=True)


def test_cams_and_pseudo_masks(chain):
    split, tops = Split(chain / "data", "train"), []
    files = {f"{name}.npy" for name in split.names} | {"made_of.json"}
    assert files_in(chain / "cam/cams").keys() == files
    assert files_in(chain / "masks").keys() == {f"{n}.png" for n in split.names} | {"made_of.json"}
    for name in split.names:
        cams = np.load(chain / f"cam/cams/{name}.npy", allow_pickle=False)
        (W, H), present = split.image(name).size, np.flatnonzero(split.labels[name])
        assert cams.dtype == np.float16 and cams.shape == (len(present), -(-H // 4), -(-W // 4))
        assert cams.min() >= 0 and cams.max() <= 1
        tops += cams.max(axis=(1, 2)).tolist()
        check_label_png(chain / f"masks/{name}.png", (W, H), {0, *(1 + present).tolist()})
        assert (cams.min(axis=(1, 2)) == 0).all()
    assert all(top == 0 or top > 0.99 for top in tops) and max(tops) > 0.99  # the whole range


@pytest.mark.parametrize("split, what, source, note, flags", [
    ("train", "cams", "cam/cams", "cam/cams/made_of.json", ["--oracle-sweep"]),
    ("train", "pred", "masks", "masks/made_of.json", []),
    ("val", "checkpoint", "seg/seg.pt", "seg/seg.pt", ["--scales", 1, 1.5, "--crf", "voc"])])
def test_eval_writes_what_it_promises(split, what, source, note, flags, toy, chain, tmp_path,
                                      capsys):
    """note: the record that the score names"""
    out = tmp_path / "new"
    call("eval", "--data", toy / "data", "--split", split, f"--{what}", chain / source, *flags,
         "--save", out, "--json", tmp_path / "scores.json", "--device", "cpu")
    table, result = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    assert list(result["iou"]) == ["background", *OBJECTS] and what in result
    assert result["record"] == digest(chain / note)
    assert (result["list"], result["images"]) == (split, 12 if split == "train" else 4)
    scores = [value for value in result["iou"].values() if value is not None]
    assert result["miou"] == pytest.approx(np.mean(scores), abs=1e-5) and min(scores) >= 0
    assert f"{result['miou']:.2f}" in table
    assert ("TUNED ON GROUND TRUTH" in table) == (what == "cams") == ("oracle" in result)
    data = Split(toy / "data", split)
    for name in data.names:
        size = data.image(name).size
        check_label_png(out / f"{name}.png", size, range(7))
        assert Image.open(out / f"overlays/{name}.jpg").size == size


def predicted(toy, chain, out):
    """Pseudo masks of three photos, and predictions for them"""
    data = ["--data", f"{toy}/data", "--split", "few", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_pseudo, "end_processes", lambda: None)  # eval.py goes on in this group
        call("make_pseudo", *data, "--cams", f"{chain}/cam/cams", "--out", f"{out}/masks")
    call("eval", *data, "--checkpoint", f"{chain}/seg/seg.pt", "--scales", 1, "--save",
         f"{out}/saved", "--json", f"{out}/s.json")


def test_two_processes_write_what_one_writes(toy, chain, tmp_path):
    """The same bytes, with unequal shares, from make_pseudo.py and eval.py"""
    predicted(toy, chain, tmp_path / "1")
    told = two_processes("test_scripts.predicted", toy, chain, tmp_path / "2")
    assert told.count("mIoU") == 1  # one process reports, and writes the scores
    assert files_in(tmp_path / "1") == files_in(tmp_path / "2")
    assert len(files_in(tmp_path / "1")) == 3 + 1 + 2 * 3 + 1 + 1  # with two made_of.json


def test_the_export_is_in_float32(chain, cam, tmp_path):
    """Whatever the training's precision was"""
    cam(chain / "cam", "--phase", "export", "--cams", tmp_path, "--precision", "bfloat16")
    assert files_in(tmp_path) == files_in(chain / "cam/cams")


def test_segmentation_resumed_equals_uninterrupted(toy, tmp_path, monkeypatch, dies_at_2):
    """With batches greater than the split. Loading photos seeds a GPU: this changes no dropout."""
    def run(out, *flags):
        call("train_seg", "--data", toy / "data", "--split", "val", "--labels", toy / "data/masks",
             "--vit", toy / "vit.pth", "--out", tmp_path / out, *TINY, "--batch", 6, *flags,
             "--set", "dropout=0.5")
        return torch.load(tmp_path / out / "seg.pt", weights_only=True)["segmenter"]
    with pytest.raises(SystemExit):
        run("killed")
    dies_at_2()  # not again
    straight, load = run("straight"), train_seg.Labelled.__getitem__

    def seeds(photos, place):
        torch.manual_seed(place[1])
        return load(photos, place)
    monkeypatch.setattr(train_seg.Labelled, "__getitem__", seeds)
    assert not moved(straight, run("killed", "--resume"))


# ---- Mistakes ------------------------------------------------------------------------------------

@pytest.fixture
def says(toy, chain, capsys, tmp_path):
    """says(script, *flags): its error line in copies of the chain's folders, which stay the same"""
    for folder in ("cam", "masks"):
        shutil.copytree(chain / folder, tmp_path / folder)
    inputs = {"train_cam": ["--clip", toy / "clip.pt", "--out", tmp_path / "cam"],
              "train_seg": ["--labels", tmp_path / "masks", "--out", tmp_path / "seg"]}

    def says(script, *flags):
        before = files_in(tmp_path)
        line = error_line(capsys, script, "--data", toy / "data", "--vit", toy / "vit.pth",
                          *inputs[script], *TINY, *flags)
        assert files_in(tmp_path) == before
        return line
    return says


@pytest.mark.parametrize("command, expected", [
    ("train_cam --phase all --checkpoint X", "--checkpoint: of --phase export alone"),
    ("train_cam --phase match --resume --seed 1", "match.pt: made with seed 0, now it is 1"),
    ("train_cam --resume --set lambda_t=0.5", "prompts.pt: made with lambda_t 0.1, now it is 0.5"),
    ("train_cam --phase match --out {m}/cam/new", "new/classify.pt: no such file"),
    ("train_cam --phase classify --workers -1", "--workers -1; expected"),
    ("train_cam --phase match --set lamda_b=1", "no key lamda_b; expected one of augment,"),
    ("train_cam --phase match --set lamda_b=1", "lambda_b?"),
    ("train_cam --phase match --steps 0", "--steps 0: expected a number above 0"),
    ("train_cam --phase export --cams {m}/none --checkpoint {m}/cam/prompts.pt",
     "prompts.pt: has no 'generator'"),
    ("train_cam --phase classify --out {m}/cam/match.pt", "File exists"),
    ("train_cam --phase classify --split missing", "missing.csv: not readable"),
    ("train_seg --set lr=fast", "--set lr=fast: expected a value like lr=0.0003"),
    ("train_seg --set speed=1", "no key speed; expected one of backbone_lr, batch, clip_patch"),
    ("train_seg --set optimizer=adam", "optimizer=sgd|adamw"),
    ("train_seg --set crop=1.5", "crop=64"),
    ("train_seg --set batch=0", "batch=8"),
    ("train_seg --set lr=1 --set crop=1.5", "crop=1.5"),
    ("train_seg --set scale=2", "scale=(0.75, 1.5)")])
def test_flags_that_cannot_be(command, expected, says, tmp_path):
    assert expected in says(*command.format(m=tmp_path).split())


def test_a_seed_of_any_length(cam, tmp_path):
    """torch takes 64 bits alone."""
    cam(tmp_path, "--phase", "classify", "--steps", 1, "--seed", 10**30)


def test_what_a_script_says_at_its_end(toy, chain, tmp_path, capsys, monkeypatch):
    """What it wrote, and the next command; interrupted, one line"""
    flags = ["--data", toy / "data", "--split", "few", "--cams", chain / "cam/cams", "--crf",
             "none", "--out", tmp_path]
    call("make_pseudo", *flags)
    told = capsys.readouterr().out
    assert f"{tmp_path}: masks of 3 photos; next:\n    python train_seg.py --data" in told
    assert "pseudo masks: 1 of 3" in told and "pseudo masks: 3 of 3" in told  # in a log

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(make_pseudo, "Split", interrupted)
    with pytest.raises(SystemExit) as end:
        call("make_pseudo", *flags)
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_missing_label_shows_at_the_start(says, tmp_path):
    (tmp_path / "masks/train_00007.png").unlink()
    assert "train_00007.png: no such file, 1 of 1" in says("train_seg")


def test_a_batch_is_shared_equally(says, monkeypatch):
    monkeypatch.setattr(train_seg, "WORLD", 3)
    assert "--batch 4: expected a multiple of the 3 processes" in says("train_seg")


def test_prompts_of_another_clip(toy, says, tmp_path):
    """Of the same widths"""
    state = torch.load(toy / "clip.pt", weights_only=True)
    state["text_projection"] = state["text_projection"].flip(0)
    torch.save(state, tmp_path / "other.pt")
    assert "prompts.pt: prompts of another CLIP" in says("train_cam", "--phase", "refine", "--clip",
                                                         tmp_path / "other.pt")


@pytest.mark.parametrize("where", ["weights", "gradients"])
def test_what_is_not_a_number_is_not_saved(where, toy, chain, tmp_path, capsys, monkeypatch):
    """NaN in weights or gradients at a saving step: one line, and the .part of before"""
    original = Training.log

    def spoils(loop, losses):
        original(loop, losses)
        head = loop.parts["model"].head
        if loop.done == 1 and where == "weights":
            head.bias.data.fill_(torch.nan)
        elif loop.done == 1:
            head.bias.register_hook(lambda gradient: gradient * torch.nan)
    monkeypatch.setattr(Training, "log", spoils)
    shutil.copytree(chain / "cam", tmp_path / "cam")
    line = error_line(capsys, "train_cam", "--data", toy / "data", "--clip", toy / "clip.pt",
                      "--out", tmp_path / "cam", *TINY, "--phase", "match")
    assert "match: a loss or weight is not finite in steps 2 to 2" in line
    assert torch.load(tmp_path / "cam/match.part", weights_only=True)["step"] == 1


def test_a_photo_of_5000_to_1_is_resized_to_what_a_crop_needs(tmp_path, monkeypatch):
    """Not to 260,000 x 520 pixels before the crop"""
    for file, text in (("classes.txt", "cat"), ("train.csv", "a.png,cat")):
        (tmp_path / file).write_text(text)
    Image.new("RGB", (5000, 1)).save(tmp_path / "a.png")
    write_labels(tmp_path / "labels/a.png", np.ones((1, 5000), np.uint8))
    recipe = {key: row[0] for key, row in train_seg.TABLE.items()}
    sizes, resize = [], train_seg.v2.functional.resize
    monkeypatch.setattr(train_seg.v2.functional, "resize", lambda x, size, mode: (
        sizes.extend(size), resize(x, size, mode))[1])
    photos = train_seg.Labelled(Split(tmp_path, "train"), tmp_path / "labels", recipe, 0)
    image, labels = photos[0, 0]
    assert max(sizes) <= 2 * 4 * 520 and image.shape[1:] == labels.shape == (480, 480)


def test_snapshots(cam, tmp_path, dies_at_2):
    """Of PHASE.pt's form, of the phases that train S. A resumed run writes those that remain, and
    they are in no record; the last one is PHASE.pt."""
    flags = ["--snapshots", 3]
    with pytest.raises(KeyboardInterrupt):
        cam(tmp_path, *flags)
    dies_at_2()  # not again
    saved, training = cam(tmp_path, *flags, "--resume"), ("classify", "match", "refine")
    names = {f"{phase}-{step}" for phase in training for step in (1, 2, 3)}
    assert saved.keys() == {*PHASES, *names}
    for phase in training:
        assert saved[f"{phase}-3"].keys() == saved[phase].keys()
        assert not moved(saved[f"{phase}-3"]["generator"], saved[phase]["generator"])
        assert moved(saved[f"{phase}-2"]["generator"], saved[phase]["generator"])
    cam(tmp_path, "--phase", "export", "--checkpoint", tmp_path / "match-2.pt", "--cams",
        tmp_path / "of match-2")


# ---- VOC in one command --------------------------------------------------------------------------

def test_voc_in_one_command(toy, tmp_path, capsys, monkeypatch):
    """make voc from WeakTr's checkpoint (a random one), on three toy photos in VOC's layout, all
    steps but the pictures; then again, where nothing is made. Its scores mean nothing."""
    split, classes = Split(toy / "data", "train"), [line.split(":")[0] for line in CLASSES]
    names = [name for name in split.names if split.image(name).size == (64, 64)][:4]
    root = voc_root(tmp_path / "VOC2012", {
        name: [split.classes[k] for k in split.present(name)] for name in names},
        train=names[:3], val=names[3:])
    number = np.array([0, *(1 + classes.index(name) for name in split.classes)], np.uint8)
    for name in names:
        shutil.copy(split.paths[name], root / f"JPEGImages/{name}.jpg")
        truth = np.array(Image.open(toy / f"data/masks/{name}.png"))
        write_labels(root / f"SegmentationClass/{name}.png", number[truth])
    for table, row in ((eval.TEST["voc"], {"scales": (0.5,), "window": 48, "stride": 32}),
                       (train_seg.TABLE, {"side": (52,), "crop": (48,), "clip_patch": (12,)})):
        for key, value in row.items():
            monkeypatch.setitem(table, key, value)  # time
    monkeypatch.setattr("companion.main", lambda args: None)
    torch.manual_seed(0)
    vit = ViT(16, 128, 3, (4, 4))
    theirs = published_cam(MaskGenerator(vit, 20, reduction=2))
    torch.save({"model": theirs, "miou": np.float64(0.1)}, tmp_path / "theirs.pth")
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    flags = ["--voc", root, "--out", tmp_path / "run", "--official", tmp_path / "theirs.pth",
             "--clip", toy / "clip.pt", "--vit", tmp_path / "vit.pth", "--steps", 2, "--batch", 2,
             "--photos", 2]
    call("demo", *flags)
    done, table = files_in(tmp_path / "run"), capsys.readouterr().out
    assert ("Trial (--photos 2 --steps 2): trained on 2 photos of train-2, scored on 2 of train-2 "
            "and 1 of val-2; backbone") in table and "match 2 x 2, prompts 2 x 2, ref" in table
    assert "WeakTr" not in table.partition("steps x batch:")[2] and "refined CAM" in table
    shown = {split.classes[k] for name in names[:2] for k in split.present(name)}
    assert set(re.findall(r"^(\w+): \w+ 0\.", table, re.M)) == shown
    call("demo", *flags)
    done.pop("minutes.json")
    assert done.items() <= files_in(tmp_path / "run").items()
