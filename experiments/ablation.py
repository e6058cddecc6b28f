"""What each part of the method is worth, on toy worlds of several seeds: a table and a picture.

A row changes one thing of the toy recipe and trains the phases from there on; those before it are
trained once a seed (chain/) and shared. Columns: mIoU of the CAMs on train, cut at the background
score that is chosen without masks; the best mIoU of any score, found with masks (analysis); for how
many classes the prompt's nearest word is their own background. Mean and standard deviation.

  for s in 0 1 2; do OMP_NUM_THREADS=1 python experiments/ablation.py --seeds $s & done; wait
  python experiments/ablation.py --report          # trains nothing; the line above takes hours
  python experiments/ablation.py --only "L_T none" --seeds 0                   # a row: minutes
  python experiments/ablation.py --table docs/results.md --out figures         # ablation.png again
"""
import argparse
import inspect
import json
import re
import shlex
import shutil
import sys
import textwrap
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import eval  # noqa: E402
import make_pseudo  # noqa: E402
import mask_generator  # noqa: E402
import toy  # noqa: E402
import train_cam  # noqa: E402
import words  # noqa: E402
from common import Split, writing  # noqa: E402
from pictures import plot  # noqa: E402
from train_cam import recipe_of  # noqa: E402

TRUE_WORDS = dict(zip(toy.OBJECTS, toy.BACKGROUNDS))
# What somebody would write who knows the classes and not the data: the likeliest and another one
HAND_WORDS = {"boat": "water, sky", "train": "rails, grass", "bird": "sky, grass",
              "cow": "grass, road", "car": "road, grass", "bottle": "table, wall"}


class Row(NamedTuple):
    title: str
    scored: str = "refine"  # the phase whose CAMs are scored
    own: str = ""  # the first phase that it trains for itself; "": none
    setting: str = ""  # of its own phases' recipe
    value: object = None
    world: str = ""  # flags of prepare/toy.py
    words: dict | None = None  # in place of learned prompts
    generator: str = "vit"
    edit: tuple = ()  # (text, text in its place) in MaskGenerator.forward
    segments: bool = False  # scored are masks of the CAMs averaged in segments, without a CRF


PHASES = (("classification", "classify"), ("matching", "match"), ("the method", "refine"))
ROWS = [
    Row("classification", "classify"),
    Row("matching only", "match"),
    Row("the method"),
    Row("true background words", own="refine", words=TRUE_WORDS),
    Row("hand-written background words", own="refine", words=HAND_WORDS),
    *(Row(f"segments, {name}", phase, segments=True) for name, phase in PHASES[1:]),
    *(Row(f"CNN, {name}", phase, generator="resnet") for name, phase in PHASES),
    *(Row(f"CNN, segments, {name}", phase, generator="resnet", segments=True)
      for name, phase in PHASES[1:]),
    Row("CNN, hand-written background words", own="refine", words=HAND_WORDS, generator="resnet"),
    *(Row(f"L_T {form}", own="prompts", setting="repel", value=form)
      for form in ("text-log", "image")),
    Row("L_T none", own="prompts", setting="lambda_t", value=0),
    *(Row(f"prompt length {n}", own="prompts", setting="length", value=n) for n in (1, 4)),
    *(Row(f"{title} x {x}", own=phase, setting=key, value=x * recipe_of("toy", phase, {})[key])
      for title, phase, key, factors in (("lambda_R", "refine", "lambda_r", (0, 0.25, 0.5, 2, 4)),
                                         ("lambda_T", "prompts", "lambda_t", (0.25, 4)))
      for x in factors),
    Row("no stop of gradient", own="classify", edit=("coarse.detach()", "coarse")),
    *(Row(f"{title}, {name}", phase, world=world) for title, world in (
        *((f"co-occurrence {p} %", f"--cooccurrence {p / 100}") for p in (50, 80, 100)),
        ("other pairs", "--pairs boat:grass,cow:road,car:table,bottle:water"))
      for name, phase in PHASES),
]
PANELS = [  # of the picture: title, [(text below a point, its row)]
    (title, [(str(x), "the method" if x == usual else form.format(x)) for x in values])
    for title, form, values, usual in (
        ("lambda_R, times the recipe's", "lambda_R x {}", (0.25, 0.5, 1, 2, 4), 1),
        ("lambda_T, times the recipe's", "lambda_T x {}", (0.25, 1, 4), 1),
        ("prompt length", "prompt length {}", (1, 4, 30), 30),
        ("co-occurrence in %", "co-occurrence {} %, the method", (50, 80, 95, 100), 95))
]


def call(script, *flags):
    """A script's main, in this process"""
    flags = [word for flag in flags for word in shlex.split(str(flag))]
    print(f"$ {script.__name__}.py {shlex.join(flags)}", flush=True)
    script.main(script.parse_args(flags))


def edited(text, replacement):
    """MaskGenerator.forward with another text in its source"""
    source = textwrap.dedent(inspect.getsource(mask_generator.MaskGenerator.forward))
    assert source.count(text) == 1, f"{text!r} stands there {source.count(text)} times"
    scope = dict(vars(mask_generator))
    exec(source.replace(text, replacement), scope)
    return mock.patch.object(mask_generator.MaskGenerator, "forward", scope["forward"])


def write_segments(data, folder):
    """Class-agnostic segments by colour alone (Felzenszwalb and Huttenlocher 2004)"""
    from skimage.segmentation import felzenszwalb
    split = Split(data, "train")
    for name in split.names:
        labels = felzenszwalb(np.array(split.image(name)), scale=100, sigma=0.5, min_size=20)
        with writing(folder / f"{name}.png") as temporary:
            Image.fromarray((1 + labels).astype(np.uint16)).save(temporary)


def places(args, row, seed):
    """The folders of a row: its world, the phases it shares, its own"""
    base, suffix = Path(args.out) / f"seed{seed}", row.world.replace(" ", "")
    chain = f"chain{suffix}" + "-resnet" * (row.generator == "resnet")
    return base / f"world{suffix}", base / chain, base / row.title.replace(" ", "_")


def run_row(args, row, seed):
    """Train what is missing and what the row does its own way, score it: out/score.json"""
    world, chain, out = places(args, row, seed)
    if not (world / "vit.pth").is_file():  # the last file that it writes
        call(toy, f"--out {world} --seed {seed} --train {args.train} --val 1", row.world)
    data, clip = f"--data {world}/data", f"--clip {world}/clip.pt"
    common = (f"{data} {clip} --vit {world}/vit.pth --generator {row.generator} --resnet "
              f"{world}/resnet.pth --recipe toy --seed {seed} --workers 0")
    phases = [phase for phase in train_cam.PHASES if phase != "export"]
    for phase in phases:
        call(train_cam, common, f"--out {chain} --phase {phase} --resume")
    if row.own:
        out.mkdir(exist_ok=True)
        start = phases.index(row.own)
        for phase in phases[:start]:
            shutil.copy(chain / f"{phase}.pt", out)
        if row.words:
            lines = "\n".join(f"{name}: {written}" for name, written in row.words.items())
            (out / "words.txt").write_text(lines)
            call(words, data, clip, f"--words {out}/words.txt --out {out}")
        for phase in phases[start:]:
            change = row.setting in recipe_of("toy", phase, {})
            with edited(*row.edit) if row.edit else nullcontext():
                call(train_cam, common, f"--out {out} --phase {phase} --resume",
                     f"--set {row.setting}={row.value}" if change else "")
    folder = out if row.own else chain
    call(train_cam, common, f"--out {folder} --phase export --set 'scales=(1,)' --checkpoint",
         f"{folder}/{row.scored}.pt --cams {out}/cams")
    if row.segments:
        write_segments(world / "data", world / "segments")
        call(make_pseudo, data, f"--cams {out}/cams --out {out}/masks --crf none --segments "
             f"{world}/segments")
        call(eval, data, f"--split train --pred {out}/masks --json {out}/score.json")
    else:
        call(eval, data, f"--split train --cams {out}/cams --oracle-sweep --json {out}/score.json")


def own_backgrounds(path, world):
    """prompts.txt -> for how many classes the nearest word is their own background in this world"""
    pairs = toy.read_pairs(toy.parse_args(world.split()).pairs)
    lines = [line.split(": ") for line in path.read_text().splitlines()]
    return sum(pairs[name] == row.split(", ")[0].rsplit(" ", 1)[0] for name, row in lines)


def collect(args):
    """The scores there are -> {title: [(mIoU, best mIoU or None, own backgrounds or None)]}"""
    found = {}
    for row, seed in product(ROWS, args.seeds):
        _, chain, out = places(args, row, seed)
        if (out / "score.json").is_file():
            score, learned = json.loads((out / "score.json").read_text()), None
            if row.scored == "refine" and row.own != "refine":
                learned = own_backgrounds((out if row.own else chain) / "prompts.txt", row.world)
            best = score.get("oracle", {}).get("miou")
            found.setdefault(row.title, []).append((score["miou"], best, learned))
    return found


def spread(values):
    """Mean and deviation as text; a single seed has none"""
    return f"{mean(values):.1f} " + (f"± {stdev(values):3.1f}" if len(values) > 1 else "(1)")


def table(found):
    lines = [f"\n{'':<36}{'mIoU':>12}{'best score':>13}   own backgrounds   seeds"]
    for title, scores in found.items():
        miou, best, learned = zip(*scores)
        cells = [spread(x) if x[0] is not None else "" for x in (miou, best)]
        named = " ".join(map(str, learned)) if learned[0] is not None else ""
        lines.append(f"{title:<36}  {cells[0]:<10}   {cells[1]:<10}   {named:<15}   {len(scores)}")
    return "\n".join(lines)


def read_results(text):
    """The tables of docs/results.md and of this script -> {row: (mIoU, deviation, None for a single
    seed)}; of rows of the same name the last"""
    found = re.findall(r"^ *(\S.*?)  +([\d.]+) (?:± +([\d.]+)|\(1\))", text, re.M)
    return {row: (float(miou), float(spread) if spread else None) for row, miou, spread in found}


def draw(found, path):
    """mIoU of the method over four settings. found {row: (mean, deviation or None)}"""
    panels = []
    for title, points in PANELS:
        points = [(text, *found[row]) for text, row in points if row in found]
        texts, *ys = zip(*points) if points else ((), (), ())
        curves = {"the method": (range(len(texts)), *ys)}
        for name in ("matching only", "true background words"):
            if name in found and "co-" not in title:
                curves[name] = range(len(texts)), [found[name][0]] * len(texts)
        panels.append({"curves": curves, "x": title, "y": "mIoU, train", "high": 90,
                       "ticks": dict(enumerate(texts))})
    plot(path, *panels, width=3)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Ablations on the toy world.")
    add = parser.add_argument
    add("--out", default="runs/ablation", help="folder for everything; a run goes on there")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and training (0 1 2)")
    add("--train", type=int, default=200, help="photos (200, a third of the demo's)")
    titles = [row.title for row in ROWS]
    add("--only", nargs="+", metavar="ROW", choices=titles, default=titles, help="these rows alone")
    add("--report", action="store_true", help="train nothing: table and picture of what there is")
    add("--table", metavar="FILE", help="train nothing: the picture of a table printed earlier")
    return parser.parse_args(argv)


def main(args):
    for row, seed in product(ROWS, args.seeds) if not (args.report or args.table) else ():
        done = (places(args, row, seed)[2] / "score.json").is_file()
        if row.title in args.only and not done:
            run_row(args, row, seed)
    text = Path(args.table).read_text(encoding="utf-8") if args.table else table(collect(args))
    if not args.table:
        print(text)
    draw(read_results(text), Path(args.out) / "ablation.png")


if __name__ == "__main__":
    main(parse_args())
