"""The scripts through their command lines: the whole chain, the files they promise, several processes."""
import json
import re
import runpy
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, error_line, files_in, run_script
from PIL import Image

from make_pseudo import PALETTE
from train_cam import PHASES, Split

SCRIPTS = ["clip_model", "mask_generator", "train_cam", "make_pseudo", "train_seg", "eval"]
OBJECTS = ["boat", "train", "bird", "cow", "car", "bottle"]
REAL = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize("script", [*SCRIPTS, "prepare/toy"])
def test_help_needs_no_files(script, tmp_path, monkeypatch, capsys):
    """From an empty folder, without a network: exit 0, nothing written, and what train_cam.py shows fits on a page."""
    def offline(*_):
        raise AssertionError("--help went to the network")
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith(f"usage: {Path(script).name}.py") and not list(tmp_path.iterdir())
    assert script != "train_cam" or len(set(re.findall(r"--[a-z][a-z-]*", shown))) <= 23


# ------------------------------------------------------------------------------------------ the whole chain

def test_chain_opened_no_mask(chain):
    assert not (chain / "data/masks").exists()  # the whole chain ran without


def test_checkpoints_and_logs(chain):
    assert {path.name for path in (chain / "cam").iterdir()} == {
        *(f"{phase}.pt" for phase in PHASES), "prompts.txt", "log.jsonl", "cams"}  # nothing left over
    assert {path.name for path in (chain / "seg").iterdir()} == {"seg.pt", "log.jsonl"}
    for path in (*(f"cam/{phase}.pt" for phase in PHASES), "seg/seg.pt"):
        state = torch.load(chain / path, weights_only=True)
        assert state["classes"] == state["words"] == OBJECTS and state["recipe"]["steps"] == 3 and state["recipe"]["batch"] == 4
    for folder, phases in (("cam", PHASES), ("seg", ["seg"])):
        rows = [json.loads(line) for line in (chain / folder / "log.jsonl").read_text().splitlines()]
        assert [(row["phase"], row["step"]) for row in rows] == [(phase, step) for phase in phases for step in (1, 2, 3)]
        assert [row["epoch"] for row in rows[:3]] == [0.33, 0.67, 1]
        assert all(np.isfinite(row["loss"]) and {"lr", "images_per_s", "eta_s", "gib"} <= row.keys() for row in rows)


def test_prompts_txt(chain):
    lines = (chain / "cam/prompts.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == OBJECTS
    for line in lines:
        cosines = [float(part.split()[-1]) for part in line.split(": ")[1].split(", ")]
        assert len(cosines) == 5 and cosines == sorted(cosines, reverse=True) and max(cosines) <= 1


def test_cams_on_disk(chain):
    split, tops = Split(chain / "data", "train"), []
    assert {path.name for path in (chain / "cam/cams").iterdir()} == {"background.json", "made_of.json", *(f"{name}.npy" for name in split.names)}
    for name in split.names:
        cams = np.load(chain / f"cam/cams/{name}.npy", allow_pickle=False)
        W, H = split.image(name).size
        assert cams.dtype == np.float16 and cams.shape == (split.labels[name].sum(), -(-H // 4), -(-W // 4))
        assert cams.min() >= 0 and cams.max() <= 1
        tops += cams.max(axis=(1, 2)).tolist()
    assert split.image(split.names[0]).size == (50, 37)
    assert all(top == 0 or top > 0.99 for top in tops) and max(tops) > 0.99  # a map uses its range, unless it is flat


def check_label_png(path, size, allowed):
    with Image.open(path) as picture:
        assert picture.mode == "P" and picture.size == size and picture.getpalette() == PALETTE
        assert set(np.unique(picture)) <= allowed, path


def test_pseudo_masks_on_disk(chain):
    split = Split(chain / "data", "train")
    assert files_in(chain / "masks").keys() == {f"{name}.png" for name in split.names}
    for name in split.names:
        present = 1 + np.flatnonzero(split.labels[name])
        check_label_png(chain / f"masks/{name}.png", split.image(name).size, {0, *present.tolist()})


@pytest.mark.parametrize("split, what, flags", [
    ("train", "cams", "--cams {chain}/cam/cams --oracle-sweep"), ("train", "pred", "--pred {chain}/masks"),
    ("val", "checkpoint", "--checkpoint {chain}/seg/seg.pt --scales 1 1.5 --crf voc")], ids=["cams", "pred", "checkpoint"])
def test_eval_writes_what_it_promises(split, what, flags, toy, chain, tmp_path, capsys):
    columns = ["--columns", f"CAM={chain / 'cam/cams'}", f"mask={chain / 'masks'}"] if split == "train" else []
    call("eval", "--data", toy / "data", "--split", split, *flags.format(chain=chain).split(), "--save", tmp_path / "saved",
         "--json", tmp_path / "new/scores.json", "--strip", tmp_path / "strip.png", "--strip-count", 3, *columns, "--device", "cpu")
    table, result = capsys.readouterr().out, json.loads((tmp_path / "new/scores.json").read_text())
    assert list(result["iou"]) == result["classes"] == ["background", *OBJECTS]
    assert (result["what"], result["list"], result["images"]) == (what, split, 12 if split == "train" else 4)
    scores = [value for value in result["iou"].values() if value is not None]
    assert all(0 <= value <= 100 for value in scores) and result["miou"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert f"{result['miou']:.2f}" in table and all(f"{name:>16}" in table for name in result["classes"])
    if what == "cams":
        assert 0 < result["background_score"] < 1 and "no true mask" in result["background_score_chosen"]
        assert "ground truth" in result["oracle"]["background_score_chosen"] and "TUNED ON GROUND TRUTH" in table
    else:
        assert "oracle" not in result and result["background_score"] is None
    tested = ([1, 1.5], True, "voc") if what == "checkpoint" else (None, None, "none" if what == "cams" else "as in the files")
    assert (result["scales"], result["flip"], result["crf"]) == tested
    data = Split(toy / "data", split)
    assert files_in(tmp_path / "saved").keys() == {f"{name}.png" for name in data.names}
    for name in data.names:
        check_label_png(tmp_path / f"saved/{name}.png", data.image(name).size, set(range(7)))
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == ((3 + len(columns[1:])) * 132, 3 * 132 + 16)


def test_clip_model_and_mask_generator(toy, capsys):
    photo = toy / "data/images/train_00000.jpg"
    call("clip_model", "a photo of boat.", "a photo of water.", "--image", photo, "--clip", toy / "clip.pt", "--device", "cpu")
    assert sum(float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines()) == pytest.approx(100, abs=0.02)
    call("mask_generator", "--vit", toy / "vit.pth")
    assert "patch 4, width 128, 4 layers, grid (16, 16)" in capsys.readouterr().out


@pytest.mark.weights
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_deit_sees_the_zebra(capsys):
    call("mask_generator", "--vit", REAL / "deit_tiny_patch16_224.pth",
         "--image", REAL / "coco_mini/val2014/COCO_val2014_000000000034.jpg")
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first[:2] == ["class", "340"] and float(first[2]) == pytest.approx(0.83, abs=0.01)  # what timm says


# ------------------------------------------------------------------------------------------ parts of the chain

def test_finished_pngs_are_kept_and_missing_ones_made(toy, chain, tmp_path):
    masks = shutil.copytree(chain / "masks", tmp_path / "masks")
    (masks / "train_00003.png").unlink()
    (masks / "train_00004.png").write_text("kept")
    flags = ["--data", toy / "data", "--cams", chain / "cam/cams", "--out", masks, "--device", "cpu"]
    call("make_pseudo", *flags)
    assert files_in(masks) == {**files_in(chain / "masks"), "train_00004.png": b"kept"}
    call("make_pseudo", *flags, "--overwrite")
    assert files_in(masks) == files_in(chain / "masks")


def test_full_supervision(toy, tmp_path):
    """train_seg.py --labels ROOT/masks, in batches greater than the split"""
    call("train_seg", "--data", toy / "data", "--split", "val", "--labels", toy / "data/masks", "--vit", toy / "vit.pth", "--out",
         tmp_path, *TINY, "--batch", 6)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1.5, 3, 4.5]
    assert torch.load(tmp_path / "seg.pt", weights_only=True)["recipe"]["labels"] == "data/masks"


def test_export_of_a_phase_and_its_background_score(toy, chain, cam, root, tmp_path, capsys):
    """--checkpoint --cams on another split. Without prompts nothing chooses a background score, so auto asks for a number."""
    shutil.copy(chain / "cam/match.pt", tmp_path)
    flags = ["--split", "val", "--phase", "export", "--checkpoint", tmp_path / "match.pt", "--cams", tmp_path / "cams"]
    cam(tmp_path / "out", *flags)
    names = [f"val_0000{i}" for i in range(4)]
    assert files_in(tmp_path / "cams").keys() == {"made_of.json", *(f"{name}.npy" for name in names)}
    assert not files_in(tmp_path / "out")
    make = ["--data", root, "--split", "val", "--cams", tmp_path / "cams", "--out", tmp_path / "masks", "--device", "cpu"]
    line = error_line(capsys, "make_pseudo", *make)
    assert "background.json: no background score" in line and "--background-score 0.4" in line
    assert "background.json" in error_line(capsys, "eval", *make[:6])
    call("make_pseudo", *make, "--background-score", 0.4)
    assert "background score 0.4 (given)" in capsys.readouterr().out
    assert files_in(tmp_path / "masks").keys() == {f"{name}.png" for name in names}

    (tmp_path / "out").mkdir()
    shutil.copy(chain / "cam/prompts.pt", tmp_path / "out")
    cam(tmp_path / "out", *flags)
    chosen = json.loads((tmp_path / "cams/background.json").read_text())
    low, high = chosen["not_told_apart"]
    assert low <= float(min(chosen["losses"], key=chosen["losses"].get)) <= high and 0.15 < chosen["background_score"] < 0.9
    call("make_pseudo", *make, "--overwrite")
    assert f"background score {chosen['background_score']} (auto: " in capsys.readouterr().out
    (tmp_path / "out/prompts.pt").unlink()
    cam(tmp_path / "out", *flags)
    assert "background.json" not in files_in(tmp_path / "cams")  # it went with the earlier CAMs


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [("make_pseudo", "--cams {chain}/cam/cams --out"),
                                           ("eval", "--checkpoint {chain}/seg/seg.pt --scales 1 --json {out}.json --save")],
                         ids=["make_pseudo", "eval"])
def test_two_processes_write_what_one_writes(script, flags, root, chain, tmp_path):
    """The same bytes, with unequal halves."""
    (root / "few.csv").write_text("".join((root / "train.csv").read_text().splitlines(keepends=True)[:3]))
    made = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = ["--data", root, "--split", "few", *flags.format(chain=chain, out=out).split(), out, "--device", "cpu"]
        if processes == 1:
            call(script, *words)
        else:
            printed = run_script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, f"{script}.py", *words)
            assert printed.count("images of few") == 1  # said once
        made.append(files_in(out) | ({"scores": (tmp_path / f"{processes}.json").read_bytes()} if script == "eval" else {}))
    assert made[0] == made[1] and len(made[0]) == 3 + (script == "eval")
