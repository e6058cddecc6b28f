"""MS COCO 2014 or 2017 in our layout: ROOT/classes.txt, ROOT/{train,val}.csv, ROOT/masks/NAME.png.

  python prepare/coco.py --coco data/coco             # has annotations/, train2014/ and val2014/
  python prepare/coco.py --coco data/coco --out ROOT  # writes elsewhere; photos are never copied
  python prepare/coco.py --coco data/coco --no-masks  # training needs no masks, eval.py does

The 80 classes are in the order of their category ids, which run to 90 with gaps. Images without an
object are left out, as the field does: 82,081 and 40,137 remain. Labels are the classes of an
image's objects, crowds too. pycocotools draws the masks as SemPLeS's script does: where objects
overlap, the first annotation wins; crowds are drawn as their class.
"""
import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

try:
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import InputError, digest, label_picture, progress, run
from layout import claim_all, write_lists, write_missing

OFFICIAL = {"instances_train2014": 82081, "instances_val2014": 40137}
MISSING_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of 1 to 90: they name no class


def read_instances(path):
    """instances json -> class names, and the images that show an object: [(file name, (H, W),
    objects [(class, outline)])]"""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(whole["categories"], key=lambda category: category["id"])
        number = {category["id"]: k for k, category in enumerate(categories)}
        objects = defaultdict(list)  # of an image id
        for entry in whole["annotations"]:
            objects[entry["image_id"]].append((number[entry["category_id"]], entry["segmentation"]))
        images = [(image["file_name"], (image["height"], image["width"]), objects[image["id"]])
                  for image in whole["images"] if image["id"] in objects]
        return [category["name"] for category in categories], images
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not COCO's instances ({type(error).__name__}: {error}); "
                         "expected images, annotations, categories; download it again") from None


def unpack_counts(text):
    """Run lengths packed into text, as pycocotools does -> whole numbers. Digits of 5 bits, the
    lowest first, 32 added to all but the last; the last one's bit 16 is the sign. From the fourth
    on a number is the difference from the last but one."""
    counts, number, shift = [], 0, 0
    for byte in text.encode():
        digit = byte - 48
        number |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            sign = (digit & 16) << shift - 4
            counts.append(number - sign + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    return counts


def outline_mask(outline, size):
    """An object's outline in a photo of size (H, W) -> bool (H, W). Polygons, or run lengths down
    the columns, as numbers or packed into text. ValueError for those that do not fit: pycocotools
    would write beyond its memory."""
    if isinstance(outline, list):
        for polygon in outline:
            if not (np.abs(np.asarray(polygon, float)) <= 2 * max(size)).all():  # so is no NaN
                raise ValueError("a coordinate far outside of the photo")
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outline, *size))) > 0
    if tuple(outline["size"]) != size:
        raise ValueError(f"a mask of size {outline['size']}")
    counts = outline["counts"]
    counts = unpack_counts(counts) if isinstance(counts, str) else counts
    if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != size[0] * size[1]:
        raise ValueError("run lengths of another size")
    return np.repeat(np.arange(len(counts)) % 2 > 0, counts).reshape(size[::-1]).T


def draw_objects(size, objects, source):
    """[(class, outline)] -> labels uint8 (H, W): 0 background, 1..K, the first on top"""
    labels = np.zeros(size, np.uint8)
    for k, outline in reversed(objects):
        try:
            labels[outline_mask(outline, size)] = 1 + k
        except Exception as error:  # pycocotools raises just that
            raise InputError(f"{source}: an object without a readable outline ({error}); expected "
                             "polygons or run lengths; download it again, or pass --no-masks"
                             ) from None
    return labels


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepares MS COCO.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--coco", required=True, metavar="DIR", help="annotations/, train2014/, val2014/; or 2017")
    add("--out", metavar="ROOT", help="where classes.txt, csv and masks go; None: DIR itself")
    add("--masks", action=argparse.BooleanOptionalAction, default=True,
        help="draw masks/NAME.png with pycocotools: eval.py needs them, training does not")
    add("--resume", action="store_true", help="go on with a run of the same inputs, whose finished "
        "files are kept")
    return parser.parse_args(argv)


def main(args):
    coco, out, sources = Path(args.coco), Path(args.out or args.coco), {}
    if args.masks and coco_mask is None:
        raise InputError("masks take pycocotools: pip install pycocotools, or pass --no-masks")
    for split in ("train", "val"):
        files = [coco / f"annotations/instances_{split}{year}.json" for year in (2014, 2017, "")]
        sources[split] = next((path for path in files if path.is_file()), None)
        if sources[split] is None:
            raise InputError(f"{files[0]}: no such file; expected the official annotations; unpack "
                             "them there, or pass another --coco")
    found, tables, folders = {}, {}, []
    for split, source in sources.items():
        print(f"reading {source}", flush=True)
        classes, found[split] = read_instances(source)
        official = OFFICIAL.get(source.stem, len(found[split]))
        if len(found[split]) > 1000 and len(found[split]) != official:
            raise InputError(f"{source}: {len(found[split]):,} images with objects; expected "
                             f"{official:,}; download it again, or rename a json of your own")
        folders.append(coco.resolve() / source.stem.removeprefix("instances_"))
        photos = Path(os.path.relpath(folders[-1], out.resolve()))  # Split tells which are missing
        tables[split] = [((photos / name).as_posix(),
                          ";".join(classes[k] for k in sorted({k for k, _ in objects})))
                         for name, _, objects in found[split]]
    names = Counter(Path(name).stem for images in found.values() for name, *_ in images)
    if (twice := names.most_common(1)) and twice[0][1] > 1:
        raise InputError(f"{coco}: {twice[0][1]} photos named {twice[0][0]} in train and val, but "
                         "masks go by names; expected each once; rename all but one")
    parts = {out: (["classes.txt", "train.csv", "val.csv"],
                   {"script": "coco.py", "lists": digest([classes, tables])})}
    if args.masks:
        parts[out / "masks"] = [f"{name}.png" for name in names], {
            "script": "coco.py", **{split: digest(path) for split, path in sources.items()},
            "overlaps": "the first annotation wins"}
    claim_all(parts, args.resume, folders)
    write_lists(out, classes, tables)
    for split, images in found.items():
        print(f"{out / split}.csv: {len(images):,} images")
        for name, size, objects in progress(images if args.masks else [], f"masks of {split}"):
            write_missing(out / f"masks/{Path(name).stem}.png", lambda path: label_picture(
                draw_objects(size, objects, f"{sources[split]}: {name}")).save(path))
    return (f"{out}: classes.txt, train.csv, val.csv{', masks/' if args.masks else ''}; next:\n"
            f"    python train_cam.py --data {out} --recipe coco --out runs/coco")


if __name__ == "__main__":
    run(main, parse_args())
