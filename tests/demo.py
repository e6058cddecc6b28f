"""The whole method on the toy world, through the command lines of the six scripts. make demo runs this.

    python tests/demo.py --out runs/toy [--seed 0] [--generator resnet]

Says before every command what it shows. A step whose file is there already is passed over: an interrupted demo goes on where it
stopped. Ends with a table (mIoU of CAMs and masks on train, of segmentations on val, and the words nearest to each class's
learned prompt), OUT/table.json, OUT/strip.png and OUT/index.html, which shows it all. All hyper-parameters: --recipe toy.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clip_model import InputError, run  # noqa: E402

TABLE = [("classification CAM", "classify"), ("matching CAM", "match"), ("refined CAM", "refine"),
         ("pseudo mask, no CRF", "masks_plain"), ("pseudo mask, CRF", "masks"), ("segmentation", "seg"),
         ("fully supervised segmentation", "full")]


def step(title, made, script, *flags):
    """Say what comes, run one of our scripts with this Python, stop the demo if it fails. made: the last file that it writes."""
    words = [script, *(word for flag in flags for word in shlex.split(str(flag)))]
    print(f"\n# {title}\n$ python {shlex.join(words)}", flush=True)
    made, = shlex.split(made)
    if Path(made).is_file():
        print(f"{made} is there already")
        return
    done = subprocess.run([sys.executable, str(ROOT / script), *words[1:]])
    if done.returncode:
        sys.exit(done.returncode)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="The whole method on the toy world.")
    parser.add_argument("--out", default="runs/toy", help="folder for everything (default runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every training (default 0)")
    parser.add_argument("--generator", choices=["vit", "resnet"], default="vit",
                        help="of the CAMs; the segmentation is a ViT (default vit)")
    parser.add_argument("--world", default="", help="further flags for prepare/toy.py, in quotes")
    return parser.parse_args(argv)


def main(args):
    began, out = time.time(), args.out
    wanted, begun = {"seed": args.seed, "world": args.world, "generator": args.generator}, Path(out, "demo.json")
    if begun.is_file() and json.loads(begun.read_text()) != wanted:
        raise InputError(f"{out}: a demo with {begun.read_text()}, now {wanted}; expected the same, to go on; pass another --out")
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(wanted))
    out = shlex.quote(out)  # from here on it is part of command lines
    data, cam = f"{out}/data", f"{out}/cam"
    common = f"--data {data} --recipe toy --seed {args.seed} --workers 0"
    trunk, weights = f"--vit {out}/vit.pth", f"--clip {out}/clip.pt --out {cam} --resume"

    step("A small VOC in which objects stand on their own backgrounds, a small CLIP, a pretrained trunk", f"{out}/vit.pth",
         "prepare/toy.py", f"--out {out} --seed {args.seed} {args.world}")
    for phase, title in [("classify", "Classification: learns which classes a photo shows, and looks at their backgrounds"),
                         ("match", "Matching: what the mask keeps must read as the class [eq. 1]"),
                         ("prompts", "Prompt learning: for each class, vectors that name what comes along with it [eq. 2]"),
                         ("refine", "Refinement: what the mask keeps must not read as that [eq. 3]")]:
        step(title, f"{cam}/{phase}.pt", "train_cam.py", common, trunk, weights,
             f"--phase {phase} --generator {args.generator} --resnet {out}/resnet.pth")
    for phase in ("classify", "match", "refine"):  # after the prompts: they help to choose the background score
        step(f"The CAMs of {phase}.pt, and the background score that CLIP and the prompts choose for them",
             f"{out}/cams_{phase}/background.json", "train_cam.py", common, weights,
             f"--phase export --checkpoint {cam}/{phase}.pt --cams {out}/cams_{phase}")
        step("Their mIoU", f"{out}/{phase}.json",
             "eval.py", f"--data {data} --split train --cams {out}/cams_{phase} --json {out}/{phase}.json")
    for name, crf in (("masks_plain", "none"), ("masks", "voc")):
        step(f"Pseudo masks of the refined CAMs, CRF {crf}", f"{out}/{name}.json",
             "make_pseudo.py", f"--data {data} --cams {out}/cams_refine --out {out}/{name} --crf {crf}")
        step("Their mIoU", f"{out}/{name}.json",
             "eval.py", f"--data {data} --split train --pred {out}/{name} --json {out}/{name}.json")
    for name, labels, title in (("seg", f"{out}/masks", "A segmentation model learns from the pseudo masks"),
                                ("full", f"{data}/masks", "The same with the true masks: the upper bound")):
        step(title, f"{out}/{name}/seg.pt",
             "train_seg.py", common, trunk, f"--labels {labels} --out {out}/{name} --resume")
        step("Its mIoU on photos that nobody has seen", f"{out}/{name}.json",
             "eval.py", f"--data {data} --checkpoint {out}/{name}/seg.pt --json {out}/{name}.json --save {out}/pred_{name}")
    step("Pictures", f"{out}/strip.png",
         "eval.py", f"--data {data} --split train --pred {out}/masks --strip {out}/strip.png --strip-count 6 --columns "
         f"classification={out}/cams_classify matching={out}/cams_match refinement={out}/cams_refine")

    scores = {name: json.loads(Path(args.out, f"{name}.json").read_text()) for _, name in TABLE}
    Path(args.out, "table.json").write_text(json.dumps({name: score["miou"] for name, score in scores.items()}) + "\n")
    step("The companion: every equation at work, in pictures", f"{out}/index.html", "tests/companion.py", f"--run {out}")

    print(f"\n{'stage':<32}{'split':<8}{'mIoU':>6}   background score")
    for title, name in TABLE:
        print(f"{title:<32}{scores[name]['list']:<8}{scores[name]['miou']:6.1f}   {scores[name]['background_score'] or ''}")
    print("\nwords nearest to each class's learned prompt")
    print(Path(args.out, "cam/prompts.txt").read_text())
    print(f"pictures: {args.out}/index.html, {args.out}/strip.png   {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main, parse_args())
