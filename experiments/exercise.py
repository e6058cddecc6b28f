"""An exercise of docs/method.md: train phases of a finished demo anew, changed, and compare.

Starts from the demo's checkpoints of the earlier phases, with its seed. Scores the CAMs of 200
training photos, the demo's and yours alike: mIoU at the score 0.43, and
at the best one, found with masks (analysis). Writes RUN/exercise, which the next exercise replaces,
and RUN/data/few.csv.

  python experiments/exercise.py --phases match --set lambda_b=0
  python experiments/exercise.py --phases classify match --world "--cooccurrence 1"
"""
import argparse
import contextlib
import importlib
import io
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
from common import InputError, run  # noqa: E402
from train_cam import recipe_of  # noqa: E402

def call(script, *words):
    """A script's main, in this process"""
    words = [str(word) for word in words]
    print(f"$ python {script} {shlex.join(words)}", flush=True)
    module = importlib.import_module(Path(script).stem)
    module.main(module.parse_args(words))


def score(cam, phase, data, common):
    """Export CAMs of the checkpoint cam/PHASE.pt -> its row of the table"""
    cams, scores = cam / f"cams_{phase}", cam / "scores.json"
    call("train_cam.py", *common, "--split", "few", "--out", cam, "--phase", "export",
         "--checkpoint", cam / f"{phase}.pt", "--cams", cams)
    with contextlib.redirect_stdout(io.StringIO()):
        call("eval.py", "--data", data, "--split", "few", "--cams", cams, "--oracle-sweep",
             "--json", scores)
    found = json.loads(scores.read_text())
    return found["miou"], found["oracle"]["miou"], found["background_score"]


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
    add("--steps", type=int, help="fewer steps, to try it")
    return parser.parse_args(argv)


def main(args):
    began, folder = time.time(), args.run / "exercise"
    if not (args.run / "table.json").is_file():
        raise InputError(f"{args.run}: no table.json; expected a finished demo; run make demo")
    begun = json.loads((args.run / "demo.json").read_text())
    key = args.set.split("=")[0]  # one that no phase has goes to all, and is refused
    having = [phase for phase in args.phases if key in recipe_of("toy", phase, {})] or args.phases
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("demo", "yours"):
        shutil.copytree(args.run / "cam", folder / name)
    world = folder if args.world else args.run
    if args.world:
        call("prepare/toy.py", "--out", world, "--seed", begun["seed"], *begun["world"].split(),
             *args.world.split())
    rows = {}
    for name, root in (("demo", args.run), ("yours", world)):
        lines = (root / "data/train.csv").read_text().splitlines(keepends=True)
        (root / "data/few.csv").write_text("".join(lines[:200]))
        common = ["--data", root / "data", "--clip", root / "clip.pt", "--recipe", "toy", "--seed",
                  begun["seed"], "--workers", 1]
        for phase in args.phases if name == "yours" else ():
            call("train_cam.py", *common, "--vit", root / "vit.pth", "--resnet",
                 root / "resnet.pth", "--generator", begun["generator"], "--out", folder / name,
                 "--phase", phase, *(["--set", args.set] if args.set and phase in having else []),
                 *(["--steps", args.steps] if args.steps else []))
        for phase in args.phases:
            if phase != "prompts":  # which gives no CAMs
                rows[phase, name] = score(folder / name, phase, root / "data", common)
    print(f"\n{'CAMs of':<24}{'mIoU':>8}{'best':>8}{'background score':>20}")
    for phase, name in sorted(rows, key=lambda row: args.phases.index(row[0])):
        miou, best, chosen = rows[phase, name]
        print(f"{phase + ', ' + name:<24}{miou:>8.1f}{best:>8.1f}{chosen:>20}")
    print((folder / "yours/prompts.txt").read_text() if "prompts" in args.phases else "")
    print(f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main, parse_args())
