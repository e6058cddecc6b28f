"""The quick parts of tests/crash.py and tests/fuzz.py, and what docs/reliability.md says besides. Both run whole by themselves."""
import json
import os
import random
import re
import socket
import subprocess
import sys

import crash
import fuzz
import pytest
import torch
from conftest import ROOT, TINY, call, error_line, files_in, run_script

import train_cam
from clip_model import InputError
from train_cam import explained, forget_log, hold


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("crash")
    crash.make_world(base / "world")
    return base


def test_killed_and_run_again_is_as_if_left_alone(base):
    stages = {stage.title: stage for stage in crash.STAGES}
    for title, kills in (("classify", 1), ("match", 2)):
        row = crash.kill_stage(stages[title], base, kills, random.Random(0))
        assert row["well"] and row["kills"] == kills, row


def test_comparison_sees_what_is_lost(tmp_path):
    """A check that cannot fail would be none."""
    for name, value in (("alone", 0.0), ("killed", 1e-7)):
        (tmp_path / name).mkdir()
        torch.save({"a": torch.tensor(value)}, tmp_path / name / "a.pt")
        (tmp_path / name / "log.jsonl").write_text(json.dumps({"loss": 1, "eta_s": value}) + "\n")
    (tmp_path / "killed/.writing.a.pt").write_bytes(b"half")
    assert crash.compare(tmp_path / "alone", tmp_path / "killed") == (1, 2, [".writing.a.pt"])  # the log's times may differ
    assert not crash.same(tmp_path / "alone/a.pt", tmp_path / "killed/.writing.a.pt")


@pytest.mark.parametrize("flags", [["--every", "31"], ["--title", "pickle"], ["--title", "object"]])
def test_broken_inputs(flags):
    """In a Python of its own: the cases are forked, and this process has grown too large for their limit of memory."""
    assert re.search(r"^all +[1-9]\d+ +\d+ +\d+ +0$", run_script("tests/fuzz.py", *flags), re.M)


def test_fuzzing_sees_faults(tmp_path):
    path = tmp_path / "a.png"
    well = "error: a.png: broken; expected a picture"
    assert fuzz.fault(0, 1, 1, [], path, tmp_path) is None and fuzz.fault(2, 1, 1, [well], path, tmp_path) is None
    for code, took, most, lines in ((None, 30, 0, []), (0, 11, 0, []), (0, 1, 3 * 2**30, []), (1, 1, 1, ["Traceback"]),
                                    (-9, 1, 1, []), (2, 1, 1, ["warning", well]),
                                    (2, 1, 1, ["error: b: expected"]), (2, 1, 1, ["error: a.png"])):
        assert fuzz.fault(code, took, most, lines, path, tmp_path)
    (tmp_path / "executed").touch()
    assert fuzz.fault(0, 1, 1, [], path, tmp_path) == "a pickle was executed"


def test_one_run_at_a_time_in_a_folder(tmp_path, capsys, toy):
    hold(tmp_path / "out")
    hold(tmp_path / "out")  # this process has it already
    files = ["--data", toy / "data", "--vit", toy / "vit.pth", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "train_cam.py", *map(str, files), "--phase", "classify", *TINY],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}/out: another run is writing there; expected one at")
    os.close(train_cam.HELD.pop(tmp_path / "out"))
    hold(tmp_path / "out")


def test_log_forgets_what_a_killed_run_did_not_save(tmp_path):
    rows = [{"phase": phase, "step": step} for phase in ("classify", "match") for step in (2, 4, 6)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"phase": "match", "st')
    forget_log(tmp_path, "match", 4)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows[:5]
    forget_log(tmp_path, "classify", 0)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows[3:5]


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory"), (MemoryError(), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a process that loads images was killed")])
def test_what_the_system_takes_away_is_one_line_with_the_images(error, says):
    with pytest.raises(InputError, match=f"^match, step 3: {says}, with images a, b; expected memory for them; lower --batch$"), \
            explained("match, step 3", ["a", "b"], "lower --batch"):
        raise error
    with pytest.raises(RuntimeError, match="^a mistake of ours$"), explained("match", [], ""):
        raise RuntimeError("a mistake of ours")


def test_a_csv_edited_between_phases(cam, root, tmp_path, capsys, toy):
    cam(tmp_path / "out", "--phase", "classify", data=root)
    before, table = files_in(tmp_path / "out"), root / "train.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[1:]))
    flags = ["--data", root, "--clip", toy / "clip.pt", "--out", tmp_path / "out", *TINY]
    line = error_line(capsys, "train_cam", *flags, "--phase", "match")
    assert "classify.pt: trained with another train.csv (12 photos" in line and "now 11 photos" in line
    table.rename(root / "other.csv")  # another split is another matter
    assert files_in(tmp_path / "out") == before
    call("train_cam", *flags, "--phase", "match", "--split", "other")


def test_nothing_is_asked_of_the_network(toy, chain, tmp_path, monkeypatch):
    """All stages with weights from files"""
    def no_network(*args, **kwargs):
        raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket, "socket", no_network)
    data, vit = ["--data", toy / "data"], ["--vit", toy / "vit.pth"]
    call("train_cam", *data, *vit, "--clip", toy / "clip.pt", "--out", tmp_path, *TINY)
    call("make_pseudo", *data, "--cams", tmp_path / "cams", "--out", tmp_path / "masks", "--device", "cpu")
    call("train_seg", *data, *vit, "--labels", tmp_path / "masks", "--out", tmp_path, *TINY)
    call("eval", *data, "--pred", tmp_path / "masks", "--split", "train", "--device", "cpu")


@pytest.mark.parametrize("flag", ["--workers -1", "--steps 0", "--batch 0", "--seed -1", "--steps many"])
def test_numbers_that_cannot_be(flag, capsys):
    with pytest.raises(SystemExit) as end:
        train_cam.parse_args(["--data", "d", "--out", "o", *flag.split()])
    assert end.value.code == 2 and f"argument {flag.split()[0]}: " in capsys.readouterr().err.splitlines()[-1]


