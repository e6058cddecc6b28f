"""An exercise of docs/method.md: train phases of a finished demo anew, changed, and compare.

Starts from the demo's checkpoints of the earlier phases and its random numbers. Scores the CAMs of
the first 200 training photos, those of the demo and those of the exercise alike: mIoU at the
background score chosen without masks, and at the best one, found with masks (analysis). Writes
RUN/exercise, which the next exercise replaces.

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

def call(script, *flags):
    """A script's main, in this process"""
    words = [word for flag in flags for word in shlex.split(str(flag))]
    print(f"$ python {script} {shlex.join(words)}", flush=True)
    module = importlib.import_module(Path(script).stem)
    module.main(module.parse_args(words))


def score(cam, phase, data, common):
    """Export CAMs of the checkpoint cam/PHASE.pt -> its row of the table"""
    cams = f"{cam}/cams_{phase}"
    call("train_cam.py", common, f"--split few --out {cam} --phase export --set images=100",
         f"--checkpoint {cam}/{phase}.pt --cams {cams}")
    with contextlib.redirect_stdout(io.StringIO()):
        call("eval.py", f"--data {data} --split few --cams {cams} --oracle-sweep",
             f"--json {cams}.json")
    found = json.loads(Path(f"{cams}.json").read_text())
    return found["miou"], found["oracle"]["miou"], found["background_score"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains phases of a finished demo anew, changed.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="the --out of a finished demo")
    add("--phases", nargs="+", required=True, choices=["classify", "match", "prompts", "refine"],
        help="trained anew, in order; CAMs of the last one are scored")
    add("--set", default="", metavar="KEY=VALUE", help="as of train_cam.py, in those of the phases "
        "that have the key")
    add("--world", default="", help="flags of prepare/toy.py: another world, in quotes")
    add("--steps", type=int, help="fewer steps, to try it")
    return parser.parse_args(argv)


def main(args):
    began, demo, folder = time.time(), args.run / "cam", args.run / "exercise"
    if args.phases[-1] == "prompts":
        raise InputError("--phases: prompts gives no CAMs; expected another phase last")
    if not (args.run / "table.json").is_file():
        raise InputError(f"{args.run}: no table.json; expected a finished demo; run make demo")
    seed = json.loads((args.run / "demo.json").read_text())["seed"]
    key = args.set.split("=")[0]
    having = [phase for phase in args.phases if key in recipe_of("toy", phase, {})] or args.phases
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(demo, folder / "demo")
    shutil.copytree(demo, folder / "yours")
    world = folder if args.world else args.run
    if args.world:
        call("prepare/toy.py", f"--out {shlex.quote(str(world))} --seed {seed}", args.world)
    rows = {}
    for name, root in (("demo", args.run), ("yours", world)):
        root, cam = shlex.quote(str(root)), shlex.quote(str(folder / name))
        lines = Path(root, "data/train.csv").read_text().splitlines(keepends=True)
        Path(root, "data/few.csv").write_text("".join(lines[:200]))
        common = f"--data {root}/data --clip {root}/clip.pt --recipe toy --seed {seed} --workers 1"
        for phase in args.phases if name == "yours" else ():
            call("train_cam.py", common, f"--vit {root}/vit.pth --out {cam} --phase {phase}",
                 f"--set {args.set}" if args.set and phase in having else "",
                 f"--steps {args.steps}" if args.steps else "")
        rows[name] = score(cam, args.phases[-1], f"{root}/data", common)
    print(f"\n{'CAMs of ' + args.phases[-1]:<24}{'mIoU':>8}{'best':>8}{'background score':>20}")
    for name, (miou, best, chosen) in rows.items():
        print(f"{name:<24}{miou:>8.1f}{best:>8.1f}{chosen:>20}")
    print(f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main, parse_args())
