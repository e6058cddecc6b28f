"""The toy world: a data set like PASCAL VOC 2012 in miniature, a small CLIP, ViT and ResNet.

  python prepare/toy.py --out runs/toy [--train 600] [--val 200] [--seed 0]

It carries the paper's story. Objects nearly always stand on "their" background (boat on water,
train on rails, ...), so image-level labels cannot tell the two apart, a classifier's CAM leaks, and
the learned prompts must name what leaks. Writes OUT/data in the layout of docs/data.md, and models
that toy_pretrain.py has trained: OUT/clip.pt (OpenAI's state-dict layout), OUT/resnet.pth
(torchvision's), OUT/vit.pth (DeiT's). The six scripts read them like any others. data/nouns.txt
lists what this CLIP has read in captions: its prompts are compared with these.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import InputError, label_picture, run, save
from layout import claim_all, write_missing
from toy_clip import READ, print_curves
from toy_pretrain import models_for
from toy_scenes import BACKGROUNDS, OBJECTS, USUAL, scene


# ---- The data set --------------------------------------------------------------------------------

def write_data(root, pairs, train, val, seed, cooccurrence):
    """pairs: each object's usual background, where it stands in `cooccurrence` of the scenes; else
    the background is drawn from all. Three scenes in ten show two objects. A photo has the classes
    of which a pixel is seen. Files that are there are kept."""
    for name, words in (("classes.txt", OBJECTS), ("nouns.txt", READ)):
        write_missing(root / name, lambda path: path.write_text("\n".join([*words, ""])))
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        rows = ""
        for i in tqdm(range(count), desc=f"toy {split}", disable=None):
            name = f"{split}_{i:05d}"
            objects = rng.permutation(OBJECTS)[:2 if rng.random() < 0.3 else 1]
            image, parts = scene(rng, [
                (o, pairs[o] if rng.random() < cooccurrence else rng.choice(BACKGROUNDS))
                for o in objects])
            truth = np.maximum(parts.astype(int) - len(BACKGROUNDS) + 1, 0).astype(np.uint8)
            write_missing(root / f"images/{name}.jpg", lambda path: Image.fromarray(image).save(
                path, quality=95, subsampling=0))
            write_missing(root / f"masks/{name}.png", label_picture(truth).save)
            shown = ";".join(o for k, o in enumerate(OBJECTS, 1) if k in truth)
            rows += f"images/{name}.jpg,{shown}\n"
        write_missing(root / f"{split}.csv", lambda path: path.write_text(rows))


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Makes the toy world.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/toy"), metavar="DIR",
        help="where data/, clip.pt, resnet.pth and vit.pth go")
    add("--train", type=int, default=600, help="training images")
    add("--val", type=int, default=200, help="validation images")
    add("--seed", type=int, default=0, help="of the images")
    add("--cooccurrence", type=float, default=0.95,
        help="how often an object stands on its own background")
    add("--pairs", default="", metavar="boat:grass,cow:road,...", help="other ties than boat:water "
        "and so on; the small CLIP is trained further with them, for minutes")
    add("--resume", action="store_true", help="go on with a run of the same flags, whose finished "
        "files are kept")
    return parser.parse_args(argv)


def read_pairs(text):
    """"boat:grass,cow:road" -> {object: background} for all six; objects left out keep their own
    background, or share those left over"""
    given = [tuple(pair.split(":")) for pair in text.split(",") if pair]
    if not all(len(pair) == 2 and pair[0] in OBJECTS and pair[1] in BACKGROUNDS for pair in given):
        raise InputError(f"--pairs {text}: expected OBJECT:BACKGROUND,...; objects: "
                         f"{', '.join(OBJECTS)}; backgrounds: {', '.join(BACKGROUNDS)}")
    pairs = dict(given)
    left = [b for b in BACKGROUNDS if b not in pairs.values()]
    for name, usual in USUAL.items():
        if name not in pairs:
            pairs[name] = usual if usual in left else left[0]
            left.remove(pairs[name])
    return {name: pairs[name] for name in OBJECTS}


def main(args):
    out, pairs = args.out, read_pairs(args.pairs)
    names = [f"{split}_{i:05d}" for split, count in (("train", args.train), ("val", args.val))
             for i in range(count)]
    files = [f"data/{file}" for file in ("classes.txt", "nouns.txt", "train.csv", "val.csv")]
    files += [f"data/images/{name}.jpg" for name in names]
    files += [f"data/masks/{name}.png" for name in names] + ["clip.pt", "resnet.pth", "vit.pth"]
    record = {"script": "toy.py", "train": args.train, "val": args.val, "seed": args.seed,
              "pairs": pairs, "cooccurrence": args.cooccurrence}
    claim_all({out: (files, record)}, args.resume)
    if all((out / file).is_file() for file in files):
        return f"kept {out}"
    write_data(out / "data", pairs, args.train, args.val, args.seed, args.cooccurrence)
    clip, states = models_for(pairs)
    print_curves(clip, pairs)
    for name, state in (("clip.pt", clip.state_dict()), ("resnet.pth", states["resnet"]),
                        ("vit.pth", {"model": states["vit"]})):
        if not (out / name).exists():
            save(out / name, state)
    print(", ".join(f"{name} on {usual}" for name, usual in pairs.items()))
    return (f"{out}: data/, clip.pt, resnet.pth, vit.pth; next:\n    python train_cam.py --data "
            f"{out}/data --recipe toy --clip {out}/clip.pt --vit {out}/vit.pth --out {out}/cam")


if __name__ == "__main__":
    run(main, parse_args())
