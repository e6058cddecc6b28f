"""An exercise of docs/method.md: train phases of a finished demo anew, changed, and compare.

Starts from the demo's checkpoints of the earlier phases, with its seed. Scores the CAMs as the demo
does: mIoU at the background score 0.43, and at the best one, found with masks (analysis). Writes
RUN/exercise-1, the next one RUN/exercise-2.

  python experiments/exercise.py --phases match --set lambda_b=0
  python experiments/exercise.py --phases classify match --world "--cooccurrence 1"
"""
import argparse
import importlib
import json
import shlex
import shutil
import sys
import time
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
from common import InputError, run  # noqa: E402
from train_cam import recipe_of  # noqa: E402


def call(script, *words):
    """A script's command line, in this process"""
    words = [str(word) for word in words]
    print(f"$ python {script} {shlex.join(words)}", flush=True)
    module = importlib.import_module(Path(script).stem)
    module.main(module.parse_args(words))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains phases of a finished demo anew, changed.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="the --out of a finished demo")
    add("--phases", nargs="+", required=True, choices=["classify", "match", "prompts", "refine"],
        help="trained anew, in order; all but prompts give CAMs, which are scored")
    add("--set", default="", metavar="KEY=VALUE", help="one changed value, as for train_cam.py; "
        "phases without the key ignore it")
    add("--world", default="", help="flags of prepare/toy.py: another world, in quotes")
    add("--steps", type=int, help="another number than the demo's, to try it")
    return parser.parse_args(argv)


def main(args):
    began = time.time()
    folder = next(path for n in count(1) if not (path := args.run / f"exercise-{n}").exists())
    cam = folder / "cam"
    if not (args.run / "full.json").is_file():  # the last score
        raise InputError(f"{args.run}: no full.json; expected a finished demo; run make demo")
    begun = json.loads((args.run / "demo.json").read_text())
    key = args.set.split("=")[0]  # one that no phase has goes to all, and is refused
    having = [phase for phase in args.phases if key in recipe_of("toy", phase, {})] or args.phases
    steps = begun.get("steps") if args.steps is None else args.steps
    same = {"steps": steps, "batch": begun.get("batch")}  # as the demo's, for a fair comparison
    shutil.copytree(args.run / "cam", cam, ignore=shutil.ignore_patterns("*-*.pt"))  # snapshots
    world = folder if args.world else args.run
    if args.world:
        call("prepare/toy.py", "--out", world, "--seed", begun["seed"], *begun["world"].split(),
             *args.world.split())
    common = ["--data", world / "data", "--clip", world / "clip.pt", "--recipe", "toy", "--seed",
              begun["seed"], "--workers", 0, "--out", cam]
    for phase in args.phases:
        call("train_cam.py", *common, "--vit", world / "vit.pth", "--resnet", world / "resnet.pth",
             "--generator", begun["generator"], "--phase", phase,
             *(["--set", args.set] if args.set and phase in having else []),
             *(f"--{key}={value}" for key, value in same.items() if value is not None))
    rows = []
    for phase in args.phases:
        if phase != "prompts":  # which gives no CAMs
            cams, scores = folder / f"cams_{phase}", folder / f"{phase}.json"
            call("train_cam.py", *common, "--phase", "export", "--checkpoint", cam / f"{phase}.pt",
                 "--cams", cams)
            call("eval.py", "--data", world / "data", "--split", "train", "--cams", cams,
                 "--oracle-sweep", "--json", scores)
            rows += [(f"{phase}, demo", args.run / f"{phase}.json"), (f"{phase}, yours", scores)]
    if steps != begun.get("steps"):
        print(f"\nA trial: {steps} steps, the demo {begun.get('steps') or 'those of the recipe'}; "
              "the scores do not compare")
    print(f"\n{'CAMs of':<24}{'mIoU':>8}   at the best score")
    for title, path in rows:
        miou, best = (json.loads(path.read_text())[key] for key in ("miou", "oracle"))
        print(f"{title:<24}{miou:>8.1f}   {best['miou']:.1f} at {best['background_score']}")
    print((cam / "prompts.txt").read_text() if "prompts" in args.phases else "")
    return f"{folder}: {(time.time() - began) / 60:.1f} minutes"


if __name__ == "__main__":
    run(main, parse_args())
