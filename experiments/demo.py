"""The whole method through the command lines of the scripts: make demo, make voc.

Every step gets --resume, and a score is kept if it is of the same record, so an interrupted demo
continues where it stopped.
Ends with a table (mIoU of CAMs and masks on train, of segmentations on val), the words nearest to
each class's prompt, OUT/table.json, OUT/strip.png, OUT/index.html and OUT/explore.html.

  V=data/VOCdevkit/VOC2012
  python experiments/demo.py --out runs/toy                        # 10 to 20 minutes
  python experiments/demo.py --out runs/cnn --generator resnet
  python experiments/demo.py --out runs/voc --voc $V               # VOC 2012, on a GPU
  python experiments/demo.py --out runs/weaktr --voc $V --official checkpoint_best_mIoU.pth
  python experiments/demo.py --out runs/try --voc $V --photos 100 --steps 20 --batch 4     # a trial
"""
import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import toy  # noqa: E402
from clip_model import load_clip  # noqa: E402
from common import InputError, Split, difference, digest, read_checkpoint, run, writing  # noqa: E402
from mask_generator import load_vit  # noqa: E402
from train_cam import load_prompts  # noqa: E402

TOY = {  # row of the table: list, what is scored and how, what was published for it
    "classify": ("train", "classification CAM", ""), "match": ("train", "matching CAM", ""),
    "refine": ("train", "refined CAM", ""), "masks_plain": ("train", "pseudo mask, no CRF", ""),
    "masks": ("train", "pseudo mask, CRF", ""), "seg": ("val", "segmentation", ""),
    "full": ("val", "fully supervised segmentation", "")}
VOC = {
    "classify": ("train", "classification CAM", "WeakTr 67 to 68"),
    "match": ("train", "matching CAM", ""),
    "refine": ("train", "refined CAM", "SemPLeS 68.7"),
    "masks_plain": ("train", "pseudo mask, no CRF", ""),
    "masks": ("train", "pseudo mask, CRF", "WeakTr 69.4 (CAM_Label)"),
    "seg_train": ("train", "segmentation, shown classes only, no CRF", "WeakTr 76.5"),
    "seg": ("val", "segmentation, CRF", "WeakTr 74.0")}
PUBLISHED = {"train_aug": 10582, "train": 1464, "val": 1449}  # lists, and their photos
TITLES = {"classify": "Classification: learns which classes a photo shows; looks at backgrounds",
          "match": "Matching: the kept region must match the class text [eq. 1]",
          "prompts": "Prompt learning: a prompt per class learns the background [eq. 2]",
          "refine": "Refinement: the kept region must not match the prompt [eq. 3]"}


def step(title, path, *flags, unless=False):
    """Say what comes and run one of our command lines, unless it is done. They run in this process:
    importing torch again would take seconds."""
    print(f"\n# {title}", flush=True)
    if unless:
        return print("is there already")
    began, words = time.time(), [word for flag in flags for word in shlex.split(str(flag))]
    print(f"$ python {path} {shlex.join(words)}", flush=True)
    script = importlib.import_module(Path(path).stem)
    script.main(script.parse_args(words))
    print(f"{time.time() - began:.0f} seconds")


def score(args, name, split, title):
    """Run eval.py on what a row of the table names, unless OUT/NAME.json is of the same record"""
    out, result = shlex.quote(args.out), Path(args.out, f"{name}.json")
    made, flags = f"{name}/made_of.json", f"--pred {out}/{name}"
    if name in TITLES:
        made, flags = f"cams_{name}/made_of.json", f"--cams {out}/cams_{name} --oracle-sweep"
    elif not name.startswith("masks"):
        made = "full/seg.pt" if name == "full" else "seg/seg.pt"
        flags = f"--checkpoint {out}/{made}"
    if name == "seg_train":
        flags += " --present-only --crf none"
    done = result.is_file() and json.loads(result.read_text())["record"]
    step(f"mIoU: {title}", "eval.py", f"--data {out}/data --split {split}", flags,
         f"--json {out}/{name}.json", unless=done == digest(Path(args.out, made)))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="The whole method on the toy world.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", default="runs/toy", help="folder for everything")
    add("--seed", type=int, default=0, help="of the data and of every training")
    add("--generator", choices=["vit", "resnet"], default="vit",
        help="of the CAMs; the segmentation is a ViT")
    add("--world", default="", help="more flags for prepare/toy.py, in quotes")
    add("--only", choices=["cams", "full"], help="cams: stop after the CAMs and their scores; "
        "full: just that row, which the demo starts itself")
    add("--voc", metavar="PATH", type=lambda path: str(Path(path)), help="not the toy world but "
        "this VOC2012, with the voc recipe, and the next four flags")
    add("--official", metavar="FILE", help="WeakTr's CAM checkpoint, in place of classification")
    add("--clip", default="ViT-B/32", help="as for train_cam.py")
    add("--vit", default="deit_small", help="as for train_cam.py")
    add("--photos", type=int, metavar="N", help="a trial: the first N of train and of val; "
        "train_aug is not used (None: all)")
    add("--steps", type=int, metavar="N", help="a trial: of every training (None: the recipe's)")
    add("--batch", type=int, help="of every training (None: the recipe's)")
    add("--snapshots", type=int, metavar="N", help="keep the generator N times in each phase, for "
        "explore.html's slider over training steps; 10 are enough (None: only the finished one)")
    return parser.parse_args(argv)


def find_inputs(args):
    """Raises InputError unless all flags make sense, and all inputs are there or can be downloaded.
    Nothing is written in OUT."""
    for key in ("photos", "steps", "batch", "snapshots"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise InputError(f"--{key} {getattr(args, key)}: expected a number above 0")
    for key in ("world", "generator") if args.voc else ("official", "photos", "clip", "vit"):
        if getattr(args, key) != getattr(parse_args([]), key):
            raise InputError(f"--{key}: only {'without' if args.voc else 'with'} --voc")
    if not args.voc:
        toy.read_pairs(toy.parse_args(args.world.split()).pairs)
        return
    voc, masks = Path(args.voc), "SegmentationClass"  # or SegmentationClassAug alone
    lists = [voc / f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val")]
    for path in (*lists, voc / "JPEGImages", next(voc.glob(f"{masks}*"), voc / masks),
                 Path(args.official or voc)):
        if not path.exists():
            raise InputError(f"{path}: not there; expected VOC 2012, as prepare/voc.py --download "
                             "unpacks it, and WeakTr's CAM checkpoint as --official")
    load_clip(args.clip)
    load_vit(args.vit)


def table(args, rows, split):
    """Print what was trained and how; the rows {name: (list, title, published)} with the scores in
    OUT/NAME.json, published ones only where lists and recipe are theirs; and the prompts' words"""
    folder = Path(args.out)
    scores = {name: json.loads((folder / f"{name}.json").read_text()) for name in rows}
    lists = {row["list"]: row["images"] for row in scores.values()}
    cut = " ".join(f"--{key} {value}" for key in ("photos", "steps")
                   if (value := getattr(args, key)))
    theirs = lists | {split.split: len(split.names)} == PUBLISHED and not (cut or args.batch) and (
        args.clip, args.vit) == ("ViT-B/32", "deit_small")
    print(f"\n{cut and f'Trial ({cut}): '}trained on {len(split.names):,} photos of {split.split}, "
          f"scored on {' and '.join(f'{n:,} of {name}' for name, n in lists.items())}; backbone "
          + (f"{args.vit}, CLIP {args.clip}" if args.voc else f"{args.generator} of the toy world"))
    paths = [*(folder / f"cam/{phase}.pt" for phase in TITLES), folder / "seg/seg.pt"]
    records = {path.stem: read_checkpoint(path, "record", "")["record"] for path in paths}
    print("steps x batch:", ", ".join(f"{name} {record['steps']:,} x {record['batch']}"
                                      for name, record in records.items() if "steps" in record))
    if args.voc and not theirs:
        print("published scores are of other lists or of another recipe, and not shown")

    print(f"\n{'stage':<42}{'split':<10}{'mIoU':>5}   best score (found with masks)"
          + "   published" * theirs)
    for (name, title, published), row in zip(rows.values(), scores.values()):
        best = row.get("oracle") and f"{row['oracle']['miou']:.1f} at " \
                                     f"{row['oracle']['background_score']}"
        print(f"{title:<42}{name:<10}{row['miou']:5.1f}   {best or '':<32}"
              f"{published if theirs else ''}".rstrip())
    print("\nCAMs are cut at the background score 0.43; words nearest to each learned prompt:")
    lines = (folder / "cam/prompts.txt").read_text("utf-8").splitlines()
    for line, shown in zip(lines, np.any(list(split.labels.values()), axis=0)):
        if shown:  # else nothing was learned
            print(line)
    if not args.voc:
        clip, pairs = load_clip(folder / "clip.pt"), toy.parse_args(args.world.split()).pairs
        print()
        toy.print_curves(clip, toy.read_pairs(pairs), load_prompts(folder / "cam/prompts.pt", split,
                                                                   clip))
    with writing(folder / "table.json") as temporary:
        temporary.write_text(json.dumps({name: row["miou"] for name, row in scores.items()}) + "\n")


def main(args):
    began, folder = time.time(), Path(args.out)
    find_inputs(args)
    if args.only == "full":
        return stages(args)
    wanted = {key: value for key, value in vars(args).items()
              if key not in ("out", "only", "official")}  # match.pt knows its classifier
    begun, spent = folder / "demo.json", folder / "minutes.json"
    if begun.is_file() and (other := difference(json.loads(begun.read_text()), wanted)):
        raise InputError(f"{begun}: {other}; pass the same, to go on, or another --out")
    with writing(begun) as temporary:
        temporary.write_text(json.dumps(wanted))
    minutes = json.loads(spent.read_text()) if spent.is_file() else 0
    try:
        told = stages(args)
    finally:
        minutes += (time.time() - began) / 60
        with writing(spent) as temporary:
            temporary.write_text(json.dumps(minutes))
    return f"{args.out}: {minutes:.1f} minutes, all starts together{told}"


def stages(args):
    """All steps, in order; those that are done take seconds -> what to look at"""
    folder, rows = Path(args.out), VOC if args.voc else TOY
    out = shlex.quote(args.out)  # part of command lines from here on
    data, cam, steps = f"--data {out}/data", f"{out}/cam", "".join(
        f" --{key} {value}" for key in ("steps", "batch") if (value := getattr(args, key)))
    if args.voc:
        step("Lists and masks", "prepare/voc.py", f"--voc {shlex.quote(args.voc)} --out {out}/data "
             "--resume")
        split = "train_aug" if (folder / "data/train_aug.csv").is_file() else "train_xml"
        common = f"{data} --recipe voc --seed {args.seed} --resume"
        clip, vit, cnn = shlex.quote(args.clip), f"--vit {shlex.quote(args.vit)}{steps}", ""
    else:
        split, clip, vit = "train", f"{out}/clip.pt", f"--vit {out}/vit.pth{steps}"
        common = f"{data} --recipe toy --seed {args.seed} --workers 0 --resume"
        cnn = f"--generator {args.generator} --resnet {out}/resnet.pth"
    shots = f"--snapshots {args.snapshots}" if args.snapshots else ""
    if args.photos:
        split = f"train-{args.photos}"
        rows = {name: (f"{row[0]}-{args.photos}", *row[1:]) for name, row in rows.items()}
        for name in ("train", "val"):  # voc.py's own lists stay as they are
            lines = (folder / f"data/{name}.csv").read_text("utf-8").splitlines()[:args.photos]
            with writing(folder / f"data/{name}-{args.photos}.csv") as temporary:
                temporary.write_text("\n".join([*lines, ""]), "utf-8")
    train = rows["match"][0]
    if args.only == "full":
        step("The upper bound, with the true masks", "train_seg.py", common, vit,
             f"--labels {out}/data/masks --out {out}/full")
        return
    if not args.voc:
        step("A small VOC in which objects stand on their own backgrounds, a small CLIP, a "
             "backbone", "prepare/toy.py", f"--out {out} --seed {args.seed} --resume", args.world)

    for phase, title in TITLES.items():
        if phase == "classify" and args.official:
            step("WeakTr's generator", "prepare/official.py", data, f"--split {split} --cam",
                 shlex.quote(args.official), f"--out {cam}")
        else:
            step(title, "train_cam.py", common, f"--split {split} --clip {clip} --out {cam}",
                 f"--phase {phase}", vit, cnn, shots if phase != "prompts" else "")
    for phase in ("classify", "match", "refine"):
        step(f"CAMs of {phase}.pt", "train_cam.py", common, f"--clip {clip} --out {cam}",
             f"--phase export --checkpoint {cam}/{phase}.pt --cams {out}/cams_{phase}",
             f"--split {split if phase == 'refine' else train}")
        score(args, phase, *rows[phase][:2])
    if args.only == "cams":
        return ""
    for name, crf in (("masks_plain", "none"), ("masks", "voc")):
        step(f"Pseudo masks of the refined CAMs, CRF {crf}", "make_pseudo.py", data,
             f"--split {split} --cams {out}/cams_refine --out {out}/{name} --crf {crf} --resume")
    if not args.voc:
        # Two trainings with half of the threads each take less time than one after the other
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))
        half = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        with open(folder / "full.log", "w") as log:
            full = subprocess.Popen([sys.executable, *sys.argv, "--only", "full"], env=half,
                                    stdout=log, stderr=log)
        print(f"\n# The upper bound: the same with the true masks, at the same time; {log.name}")
    step("A segmentation model learns from the pseudo masks", "train_seg.py", common,
         f"--split {split}", vit, f"--labels {out}/masks --out {out}/seg")
    if not args.voc:
        if code := full.wait():
            raise InputError(f"{log.name}: the run ended with exit code {code}; see there")
        torch.set_num_threads(threads)

    for name in [*rows][3:]:  # CAMs have theirs
        score(args, name, *rows[name][:2])
    step("Pictures: every equation at work", "experiments/companion.py", f"--run {out}",
         f"--split {train} --clip {clip}")
    step("A page where the background score moves", "experiments/explore.py", f"--run {out}",
         f"--split {train}")
    table(args, rows, Split(folder / "data", split))
    return (f"; pictures: {args.out}/index.html, {args.out}/strip.png; to move things: "
            f"{args.out}/explore.html")


if __name__ == "__main__":
    run(main, parse_args())
