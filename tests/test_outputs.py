"""What the scripts may replace, what --resume keeps, and that a killed run can be continued."""
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, error_line, files_in
from PIL import Image
from test_prepare import IDS, SQUARE, coco_root, voc_root

from common import Split, claim, digest, write_labels


@pytest.fixture
def mine(toy, chain, tmp_path):
    """A user's folder: PNG photos, truth, and what other programs wrote, beside a run of ours"""
    data = shutil.copytree(toy / "data", tmp_path / "mine")
    for path in (data / "images").glob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    for path in data.glob("*.csv"):
        path.write_text(path.read_text().replace(".jpg", ".png"))
    for file in ("clip.pt", "vit.pth"):
        shutil.copy(toy / file, tmp_path)
    for folder in ("cam", "seg"):
        shutil.copytree(chain / folder, tmp_path / folder)
    split = Split(data, "train")
    for folder in ("theirs", "sam", "segments", "pictures", "weights"):
        (tmp_path / folder).mkdir()
    for name in split.names:
        size, present = split.image(name).size[::-1], np.flatnonzero(split.labels[name])
        np.save(tmp_path / f"theirs/{name}.npy", {k: np.ones(size) for k in present.tolist()})
        np.savez(tmp_path / f"sam/{name}.npz", np.ones((1, *size), bool))
        write_labels(tmp_path / f"segments/{name}.png", np.ones(size, np.uint8))
    write_labels(tmp_path / "pictures/holiday.png", np.ones((4, 5), np.uint8))
    write_labels(tmp_path / "coco/masks/mine.png", np.ones((4, 5), np.uint8))
    coco_root(tmp_path / "coco", [(0, 1, 0, SQUARE)])
    voc_root(tmp_path / "voc", {"a": ["cat"]}, train=["a"])
    write_labels(tmp_path / "voc/SegmentationClass/a.png", np.ones((4, 5), np.uint8))
    (tmp_path / "voc/masks").symlink_to("SegmentationClass")
    for file in ("vit.pth", "classify.pt", "seg.pt"):
        torch.save({"not": "ours"}, tmp_path / "weights" / file)
    return tmp_path


# ---- Only files that a run of ours made are replaced ---------------------------------------------

MASKS = "make_pseudo --data {m}/mine --cams {m}/cam/cams --out {m}/"
TRAIN = "--data {m}/mine --clip {m}/clip.pt --vit {m}/vit.pth " + " ".join(TINY) + " --out {m}/"
WRONG_TURNS = {  # whatever is there stays, byte by byte
    "masks into the photos": MASKS + "mine/images",
    "masks into the truth": MASKS + "mine/masks",
    "masks into other pictures": MASKS + "pictures",
    "masks into the segments": MASKS + "segments --segments {m}/segments",
    "masks into the CAMs": MASKS + "cam/cams",
    "the same with --resume": MASKS + "mine/images --resume",
    "foreign CAMs into the photos":
        "foreign --data {m}/mine --cams {m}/theirs --out {m}/mine/images",
    "foreign CAMs into themselves": "foreign --data {m}/mine --cams {m}/theirs --out {m}/theirs",
    "foreign segments into the truth":
        "foreign --data {m}/mine --segments {m}/sam --out {m}/mine/masks",
    "the export into foreign CAMs": "train_cam --phase export --cams {m}/theirs " + TRAIN + "cam",
    "predictions into the photos":
        "eval --images {m}/mine/images --checkpoint {m}/seg/seg.pt --save {m}/mine/images",
    "predictions into other pictures":
        "eval --data {m}/mine --checkpoint {m}/seg/seg.pt --save {m}/pictures",
    "predictions into the masks scored":
        "eval --data {m}/mine --split train --pred {m}/segments --save {m}/segments",
    "COCO's masks": "coco --coco {m}/coco",
    "VOC's masks through a link": "voc --voc {m}/voc",
    "the toy world over weights": "toy --out {m}/weights --train 1 --val 1",
    "a generator over a file of that name": "train_cam --phase classify " + TRAIN + "weights",
    "a segmentation over a file of that name": "train_seg --labels {m}/segments --data {m}/mine "
        "--vit {m}/vit.pth " + " ".join(TINY) + " --out {m}/weights",
}


@pytest.mark.parametrize("command", WRONG_TURNS.values(), ids=WRONG_TURNS)
def test_wrong_turns_change_nothing(command, mine, capsys):
    before = files_in(mine)
    line = error_line(capsys, *command.format(m=mine).split())
    assert "pass another" in line and "delete" not in line
    assert files_in(mine) == before


def test_a_folder_of_ours_is_made_anew_and_no_other_file_goes(tmp_path):
    record = {"a": 1}
    claim(tmp_path / "out", ["x.png"], record)
    for file in ("x.png", "y.png", "x.txt"):
        (tmp_path / "out" / file).write_text(file)
    claim(tmp_path / "out", ["x.png"], record, resume=True)
    assert (tmp_path / "out/x.png").is_file()
    claim(tmp_path / "out", ["x.png"], record)
    assert set(files_in(tmp_path / "out")) == {"y.png", "x.txt", "made_of.json"}


# ---- --resume keeps what was made of the same inputs ---------------------------------------------

@pytest.fixture
def ours(toy, chain, tmp_path):
    """A finished run and its data, which may be changed"""
    for folder in ("cam", "masks", "seg"):
        shutil.copytree(chain / folder, tmp_path / folder)
    shutil.copytree(chain / "data", tmp_path / "data")
    for file in ("clip.pt", "vit.pth"):
        shutil.copy(toy / file, tmp_path)
    return tmp_path


STAGES = {
    "cam": "train_cam --data {m}/data --clip {m}/clip.pt --vit {m}/vit.pth --out {m}/cam ",
    "masks": "make_pseudo --data {m}/data --cams {m}/cam/cams --out {m}/masks ",
    "seg": "train_seg --data {m}/data --labels {m}/masks --vit {m}/vit.pth --out {m}/seg "}
for stage in ("cam", "seg"):
    STAGES[stage] += " ".join(TINY)


def stage(name, folder):
    return [*STAGES[name].format(m=folder).split(), "--resume"]


def rewrite(path, change):
    """Change a checkpoint in place"""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def swap_words(m):
    lines = (m / "data/classes.txt").read_text().splitlines()
    (m / "data/classes.txt").write_text("\n".join([lines[0] + ": ship", *lines[1:]]))


def other_photo(m):
    Image.new("RGB", (64, 64), "red").save(m / "data/images/train_00001.jpg")


def other_mask(m):
    (m / "masks/train_00001.png").write_bytes((m / "masks/train_00002.png").read_bytes() + b" ")


def other_backbone(m):
    rewrite(m / "vit.pth", lambda state: state["model"]["norm.bias"].add_(1))


CHANGES = {  # what changes: the stage that refuses, the file and key it names
    "words": (swap_words, "cam", "match.pt: made with words"),
    "a photo": (other_photo, "cam", "classify.pt: made with photos"),
    "a photo, masks": (other_photo, "masks", "made_of.json: made with photos"),
    "a photo, segmentation": (other_photo, "seg", "seg.pt: made with photos"),
    "the EXIF switch": (lambda m: (m / "data/classes.txt").write_text(
        ": ignore exif\n" + (m / "data/classes.txt").read_text()), "masks", "with photos"),
    "a label": (lambda m: (m / "data/train.csv").write_text(
        (m / "data/train.csv").read_text().replace("cow", "cow;car", 1)), "seg", "with photos"),
    "the backbone": (other_backbone, "cam", "classify.pt: made with weights"),
    "the segmentation's backbone": (other_backbone, "seg", "made with weights"),
    "a text weight of CLIP": (lambda m: rewrite(
        m / "clip.pt", lambda s: s["ln_final.bias"].add_(1)), "cam", "match.pt: made with clip"),
    "classify.pt": (lambda m: rewrite(m / "cam/classify.pt", lambda s: s["generator"][
        "head.bias"].add_(1)), "cam", "match.pt: made with classify"),
    "prompts.pt": (lambda m: rewrite(m / "cam/prompts.pt", lambda s: s["u_b"].add_(1)),
                   "cam", "refine.pt: made with prompts"),
    "refine.pt": (lambda m: rewrite(m / "cam/refine.pt", lambda s: s["generator"][
        "head.bias"].add_(1)), "cam", "made_of.json: made with generator"),
    "a CAM": (lambda m: np.save(m / "cam/cams/train_00001.npy", np.ones((1, 9, 9))),
              "masks", "made with cams"),
    "a mask": (other_mask, "seg", "made with labels"),
    "CAMs of the same sizes, of another generator": (lambda m: (m / "cam/cams/made_of.json"
                                                     ).write_text("{}"), "masks", "with cams"),
}


@pytest.mark.parametrize("change, name, says", CHANGES.values(), ids=CHANGES)
def test_resume_refuses_what_was_made_of_other_inputs(change, name, says, ours, capsys):
    call(*stage(name, ours))  # nothing has changed: nothing is refused
    change(ours)
    before = files_in(ours)
    line = error_line(capsys, *stage(name, ours))
    assert says in line and "without --resume" in line and "delete" not in line
    assert files_in(ours) == before


@pytest.mark.parametrize("flags, says", [
    ("length=4", "prompts.pt: made with length 30, now it is 4; --phase prompts without --resume"),
    ("lambda_t=0.5", "prompts.pt: made with lambda_t 0.02, now it is 0.5")])
def test_resume_names_the_phase_and_the_key(flags, says, ours, capsys):
    assert says in error_line(capsys, *stage("cam", ours), "--set", flags)


def test_data_may_move(ours, tmp_path):
    """Records hold no path and no time."""
    for name in STAGES:
        call(*stage(name, ours))
    before, moved = files_in(ours), tmp_path / "moved"
    shutil.copytree(ours, moved, ignore=shutil.ignore_patterns("moved"))
    shutil.rmtree(ours / "data")
    for path in moved.rglob("*"):
        os.utime(path, (0, 0))
    for name in STAGES:
        call(*stage(name, moved))
    assert files_in(moved) == before


def test_without_resume_masks_are_made_of_the_photos_there_are(ours):
    """Photos replaced in place, of the same size, CAMs exported anew: no mask is the old one."""
    split = Split(ours / "data", "train")
    for path in split.paths.values():
        Image.open(path).rotate(180).save(path)
    flags = STAGES["masks"].format(m=ours).split()
    shutil.rmtree(ours / "cam/cams")
    call(*stage("cam", ours)[:-1], "--phase", "export")
    call(*flags, "--background-score", 0.2)
    call(*[flag.replace(f"{ours}/masks", f"{ours}/new") for flag in flags],
         "--background-score", 0.2)
    assert files_in(ours / "masks") == files_in(ours / "new")


# ---- A killed run --------------------------------------------------------------------------------

KILLER = """
import json, os, signal, sys
import coco, foreign, make_pseudo, train_cam, train_seg  # loaded once, for all children
from conftest import call
for line in sys.stdin:
    command, writes = json.loads(line)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # with the processes that it starts
        done, replace = [], os.replace
        def replacing(*paths):  # killed when a file is written and has not yet taken its place
            done.append(paths)
            if len(done) == writes:
                os.killpg(0, signal.SIGKILL)
            replace(*paths)
        os.replace, sys.stdout, sys.stderr = replacing, open(os.devnull, "w"), open(os.devnull, "w")
        call(*command)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def killed():
    """killed(command, writes): run it in a process of its own, killed at the end of so many writes.
    The processes are forked off one that has computed nothing, whose threads would be lost."""
    path = os.pathsep.join([str(ROOT), *(str(ROOT / name) for name in ("tests", "prepare"))])
    with subprocess.Popen([sys.executable, "-c", KILLER], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}) as parent:
        def killed(command, writes):
            print(json.dumps([command, writes]), file=parent.stdin, flush=True)
            assert int(parent.stdout.readline()) == signal.SIGKILL  # it was still running
        yield killed
        parent.stdin.close()


def results(folder):
    """Without logs, which hold times"""
    return {name: data for name, data in files_in(folder).items() if not name.endswith(".jsonl")}


KILLS = {  # where it writes; the command; another run there before it; writes before the kill
    "cam, in classify": ("cam", STAGES["cam"] + " --seed 1", STAGES["cam"], 6),
    "cam, in match": ("cam", STAGES["cam"] + " --seed 1", STAGES["cam"], 12),
    "cam, in the export": ("cam", STAGES["cam"] + " --seed 1", STAGES["cam"], 42),
    "masks": ("masks", STAGES["masks"] + "--background-score 0.2 --crf none", STAGES["masks"], 4),
    "seg": ("seg", STAGES["seg"] + " --seed 1", STAGES["seg"], 5),
    "foreign": ("out", "foreign --data {m}/data --cams {m}/theirs --out {m}/out",
                "foreign --data {m}/data --cams {m}/others --out {m}/out", 4),
    "coco": ("coco", "coco --coco {m}/coco", "", 6),
}


@pytest.mark.parametrize("folder, command, other, writes", KILLS.values(), ids=KILLS)
def test_a_killed_run_resumed_equals_one_that_was_not(folder, command, other, writes, killed, ours,
                                                      tmp_path):
    """In a folder in which another run had finished: equal to a run in an empty folder"""
    split = Split(ours / "data", "train")
    for value, theirs in ((0.5, "theirs"), (1, "others")):
        (ours / theirs).mkdir()
        for name in split.names:
            maps = {k: np.full((3, 3), value) for k in np.flatnonzero(split.labels[name]).tolist()}
            np.save(ours / f"{theirs}/{name}.npy", maps)
    coco_root(ours / "coco", [(i, c, 0, SQUARE) for i in range(4) for c in IDS[:2]])
    alone = shutil.copytree(ours, tmp_path / "alone", ignore=shutil.ignore_patterns("alone"))
    if folder != "coco":
        shutil.rmtree(alone / folder, ignore_errors=True)
    if other:
        call(*other.format(m=ours).split())
    killed(command.format(m=ours).split(), writes)
    call(*command.format(m=ours).split(), "--resume")
    call(*command.format(m=alone).split())
    assert results(ours / folder) == results(alone / folder)


def test_a_full_disk_leaves_the_older_file(ours, capsys, monkeypatch):
    before = (ours / "cam/classify.pt").read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for name in ("cam", "seg"):
        line = error_line(capsys, *stage(name, ours)[:-1])
        assert "No space left on device" in line
    assert (ours / "cam/classify.pt").read_bytes() == before
    assert not list(ours.rglob(".writing.*"))


def test_a_score_names_the_record_that_it_scored(toy, ours):
    for flags, record in ((["--split", "train", "--pred", ours / "masks"], "masks/made_of.json"),
                          (["--split", "train", "--cams", ours / "cam/cams"],
                           "cam/cams/made_of.json"),
                          (["--checkpoint", ours / "seg/seg.pt"], "seg/seg.pt")):
        call("eval", "--data", toy / "data", *flags, "--json", ours / "s.json")
        assert json.loads((ours / "s.json").read_text())["record"] == digest(ours / record)
