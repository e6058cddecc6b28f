"""The whole method on the toy world, through the command lines of the six scripts: make demo.

Every step gets --resume, and a score is kept if it is of the same record, so an interrupted demo
continues where it stopped.
Ends with a table (mIoU of CAMs and masks on train, of segmentations on val), the nouns nearest to
each class's prompt, OUT/table.json, OUT/strip.png and OUT/index.html.

  python experiments/demo.py --out runs/toy                        # about ten minutes
  python experiments/demo.py --out runs/cnn --generator resnet
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

TABLE = {"classify": "classification CAM", "match": "matching CAM", "refine": "refined CAM",
         "masks_plain": "pseudo mask, no CRF", "masks": "pseudo mask, CRF", "seg": "segmentation",
         "full": "fully supervised segmentation"}
TITLES = {"classify": "Classification: learns which classes a photo shows; looks at backgrounds",
          "match": "Matching: the kept region must match the class text [eq. 1]",
          "prompts": "Prompt learning: a prompt per class learns the background [eq. 2]",
          "refine": "Refinement: the kept region must not match the prompt [eq. 3]"}


def step(title, path, *flags, unless=False):
    """Say what comes and run one of our command lines, unless it is done. They run in this process:
    importing torch anew would take seconds."""
    print(f"\n# {title}", flush=True)
    if unless:
        return print("is there already")
    began, words = time.time(), [word for flag in flags for word in shlex.split(str(flag))]
    print(f"$ python {path} {shlex.join(words)}", flush=True)
    script = importlib.import_module(Path(path).stem)
    script.main(script.parse_args(words))
    print(f"{time.time() - began:.0f} seconds")


def score(title, made, result, *flags):
    """Run eval.py, unless the JSON file `result` names the record of what it scores, `made`"""
    done = Path(result).is_file() and json.loads(Path(result).read_text())["record"]
    step(title, "eval.py", *flags, f"--json {shlex.quote(result)}",
         unless=done == digest(Path(made)))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="The whole method on the toy world.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", default="runs/toy", help="folder for everything")
    add("--seed", type=int, default=0, help="of the data and of every training")
    add("--generator", choices=["vit", "resnet"], default="vit",
        help="of the CAMs; the segmentation model is a ViT")
    add("--world", default="", help="further flags for prepare/toy.py, in quotes")
    add("--only", choices=["full"], help="just that row; the demo starts it itself")
    return parser.parse_args(argv)


def main(args):
    began, folder = time.time(), Path(args.out)
    wanted = {"seed": args.seed, "world": args.world, "generator": args.generator}
    begun = folder / "demo.json"
    if begun.is_file() and json.loads(begun.read_text()) != wanted:
        raise InputError(f"{begun}: a demo with {begun.read_text()}, now {wanted}; expected the "
                         "same, to go on; pass another --out")
    with writing(begun) as temporary:
        temporary.write_text(json.dumps(wanted))
    out = shlex.quote(args.out)  # part of command lines from here on
    data, cam, vit = f"--data {out}/data", f"{out}/cam", f"--vit {out}/vit.pth"
    common = f"{data} --recipe toy --seed {args.seed} --workers 0 --resume"
    weights = f"--clip {out}/clip.pt --out {cam}"

    def segment(name, labels, title):
        step(title, "train_seg.py", common, vit, f"--labels {labels} --out {out}/{name}")
        score("Its mIoU on photos that no training has seen", f"{args.out}/{name}/seg.pt",
              f"{args.out}/{name}.json", data, f"--checkpoint {out}/{name}/seg.pt",
              f"--save {out}/pred_{name}")

    if args.only:
        return segment(args.only, f"{out}/data/masks", "The upper bound, with the true masks")
    step("A small VOC in which objects stand on their own backgrounds, a small CLIP, a backbone",
         "prepare/toy.py", f"--out {out} --seed {args.seed}", args.world,
         unless=(folder / "vit.pth").is_file())  # the last file that it writes
    for phase, title in TITLES.items():
        step(title, "train_cam.py", common, weights, f"--phase {phase}", vit,
             f"--generator {args.generator} --resnet {out}/resnet.pth")
    for phase in ("classify", "match", "refine"):
        cams = f"cams_{phase}"
        step(f"CAMs of {phase}.pt", "train_cam.py", common, weights,
             f"--phase export --checkpoint {cam}/{phase}.pt --cams {out}/{cams}")
        score("Their mIoU", f"{args.out}/{cams}/made_of.json", f"{args.out}/{phase}.json", data,
              f"--split train --cams {out}/{cams} --oracle-sweep")
    for name, crf in (("masks_plain", "none"), ("masks", "voc")):
        step(f"Pseudo masks of the refined CAMs, CRF {crf}", "make_pseudo.py", data,
             f"--cams {out}/cams_refine --out {out}/{name} --crf {crf} --resume")
        score("Their mIoU", f"{args.out}/{name}/made_of.json", f"{args.out}/{name}.json", data,
              f"--split train --pred {out}/{name}")
    # Two trainings with half of the threads each take less time than one after the other
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    half = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(folder / "full.log", "w") as log:
        full = subprocess.Popen([sys.executable, *sys.argv, "--only", "full"], env=half,
                                stdout=log, stderr=log)
    print(f"\n# The upper bound: the same with the true masks, at the same time; {log.name}")
    segment("seg", f"{out}/masks", "A segmentation model learns from the pseudo masks")
    if code := full.wait():
        raise InputError(f"{log.name}: the run ended with exit code {code}; see there")

    scores = {name: json.loads((folder / f"{name}.json").read_text()) for name in TABLE}
    with writing(folder / "table.json") as temporary:
        temporary.write_text(json.dumps({name: row["miou"] for name, row in scores.items()}) + "\n")
    step("Pictures: every equation at work", "experiments/companion.py", f"--run {out}")
    print(f"\n{'stage':<32}{'split':<8}{'mIoU':>6}   at its best score (found with masks)")
    for name, title in TABLE.items():
        row, best = scores[name], scores[name].get("oracle")
        print(f"{title:<32}{row['list']:<8}{row['miou']:6.1f}"
              + (f"   {best['miou']:.1f} at {best['background_score']}" if best else ""))
    print("\nnouns nearest to each class's learned prompt")
    print((folder / "cam/prompts.txt").read_text())
    print(f"pictures: {args.out}/index.html, {args.out}/strip.png   "
          f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main, parse_args())
