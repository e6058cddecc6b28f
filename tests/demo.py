"""The whole method on the toy world, through the command lines of the six scripts. make demo runs this.

    python tests/demo.py --out runs/toy [--seed 0]

Every command is printed before it runs. Ends with a table (mIoU of CAMs and masks on train, of segmentations on val, and
the words nearest to each class's prompt), OUT/table.json and OUT/strip.png.
FLAGS is the toy recipe: what differs from the scripts' defaults, which are VOC's.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {  # short runs of a small model on 600 small pictures want larger rates
    "classify": "--epochs 4 --lr 1e-3 --trunk-lr 0.02 --batch 32 --min-area 0.4 --no-augment --no-class-attention",
    "match": "--epochs 8 --lr 1e-3 --batch 16 --min-area 0.4 --no-augment --mask-views 2 --lambda-b 0.75",
    "prompts": "--prompt-epochs 10 --min-area 0.4",
    "refine": "--epochs 8 --lr 1e-3 --batch 16 --min-area 0.4 --no-augment --mask-views 2 --lambda-b 0.75 --lambda-r 1",
    "seg": "--crop 64 --scale 0.75 1.5 --epochs 14 --batch 8 --optimizer adamw --lr 1e-3 --trunk-lr 0.3",
    "test": "--scales 0.75 1 1.25 1.5 1.75 --crf prob",  # WeakTr's scales but for 0.5, whole images; CLIP-ES's CRF
}


def command(script, *flags):
    """Run one of our scripts with this Python; stop the demo if it fails."""
    words = [script, *(word for flag in flags for word in shlex.split(str(flag)))]
    print("\n$ python " + shlex.join(words), flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *words[1:]], check=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="The whole method on the toy world.")
    parser.add_argument("--out", default="runs/toy", help="folder for everything (default runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every training (default 0)")
    parser.add_argument("--world", default="", help="further flags for tests/toy_world.py, in quotes")
    return parser.parse_args(argv)


def main(args):
    began, out = time.time(), args.out
    voc, cam = f"{out}/VOC2012", f"{out}/cam"
    command("tests/toy_world.py", f"--out {out} --seed {args.seed} {args.world}")
    common = f"--data {voc} --seed {args.seed}"
    weights = f"--clip {out}/clip.pt --vit {out}/vit.pth --out {cam} --workers 0"
    for phase in ("classify", "match", "prompts", "refine"):
        command("train_cam.py", common, weights, f"--phase {phase}", FLAGS[phase])
    for phase in ("classify", "match", "refine"):  # after the prompts: they help to choose the background score
        command("train_cam.py", common, weights, f"--phase export --checkpoint {cam}/{phase}.pt --cams {out}/cams_{phase}")
        command("eval.py", f"--data {voc} --split train --cams {out}/cams_{phase} --json {out}/{phase}.json")
    for name, crf in (("masks_plain", "none"), ("masks", "voc")):
        command("make_pseudo.py", f"--data {voc} --cams {out}/cams_refine --out {out}/{name} --crf {crf} --overwrite")
        command("eval.py", f"--data {voc} --split train --pred {out}/{name} --json {out}/{name}.json")
    for name, labels in (("seg", f"{out}/masks"), ("full", f"{voc}/SegmentationClass")):
        command("train_seg.py", common, f"--labels {labels} --vit {out}/vit.pth --out {out}/{name} --workers 0", FLAGS["seg"])
        command("eval.py", f"--data {voc} --split val --checkpoint {out}/{name}/seg.pt --json {out}/{name}.json",
                f"--save {out}/pred_{name}", FLAGS["test"])
    command("eval.py", f"--data {voc} --split train --checkpoint {out}/seg/seg.pt --strip {out}/strip.png --columns "
            f"classify={out}/cams_classify match={out}/cams_match refine={out}/cams_refine 'no CRF'={out}/masks_plain "
            f"'pseudo mask'={out}/masks")

    rows = [("classification CAM", "classify"), ("matching CAM", "match"), ("refined CAM", "refine"),
            ("pseudo mask, no CRF", "masks_plain"), ("pseudo mask, CRF", "masks"), ("segmentation", "seg"),
            ("fully supervised segmentation", "full")]
    table = {}
    print(f"\n{'stage':<32}{'split':<8}{'mIoU':>6}   threshold")
    for title, name in rows:
        score = json.loads(Path(out, f"{name}.json").read_text())
        table[name] = score["miou"]
        print(f"{title:<32}{score['list']:<8}{score['miou']:6.1f}   {score['threshold'] or ''}")
    print("\nwords nearest to each class's learned prompt")
    print(Path(cam, "prompts.txt").read_text())
    Path(out, "table.json").write_text(json.dumps(table) + "\n")
    print(f"pictures: {out}/strip.png   {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main(parse_args())
