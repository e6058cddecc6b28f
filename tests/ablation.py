"""What each part of the method is worth, on toy worlds of three seeds. An hour or two, unattended; started again, it goes on.

    python tests/ablation.py --out runs/ablation                # trains, then prints the table and draws OUT/ablation.png
    python tests/ablation.py --only "L_T none" --seeds 0        # one row: minutes

A process a seed is faster on a few cores; --report then draws what they found:

    for s in 0 1 2; do OMP_NUM_THREADS=1 python tests/ablation.py --seeds $s > ablation$s.log & done; wait
    python tests/ablation.py --report

A row changes one thing of the toy recipe (train_cam.RECIPES) and trains the phases from there on; those before it are trained
once a seed (`chain`) and shared by the rows.
Columns: mIoU of the CAMs on the train split, cut at the background score that is chosen without masks; the best mIoU of
any score, found with the masks, for comparison; and how many of the six prompts have their own background as the nearest
word. Mean and standard deviation over the seeds, of data and training both.
"""
import argparse
import copy
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from skimage.segmentation import felzenszwalb

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "prepare")]
import toy  # noqa: E402

import eval  # noqa: E402
import make_pseudo  # noqa: E402
import train_cam  # noqa: E402
from train_cam import PHASES, RECIPES, Split, write_file  # noqa: E402

TOY = copy.deepcopy(RECIPES["toy"])


class Row(NamedTuple):
    title: str
    scored: str = "refine"  # the phase whose CAMs are scored
    own: str = ""  # the first phase it trains for itself; "": none, it is the chain
    setting: str = ""  # of its own phases' recipe
    value: object = None
    world: str = ""  # flags of prepare/toy.py
    words: dict | None = None  # --background-words of its refinement
    generator: str = "vit"
    edit: tuple = ()  # (script, text, text in its place): its own phases run by the edited script
    segments: bool = False  # scored are pseudo masks of the CAMs averaged in segments [eq. P2], without a CRF


TRUE_WORDS = dict(zip(toy.OBJECTS, toy.BACKGROUNDS))
# What somebody would write who knows the classes and not the data, as CLIMS lists such words: the likeliest and another one.
HAND_WORDS = {"boat": "water, sky", "train": "rails, grass", "bird": "sky, grass", "cow": "grass, road", "car": "road, grass",
              "bottle": "table, wall"}
ROWS = [
    Row("classification", "classify"),
    Row("matching only", "match"),
    Row("the method"),
    Row("true background words", own="refine", words=TRUE_WORDS),
    Row("hand-written background words", own="refine", words=HAND_WORDS),
    *(Row(f"segments, {name}", scored, segments=True) for name, scored in (("matching", "match"), ("the method", "refine"))),
    *(Row(f"CNN, {name}", scored, generator="resnet") for name, scored in
      (("classification", "classify"), ("matching", "match"), ("the method", "refine"))),
    *(Row(f"CNN, segments, {name}", scored, generator="resnet", segments=True) for name, scored in
      (("matching", "match"), ("the method", "refine"))),
    Row("CNN, hand-written background words", own="refine", words=HAND_WORDS, generator="resnet"),
    *(Row(f"L_T {form}", own="prompts", setting="repel", value=form) for form in ("text-log", "image")),
    Row("L_T none", own="prompts", setting="lambda_t", value=0),
    *(Row(f"prompt length {n}", own="prompts", setting="length", value=n) for n in (1, 4)),
    *(Row(f"lambda_R x {x}", own="refine", setting="lambda_r", value=x * TOY["refine"]["lambda_r"]) for x in (0, 0.25, 0.5, 2, 4)),
    *(Row(f"lambda_T x {x}", own="prompts", setting="lambda_t", value=x * TOY["prompts"]["lambda_t"]) for x in (0.25, 4)),
    Row("no stop of gradient", own="classify", edit=("mask_generator.py", "spread(A, coarse.detach())", "spread(A, coarse)")),
    *(Row(f"{title}, {name}", scored, world=world) for title, world in (
        *((f"co-occurrence {p} %", f"--cooccurrence {p / 100}") for p in (50, 80, 100)),
        ("other pairs", "--pairs boat:grass,cow:road,car:table,bottle:water"))
      for name, scored in (("classification", "classify"), ("matching", "match"), ("the method", "refine"))),
]
PANELS = [  # of the picture: title, what is written below each point, its row
    ("lambda_R", [(str(x), "the method" if x == 1 else f"lambda_R x {x}") for x in (0.25, 0.5, 1, 2, 4)]),
    ("lambda_T", [(str(x), "the method" if x == 1 else f"lambda_T x {x}") for x in (0.25, 1, 4)]),
    ("prompt length", [("1", "prompt length 1"), ("4", "prompt length 4"), ("30", "the method")]),
    ("co-occurrence", [("50", "co-occurrence 50 %, the method"), ("80", "co-occurrence 80 %, the method"), ("95", "the method"),
                       ("100", "co-occurrence 100 %, the method")]),
]


def call(script, *flags):
    """A script's main with these flags, in this process."""
    words = [word for flag in flags for word in shlex.split(str(flag))]
    print(f"$ python {script.__name__}.py {shlex.join(words)}", flush=True)
    script.main(script.parse_args(words))


def call_edited(edit, folder, *flags):
    """train_cam.py of a copy of the scripts, in folder, that differs in one place"""
    script, text, replacement = edit
    for path in ("*.py", "*.txt.gz", "tests/nouns.txt"):
        for source in HERE.parent.glob(path):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / source.relative_to(HERE.parent))
    code = (folder / script).read_text()
    assert code.count(text) == 1, f"{script}: {text!r} stands there {code.count(text)} times"
    (folder / script).write_text(code.replace(text, replacement))
    words = [sys.executable, str(folder / "train_cam.py"), *(word for flag in flags for word in shlex.split(str(flag)))]
    print("$", shlex.join(words), flush=True)
    subprocess.run(words, check=True)


def write_segments(data, folder):
    """Class-agnostic segments by colour alone (Felzenszwalb and Huttenlocher 2004), label pictures as make_pseudo.py reads them."""
    split = Split(data, "train")
    for name in split.names:
        labels = 1 + felzenszwalb(np.array(split.image(name)), scale=100, sigma=0.5, min_size=20).astype(np.uint16)
        write_file(folder / f"{name}.png", Image.fromarray(labels).save)


def run_row(row, seed, base, args):
    """Train what is missing and what the row does its own way, score it -> base/TITLE/score.json"""
    suffix = row.world.replace(" ", "")
    world, chain, out = base / f"world{suffix}", base / chain_of(row), base / row.title.replace(" ", "_")
    if not (world / "vit.pth").is_file():  # the last file it writes
        call(toy, f"--out {world} --seed {seed} --train {args.train} --val 1", row.world)
    common = f"--data {world}/data --clip {world}/clip.pt --vit {world}/vit.pth --recipe toy --seed {seed} --workers 0"
    common += f" --generator {row.generator} --resnet {world}/resnet.pth"
    RECIPES["toy"] = copy.deepcopy(TOY)
    for phase in PHASES:
        call(train_cam, common, f"--out {chain} --phase {phase} --resume")
    folder = out if row.own else chain
    if row.own:
        out.mkdir(exist_ok=True)
        start = PHASES.index(row.own)
        for phase in PHASES[:start]:
            shutil.copy(chain / f"{phase}.pt", out)
        if row.words:
            (out / "words.txt").write_text("".join(f"{name}: {words}\n" for name, words in row.words.items()))
            common += f" --background-words {out}/words.txt"
        for phase in PHASES[start:]:
            if row.setting in RECIPES["toy"][phase]:
                RECIPES["toy"][phase][row.setting] = row.value
            if row.edit:
                call_edited(row.edit, out / "code", common, f"--out {out} --phase {phase} --resume")
            else:
                call(train_cam, common, f"--out {out} --phase {phase} --resume")
    RECIPES["toy"]["export"]["scales"] = (1,)
    call(train_cam, common, f"--out {folder} --phase export --checkpoint {folder}/{row.scored}.pt --cams {out}/cams")
    if row.segments:
        write_segments(world / "data", world / "segments")
        call(make_pseudo, f"--data {world}/data --cams {out}/cams --out {out}/masks --crf none --segments {world}/segments")
        call(eval, f"--data {world}/data --split train --pred {out}/masks --json {out}/score.json")
        shutil.rmtree(out / "masks")
    else:
        call(eval, f"--data {world}/data --split train --cams {out}/cams --oracle-sweep --json {out}/score.json")
    shutil.rmtree(out / "cams")


def chain_of(row):
    """The folder of the phases that a row shares with others"""
    return f"chain{row.world.replace(' ', '')}" + "-resnet" * (row.generator == "resnet")


def own_backgrounds(path, world):
    """prompts.txt -> for how many classes the nearest word is the class's own background in this world"""
    pairs = toy.read_pairs(toy.parse_args(world.split()).pairs)
    lines = [line.split(": ") for line in path.read_text().splitlines()]
    return sum(pairs[name] == words.split(", ")[0].rsplit(" ", 1)[0] for name, words in lines)


def collect(args):
    """Of every row the scores there are, one per seed -> {title: [(mIoU, best mIoU, own backgrounds or None), ...]}"""
    found = {}
    for row in ROWS:
        for seed in args.seeds:
            base = Path(args.out) / f"seed{seed}"
            out = base / row.title.replace(" ", "_")
            if (out / "score.json").is_file():
                score = json.loads((out / "score.json").read_text())
                learned = (out if row.own else base / chain_of(row)) / "prompts.txt"
                words = own_backgrounds(learned, row.world) if row.scored == "refine" and row.own != "refine" else None
                found.setdefault(row.title, []).append((score["miou"], score.get("oracle", {}).get("miou"), words))
    return found


def spread(values):
    return f"{mean(values):5.1f} ± {stdev(values):3.1f}" if len(values) > 1 else f"{values[0]:5.1f}      "


def print_table(found):
    print(f"\n{'':<36}{'mIoU':>12}{'best score':>13}   own backgrounds   seeds")
    for title, scores in found.items():
        miou, best, words = zip(*scores, strict=True)
        named = " ".join(map(str, words)) if words[0] is not None else ""
        print(f"{title:<36}{spread(miou):>12}{spread(best) if best[0] else '':>13}   {named:<15}   {len(scores)}")


def draw(found, path):
    """Four curves of mIoU, mean and deviation over the seeds; the dashed lines are matching only and the true words."""
    W, H, low, high = 300, 240, 40, 90
    sheet = Image.new("RGB", (len(PANELS) * W, H), "white")
    pen = ImageDraw.Draw(sheet)
    y = lambda value: 20 + (H - 60) * (high - value) / (high - low)  # noqa: E731
    for panel, (title, points) in enumerate(PANELS):
        left, right = panel * W + 40, panel * W + W - 10
        pen.text((left, 4), f"{title} (mIoU, train)", fill="black")
        for value in range(low, high + 1, 10):
            pen.line([(left, y(value)), (right, y(value))], fill=(225, 225, 225))
            pen.text((left - 20, y(value) - 6), str(value), fill="black")
        if title != "co-occurrence":
            for name, colour in (("matching only", (200, 120, 40)), ("true background words", (60, 140, 70))):
                if name in found:
                    level = y(mean(score[0] for score in found[name]))
                    for x in range(left, right, 8):
                        pen.line([(x, level), (x + 4, level)], fill=colour)
                    pen.text((left + 4, level + (1 if name == "matching only" else -12)), name, fill=colour)
        curve = []
        for i, (label, row) in enumerate(points):
            x = left + 20 + i * (right - left - 40) / (len(points) - 1)
            pen.text((x - 8, H - 30), label, fill="black")
            if row in found:
                values = [score[0] for score in found[row]]
                curve.append((x, y(mean(values))))
                if len(values) > 1:
                    pen.line([(x, y(mean(values) - stdev(values))), (x, y(mean(values) + stdev(values)))], fill=(60, 80, 160))
                pen.ellipse([x - 3, curve[-1][1] - 3, x + 3, curve[-1][1] + 3], fill=(60, 80, 160))
        pen.line(curve, fill=(60, 80, 160))
    write_file(path, sheet.save)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Ablations on the toy world.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/ablation", help="folder for everything; a run started again goes on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and training")
    parser.add_argument("--train", type=int, default=200, help="training images: a third of the demo's, to save time")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.title for row in ROWS], help="only these rows")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of what there is")
    return parser.parse_args(argv)


def main(args):
    for row in ROWS if not args.report else []:
        for seed in args.seeds:
            base = Path(args.out) / f"seed{seed}"
            if row.title in (args.only or [row.title]) and not (base / row.title.replace(" ", "_") / "score.json").is_file():
                run_row(row, seed, base, args)
    found = collect(args)
    if found:
        print_table(found)
        draw(found, Path(args.out) / "ablation.png")


if __name__ == "__main__":
    main(parse_args())
