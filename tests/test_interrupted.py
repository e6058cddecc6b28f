"""The demo, stopped after each of its steps and started again, ends with the same table."""
import subprocess
import sys

import companion
import demo
import pytest
from conftest import files_in

FLAGS = ["--steps", "2", "--batch", "2", "--world", "--train 4 --val 1"]


class InThisProcess:
    """subprocess.Popen of the demo, which it starts for the upper bound"""

    def __init__(self, words, **_):
        self.words = words[2:]

    def wait(self):
        demo.main(demo.parse_args(self.words))


@pytest.fixture
def start(monkeypatch):
    """start(out, n=None): the demo, stopped when n of its steps are done -> the number of steps"""
    step = demo.step

    def start(out, n=None):
        words, done = ["--out", str(out), *FLAGS], []

        def counted(*args, **flags):
            done.append(step(*args, **flags))
            if len(done) == n:
                raise KeyboardInterrupt
        monkeypatch.setattr(demo, "step", counted)
        monkeypatch.setattr(sys, "argv", ["demo.py", *words])
        demo.main(demo.parse_args(words))
        return len(done)

    monkeypatch.setattr(subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(companion, "SECTIONS", {})  # pictures take seconds, and have their own test
    return start


def test_a_demo_stopped_after_each_step_gives_the_same_table(start, tmp_path):
    steps = start(tmp_path / "whole")
    for n in range(1, steps):
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "stopped", n)
    start(tmp_path / "stopped")
    whole, stopped = (files_in(tmp_path / name) for name in ("whole", "stopped"))
    assert whole["table.json"] == stopped["table.json"] and whole.keys() == stopped.keys()
    timed = (".jsonl", ".json")  # logs hold times, scores the paths of what they scored
    assert all(stopped[name] == data for name, data in whole.items() if not name.endswith(timed))
