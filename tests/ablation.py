"""What each part of the method is worth, on toy worlds of three seeds. Runs unattended for about an hour; goes on if started again.

    python tests/ablation.py --out runs/ablation                # trains, then prints the table and draws OUT/ablation.png
    nohup python tests/ablation.py > ablation.log &             # in the background

A row changes one thing of the demo's recipe (tests/demo.py) and runs the phases after it; the earlier ones are the seed's own.
Columns: mIoU of the CAMs on the train split, cut at the background score that is chosen without masks; the best mIoU of
any score, found with the masks, for comparison; and how many of the six prompts have their own background as the nearest
word. Mean and standard deviation over the seeds, of data and training both.
"""
import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import eval  # noqa: E402
import toy_world  # noqa: E402
import train_cam  # noqa: E402
from clip_model import load_clip, tokenize  # noqa: E402
from demo import FLAGS  # noqa: E402
from make_pseudo import write_file  # noqa: E402

PHASES = ["classify", "match", "prompts", "refine"]
ROWS = [  # title, first phase that differs, its flags, flags of the world
    ("classification", "classify", "", ""),
    ("matching only", "match", "", ""),
    ("the method", "prompts", "", ""),
    ("true background words", "words", "", ""),
    *((f"L_T {form}", "prompts", f"--repel {form}", "") for form in ("text-log", "image")),
    ("L_T none", "prompts", "--lambda-t 0", ""),
    *((f"length {n}", "prompts", f"--prompt-length {n}", "") for n in (1, 4)),
    *((f"lambda_R x{x}", "refine", f"--lambda-r {x}", "") for x in (0.25, 0.5, 2, 4)),
    *((f"lambda_T x{x}", "prompts", f"--lambda-t {x}", "") for x in (0.25, 0.5, 2, 4)),
    *((f"co-occurrence {p} %, {title}", first, "", f"--cooccurrence {p / 100}") for p in (50, 80, 100)
      for title, first in (("matching", "match"), ("the method", "prompts"))),
]
PANELS = [  # of the picture: title, what is written below each point, its row
    ("lambda_R", [(str(x), "the method" if x == 1 else f"lambda_R x{x}") for x in (0.25, 0.5, 1, 2, 4)]),
    ("lambda_T", [(str(x), "the method" if x == 1 else f"lambda_T x{x}") for x in (0.25, 0.5, 1, 2, 4)]),
    ("prompt length", [("1", "length 1"), ("4", "length 4"), ("30", "the method")]),
    ("co-occurrence", [("50", "co-occurrence 50 %, the method"), ("80", "co-occurrence 80 %, the method"), ("95", "the method"),
                       ("100", "co-occurrence 100 %, the method")]),
]


def times_default(flags):
    """--lambda-r 2 in a row means twice the recipe's: the number itself."""
    words = flags.split()
    for flag, phase in (("--lambda-r", "refine"), ("--lambda-t", "prompts")):
        if flag in words:
            default = shlex.split(FLAGS[phase])
            words[words.index(flag) + 1] = str(float(words[words.index(flag) + 1]) * float(default[default.index(flag) + 1]))
    return " ".join(words)


def call(script, *flags):
    """A script's main with these flags, in this process."""
    words = [word for flag in flags for word in shlex.split(str(flag))]
    print(f"$ python {script.__name__}.py {shlex.join(words)}", flush=True)
    script.main(script.parse_args(words))


def write_true_words(world, out):
    """OUT/prompts.pt whose prompts are the word embeddings of the classes' own backgrounds: u_b = E_T("a photo of water.")."""
    clip = load_clip(world / "clip.pt")
    ids = tokenize(toy_world.BACKGROUNDS)[:, 1:2]  # one token each, behind the start token: (6, 1)
    state = {"phase": "prompts", "classes": toy_world.OBJECTS, "vectors": clip.token_embedding(ids).detach()}
    write_file(out / "prompts.pt", lambda path: torch.save(state, path))


def run_row(row, seed, base, args):
    """Train what differs from the seed's own chain, score it -> OUT/seedS/ROW/score.json"""
    title, first, flags, world_flags = row
    world = base / ("world" + world_flags.replace(" ", ""))
    if not (world / "clip.pt").is_file():
        call(toy_world, f"--out {world} --seed {seed} --train {args.train} --val 1", world_flags)
    chain = base / f"chain{world_flags.replace(' ', '')}"
    out = base / title.replace(" ", "_")
    common = f"--data {world}/VOC2012 --clip {world}/clip.pt --vit {world}/vit.pth --seed {seed} --workers 0"
    own = first in ("prompts", "refine", "words") and (flags or first == "words")  # else a phase of the chain itself
    folder = out if own else chain
    folder.mkdir(parents=True, exist_ok=True)
    if first == "words":
        write_true_words(world, folder)
    start = PHASES.index("refine" if first == "words" else first) if own else len(PHASES)
    if own:
        for phase in PHASES[:start]:
            if first != "words" or phase != "prompts":
                shutil.copy(chain / f"{phase}.pt", folder)
    needed = PHASES[start:] if own else PHASES  # the whole chain: classify and match are scored once there are prompts
    for phase in needed:
        call(train_cam, common, f"--out {folder} --phase {phase} --resume", FLAGS[phase], times_default(flags) if own else "")
    last = {"classify": "classify", "match": "match"}.get(first, "refine")
    call(train_cam, common, f"--out {folder} --phase export --checkpoint {folder}/{last}.pt --cams {out}/cams", FLAGS["export"])
    call(eval, f"--data {world}/VOC2012 --split train --cams {out}/cams --oracle-sweep --json {out}/score.json")
    shutil.rmtree(out / "cams")


def own_backgrounds(path):
    """prompts.txt -> for how many classes the nearest word is the class's own background"""
    pairs = dict(zip(toy_world.OBJECTS, toy_world.BACKGROUNDS, strict=True))
    lines = [line.split(": ") for line in path.read_text().splitlines()]
    return sum(pairs[name] == words.split(", ")[0].rsplit(" ", 1)[0] for name, words in lines)


def collect(args):
    """Of every row the scores there are, one per seed -> {title: [(mIoU, best mIoU, own backgrounds or None), ...]}"""
    found = {}
    for title, first, flags, world_flags in ROWS:
        for seed in args.seeds:
            base = Path(args.out) / f"seed{seed}"
            out = base / title.replace(" ", "_")
            if (out / "score.json").is_file():
                score = json.loads((out / "score.json").read_text())
                prompts = (out if flags else base / f"chain{world_flags.replace(' ', '')}") / "prompts.txt"
                words = own_backgrounds(prompts) if first == "prompts" else None
                found.setdefault(title, []).append((score["miou"], score["oracle"]["miou"], words))
    return found


def spread(values):
    return f"{mean(values):5.1f} ± {stdev(values):3.1f}" if len(values) > 1 else f"{values[0]:5.1f}      "


def print_table(found):
    print(f"\n{'':<36}{'mIoU':>12}{'best score':>13}   own backgrounds   seeds")
    for title, scores in found.items():
        miou, best, words = zip(*scores, strict=True)
        named = " ".join(map(str, words)) if words[0] is not None else ""
        print(f"{title:<36}{spread(miou):>12}{spread(best):>13}   {named:<15}   {len(scores)}")


def draw(found, path):
    """Four curves of mIoU, mean and deviation over the seeds; the dashed lines are matching only and the true words."""
    W, H, low, high = 300, 240, 20, 80
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
                    pen.text((left + 4, level + 1), name, fill=colour)
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
    parser = argparse.ArgumentParser(description="Ablations on the toy world.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/ablation", help="folder for everything; a run started again goes on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and training")
    parser.add_argument("--train", type=int, default=300, help="training images: half the demo's, half the time")
    parser.add_argument("--only", default="", help="only the rows whose title contains this")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of what there is")
    return parser.parse_args(argv)


def main(args):
    for seed in args.seeds if not args.report else []:
        base = Path(args.out) / f"seed{seed}"
        for row in ROWS:
            if args.only in row[0] and not (base / row[0].replace(" ", "_") / "score.json").is_file():
                run_row(row, seed, base, args)
    found = collect(args)
    if found:
        print_table(found)
        draw(found, Path(args.out) / "ablation.png")


if __name__ == "__main__":
    main(parse_args())
