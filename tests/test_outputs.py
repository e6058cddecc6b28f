"""What the scripts may replace, what --resume keeps, and that a killed run can be continued."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import reduce
from operator import getitem

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, error_line, files_in, two_processes
from PIL import Image
from test_prepare import IDS, SQUARE, coco_root, voc_root

import common
import train_cam
from common import InputError, Split, claim, write_labels


@pytest.fixture
def ours(toy, chain, tmp_path):
    """A finished run and its data, which may be changed"""
    for folder in ("data", "cam", "masks", "seg"):
        shutil.copytree(chain / folder, tmp_path / folder)
    for file in ("clip.pt", "vit.pth"):
        shutil.copy(toy / file, tmp_path)
    return tmp_path


def foreign_cams(m, folder):
    """CAMs of another program: (H, W) arrays in a dict, pickled"""
    split = Split(m / "data", "train")
    (m / folder).mkdir()
    for name in split.names:
        maps = {k: np.full((3, 3), 0.5) for k in split.present(name).tolist()}
        np.save(m / f"{folder}/{name}.npy", maps)


@pytest.fixture
def mine(toy, ours):
    """The same, with PNG photos, truth, and what other programs wrote"""
    data = ours / "data"
    shutil.copytree(toy / "data/masks", data / "masks")
    for path in (data / "images").glob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    for path in data.glob("*.csv"):
        path.write_text(path.read_text().replace(".jpg", ".png"))
    foreign_cams(ours, "theirs")
    for name in ("train_00000", "train_00001"):
        write_labels(ours / f"pictures/{name}.png", np.ones((64, 64), np.uint8))
    for file in ("weights/vit.pth", "weights/classify.pt", "weights/seg.pt", "later/refine.pt"):
        (ours / file).parent.mkdir(exist_ok=True)
        torch.save({"not": "ours"}, ours / file)
    (ours / "texts").mkdir()
    (ours / "texts/classify.jsonl").write_text("mine")
    coco_root(ours / "coco", [(0, 1, 0, SQUARE)])
    write_labels(ours / "coco/masks/mine.png", np.ones((4, 5), np.uint8))
    (ours / "listed").mkdir()
    for folder, file in (("coco", "classes.txt"), ("listed", "train.csv")):
        (ours / folder / file).write_text("mine")
    voc_root(ours / "voc", {"a": ["cat"]}, train=["a"])
    write_labels(ours / "voc/SegmentationClass/a.png", np.ones((4, 5), np.uint8))
    (ours / "voc/masks").symlink_to("SegmentationClass")
    return ours


# ---- Results begin where nothing is --------------------------------------------------------------

STAGES = {
    "cam": "train_cam --data {m}/data --clip {m}/clip.pt --vit {m}/vit.pth --out {m}/cam "
           + " ".join(TINY),
    "masks": "make_pseudo --data {m}/data --cams {m}/cam/cams --out {m}/masks --workers 0",
    "seg": "train_seg --data {m}/data --labels {m}/masks --vit {m}/vit.pth --out {m}/seg "
           + " ".join(TINY)}
EVAL = "eval --data {m}/data --split train --workers 0 "
WRONG_TURNS = {  # whatever is there stays, byte by byte; of two --out the later counts
    "all phases again": STAGES["cam"],
    "all phases of a shorter list": STAGES["cam"] + " --split few",
    "all phases of a shorter list, resumed": STAGES["cam"] + " --split few --resume",
    "the export again": STAGES["cam"] + " --phase export",
    "masks again": STAGES["masks"],
    "masks of some photos by another score": STAGES["masks"] + " --split few "
                                             "--background-score 0.3",
    "the same, resumed": STAGES["masks"] + " --split few --background-score 0.3 --resume",
    "masks into the photos": STAGES["masks"] + " --out {m}/data/images --resume",
    "masks into other pictures": STAGES["masks"] + " --out {m}/pictures",
    "masks into the segments": STAGES["masks"] + " --segments {m}/masks",
    "masks into the CAMs": STAGES["masks"] + " --out {m}/cam/cams",
    "foreign CAMs into the photos":
        "foreign --data {m}/data --cams {m}/theirs --out {m}/data/images",
    "the export into foreign CAMs": STAGES["cam"] + " --phase export --cams {m}/theirs",
    "all phases, their CAMs into the photos":  # shows before the first phase
        STAGES["cam"] + " --out {m}/new --cams {m}/data/images",
    "all phases, their CAMs into foreign ones": STAGES["cam"] + " --out {m}/new --cams {m}/theirs",
    "predictions into other pictures":
        EVAL + "--checkpoint {m}/seg/seg.pt --save {m}/pictures",
    "predictions into the masks scored": EVAL + "--pred {m}/masks --save {m}/masks",
    "predictions over the truth":
        "eval --images {m}/data/images --checkpoint {m}/seg/seg.pt --save {m}/data/masks",
    "predictions into a folder of masks": EVAL + "--checkpoint {m}/seg/seg.pt --save {m}/masks",
    "COCO's lists over mine": "coco --coco {m}/coco",
    "COCO's lists over mine, without masks": "coco --coco {m}/coco --no-masks",
    "VOC's masks through a link": "voc --voc {m}/voc",
    "VOC's lists over mine": "voc --voc {m}/voc --out {m}/listed",
    "the toy world over weights": "toy --out {m}/weights --train 1 --val 1",
    "the toy world over lists": "toy --out {m} --train 1 --val 1",
    "a generator over a file of that name": STAGES["cam"] + " --phase classify --out {m}/weights",
    "all phases over the file of a later one": STAGES["cam"] + " --out {m}/later",
    "a log over a text of that name": STAGES["cam"] + " --phase classify --out {m}/texts",
    "a segmentation over a file of that name": STAGES["seg"] + " --out {m}/weights"}


@pytest.mark.parametrize("command", WRONG_TURNS.values(), ids=WRONG_TURNS)
def test_wrong_turns_change_nothing(command, mine, capsys):
    before = files_in(mine)
    line = error_line(capsys, *command.format(m=mine).split())
    assert "another" in line and "delete" not in line
    assert files_in(mine) == before


@pytest.mark.parametrize("flags, says", [
    ("", "add --resume to go on, or pass another folder, or remove this one, which"),
    ("--crf irn", 'made with crf "voc", now it is "irn"; pass another folder, or remove this one,'),
    ("--crf irn --resume", 'made with crf "voc", now it is "irn"; pass another folder, or remove')])
def test_the_line_says_what_differs_and_the_ways_out(flags, says, ours, capsys):
    line = error_line(capsys, *STAGES["masks"].format(m=ours).split(), *flags.split())
    assert line.startswith(f"error: {ours}/masks: holds an earlier run") and says in line
    write_labels(ours / "masks/mine.png", np.ones((4, 5), np.uint8))
    assert "remove" not in error_line(capsys, *STAGES["masks"].format(m=ours).split())


def test_a_folder_that_holds_one_run(tmp_path):
    """A file of the user's stays in it; what others made, or a broken record, is refused."""
    record = {"script": "a.py", "scales": (1, 2)}
    claim(tmp_path / "out", ["x.png"], record)
    for file in ("x.png", "mine.png"):
        (tmp_path / "out" / file).write_text(file)
    claim(tmp_path / "out", ["x.png"], record, resume=True)
    assert set(files_in(tmp_path / "out")) == {"x.png", "mine.png", "made_of.json"}
    for other in (record | {"script": "b.py"}, record | {"scales": (1, 3)}, {"script": "a.py"},
                  record | {"segments": "4a"}):  # a key less, a key more
        with pytest.raises(InputError, match="out: holds an earlier run made with"):
            claim(tmp_path / "out", ["x.png"], other, resume=True)
    for text in ("", "{", "[]", "\0"):
        (tmp_path / "out/made_of.json").write_text(text)
        with pytest.raises(InputError, match="made_of.json: not readable .*; pass another folder"):
            claim(tmp_path / "out", ["x.png"], record, resume=True)


def test_snapshots_of_another_run(cam, tmp_path):
    """They would lie beside those of this one."""
    cam(tmp_path, "--phase", "classify", "--steps", 6, "--snapshots", 3)
    before = files_in(tmp_path)
    for flags in ([], ["--resume"]):
        with pytest.raises(InputError, match="pass another --out"):
            cam(tmp_path, "--phase", "classify", "--steps", 4, "--snapshots", 2, "--seed", 1,
                *flags)
    assert files_in(tmp_path) == before


def test_a_training_that_was_begun_again(ours, killed, capsys):
    """By one phase with other flags, killed while it begins: the old flags keep the old file, the
    new ones are told to begin again; begun, --resume goes on with it, and the new file takes the
    old one's place."""
    command = STAGES["cam"].format(m=ours).split() + ["--phase", "match"]
    before = files_in(ours)
    killed([*command, "--seed", "1"], 1)
    call(*command, "--resume")
    assert {**files_in(ours)} | before == files_in(ours)
    line = error_line(capsys, *command, "--seed", 1, "--resume")
    assert "match.pt: made with seed 0, now it is 1; --phase match without --resume" in line
    killed([*command, "--seed", "1"], 3)
    call(*command, "--seed", "1", "--resume")
    assert torch.load(ours / "cam/match.pt", weights_only=True)["record"]["seed"] == 1
    assert not (ours / "cam/match.part").exists()


def test_a_finished_phase_behind_one_that_must_be_trained(ours, capsys):
    for file in ("prompts.pt", "prompts.jsonl", "prompts.txt"):
        (ours / f"cam/{file}").unlink()
    before = files_in(ours)
    line = error_line(capsys, *stage("cam", ours))
    assert "cam/refine.pt: made of an earlier prompts.pt" in line and files_in(ours) == before


def late(*command):
    """train_cam.py, whose second process comes late to each place where the first one looks"""
    if common.RANK:
        for module in (common, train_cam):
            module.in_first_process = lambda function: (time.sleep(0.5), in_first(function))[1]
    call("train_cam", *command)


in_first = common.in_first_process


def test_a_late_process_looks_at_no_file(ours):
    """It would take what the first one has just made for an earlier run."""
    command = STAGES["cam"].format(m=ours).split()[1:] + ["--split", "few", "--steps", "1"]
    two_processes("test_outputs.late", *command, "--out", ours / "cam2")
    assert len(list((ours / "cam2/cams").glob("*.npy"))) == 3


# ---- CAMs know of what labels they are -----------------------------------------------------------

def swap_classes(m):
    text = (m / "data/classes.txt").read_text().splitlines()
    (m / "data/classes.txt").write_text("\n".join([text[1], text[0], *text[2:]]))


LABELS = {
    "another order of classes": (swap_classes, "CAMs of the classes"),
    "a label corrected": (lambda m: replace("data/train.csv", "images/train_00002.jpg,", "images/"
                                            "train_00002.jpg,boat;train;bird;cow;")(m),
                          "made for other labels of train_00002"),
    "a new photo": (lambda m: (shutil.copy(m / "data/images/val_00001.jpg",
                                           m / "data/images/new.jpg"),
                               (m / "data/train.csv").open("a").write("images/new.jpg,cow\n")),
                    "no CAMs of new, a photo of train.csv; pass the --split")}


@pytest.mark.parametrize("change, says", LABELS.values(), ids=LABELS)
def test_cams_of_other_labels_are_refused(change, says, ours, toy, capsys):
    shutil.copytree(toy / "data/masks", ours / "data/masks")
    change(ours)
    for command in (STAGES["masks"] + " --out {m}/new", EVAL + "--cams {m}/cam/cams"):
        assert says in error_line(capsys, *command.format(m=ours).split())


def test_cams_of_unknown_origin_are_taken_as_they_are(ours, capsys):
    (ours / "cam/cams/made_of.json").unlink()
    call(*(STAGES["masks"] + " --out {m}/new").format(m=ours).split())
    assert "no made_of.json, so these CAMs are taken as they are" in capsys.readouterr().out


# ---- --resume keeps what was made of the same inputs ---------------------------------------------

def stage(line, folder):
    """A stage of STAGES, and more flags -> its command line"""
    name, *flags = line.format(m=folder).split()
    return [*STAGES[name].format(m=folder).split(), *flags, "--resume"]


def add_one(file, *keys):
    """To a tensor of a checkpoint"""
    def change(m):
        state = torch.load(m / file, weights_only=True)
        reduce(getitem, keys, state).add_(1)
        torch.save(state, m / file)
    return change


def replace(file, old, new):
    return lambda m: (m / file).write_text((m / file).read_text().replace(old, new, 1))


def other_photo(m):
    Image.new("RGB", (64, 64), "red").save(m / "data/images/train_00001.jpg")


def other_mask(m):
    (m / "masks/train_00001.png").write_bytes((m / "masks/train_00002.png").read_bytes() + b" ")


def other_prompts(m):
    """match.pt, of which the prompts are made, and what follows it"""
    add_one("cam/match.pt", "generator", "head.bias")(m)


SEGMENTED = "masks --segments {m}/segments --out {m}/segmented"


def other_segments(m):
    """Of masks that have been made with them"""
    split = Split(m / "data", "train")
    for name in split.names:
        write_labels(m / f"segments/{name}.png", np.ones(split.size(name), np.uint8))
    call(*stage(SEGMENTED, m))
    with (m / "segments/train_00001.png").open("ab") as file:
        file.write(b" ")


CHANGES = {  # what changes; the stage that refuses, the file and key that it names
    "scales of the export": (lambda m: None, "cam --set scales=(1,0.5)",
                             "cams: holds an earlier run made with scales"),
    "segments": (other_segments, SEGMENTED, "segmented: holds an earlier run made with segments"),
    "match.pt": (other_prompts, "cam", "prompts.pt: made with match"),
    "words": (replace("data/classes.txt", "boat", "boat: X"), "cam", "match.pt: made with words"),
    "a photo": (other_photo, "cam", "classify.pt: made with photos"),
    "a photo, masks": (other_photo, "masks", "masks: holds an earlier run made with photos"),
    "a photo, segmentation": (other_photo, "seg", "seg.pt: made with photos"),
    "the EXIF switch": (replace("data/classes.txt", "boat", ": ignore exif\nboat"), "masks",
                        "made with photos"),
    "a label": (replace("data/train.csv", "cow", "cow;car"), "seg", "made with photos"),
    "the backbone": (add_one("vit.pth", "model", "norm.bias"), "cam",
                     "classify.pt: made with weights"),
    "the segmentation's backbone": (add_one("vit.pth", "model", "norm.bias"), "seg",
                                    "made with weights"),
    "a text weight of CLIP": (add_one("clip.pt", "ln_final.bias"), "cam",
                              "match.pt: made with clip"),
    "classify.pt": (add_one("cam/classify.pt", "generator", "head.bias"), "cam",
                    "match.pt: made with classify"),
    "prompts.pt": (add_one("cam/prompts.pt", "u_b"), "cam", "refine.pt: made with prompts"),
    "refine.pt": (add_one("cam/refine.pt", "generator", "head.bias"), "cam",
                  "cams: holds an earlier run made with generator"),
    "a CAM": (lambda m: np.save(m / "cam/cams/train_00001.npy", np.ones((1, 9, 9))), "masks",
              "masks: holds an earlier run made with cams"),
    "CAMs of another generator": (replace("cam/cams/made_of.json", '"generator": "', '"generator": '
                                          '"0'), "masks",
                                  "masks: holds an earlier run made with cams"),
    "a mask": (other_mask, "seg", "made with labels")}


@pytest.mark.parametrize("change, name, says", CHANGES.values(), ids=CHANGES)
def test_resume_refuses_what_was_made_of_other_inputs(change, name, says, ours, capsys):
    change(ours)
    before = files_in(ours)
    line = error_line(capsys, *stage(name, ours))
    assert says in line and ("without --resume" in line or "another folder" in line)
    assert files_in(ours) == before


def test_data_may_move(ours, tmp_path):
    """Records hold no path and no time; nothing is refused while nothing has changed."""
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


KILLS = {  # where it writes: the command, and after how many writes it is killed
    "cam2": (STAGES["cam"] + " --seed 1 --out {m}/cam2", [6, 42]),  # in classify, in the export
    "masks2": (STAGES["masks"] + " --background-score 0.2 --crf none --out {m}/masks2", [4]),
    "seg": (STAGES["seg"] + " --seed 1", [5]),  # over that of another run
    "out": ("foreign --data {m}/data --cams {m}/theirs --out {m}/out", [4]),
    "coco": ("coco --coco {m}/coco", [6])}


@pytest.mark.parametrize("folder, command, places", [(key, *row) for key, row in KILLS.items()],
                         ids=KILLS)
def test_a_killed_run_resumed_equals_one_that_was_not(folder, command, places, killed, ours,
                                                      tmp_path):
    foreign_cams(ours, "theirs")
    coco_root(ours / "coco", [(i, c, 0, SQUARE) for i in range(4) for c in IDS[:2]])
    leave = shutil.ignore_patterns("copy*")
    others = [shutil.copytree(ours, tmp_path / f"copy-{n}", ignore=leave) for n in places]
    alone = shutil.copytree(ours, tmp_path / "copy", ignore=leave)
    call(*command.format(m=alone).split())
    for other, writes in zip(others, places, strict=True):
        killed(command.format(m=other).split(), writes)
        call(*command.format(m=other).split(), "--resume")
        assert results(other / folder) == results(alone / folder)


def test_a_full_disk_leaves_the_older_file(ours, capsys, monkeypatch):
    before = (ours / "cam/classify.pt").read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for name, flags in (("cam", ["--phase", "classify"]), ("seg", [])):
        line = error_line(capsys, *stage(name, ours)[:-1], *flags)
        assert "No space left on device" in line
    assert (ours / "cam/classify.pt").read_bytes() == before
    assert not list(ours.rglob(".writing.*"))
