"""The scripts through their command lines: the whole chain, the files they promise, and what users get wrong."""
import importlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import train_cam
import train_seg
from clip_model import InputError, run
from make_pseudo import PALETTE, PRESETS, dense_crf, hard_unary, read_cams
from train_cam import Data

SCRIPTS = ["clip_model", "mask_generator", "train_cam", "make_pseudo", "train_seg", "eval"]
REAL = ROOT.parent / "shared" / "data"


def names_in(root, split="train"):
    return (root / f"ImageSets/Segmentation/{split}.txt").read_text().split()


def files_in(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def call(script, *flags):
    """A script's command line, run as __main__ in this process: three times as fast as a Python of its own."""
    old = sys.argv
    sys.argv = [f"{script}.py", *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv = old


# ------------------------------------------------------------------------------------------ help

@pytest.mark.parametrize("script", [*SCRIPTS, "tests/toy_world"])
def test_help_needs_no_files(script, tmp_path, monkeypatch, capsys):
    """From an empty folder, without a network: exit 0, and every flag is explained."""
    def offline(*_):
        raise AssertionError("--help went to the network")
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(script, "--help")
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {Path(script).name}.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train_cam", "make_pseudo", "train_seg", "eval", "clip_model"])
def test_common_flags(script):
    required = {"train_cam": "--data D --out O", "make_pseudo": "--data D --cams C --out O", "eval": "--data D --pred P",
                "train_seg": "--data D --labels L --vit V --out O", "clip_model": "a b --image I"}[script].split()
    args = importlib.import_module(script).parse_args([*required, "--device", "cpu", "--seed", "3"])
    assert (args.device, args.seed) == ("cpu", 3)


# ------------------------------------------------------------------------------------------ the whole chain

def test_chain_opened_no_mask(chain):
    assert not (chain / "VOC2012/SegmentationClass").exists()  # the whole chain ran without


def test_checkpoints_and_logs(chain):
    for phase in ("classify", "match", "refine"):
        state = torch.load(chain / f"cam/{phase}.pt", weights_only=True)
        assert state["phase"] == phase and state["classes"] == ["boat", "train", "bird", "cow", "car", "bottle"]
    assert torch.load(chain / "seg/seg.pt", weights_only=True)["decoder"] == "mask"
    rows = [json.loads(line) for line in (chain / "cam/log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["classify", "match", "prompts", "refine"]
    assert all(np.isfinite(row["loss"]) and {"epoch", "step", "lr", "images_per_s", "eta_s"} <= row.keys() for row in rows)
    assert [json.loads(line)["phase"] for line in (chain / "seg/log.jsonl").read_text().splitlines()] == ["seg"]
    assert {path.name for path in (chain / "cam").iterdir()} == {
        "classify.pt", "match.pt", "prompts.pt", "refine.pt", "prompts.txt", "log.jsonl", "cams"}  # nothing left over
    assert {path.name for path in (chain / "seg").iterdir()} == {"seg.pt", "log.jsonl"}


def test_prompts_txt(chain):
    lines = (chain / "cam/prompts.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["boat", "train", "bird", "cow", "car", "bottle"]
    for line in lines:
        cosines = [float(part.split()[-1]) for part in line.split(": ")[1].split(", ")]
        assert len(cosines) == 5 and cosines == sorted(cosines, reverse=True) and max(cosines) <= 1


def test_cams_on_disk(chain):
    data = Data(chain / "VOC2012", "train")
    assert {path.name for path in (chain / "cam/cams").iterdir()} == {"background.json", *(f"{name}.npy" for name in data.names)}
    sizes, tops = set(), []
    for name in data.names:
        cams = np.load(chain / f"cam/cams/{name}.npy", allow_pickle=False)
        W, H = data.image(name).size
        assert cams.dtype == np.float16 and cams.shape == (data.labels(name).sum(), -(-H // 4), -(-W // 4))
        assert cams.min() >= 0 and cams.max() <= 1
        tops += cams.reshape(len(cams), -1).max(axis=1).tolist()
        sizes.add((H, W))
    assert (37, 50) in sizes
    assert all(top == 0 or top > 0.99 for top in tops) and max(tops) > 0.99  # a map uses its range, unless it is flat


def check_label_png(path, size, allowed):
    with Image.open(path) as picture:
        assert picture.mode == "P" and picture.size == size and picture.getpalette() == PALETTE
        assert set(np.unique(picture)) <= allowed, path


def test_pseudo_masks_on_disk(chain):
    data = Data(chain / "VOC2012", "train")
    assert {path.name for path in (chain / "masks").iterdir()} == {f"{name}.png" for name in data.names}
    for name in data.names:
        present = np.flatnonzero(data.labels(name)) + 1
        check_label_png(chain / f"masks/{name}.png", data.image(name).size, {0, 255, *present.tolist()})


@pytest.mark.parametrize("split, what, flags", [
    ("train", "cams", ["--cams", "cam/cams", "--oracle-sweep"]), ("train", "pred", ["--pred", "masks"]),
    ("val", "checkpoint", ["--checkpoint", "seg/seg.pt", "--scales", "1", "1.5", "--crf", "prob"])])
def test_eval_writes_what_it_promises(split, what, flags, toy, chain, script, tmp_path, capsys):
    flags = [chain / flag if "/" in flag or flag == "masks" else flag for flag in flags]
    flags = ["--data", toy / "VOC2012", "--split", split, *flags, "--device", "cpu", "--save", tmp_path / "saved",
             "--json", tmp_path / "new/scores.json", "--strip", tmp_path / "strip.png", "--strip-count", 3]
    if split == "train":
        call("eval", *flags, "--columns", f"CAM={chain / 'cam/cams'}", f"mask={chain / 'masks'}")
        table = capsys.readouterr().out
    else:
        table = script("eval.py", *flags)  # once in a process of its own
    result = json.loads((tmp_path / "new/scores.json").read_text())
    labels = ["background", "boat", "train", "bird", "cow", "car", "bottle"]
    assert {"miou", "iou", "images", "list", "classes", "what", "threshold", "scales", "flip", "crf"} <= result.keys()
    assert list(result["iou"]) == result["classes"] == labels and result["what"] == what and result["list"] == split
    scores = [value for value in result["iou"].values() if value is not None]
    assert all(0 <= value <= 100 for value in scores) and result["miou"] == pytest.approx(np.mean(scores), abs=2e-3)
    assert f"{result['miou']:.2f}" in table and all(name in table for name in labels)
    if what == "cams":
        assert 0 < result["threshold"] < 1 and "no mask" in result["threshold_chosen"]
        assert "ground truth" in result["oracle"]["threshold_chosen"] and "TUNED ON GROUND TRUTH" in table
        assert result["oracle"]["miou"] >= result["miou"] - 1
    else:
        assert "oracle" not in result and result["threshold"] is None
    if what == "checkpoint":
        assert (result["scales"], result["flip"], result["crf"]) == ([1, 1.5], True, "prob")
    data = Data(toy / "VOC2012", split)
    assert {path.stem for path in (tmp_path / "saved").iterdir()} == set(data.names) and result["images"] == len(data.names)
    for name in data.names:
        check_label_png(tmp_path / f"saved/{name}.png", data.image(name).size, {*range(7), 255})
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == ((5 if split == "train" else 3) * 132, 3 * 132 + 16)


def test_clip_model_and_mask_generator(toy, capsys):
    photo = toy / "VOC2012/JPEGImages" / f"{names_in(toy / 'VOC2012')[0]}.jpg"
    call("clip_model", "a photo of boat.", "a photo of water.", "--image", photo, "--clip", toy / "clip.pt", "--device", "cpu")
    assert sum(float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines()) == pytest.approx(100, abs=0.02)
    call("mask_generator", "--vit", toy / "vit.pth", "--image", photo)
    assert "patch 4, width 128, 4 layers" in capsys.readouterr().out


def test_finished_pngs_are_kept_and_broken_ones_redone(toy, chain, tmp_path):
    masks = shutil.copytree(chain / "masks", tmp_path / "masks")
    redo = names_in(toy / "VOC2012")[:3]
    cut(masks / f"{redo[0]}.png", -30)
    cut(masks / f"{redo[1]}.png", 0)
    (masks / f"{redo[2]}.png").unlink()
    before = files_in(masks)
    flags = ["--data", toy / "VOC2012", "--cams", chain / "cam/cams", "--out", masks, "--device", "cpu"]
    call("make_pseudo", *flags)
    assert bytes_in(masks) == bytes_in(chain / "masks")
    after = files_in(masks)
    assert {name for name in after if after[name] != before.get(name)} == {f"{name}.png" for name in redo}
    call("make_pseudo", *flags, "--overwrite")
    assert bytes_in(masks) == bytes_in(chain / "masks")
    assert all(stamp > after[name] for name, stamp in files_in(masks).items())


@pytest.mark.slow
def test_two_processes_write_the_same_pngs(toy, chain, tmp_path, capsys):
    """Each reads half of the CAMs for the background score and writes half of the PNGs; unequal halves."""
    lists = toy / "VOC2012/ImageSets/Segmentation"
    root = tmp_path / "voc"
    shutil.copytree(toy / "VOC2012", root, ignore=shutil.ignore_patterns("ImageSets", "SegmentationClass"))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join((lists / "train.txt").read_text().split()[:11]))
    cams = shutil.copytree(chain / "cam/cams", tmp_path / "cams", ignore=shutil.ignore_patterns("background.json"))
    flags = ["--data", root, "--cams", cams, "--min-confidence", 0.8, "--device", "cpu"]
    call("make_pseudo", *flags, "--out", tmp_path / "one")
    printed = capsys.readouterr().out
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "make_pseudo.py",
               *flags, "--out", tmp_path / "two"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed and "auto: Otsu" in printed  # the same threshold, said once
    assert len(bytes_in(tmp_path / "one")) == 11 and bytes_in(tmp_path / "two") == bytes_in(tmp_path / "one")


@pytest.mark.parametrize("preset", ["voc", "prob"])
def test_min_confidence(toy, chain, tmp_path, preset):
    """255 exactly where the CRF's best probability is below; elsewhere nothing changes."""
    flags = ["--data", toy / "VOC2012", "--cams", chain / "cam/cams", "--crf", preset, "--bg-score", 0.4, "--device", "cpu"]
    call("make_pseudo", *flags, "--out", tmp_path / "all")
    call("make_pseudo", *flags, "--out", tmp_path / "sure", "--min-confidence", 0.8)
    data, ignored = Data(toy / "VOC2012", "train"), 0
    for name in data.names:
        photo, present = np.array(data.image(name)), np.flatnonzero(data.labels(name))
        cams = read_cams(chain / "cam/cams", name, present, photo.shape[:2])
        prob = torch.cat([torch.full_like(cams[:1], 0.4), cams])
        prob = hard_unary(prob.argmax(0), len(prob)) if preset == "voc" else prob / prob.sum(0)
        unsure = (dense_crf(torch.from_numpy(photo), prob, *list(PRESETS[preset].values())[1:]).amax(0) < 0.8).numpy()
        every, sure = (np.array(Image.open(tmp_path / folder / f"{name}.png")) for folder in ("all", "sure"))
        assert (every != 255).all() and np.array_equal(sure, np.where(unsure, 255, every))
        ignored += unsure.mean() / len(data.names)
    assert 0 < ignored < 1


def test_full_supervision_and_export_of_a_phase(toy, chain, tmp_path):
    """--labels ROOT/SegmentationClass as it stands, 255 and all; --phase export --checkpoint --cams without CLIP and ViT."""
    voc = toy / "VOC2012"
    call("train_seg", "--data", voc, "--labels", voc / "SegmentationClass", "--vit", toy / "vit.pth", "--out", tmp_path / "seg",
         "--decoder", "linear", "--crop", 80, "--epochs", 1, "--batch", 6, "--optimizer", "adamw", "--workers", 0,
         "--device", "cpu")
    assert files_in(tmp_path / "seg").keys() == {"seg.pt", "log.jsonl"}
    call("train_cam", "--data", voc, "--split", "val", "--out", tmp_path / "cam", "--phase", "export", "--checkpoint",
         chain / "cam/match.pt", "--cams", tmp_path / "match", "--scales", 1, "--device", "cpu")
    assert files_in(tmp_path / "match").keys() == {f"{name}.npy" for name in names_in(voc, "val")}


def test_a_killed_segmenter_goes_on_with_the_same_flags_only(toy, chain, tmp_path, monkeypatch):
    """Killed in the second epoch: the run that goes on ends where one that was let alone does; other flags are named."""
    def train(out, *flags, masks=chain / "masks"):
        fixed = ["--data", toy / "VOC2012", "--labels", masks, "--vit", toy / "vit.pth", "--out", out, "--epochs", 2, "--batch", 6,
                 "--crop", 32, "--workers", 0, "--device", "cpu"]
        train_seg.main(train_seg.parse_args([str(flag) for flag in [*fixed, *flags]]))

    def dies(out, row, original=train_cam.log):
        if row["epoch"] == 2:
            raise KeyboardInterrupt
        original(out, row)
    train(tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cam, "log", dies)
        train(tmp_path / "killed")
    for flags, says in ((["--lr", 0.02], "--lr 0.01, now it is 0.02"), (["--crop", 48], "--crop 32, now it is 48"),
                        (["--scale", 1, 1], r"--scale \[0.5, 2.0\], now it is \[1.0, 1.0\]"),
                        (["--seed", 1], "--seed 0, now it is 1"), (["--epochs", 3], "--epochs 2, now it is 3")):
        with pytest.raises(InputError, match=f"seg.part: begun with {says}; .*delete that file to start"):
            train(tmp_path / "killed", "--resume", *flags)
    with pytest.raises(InputError, match="begun with --labels masks, now it is SegmentationClass"):
        train(tmp_path / "killed", "--resume", masks=toy / "VOC2012/SegmentationClass")
    train(tmp_path / "killed", "--resume", "--workers", 1, masks=shutil.copytree(chain / "masks", tmp_path / "moved/masks"))
    straight, resumed = (torch.load(tmp_path / f"{name}/seg.pt", weights_only=True)["segmenter"] for name in ("straight", "killed"))
    torch.testing.assert_close(resumed, straight, atol=0, rtol=0)


# ------------------------------------------------------------------------------------------ what users get wrong

def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def cut(path, size=200):
    path.write_bytes(path.read_bytes()[:size])


def resize(path):
    with Image.open(path) as picture:
        picture.resize((30, 20)).save(path)


def relabel(path, value=200):
    labels = np.array(Image.open(path))
    labels[3:5] = value
    Image.fromarray(labels).save(path)


def other_cams(path):
    np.save(path, np.zeros((5, 16, 16), np.float16))


TRAIN = "--phase classify"
BAD = {  # script: (what was done, how, further flags, what the message says)
    "train_cam": [
        ("no root", lambda w: shutil.rmtree(w.voc), TRAIN, "VOC2012"),
        ("no photos", lambda w: shutil.rmtree(w.voc / "JPEGImages"), TRAIN, "JPEGImages"),
        ("no such list", None, f"{TRAIN} --split train_aug", "train_aug.txt"),
        ("empty list", lambda w: w.list.write_text("\n"), TRAIN, "empty"),
        ("no annotation", lambda w: w.xml.unlink(), TRAIN, "{name}.xml"),
        ("cut annotation", lambda w: cut(w.xml, 60), TRAIN, "{name}.xml"),
        ("unknown class", lambda w: w.xml.write_text("<a><object><name>unicorn</name></object></a>"), TRAIN, "unicorn"),
        ("class twice", lambda w: (w.voc / "classes.txt").write_text("boat\nboat\n"), TRAIN, "twice"),
        ("no photo", lambda w: w.jpg.unlink(), TRAIN, "{name}.jpg"),
        ("cut photo", lambda w: cut(w.jpg), TRAIN, "{name}.jpg"),
        ("cut photo, seen by a worker process", lambda w: cut(w.jpg), f"{TRAIN} --workers 1", "{name}.jpg"),
        ("no CLIP", lambda w: w.clip.unlink(), TRAIN, "clip.pt"),
        ("no ViT", lambda w: w.vit.unlink(), TRAIN, "vit.pth"),
        ("cut CLIP", lambda w: cut(w.clip), TRAIN, "clip.pt"),
        ("cut ViT", lambda w: cut(w.vit), TRAIN, "vit.pth"),
        ("CLIP for ViT", lambda w: shutil.copy(w.clip, w.vit), TRAIN, "DeiT"),
        ("ViT for CLIP", lambda w: shutil.copy(w.vit, w.clip), TRAIN, "clip.pt"),
        ("match before classify", lambda w: (w.out / "classify.pt").unlink(), "--phase match", "classify.pt"),
        ("prompts before match", lambda w: (w.out / "match.pt").unlink(), "--phase prompts", "match.pt"),
        ("refine before prompts", lambda w: (w.out / "prompts.pt").unlink(), "--phase refine", "prompts.pt"),
        ("export before refine", lambda w: (w.out / "refine.pt").unlink(), "--phase export", "refine.pt"),
        ("cut checkpoint", lambda w: cut(w.out / "classify.pt"), "--phase match", "classify.pt"),
        ("prompts for a generator", lambda w: shutil.copy(w.out / "prompts.pt", w.out / "refine.pt"), "--phase export",
         "generator"),
        ("a file where a folder should be", None, f"{TRAIN} --out OUT/refine.pt/new", "expected a folder that can be written to"),
        ("other classes", lambda w: edit(w.voc / "classes.txt", "boat", "boat\nunicorn"), "--phase match", "classify.pt"),
        *((f"scale {scale}", None, f"--phase export --scales 1 {scale}", "scales") for scale in ("nan", "-1")),
        *((f"{n} prompt vectors", None, f"--phase all --prompt-length {n}", "prompt-length") for n in (-1, 0, 72)),
    ],
    "make_pseudo": [
        ("no root", lambda w: shutil.rmtree(w.voc), "", "VOC2012"),
        ("no CAMs", lambda w: shutil.rmtree(w.cams), "", "cams"),
        ("cut CAMs", lambda w: cut(w.npy), "", "{name}.npy"),
        ("empty CAMs", lambda w: cut(w.npy, 0), "", "{name}.npy"),
        ("other CAMs", lambda w: other_cams(w.npy), "", "{name}.npy"),
        ("objects as CAMs", lambda w: np.save(w.npy, np.array([{}]), allow_pickle=True), "", "{name}.npy"),
        ("a file where a folder should be", None, "--out OUT/refine.pt/new", "expected a folder that can be written to"),
        ("CAMs of NaN", lambda w: np.save(w.npy, np.load(w.npy) * np.nan), "", "finite"),
        ("cut photo", lambda w: cut(w.jpg), "", "{name}.jpg"),
        *[("background score", None, f"--bg-score {score}", f"bg-score or --threshold {score}: expected a number in (0, 1) or auto")
          for score in ("high", "7", "nan", "0", "-0.5", "inf")],
        *[("confidence", None, f"--min-confidence {value}", f"--min-confidence {float(value)}: expected a probability")
          for value in ("-0.1", "1.5", "nan")],
        ("confidence without a CRF", None, "--crf none --min-confidence 0.5", "--crf none has none"),
    ],
    "train_seg": [
        ("no labels", lambda w: w.png.unlink(), "", "{name}.png"),
        ("cut labels", lambda w: cut(w.png, 100), "", "{name}.png"),
        ("labels of another size", lambda w: resize(w.png), "", "20x30"),
        ("label of another class list", lambda w: relabel(w.png), "", "200"),
        ("labels in colour", lambda w: Image.new("RGB", (64, 64)).save(w.png), "", "RGB"),
        ("labels of another size, seen by a worker process", lambda w: resize(w.png), "--workers 1", "20x30"),
        ("a file where a folder should be", None, "--out OUT/refine.pt/new", "expected a folder that can be written to"),
        ("cut photo", lambda w: cut(w.jpg), "", "{name}.jpg"),
        ("no ViT", lambda w: w.vit.unlink(), "", "vit.pth"),
    ],
    "eval": [
        ("no predictions", None, "--pred nowhere", "nowhere"),
        ("prediction of another size", lambda w: resize(w.png), "--pred MASKS", "20x30"),
        ("prediction of another class list", lambda w: relabel(w.png), "--pred MASKS", "200"),
        ("no truth", lambda w: w.truth.unlink(), "--pred MASKS", "SegmentationClass/{name}.png: no such mask; expected the true"),
        ("truth of another size", lambda w: resize(w.truth), "--pred MASKS", "20x30"),
        ("other CAMs", lambda w: other_cams(w.npy), "--cams CAMS", "{name}.npy"),
        *[("threshold", None, f"--cams CAMS --threshold {score}", f"threshold {score}: expected a number in (0, 1) or auto")
          for score in ("high", "7", "nan")],
        ("no checkpoint", None, "--checkpoint nowhere.pt", "nowhere.pt"),
        ("a generator for a segmenter", None, "--checkpoint OUT/refine.pt", "segmenter"),
        ("a file where a folder should be", None, "--pred MASKS --save OUT/refine.pt/new",
         "expected a folder that can be written to"),
        ("column without caption", None, "--pred MASKS --strip OUT/s.png --columns MASKS", "columns"),
    ],
    "clip_model": [
        ("no photo", lambda w: w.jpg.unlink(), "", "{name}.jpg"),
        ("cut photo", lambda w: cut(w.jpg), "", "{name}.jpg"),
        ("no CLIP", lambda w: w.clip.unlink(), "", "clip.pt"),
    ],
    "mask_generator": [
        ("no ViT", lambda w: w.vit.unlink(), "", "vit.pth"),
        ("no photo", lambda w: w.jpg.unlink(), "", "{name}.jpg"),
    ],
}


class World:
    """The toy world and the chain's outputs as a user may have damaged them; name is the first training image."""

    def __init__(self, toy, chain, folder):
        self.voc = shutil.copytree(toy / "VOC2012", folder / "VOC2012")
        self.out, self.masks = (shutil.copytree(chain / part, folder / part) for part in ("cam", "masks"))
        self.clip, self.vit = (shutil.copy(toy / file, folder / file) for file in ("clip.pt", "vit.pth"))
        self.cams, self.name, self.list = self.out / "cams", names_in(self.voc)[0], self.voc / "ImageSets/Segmentation/train.txt"
        self.jpg, self.xml = self.voc / f"JPEGImages/{self.name}.jpg", self.voc / f"Annotations/{self.name}.xml"
        self.png, self.npy = self.masks / f"{self.name}.png", self.cams / f"{self.name}.npy"
        self.truth = self.voc / f"SegmentationClass/{self.name}.png"

    def flags(self, script):
        data, weights = ["--data", self.voc, "--split", "train"], ["--clip", self.clip, "--vit", self.vit]
        return {"train_cam": [*data, *weights, "--out", self.out, *TINY],
                "make_pseudo": [*data, "--cams", self.cams, "--out", self.voc.parent / "new", "--device", "cpu"],
                "train_seg": [*data, "--labels", self.masks, "--vit", self.vit, "--out", self.voc.parent / "new", "--epochs", 1,
                              "--crop", 32, "--batch", 4, "--workers", 0, "--device", "cpu"],
                "eval": [*data, "--json", self.voc.parent / "new/a.json", "--device", "cpu"],
                "clip_model": ["a", "b", "--image", self.jpg, "--clip", self.clip, "--device", "cpu"],
                "mask_generator": ["--vit", self.vit, "--image", self.jpg]}[script]


@pytest.mark.parametrize("script, damage, flags, says", [pytest.param(script, *row[1:], id=f"{script}: {row[0]}")
                                                         for script, rows in BAD.items() for row in rows])
def test_a_mistake_is_one_line_and_exit_code_2(script, damage, flags, says, toy, chain, tmp_path, capsys):
    world = World(toy, chain, tmp_path)
    if damage:
        damage(world)
    before = files_in(tmp_path)
    flags = [flag.replace("MASKS", str(world.masks)).replace("CAMS", str(world.cams)).replace("OUT", str(world.out))
             for flag in flags.split()]
    with pytest.raises(SystemExit) as end:
        call(script, *world.flags(script), *flags)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and says.format(name=world.name) in lines[0], "\n".join(lines)
    assert files_in(tmp_path) == before  # nothing written, whole or half


def test_exit_code_of_the_process(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--data", str(tmp_path), "--pred", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}: no folder JPEGImages") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("fill", [
    lambda file: torch.save({"weights": torch.zeros(9999)}, file.name), lambda file: file.write(bytes(9999)),
    lambda file: Image.new("L", (99, 99)).save(file, "png")], ids=["checkpoint", "bytes", "png"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(fill, tmp_path, capsys):
    """A device that takes no byte stands for the disk that is full halfway through the file."""
    (tmp_path / "a.pt").write_text("old")

    def write(path):
        path.write_text("half")
        with open("/dev/full", "wb") as full:
            fill(full)
    with pytest.raises(SystemExit) as end:
        run(lambda _: train_cam.write_file(tmp_path / "a.pt", write), None)
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {tmp_path}/a.pt: cannot be written (") and "make room" in line
    assert bytes_in(tmp_path) == {"a.pt": b"old"}


# ------------------------------------------------------------------------------------------ real photos

@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_chain_on_real_photos(toy, tmp_path):
    """Four photos of VOC size, the 20 classes, DeiT-Tiny: every stage runs through and writes a file per photo."""
    root, vit = tmp_path / "voc", REAL / "deit_tiny_patch16_224.pth"
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass"):
        (root / folder).symlink_to(REAL / "voc_mini" / folder)
    names = names_in(REAL / "voc_mini")[:4]
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(names))
    data = ["--data", root, "--split", "train"]
    call("train_cam", *data, "--clip", toy / "clip.pt", "--vit", vit, "--out", tmp_path / "cam", *TINY, "--scales", 0.5)
    assert files_in(tmp_path / "cam/cams").keys() == {"background.json", *(f"{name}.npy" for name in names)}
    call("make_pseudo", *data, "--cams", tmp_path / "cam/cams", "--out", tmp_path / "masks", "--crf", "voc", "--device", "cpu")
    call("train_seg", *data, "--labels", tmp_path / "masks", "--vit", vit, "--out", tmp_path / "seg", "--epochs", 1, "--batch", 2,
         "--crop", 96, "--workers", 0, "--device", "cpu")
    call("eval", *data, "--checkpoint", tmp_path / "seg/seg.pt", "--scales", 0.5, "--json", tmp_path / "s.json",
         "--save", tmp_path / "saved", "--device", "cpu")
    for folder in ("masks", "saved"):
        assert files_in(tmp_path / folder).keys() == {f"{name}.png" for name in names}
        for name in names:
            check_label_png(tmp_path / folder / f"{name}.png", Data(root, "train").image(name).size, {*range(21), 255})
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["images"] == 4 and len(result["classes"]) == 21 and 0 <= result["miou"] <= 100


@pytest.mark.weights
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_deit_sees_the_zebra(capsys):
    call("mask_generator", "--vit", REAL / "deit_tiny_patch16_224.pth",
         "--image", REAL / "coco_mini/val2014/COCO_val2014_000000000034.jpg")
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first[:2] == ["class", "340"] and float(first[2]) == pytest.approx(0.83, abs=0.01)  # what timm says
