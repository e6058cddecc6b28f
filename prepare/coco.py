"""MS COCO 2014 or 2017 as the scripts read it: ROOT/classes.txt, ROOT/train.csv, ROOT/val.csv, ROOT/masks/NAME.png.

    python prepare/coco.py --coco data/coco                # has annotations/instances_{train,val}2014.json, train2014/, val2014/
    python prepare/coco.py --coco data/coco --out ROOT     # writes elsewhere; photos are never copied
    python prepare/coco.py --coco data/coco --no-masks     # training needs no masks, eval.py does

80 classes in the order of their category ids, which run to 90 with gaps. Images without any object are left out, as the field
does: 82,081 and 40,137 remain. Labels are the classes of an image's objects, crowds too. Masks are drawn by pycocotools as the
field's are: where objects overlap, the first annotation wins; crowds are drawn as their class. Masks newer than the json are kept,
so a killed run goes on when it is started again; those that an earlier version of this program drew by another rule must be
deleted first.
"""
import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

try:
    from pycocotools import mask as coco_mask
except ImportError:
    coco_mask = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import InputError, at_least, run  # noqa: E402
from make_pseudo import write_labels  # noqa: E402
from train_cam import hold, write_file  # noqa: E402

OFFICIAL = {"instances_train2014": 82081, "instances_val2014": 40137}


def read_instances(path, with_outlines):
    """instances json -> class names, images [(file name, (H, W), objects [(class, outline as text)])] that show any."""
    objects = defaultdict(list)  # image id -> [(category id, outline)]

    def gather(entry):
        """Sees every {...} of the json once it is read. Outlines become text again: as numbers they take ten times as much."""
        if "category_id" not in entry:
            return entry
        outline = json.dumps(entry["segmentation"]) if with_outlines else ""
        objects[entry["image_id"]].append((entry["category_id"], outline))

    try:
        with open(path, encoding="utf-8") as file:
            whole = json.load(file, object_hook=gather)
        categories = sorted(whole["categories"], key=lambda category: category["id"])
        number = {category["id"]: k for k, category in enumerate(categories)}
        images = [(image["file_name"], (image["height"], image["width"]),
                   [(number[c], outline) for c, outline in objects.pop(image["id"])])
                  for image in whole["images"] if image["id"] in objects]
        if too_large := [name for name, (H, W), _ in images if not 0 < H * W < Image.MAX_IMAGE_PIXELS]:
            raise ValueError(f"the size of {too_large[0]}")
        return [category["name"] for category in categories], images
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not COCO's instances ({type(error).__name__}: {error}); expected images, annotations and "
                         "categories that refer to each other; download the annotations again") from None


def draw_objects(size, objects, source):
    """objects [(class, outline as text)] -> labels uint8 (H, W): 0 background, 1..K; where they overlap, the first one."""
    labels = np.zeros(size, np.uint8)
    for k, outline in reversed(objects):
        try:
            runs = json.loads(outline)  # polygons, or run lengths, as numbers or packed into text
            if isinstance(runs, list):
                runs = coco_mask.merge(coco_mask.frPyObjects(runs, *size))
            elif isinstance(runs["counts"], list):
                runs = coco_mask.frPyObjects(runs, *size)
            labels[coco_mask.decode(runs) > 0] = 1 + k
        except Exception as error:  # pycocotools raises just that
            raise InputError(f"{source}: an object without a readable outline ({error}); expected polygons or run lengths; "
                             "download the annotations again, or pass --no-masks: training needs none") from None
    return labels


def write_mask(job):
    """For a worker. A mask newer than the json is there already: writes are atomic."""
    path, size, objects, source, changed = job
    if not path.is_file() or path.stat().st_mtime < changed:
        write_labels(path, draw_objects(size, objects, source))


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepares MS COCO.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--coco", required=True, metavar="DIR", help="has annotations/, train2014/ and val2014/; or 2017")
    parser.add_argument("--out", metavar="ROOT", help="where classes.txt, the csv files and masks go; None: DIR itself")
    parser.add_argument("--masks", action=argparse.BooleanOptionalAction, default=True,
                        help="draw masks/NAME.png, which takes pycocotools: eval.py scores with them, training needs none")
    parser.add_argument("--workers", type=at_least(1), default=min(8, os.cpu_count() or 1), help="processes that draw masks")
    return parser.parse_args(argv)


def main(args):
    coco, out = Path(args.coco), Path(args.out or args.coco)
    if args.masks and coco_mask is None:
        raise InputError("no pycocotools, which draws the masks; pip install pycocotools, or pass --no-masks: training needs none")
    hold(out)
    known = None
    for split in ("train", "val"):
        found = [path for year in ("2014", "2017", "") if (path := coco / f"annotations/instances_{split}{year}.json").is_file()]
        if not found:
            raise InputError(f"{coco / 'annotations'}: no instances_{split}2014.json; expected the official annotations; unpack "
                             "annotations_trainval2014.zip there, or pass another --coco")
        source, photos = found[0], coco / found[0].stem.removeprefix("instances_")
        print(f"reading {source}", flush=True)
        classes, images = read_instances(source, args.masks)
        if classes != (known := known or classes):
            raise InputError(f"{source}: other categories than train's; expected the same for both splits; correct the json")
        if len(images) > 1000 and len(images) != OFFICIAL.get(source.stem, len(images)):
            raise InputError(f"{source}: {len(images):,} images; expected {OFFICIAL[source.stem]:,}; download the annotations "
                             "again, or give a json of your own, and its folder of photos, another name")
        there = {path.name for path in photos.glob("*")}
        if missing := {file for file, _, _ in images} - there:
            raise InputError(f"{photos / min(missing)}: no such photo, but {source.name} lists it; expected the photo of every "
                             "image that shows an object; unpack the photos there")

        text = "\n".join(["# exif: ignore", *classes]) + "\n"  # outlines refer to the stored pixels
        write_file(out / "classes.txt", lambda path: path.write_text(text, encoding="utf-8"))
        relative = Path(os.path.relpath(coco.resolve(), out.resolve())) / photos.name

        def write(path):
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [(relative / name).as_posix(), ";".join(classes[k] for k in sorted({k for k, _ in objects}))]
                    for name, _, objects in images)
        write_file(out / f"{split}.csv", write)
        if args.masks:
            jobs = ((out / "masks" / f"{Path(name).stem}.png", size, objects, f"{source}: {name}", source.stat().st_mtime)
                    for name, size, objects in images)
            with Pool(args.workers) as pool:
                for _ in tqdm(pool.imap_unordered(write_mask, jobs, 16), f"masks of {split}", len(images), disable=None):
                    pass
        print(f"{out / split}.csv: {len(images):,} images" + (f", masks in {out / 'masks'}" if args.masks else ""))

    print(f"""next:
    python train_cam.py   --data {out} --split train --recipe coco --out runs/coco
    python make_pseudo.py --data {out} --split train --cams runs/coco/cams --out runs/coco/masks --crf irn
    python train_seg.py   --data {out} --split train --labels runs/coco/masks --recipe coco --out runs/coco
    python eval.py        --data {out} --split val --checkpoint runs/coco/seg.pt""")


if __name__ == "__main__":
    run(main, parse_args())
