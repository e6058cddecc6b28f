"""Nothing is lost: every stage is killed at random moments, run again until it ends, and compared
with a run left alone: checkpoints tensor by tensor, logs without times, other files byte by byte.

A kill is SIGKILL to the process and all its children, so nothing can clean up. Every other kill
waits for a file that is being written, and strikes then. Columns: kills; those that left a
half-written file behind; equal files; files too many. Linux. Exit code 1 if anything differs.

  python experiments/crash.py                            # 36 kills
  python experiments/crash.py --kills 2 --until match
"""
import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("images_per_s", "eta_s", "gib")  # in logs: they may differ
DATA = "--data {w}/toy/data --out {o} "
FLAGS = DATA + "--vit {w}/toy/vit.pth --recipe toy --resume --workers 1 "
TRAIN = "train_cam.py " + FLAGS + "--clip {w}/toy/clip.pt --phase "
SHORT = " --batch 4 --steps 20"
PSEUDO = "make_pseudo.py " + DATA + "--cams {w}/export/cams --background-score 0.4"
TWO = "-m torch.distributed.run --nproc-per-node 2 --master-port {port} "
STAGES = {  # title: command, the stage whose files it begins with. {w} has what was left alone
    "toy": ("prepare/toy.py --train 24 --val 8 --out {o}", ""),
    "classify": (TRAIN + "classify" + SHORT, ""),
    "match": (TRAIN + "match" + SHORT, "classify"),
    "prompts": (TRAIN + "prompts" + SHORT, "match"),
    "refine": (TRAIN + "refine" + SHORT, "prompts"),
    "export": (TRAIN + "export", "refine"),
    "match, two processes": (TWO + TRAIN + "match" + SHORT, "classify"),
    "masks": (PSEUDO, ""),
    "seg": ("train_seg.py " + FLAGS + "--labels {w}/masks" + SHORT, ""),
}


# ---- Kill ----------------------------------------------------------------------------------------

def descendants(pid):
    """The process, its children and theirs (torchrun's are in no common group)"""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def half_written(folder):
    return {path for path in Path(folder).rglob(".writing.*") if path.is_file()}


def run_and_kill(words, folder, after, at_a_write):
    """Kill a command after so many seconds, or at the next write -> whether before its end"""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    start = time.monotonic() + after
    while process.poll() is None:
        late = time.monotonic() - start
        if late > 0 and (not at_a_write or late > 3 or half_written(folder)):
            pids = descendants(process.pid)
            for sign in (signal.SIGSTOP, signal.SIGKILL):  # no parent sees its child die
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, sign)
            return process.wait() == -signal.SIGKILL
        time.sleep(0 if late > 0 else 0.005)
    return False


# ---- Compare -------------------------------------------------------------------------------------

def content(path):
    """What must be the same of a file"""
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=True)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return path.read_bytes()


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def compare(alone, killed):
    """-> files that are equal, files there should be, files too many"""
    a, b = ({path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()}
            for folder in (alone, killed))
    equal = sum(same(content(alone / name), content(killed / name)) for name in a & b)
    return equal, len(a), len(b - a)


# ---- Stages --------------------------------------------------------------------------------------

def kill_stage(title, base, kills, rng):
    """Leave a stage alone, then kill it so often and finish it -> whether all is as it should be"""
    command, given = STAGES[title]
    alone, killed = base / title, base / "killed" / title

    def words(out):
        places = {"w": base, "o": out, "port": rng.randint(20000, 60000)}
        return [sys.executable, *(word.format(**places) for word in command.split())]

    def begin(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if given:
            shutil.copytree(base / given, folder)
    begin(alone)
    began = time.monotonic()
    subprocess.run(words(alone), cwd=ROOT, check=True, capture_output=True)
    lasts, misses, done, halves = time.monotonic() - began, 0, 0, 0
    begin(killed)
    while done < kills:
        before = half_written(killed)
        after = rng.uniform(0.2, 0.9) * lasts * 0.8 ** misses
        if run_and_kill(words(killed), killed, after, at_a_write=done % 2 == 0):
            done += 1
            halves += bool(half_written(killed) - before)
        else:  # it was faster
            begin(killed)
            misses += 1
    subprocess.run(words(killed), cwd=ROOT, check=True, capture_output=True)
    equal, count, stray = compare(alone, killed)
    print(f"{title:<24}{done:>6}{halves:>15}{f'{equal} of {count}':>15}{stray:>7}", flush=True)
    return equal == count and not stray


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Kills every stage, and compares.")
    parser.add_argument("--kills", type=int, default=4, help="of every stage (default 4)")
    parser.add_argument("--until", choices=STAGES, default="seg", help="the last stage (seg)")
    return parser.parse_args(argv)


def main(args):
    rng, titles = random.Random(0), list(STAGES)[:list(STAGES).index(args.until) + 1]
    print(f"{'stage':<24}{'kills':>6}{'while writing':>15}{'identical':>15}{'stray':>7}")
    with tempfile.TemporaryDirectory() as folder:
        well = [kill_stage(title, Path(folder), args.kills, rng) for title in titles]
    sys.exit(not all(well))


if __name__ == "__main__":
    main(parse_args())
