"""What each part of the method is worth, on toy worlds of several seeds: a table and a picture.

A row is a command line that replaces one phase of the demo. The phases after it follow; those
before it are trained once a seed and shared. Columns: mIoU of the CAMs on train, as the demo scores
them; the same at the best background score, found with masks (analysis); for how many classes the
word nearest to the prompt is their own background. Mean and standard deviation over the seeds.
"Permuted": the control, refinement with the prompt of another class.

  for s in 0 1 2; do OMP_NUM_THREADS=1 python experiments/ablation.py --seeds $s & done; wait
  python experiments/ablation.py --only    # the table, OUT/ablation.png; the line above takes hours
  python experiments/ablation.py --only "L_T none" --seeds 0                    # a row: minutes
"""
import argparse
import json
import shutil
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import toy  # noqa: E402
from common import InputError, read_checkpoint, run, save, writing  # noqa: E402
from exercise import call  # noqa: E402
from make_pseudo import RECIPES  # noqa: E402

WORDS = {"true": dict(zip(toy.OBJECTS, toy.BACKGROUNDS)),
         # What somebody would write who knows the classes and not the data
         "hand": {"boat": "water, sky", "train": "rails, grass", "bird": "sky, grass",
                  "cow": "grass, road", "car": "road, grass", "bottle": "table, wall"}}
PERMUTED = "permuted"


class Row(NamedTuple):
    title: str
    command: str = ""  # the phase that is replaced, and its further flags
    words: str = ""  # of WORDS, or PERMUTED: replaces the prompts
    scored: str = "refine"  # the phase whose CAMs are scored
    world: str = ""  # flags of prepare/toy.py
    classify: str = ""  # further flags of that phase


PHASES = ("classify", "match", "prompts", "refine")
SCORED = {"classification": "classify", "matching": "match", "the method": "refine"}
ROWS = [
    Row("classification", scored="classify"),
    Row("matching only", scored="match"),
    Row("the method"),
    Row("true background words", "refine", "true"),
    Row("hand-written background words", "refine", "hand"),
    Row("prompts permuted", "refine", PERMUTED),
    *(Row(f"class attention, {name}", scored=phase, classify="--set class_attention=True")
      for name, phase in SCORED.items()),
    *(Row(f"lambda_R {x}", f"refine --set lambda_r={x}") for x in (0.05, 0.25, 1, 2)),
    *(Row(f"lambda_T {x}", f"prompts --set lambda_t={x}") for x in (0, 0.02, 0.5)),
    Row("L_T text-log", "prompts --set repel=text-log"),
    Row("L_T image", "prompts --set repel=image"),
    *(Row(f"prompt length {n}", f"prompts --set length={n}") for n in (1, 4)),
    *(Row(f"co-occurrence {p} %, {name}", scored=phase, world=f"--cooccurrence {p / 100}")
      for p in (50, 80, 100) for name, phase in SCORED.items()),
    *(Row(f"CNN, {name}", scored=phase, classify="--generator resnet")
      for name, phase in SCORED.items()),
    Row("CNN, hand-written background words", "refine", "hand", classify="--generator resnet"),
]
PANELS = [  # of the picture: title, rows, what stands below the points, and below "the method"
    ("lambda_R (VOC's: 0.05)", "lambda_R {}", (0.05, 0.25, 0.5, 1, 2), 0.5),
    ("lambda_T (VOC's: 0.02)", "lambda_T {}", (0, 0.02, 0.1, 0.5), 0.1),
    ("prompt length", "prompt length {}", (1, 4, 30), 30),
    ("co-occurrence in %", "co-occurrence {} %, the method", (50, 80, 95, 100), 95)]


def folders(args, row, seed):
    """The folders of a row: its world, the phases it shares, its own"""
    base, world = Path(args.out) / f"seed{seed}", row.world.replace(" ", "")
    return (base / f"world{world}", base / f"chain{world}{row.classify.replace(' ', '')}",
            base / row.title.replace(" ", "_"))


def run_row(args, row, seed):
    """Train what is missing, score it: out/score.json"""
    world, chain, out = folders(args, row, seed)
    call("prepare/toy.py", "--out", world, "--seed", seed, "--train", args.train, "--val", 1,
         "--resume", *row.world.split())
    inputs = ["--data", world / "data", "--clip", world / "clip.pt"]
    common = [*inputs, "--vit", world / "vit.pth", "--resnet", world / "resnet.pth", "--recipe",
              "toy", "--seed", seed, "--workers", 0, "--resume"]
    for phase in PHASES:
        call("train_cam.py", *common, "--out", chain, "--phase", phase,
             *(row.classify.split() if phase == "classify" else ()))
    if row.command:
        out.mkdir(parents=True, exist_ok=True)
        first = PHASES.index(row.command.split()[0])
        for phase in PHASES[:first]:
            shutil.copy(chain / f"{phase}.pt", out)
        if row.words == PERMUTED:
            state = read_checkpoint(chain / "prompts.pt", "u_b", "--phase prompts writes it")
            save(out / "prompts.pt", state | {"u_b": state["u_b"].roll(1, dims=0)})
        elif row.words:
            lines = "".join(f"{name}: {text}\n" for name, text in WORDS[row.words].items())
            (out / "words.txt").write_text(lines)
            call("words.py", *inputs, "--words", out / "words.txt", "--out", out)
        for phase in (row.command, *PHASES[first + 1:]):
            call("train_cam.py", *common, "--out", out, "--phase", *phase.split())
    call("train_cam.py", *common, "--out", out, "--phase", "export", "--checkpoint",
         (out if row.command else chain) / f"{row.scored}.pt")
    call("eval.py", "--data", world / "data", "--split", "train", "--cams", out / "cams",
         "--oracle-sweep", "--json", out / "score.json")


def own_backgrounds(path, world):
    """prompts.txt -> for how many classes the nearest noun is their own background in this world"""
    pairs = toy.read_pairs(toy.parse_args(world.split()).pairs)
    lines = path.read_text().splitlines()
    return sum(line.startswith(f"{name}: {pairs[name]} 0.") for name, line in zip(pairs, lines))


def scores(args, row):
    """For each seed that is done: mIoU, mIoU at the best score, own backgrounds, or "" without"""
    found = []
    for _, chain, out in (folders(args, row, seed) for seed in args.seeds):
        if (out / "score.json").is_file():
            score, named = json.loads((out / "score.json").read_text()), ""
            if row.scored == "refine" and not row.words:
                folder = out if row.command.startswith("prompts") else chain
                named = own_backgrounds(folder / "prompts.txt", row.world)
            found.append((score["miou"], score["oracle"]["miou"], named))
    return found


def spread(values):
    """Mean and deviation as text; a single seed has none"""
    return f"{mean(values):.1f} " + (f"± {stdev(values):.1f}" if len(values) > 1 else "(1)")


def draw(results, path):
    """mIoU over four settings, of results {title: scores}: the method, the phases before it, and
    words in place of prompts"""
    figure = Figure((13, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for ax, (title, row, values, usual) in zip(axes, PANELS):
        method = ["the method" if x == usual else row.format(x) for x in values]
        lines = {"the method": method}
        for label, alone in (("matching", "matching only"), ("classification", "classification")):
            lines[label] = [name.replace("the method", label) if "%" in name else alone
                            for name in method]
        for label in WORDS:
            name = f"{label}{'-written' * (label == 'hand')} background words"
            lines[name] = ["" if "%" in title else name for title in method]
        for label, rows in lines.items():
            mious = {x: [miou for miou, *_ in results.get(name, ())] for x, name in enumerate(rows)}
            mious = {x: found for x, found in mious.items() if found}
            bars = [stdev(found) if len(found) > 1 else 0 for found in mious.values()]
            ax.errorbar(list(mious), [*map(mean, mious.values())], bars, fmt="o-", ms=4, capsize=3,
                        label=label)
        ax.set(xlabel=title, ylim=(0, 90))
        ax.set_xticks(range(len(values)), values)
        ax.grid(color="0.9")
    axes[0].set_ylabel("mIoU of the CAMs, train")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Ablations on the toy world.")
    add = parser.add_argument
    add("--out", default="runs/ablation", help="folder for everything; a run goes on there")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and training (0 1 2)")
    add("--train", type=int, default=600, help="photos (600, as the demo)")
    titles = [row.title for row in ROWS]
    add("--only", nargs="*", metavar="ROW", choices=titles, default=titles, help="these rows alone")
    return parser.parse_args(argv)


def main(args):
    for row, seed in product(ROWS, args.seeds):
        done = (folders(args, row, seed)[2] / "score.json").is_file()
        if row.title in args.only and not done:
            run_row(args, row, seed)
    results = {row.title: scores(args, row) for row in ROWS}
    if not any(results.values()):
        raise InputError(f"{args.out}: no score of seeds {args.seeds}; run it without --only first")
    print(f"CAMs of {args.train} training photos, background score {RECIPES['toy'][0]}\n\n"
          f"{'':<36}{'mIoU':<14}{'best score':<14}own backgrounds   seeds")
    for title, found in results.items():
        if found:
            mious, bests, named = zip(*found)
            print(f"{title:<36}{spread(mious):<14}{spread(bests):<14}"
                  f"{' '.join(map(str, named)):<18}{len(found)}")
    if not args.only:  # else others may still train, and draw at the same time
        draw(results, Path(args.out) / "ablation.png")
        return f"{args.out}/ablation.png"


if __name__ == "__main__":
    run(main, parse_args())
