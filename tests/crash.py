"""Nothing is lost: every stage is killed at random moments, run again, and compared with a run that was left alone.

    python tests/crash.py                       # 50 kills, disk, photos and runs that meet, memory of long runs: about 15 minutes
    python tests/crash.py --kills 6 --only make_pseudo

A kill is SIGKILL to the process and all its children, so nothing can clean up. Half of them wait for a file that is being written
(its temporary name shows in the folder) and strike then. Compared are checkpoints tensor by tensor, log.jsonl without its times,
all other files byte by byte. Columns: kills, those of them that left a half-written file behind, files equal to those of the run
left alone, files that were finished before a kill and were not as they should be afterwards ("lost"), files that the run left
alone does not have ("stray").
"""
import argparse
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WRITING = ".writing."  # how train_cam.write_file begins a temporary name
SLOW = """import os, time
replace = os.replace
os.replace = lambda source, target: (time.sleep(0.03 * ("/.writing." in str(source))), replace(source, target))
"""  # a sitecustomize.py that stands for a slow file system: each file takes 30 ms more to be put in its place
TIMES = ("images_per_s", "eta_s", "gib")  # of log.jsonl: they may differ


class Stage(NamedTuple):
    title: str
    command: str  # {w} the world, {e} what earlier stages made, {o} where this one writes
    kills: int
    given: str = ""  # the earlier stage whose files {o} begins with


TRAIN = ("train_cam.py --data {w}/toy/data --clip {w}/toy/clip.pt --vit {w}/toy/vit.pth --recipe toy --batch 4 --steps 40 "
         "--out {o} --resume")
TORCHRUN = "-m torch.distributed.run --nproc-per-node 2 --master-port {port} "
PSEUDO = "make_pseudo.py --data {w}/toy/data --cams {e}/export/cams --background-score 0.4 --out {o}"
SEG = ("train_seg.py --data {w}/toy/data --labels {e}/masks --vit {w}/toy/vit.pth --recipe toy --batch 4 --steps 40 "
       "--out {o} --resume")
STAGES = [
    Stage("toy", "prepare/toy.py --train 24 --val 8 --out {o}", 4),
    Stage("voc", "prepare/voc.py --voc {w}/voc --out {o}", 3),
    Stage("coco", "prepare/coco.py --coco {w}/coco --workers 2 --out {o}", 3),
    Stage("classify", f"{TRAIN} --phase classify --workers 0", 5),
    Stage("match", f"{TRAIN} --phase match --workers 2", 5, "classify"),
    Stage("prompts", f"{TRAIN} --phase prompts --workers 0", 5, "match"),
    Stage("refine", f"{TRAIN} --phase refine --workers 0", 4, "prompts"),
    Stage("export", f"{TRAIN} --phase export --workers 0", 4, "refine"),
    Stage("match, two processes", f"{TORCHRUN}{TRAIN} --phase match --workers 0", 3, "classify"),
    Stage("masks", PSEUDO, 4),
    Stage("masks, two processes", TORCHRUN + PSEUDO, 3),
    Stage("seg", f"{SEG} --workers 1", 4),
    Stage("eval --save", "eval.py --data {w}/toy/data --split train --checkpoint {e}/seg/seg.pt --save {o} --json {o}/score.json "
          "--strip {o}/strip.png", 3),
]


# ---------------------------------------------------------------------------------------------------------------------
# Kill
# ---------------------------------------------------------------------------------------------------------------------

def descendants(pid):
    """The process and all its children's children. torchrun gives its own a session each, which a group's signal misses."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            child, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(child)
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def kill(process):
    """SIGKILL to all at once: stopped first, so that no parent sees its child die."""
    pids = descendants(process.pid)
    for sign in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
    process.wait()


def half_written(folder):
    return [path for path in Path(folder).rglob(f"{WRITING}*") if path.is_file()]


def run_and_kill(command, folder, after, at_a_write):
    """Run a command, kill it after so many seconds, or at the first write after that. Whether it was killed before its end."""
    with tempfile.TemporaryDirectory() as slow:
        Path(slow, "sitecustomize.py").write_text(SLOW if at_a_write else "")
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                                   env=os.environ | {"PYTHONPATH": slow})
        return strike(process, folder, time.monotonic() + after, at_a_write)


def strike(process, folder, struck, at_a_write):
    while process.poll() is None:
        late = time.monotonic() - struck
        if late > 0 and (not at_a_write or late > 3 or half_written(folder)):
            kill(process)
            return process.returncode == -signal.SIGKILL
        time.sleep(0 if late > 0 else 0.005)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Compare
# ---------------------------------------------------------------------------------------------------------------------

def files_of(folder):
    return {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def same_values(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same(a, b):
    """Two files of one name"""
    if a.suffix in (".pt", ".pth"):
        try:
            return same_values(torch.load(a, weights_only=True), torch.load(b, weights_only=True))
        except Exception:  # half of one
            return False
    if a.name == "log.jsonl":
        rows = [[{key: value for key, value in json.loads(line).items() if key not in TIMES}
                 for line in path.read_text().splitlines()] for path in (a, b)]
        return rows[0] == rows[1]
    return a.read_bytes() == b.read_bytes()


def compare(alone, killed):
    """-> (files that are equal, files there should be, stray ones)"""
    a, b = files_of(alone), files_of(killed)
    return sum(name in b and same(a[name], b[name]) for name in a), len(a), sorted(set(b) - set(a))


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------

def make_world(world):
    """toy/, and from its scenes a data set in VOC's layout and one in COCO's"""
    if not (world / "toy/vit.pth").is_file():
        finish("prepare/toy.py --train 24 --val 8 --out {w}/toy", {"w": world})
    data, voc, coco = world / "toy/data", world / "voc", world / "coco"
    for folder in (voc / "ImageSets/Segmentation", voc / "Annotations", coco / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(data / "classes.txt", voc)
    classes = (data / "classes.txt").read_text().split()
    for split in ("train", "val"):
        rows = [(Path(path), labels.split(";") if labels else []) for path, labels in csv.reader((data / f"{split}.csv").open())]
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{path.stem}\n" for path, _ in rows))
        whole = {"categories": [{"id": i, "name": name} for i, name in enumerate(classes)], "images": [], "annotations": []}
        for i, (path, labels) in enumerate(rows):
            for folder in (voc / "JPEGImages", voc / "SegmentationClass", coco / f"{split}2014"):
                folder.mkdir(exist_ok=True)
            shutil.copy(data / path, voc / "JPEGImages")
            shutil.copy(data / path, coco / f"{split}2014")
            shutil.copy(data / f"masks/{path.stem}.png", voc / "SegmentationClass")
            boxes = "".join(f"<object><name>{name}</name></object>" for name in labels)
            (voc / f"Annotations/{path.stem}.xml").write_text(f"<annotation>{boxes}</annotation>")
            W, H = Image.open(data / path).size
            whole["images"].append({"id": i, "file_name": path.name, "width": W, "height": H})
            whole["annotations"] += [{"image_id": i, "category_id": classes.index(name), "iscrowd": 0,
                                      "segmentation": [[3, 3, 40, 5, 30 + i, 40, 7, 33]]} for name in labels]
        (coco / f"annotations/instances_{split}2014.json").write_text(json.dumps(whole))


def words_of(command, places):
    return [sys.executable, *(word.format(port=random.randint(20000, 60000), **places) for word in command.split())]


def finish(command, places):
    """Run a command to its end -> seconds"""
    began = time.monotonic()
    done = subprocess.run(words_of(command, places), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command.format(port=0, **places)} failed\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - began


def kill_stage(stage, base, kills, rng):
    """Leave a stage alone, then kill it so often and finish it -> row of the table"""
    alone, killed = base / "alone" / stage.title, base / "killed" / stage.title
    places = {"w": base / "world", "e": base / "alone"}

    def begin(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if stage.given:
            shutil.copytree(base / "alone" / stage.given, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
    begin(alone)
    lasts = finish(stage.command, places | {"o": alone})
    begin(killed)
    wanted, done, halves, lost, misses = files_of(alone), 0, 0, set(), 0
    finished = set()  # files that were as they should be before the last kill
    while done < kills:
        before = set(half_written(killed))
        after = rng.uniform(0.2, 0.9) * lasts * 0.8 ** misses
        struck = run_and_kill(words_of(stage.command, places | {"o": killed}), killed, after, at_a_write=done % 2 == 0)
        if not struck:  # it was faster
            begin(killed)
            finished, misses = set(), misses + 1
            continue
        done += 1
        halves += bool(set(half_written(killed)) - before)
        there = {name for name, path in files_of(killed).items() if name in wanted and not name.endswith("log.jsonl")}
        now = {name for name in there if same(wanted[name], killed / name)}
        lost |= finished - now
        finished = now
    finish(stage.command, places | {"o": killed})
    equal, all_files, stray = compare(alone, killed)
    return {"stage": stage.title, "kills": done, "while writing": halves, "identical": f"{equal} of {all_files}", "lost": len(lost),
            "stray": len(stray), "well": equal == all_files and not lost and not stray}


def print_row(row):
    print(f"{row['stage']:<24}{row['kills']:>6}{row['while writing']:>15}{row['identical']:>15}{row['lost']:>6}{row['stray']:>7}"
          + ("" if row["well"] else "   <-- NOT WELL"), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# A run that the system hinders: each ends in one line, and what was written before is there
# ---------------------------------------------------------------------------------------------------------------------

def refused(command, limit=None):
    """The one line with which a command ends; limit: the largest file it may write, in bytes, as on a disk that fills up."""
    def few_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=few_bytes if limit else None)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"NOT WELL: exit code {done.returncode}, {len(lines)} lines, {(lines or [''])[-1]}"
    return lines[0]


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, f"ended before {path} was there"
        time.sleep(0.02)


def hindrances(base):
    """[(what happened, the line it ended with, whether what was there before is unharmed)]"""
    world, out = base / "world", base / "hindered"
    shutil.rmtree(out, ignore_errors=True)
    data = shutil.copytree(world / "toy/data", out / "data")
    places = {"w": out, "e": out, "o": out / "cam"}
    for name in ("clip.pt", "vit.pth"):
        (out / "toy").mkdir(exist_ok=True)
        shutil.copy(world / f"toy/{name}", out / "toy")
    data.rename(out / "toy/data")
    data, found = out / "toy/data", []
    few = TRAIN.replace("--steps 40", "--steps 4") + " --workers 0 --phase "
    finish(f"{few}classify", places)

    def record(title, line):
        now = files_of(out / "cam")
        kept = not half_written(out / "cam") and all(
            name in now and (now[name].read_text().startswith(path.read_text()) if name == "log.jsonl" else same(path, now[name]))
            for name, path in files_of(out / "before").items())
        found.append((title, line, kept))

    def remember():
        shutil.rmtree(out / "before", ignore_errors=True)
        shutil.copytree(out / "cam", out / "before")
    remember()
    record("a disk that is full in the middle of a checkpoint", refused(words_of(f"{few}match", places), limit=300_000))
    if os.geteuid():  # root may write anywhere
        (out / "cam").chmod(0o500)
        record("a folder that is read-only", refused(words_of(f"{few}match", places)))
        (out / "cam").chmod(0o700)
    finish(f"{few}match", places)
    remember()

    table = data / "train.csv"
    text = table.read_text()
    table.write_text("".join(text.splitlines(keepends=True)[1:]))
    record("a csv edited between phases", refused(words_of(f"{few}prompts", places)))
    table.write_text(text)

    long = few.replace("--steps 4", "--steps 4000")
    for title, hinder in (
            ("a photo deleted between epochs", lambda process: next((data / "images").glob("train*")).unlink()),
            ("a process that loads images, killed", lambda process: os.kill(descendants(process.pid)[-1], signal.SIGKILL)),
            ("a second run into the same --out", None)):
        at = places | {"o": out / title.replace(" ", "_")}
        process = subprocess.Popen(words_of(f"{long}classify --workers 1", at), cwd=ROOT, stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, text=True)
        wait_for(at["o"] / "classify.part", process)
        if hinder:
            hinder(process)
            line = [line for line in process.communicate()[1].splitlines() if line.strip()][-1]
            if process.returncode != 2:
                line = f"NOT WELL: exit code {process.returncode}, {line}"
            shutil.copytree(world / "toy/data/images", data / "images", dirs_exist_ok=True)
        else:
            line = refused(words_of(f"{few}classify", at))
            kill(process)
        record(title, line)
        torch.load(at["o"] / "classify.part", weights_only=True)  # the last good state can be read
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Long runs
# ---------------------------------------------------------------------------------------------------------------------

def peak(command):
    """Run a command -> its largest resident memory in MiB"""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command} failed"
    return usage.ru_maxrss / 1024


def peaks(base, few, many):
    """[(stage, peak with few photos, peak with many)]: one data set, its photos repeated under other names"""
    rows, world = {}, base / "world"
    for count in (few, many):
        root = base / f"long{count}"
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "toy/data/classes.txt", root)
        lines = (world / "toy/data/train.csv").read_text().splitlines()
        with open(root / "train.csv", "w") as table:
            for i in range(count):
                path, _, labels = lines[i % len(lines)].partition(",")
                for kind, name in (("images", f"{i:05}.jpg"), ("masks", f"{i:05}.png")):
                    source = world / "toy/data" / (path if kind == "images" else f"masks/{Path(path).stem}.png")
                    if not (root / kind / name).exists():
                        os.link(source, root / kind / name)
                table.write(f"images/{i:05}.jpg,{labels}\n")
        places = {"w": world, "e": base / "alone", "o": root}
        for stage, command in (
                ("export", "train_cam.py --data {o} --clip {w}/toy/clip.pt --recipe toy --out {e}/refine --phase export "
                 "--cams {o}/cams"),
                ("make_pseudo", "make_pseudo.py --data {o} --cams {o}/cams --out {o}/pseudo"),
                ("eval", "eval.py --data {o} --split train --pred {o}/pseudo"),
                ("eval --checkpoint", "eval.py --data {o} --split train --checkpoint {e}/seg/seg.pt --no-flip --scales 1 "
                 "--crf none")):
            rows.setdefault(stage, []).append(peak(words_of(command, places)))
    return [(stage, *both) for stage, both in rows.items()]


def other_machine(base):
    """{how a run killed in the middle went on: largest relative difference of its log's losses to the run left alone}"""
    out, places, found = base / "moved", {"w": base / "world", "e": base / "alone"}, {}
    for title, again in (("the same", f"{TRAIN} --phase match --workers 2"), ("no workers", f"{TRAIN} --phase match --workers 0"),
                         ("two processes", f"{TORCHRUN}{TRAIN} --phase match --workers 0")):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base / "alone/classify", out)
        process = subprocess.Popen(words_of(f"{TRAIN} --phase match --workers 2", places | {"o": out}), cwd=ROOT,
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for(out / "match.part", process)
        kill(process)
        finish(again, places | {"o": out})
        losses = [np.array([json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()])
                  for folder in (base / "alone/match", out)]
        found[title] = float(np.abs(losses[1] / losses[0] - 1).max()) if len(losses[0]) == len(losses[1]) else float("nan")
    return found


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Kills every stage, and compares.")
    parser.add_argument("--kills", type=int, help="of every stage, instead of those of STAGES, 50 in all")
    parser.add_argument("--only", default="", help="only stages whose title contains this, and those they begin with")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", help="folder for everything, kept; None: a temporary one")
    return parser.parse_args(argv)


def main(args):
    began, rng = time.monotonic(), random.Random(args.seed)
    base = Path(args.out or tempfile.mkdtemp(prefix="crash"))
    base.mkdir(parents=True, exist_ok=True)
    make_world(base / "world")
    print(f"{'stage':<24}{'kills':>6}{'while writing':>15}{'identical':>15}{'lost':>6}{'stray':>7}")
    rows = []
    for stage in STAGES:
        if args.only in stage.title:
            rows.append(kill_stage(stage, base, args.kills or stage.kills, rng))
            print_row(rows[-1])
    print_row({key: sum(row[key] for row in rows) for key in ("kills", "while writing", "lost", "stray")}
              | {"stage": "all", "identical": "", "well": True})
    well = all(row["well"] for row in rows)
    if not args.only:
        print("\na run that is hindered, the line it ends with, and whether all that was there before is as it was")
        for title, line, kept in hindrances(base):
            print(f"- {title}: {'kept' if kept else 'NOT KEPT'}\n    {line.replace(str(base), 'OUT')}", flush=True)
            well &= kept and "NOT WELL" not in line
        print("\na run killed in the middle of matching that goes on otherwise: largest relative difference of a logged loss")
        for title, difference in other_machine(base).items():
            print(f"  {title:<22}{difference:.1e}", flush=True)
            well &= difference < 1e-3
        print(f"\n{'peak memory in MiB':<24}{'200 photos':>12}{'2,000 photos':>14}")
        for stage, few, many in peaks(base, 200, 2000):
            print(f"{stage:<24}{few:>12.0f}{many:>14.0f}   {many / few - 1:+.1%}", flush=True)
            well &= many < 1.05 * few
    print(f"\n{'all well' if well else 'NOT WELL'}, {(time.monotonic() - began) / 60:.0f} minutes, seed {args.seed}")
    if not args.out:
        shutil.rmtree(base)
    return well


if __name__ == "__main__":
    sys.exit(not main(parse_args()))
