"""The whole method through the command lines of the scripts: make demo, make voc.

Every step gets --resume, and a score is kept if it is of the same record, so an interrupted demo
continues where it stopped.
Ends with a table (mIoU of CAMs and masks on train, of segmentations on val), the nouns nearest to
each class's prompt, OUT/table.json, OUT/strip.png and OUT/index.html.

  python experiments/demo.py --out runs/toy                        # 10 to 15 minutes
  python experiments/demo.py --out runs/cnn --generator resnet
  python experiments/demo.py --out runs/voc --voc data/VOCdevkit/VOC2012    # VOC 2012, on a GPU
  python experiments/demo.py --out runs/voc --voc ... --official checkpoint_best_mIoU.pth
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

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
from common import InputError, digest, run, writing  # noqa: E402

TOY = {  # row of the table: list, what is scored and how, what was published for it
    "classify": ("train", "classification CAM", ""), "match": ("train", "matching CAM", ""),
    "refine": ("train", "refined CAM", ""), "masks_plain": ("train", "pseudo mask, no CRF", ""),
    "masks": ("train", "pseudo mask, CRF", ""), "seg": ("val", "segmentation", ""),
    "full": ("val", "fully supervised segmentation", "")}
VOC = {
    "classify": ("train", "classification CAM", "WeakTr 67.1"),
    "match": ("train", "matching CAM", ""),
    "refine": ("train", "refined CAM", "SemPLeS 68.7"),
    "masks_plain": ("train", "pseudo mask, no CRF", ""),
    "masks": ("train", "pseudo mask, CRF", "WeakTr 69.4, to our reading"),
    "seg_train": ("train", "segmentation, shown classes only, no CRF", "WeakTr 76.5"),
    "seg": ("val", "segmentation, CRF", "WeakTr 74.0")}
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
    add("--voc", metavar="PATH", help="not the toy world but this VOC2012, with the voc recipe, "
        "and the next three flags")
    add("--official", metavar="FILE", help="WeakTr's CAM checkpoint, in place of classification")
    add("--clip", default="ViT-B/32", help="as for train_cam.py")
    add("--vit", default="deit_small", help="as for train_cam.py")
    add("--steps", type=int, help="of every training (None: the recipe's)")
    add("--batch", type=int, help="of every training (None: the recipe's)")
    return parser.parse_args(argv)


def table(folder, rows):
    """Print the rows {name: (list, title, published)} with the scores in folder/NAME.json"""
    print(f"\n{'stage':<42}{'split':<7}{'mIoU':>5}   best score (found with masks)   published")
    scores = {name: json.loads((folder / f"{name}.json").read_text()) for name in rows}
    for (split, title, published), row in zip(rows.values(), scores.values()):
        best = row.get("oracle") and f"{row['oracle']['miou']:.1f} at " \
                                     f"{row['oracle']['background_score']}"
        print(f"{title:<42}{split:<7}{row['miou']:5.1f}   {best or '':<32}{published}".rstrip())
    print("\nCAMs are cut at the background score 0.43; nouns nearest to each learned prompt:")
    print((folder / "cam/prompts.txt").read_text())
    with writing(folder / "table.json") as temporary:
        temporary.write_text(json.dumps({name: row["miou"] for name, row in scores.items()}) + "\n")


def main(args):
    began, folder, rows = time.time(), Path(args.out), VOC if args.voc else TOY
    wanted = {key: value for key, value in vars(args).items() if key not in ("out", "only")}
    begun = folder / "demo.json"
    if begun.is_file() and json.loads(begun.read_text()) != wanted:
        raise InputError(f"{begun}: a demo with {begun.read_text()}, now {wanted}; expected the "
                         "same, to go on; pass another --out")
    with writing(begun) as temporary:
        temporary.write_text(json.dumps(wanted))

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
                 f"--phase {phase}", vit, cnn)
    for phase in ("classify", "match", "refine"):
        step(f"CAMs of {phase}.pt", "train_cam.py", common, f"--clip {clip} --out {cam}",
             f"--phase export --checkpoint {cam}/{phase}.pt --cams {out}/cams_{phase}",
             f"--split {split if phase == 'refine' else 'train'}")
        score(args, phase, *rows[phase][:2])
    if args.only == "cams":
        return
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
         f"--clip {clip}")
    table(folder, rows)
    print(f"pictures: {args.out}/index.html, {args.out}/strip.png   "
          f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main, parse_args())
