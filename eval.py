"""Scores predictions, CAMs or a segmentation model against true masks, the only stage that opens one; predicts where there is none.

    IoU_c = |pred = c and truth = c| / |pred = c or truth = c| over all pixels of the list whose truth is not 255       [eq. E1]
    mIoU  = mean of IoU_c over those of the K classes and the background that occur in pred or truth, in percent

Counts are summed over the whole list before dividing, as the VOC server does. A predicted 255 counts as background.
Reads ROOT/classes.txt, ROOT/SPLIT.csv, the photos where pixels are needed, and ROOT/masks/NAME.png (docs/data.md).
Prints a table; writes a JSON, the predicted PNGs and a strip of pictures where asked. --images needs no data set: it predicts
any photos, with the classes of the checkpoint.

    python eval.py --data runs/toy/data --split train --cams runs/toy/cam/cams
    python eval.py --data runs/toy/data --split train --pred runs/toy/masks --json runs/toy/masks.json
    python eval.py --data runs/toy/data --checkpoint runs/toy/seg/seg.pt --strip runs/toy/strip.png
    python eval.py --images holiday --checkpoint runs/voc/seg.pt --save runs/holiday
    torchrun --nproc-per-node 4 eval.py ... the same ...                                 # processes share the photos
"""
import argparse
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from clip_model import InputError, at_least, read_image, run
from make_pseudo import (
    PALETTE,
    PRESETS,
    background_score,
    dense_crf,
    kind_of_cams,
    read_cams,
    read_labels,
    score_labels,
    write_labels,
)
from train_cam import (
    Split,
    autocast,
    check_classes,
    end_processes,
    explained,
    hold,
    scaled_input,
    start_processes,
    sum_over_processes,
    write_file,
)
from train_seg import load_segmenter

# Dimension key: K classes, C = K + 1 labels, H W pixels.

SMALLER = "make the photo smaller, or pass --crf none, fewer --scales or --device cpu"
LARGEST = 1024  # pixels of the longest side: larger photos are shrunk for model and CRF
SWEEP = [round(0.02 * i, 2) for i in range(1, 50)]  # background scores that --oracle-sweep tries
PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
HEAT = np.array([[20, 20, 90], [30, 90, 200], [90, 200, 120], [250, 220, 60], [220, 40, 30]], np.float32)  # CAM 0, 1/4, ... 1


# ---------------------------------------------------------------------------------------------------------------------
# IoU
# ---------------------------------------------------------------------------------------------------------------------

def confusion_matrix(pred, truth, num_classes, ignore=255):
    """Pixel counts (C, C) int64, rows truth, columns prediction; C = num_classes, background included.

    pred, truth: integer arrays of one shape. Pixels whose truth is `ignore` are left out; a prediction of `ignore`
    counts as background (0). Raises ValueError for other labels outside [0, C) or for unequal shapes."""
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
    valid = truth != ignore
    truth, pred = truth[valid].astype(np.int64), pred[valid].astype(np.int64)
    pred[pred == ignore] = 0
    low, high = min(pred.min(initial=0), truth.min(initial=0)), max(pred.max(initial=0), truth.max(initial=0))
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels from {low} to {high}, expected 0 to {num_classes - 1} or {ignore}")
    return np.bincount(num_classes * truth + pred, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def iou(matrix):
    """IoU_c = |pred = c and truth = c| / |pred = c or truth = c|                                              [eq. E1]

    Confusion matrix (C, C) -> (C,) in [0, 1], NaN for a class in neither truth nor prediction."""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------------------

def slide(model, x, window, stride, most=8):
    """x (B, 3, H, W) -> scores (B, C, H, W), means over windows `stride` pixels apart, the last ones flush with the border.

    `most` windows of the B images are one batch."""
    B, _, H, W = x.shape
    h, w = min(window, H), min(window, W)
    places = list(product([*range(0, H - h, stride), H - h], [*range(0, W - w, stride), W - w]))
    windows = torch.cat([x[:, :, top:top + h, left:left + w] for top, left in places])
    scores = torch.cat([model(part) for part in windows.split(most)]).unflatten(0, (len(places), B))
    total, seen = scores.new_zeros(B, scores.shape[2], H, W), scores.new_zeros(H, W)
    for part, (top, left) in zip(scores, places):
        total[:, :, top:top + h, left:left + w] += part
        seen[top:top + h, left:left + w] += 1
    return total / seen


@torch.no_grad()
def predict(model, photo, recipe, flip, device):
    """PIL photo -> probabilities (C, H, W): mean of the softmax over scales and mirror images, as the recipe's test_* say."""
    W, H = photo.size
    short, window = min(H, W), recipe["test_window"]
    # As Segmenter does, no side is shorter than a window: scales 0.5 and 0.75 of 520 are both 480 then, one pass of weight 2
    scales = Counter(max(scale * recipe["side"], window or 0) / short for scale in recipe["test_scales"])
    total = 0
    for scale, weight in scales.items():
        x = scaled_input(photo, scale, model.trunk.patch, most=8192 if window else 2048).to(device)
        x = torch.cat([x, x.flip(3)]) if flip else x                                            # (2 or 1, 3, h, w)
        with autocast(device, "auto"):
            scores = slide(model, x, window, recipe["test_stride"]) if window else model(x)     # (2 or 1, C, h, w)
        scores = torch.cat([scores[:1], scores[1:].flip(3)])
        scores = F.interpolate(scores, size=(H, W), mode="bilinear", align_corners=False)
        total = total + weight * scores.softmax(dim=1).mean(dim=0)
    return total / len(recipe["test_scales"])                                                   # (C, H, W)


def predict_labels(model, photo, recipe, flip, device, ids=slice(None)):
    """PIL photo -> labels uint8 (H, W) of the model, of those in ids, sharpened by the CRF of the recipe's test_crf among the
    labels that win at some pixel."""
    view = photo.copy()
    view.thumbnail((LARGEST, LARGEST))                                                          # smaller ones stay as they are
    prob = predict(model, view, recipe, flip, device)[ids]                                      # (len(ids), h, w)
    labels = prob.argmax(0)                                                                     # (h, w)
    if recipe["test_crf"] != "none":
        winners, preset = labels.unique(), PRESETS[recipe["test_crf"]]
        Q = dense_crf(torch.from_numpy(np.array(view)), prob[winners], preset["gaussian"], preset["bilateral"])
        labels = winners[Q.argmax(0)]
    labels = Image.fromarray(np.arange(256, dtype=np.uint8)[ids][labels.cpu().numpy()])
    return np.array(labels.resize(photo.size, Image.NEAREST))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

def coloured(labels):
    """labels uint8 (H, W) -> picture in VOC's colours"""
    picture = Image.fromarray(labels, "P")
    picture.putpalette(PALETTE)
    return picture.convert("RGB")


def overlay(photo, labels):
    """photo uint8 (H, W, 3), labels (H, W) -> picture: the photo, things under a veil of their colour, with white outlines"""
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    veil = np.where(edge[..., None], 255, np.asarray(coloured(labels)))
    share = np.where(edge, 1, 0.5 * (labels > 0))[..., None]
    return Image.fromarray(((1 - share) * photo + share * veil).astype(np.uint8))


def heat(photo, cams):
    """photo uint8 (H, W, 3) in grey under the strongest of its CAMs (n, H, W): blue 0, green 1/2, red 1"""
    cam = cams.amax(dim=0).numpy() if len(cams) else np.zeros(photo.shape[:2], np.float32)
    colour = np.stack([np.interp(cam, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], axis=-1)
    return Image.fromarray((0.35 * photo.mean(axis=2, keepdims=True) + 0.65 * colour).astype(np.uint8))


def examples(split, count):
    """Names of up to `count` photos: for each class in turn one that shows it, alone where there is such a one."""
    chosen = []
    for k in range(len(split.classes)):
        with_k = [name for name in split.names if split.labels[name][k] and name not in chosen]
        chosen += sorted(with_k, key=lambda name: split.labels[name].sum())[:1]
    return (chosen + [name for name in split.names if name not in chosen])[:count]


def strip_cell(folder, split, name, photo):
    """What a folder holds for a photo (H, W, 3), as a picture: CAMs (NAME.npy) or labels (NAME.png)"""
    if (Path(folder) / f"{name}.npy").is_file():
        return heat(photo, read_cams(folder, name, np.flatnonzero(split.labels[name]), photo.shape[:2]))
    return coloured(read_labels(f"{folder}/{name}.png", photo.shape[:2], len(split.classes) + 1))


def picture_strip(rows, captions, path, side=128):
    """rows: lists of PIL images, one a caption -> a PNG, every image fitted into a cell of `side` x `side` pixels"""
    sheet = Image.new("RGB", (len(captions) * (side + 4), len(rows) * (side + 4) + 16), "white")
    for column, caption in enumerate(captions):
        ImageDraw.Draw(sheet).text((column * (side + 4) + 4, 2), caption, fill="black")
        for row, cells in enumerate(rows):
            cell = ImageOps.contain(cells[column].convert("RGB"), (side, side), Image.NEAREST)
            sheet.paste(cell, (column * (side + 4) + (side - cell.width) // 2, row * (side + 4) + 16 + (side - cell.height) // 2))
    write_file(path, sheet.save)


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Scores predictions against masks, or predicts photos that have none.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    images = parser.add_argument_group("images (one of --data, --images)")
    images.add_argument("--data", metavar="ROOT", help="folder with classes.txt, SPLIT.csv and masks/")
    images.add_argument("--split", default="val", help="ROOT/SPLIT.csv: the photos to score")
    images.add_argument("--truth", metavar="DIR", help="true masks, NAME.png (default ROOT/masks)")
    images.add_argument("--images", metavar="DIR", help="any photos, to be predicted: --checkpoint and --save go with it")
    what = parser.add_argument_group("what to score (one of --pred, --cams, --checkpoint)")
    what.add_argument("--pred", metavar="DIR", help="label PNGs")
    what.add_argument("--cams", metavar="DIR", help="CAMs, of train_cam.py or other programs, cut at the background score")
    what.add_argument("--checkpoint", metavar="FILE", help="a segmentation model, seg.pt of train_seg.py")
    what.add_argument("--background-score", default="auto", metavar="T", help="--cams: a number in (0, 1), higher gives smaller "
                      "masks; auto: what the export of train_cam.py chose; no mask is read for it")
    what.add_argument("--oracle-sweep", action="store_true",
                      help="--cams: also the best background score, FOUND WITH THE MASKS: for analysis, not for results")
    what.add_argument("--present-only", action="store_true", help="--checkpoint: only background and the classes that "
                      "the csv says a photo shows, as published scores of masks on train have it")
    what.add_argument("--scales", type=float, nargs="+", help="--checkpoint: image scales, averaged (default: the recipe's)")
    what.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="--checkpoint: mirror images too")
    what.add_argument("--crf", choices=list(PRESETS), help="--checkpoint: dense CRF, this preset's kernels (default: the recipe's)")
    files = parser.add_argument_group("what to write")
    files.add_argument("--save", metavar="DIR", help="the predicted label PNGs, with --images also DIR/overlays/NAME.jpg, the "
                       "photo under them. Where a split has no masks, it is predicted and not scored")
    files.add_argument("--json", metavar="FILE", help="the scores")
    files.add_argument("--strip", metavar="FILE", help="pictures: photo, columns, prediction, truth, a photo of each class a row")
    files.add_argument("--strip-count", type=at_least(1), default=8, help="rows of the strip")
    files.add_argument("--columns", nargs="*", default=[], metavar="CAPTION=DIR",
                       help="more columns for the strip: folders of CAMs or label PNGs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser.parse_args(argv)


def check_flags(args):
    """Flags that do not go together end here, in one line."""
    for wrong, message in [
            (sum(map(bool, (args.pred, args.cams, args.checkpoint))) != 1,
             "expected one of --pred, --cams, --checkpoint: what to score"),
            (bool(args.data) == bool(args.images), "expected one of --data ROOT, a data set, and --images DIR, any photos"),
            (args.images and not (args.checkpoint and args.save),
             "--images: photos alone can only be predicted; expected --checkpoint seg.pt and --save DIR"),
            (args.images and (args.json or args.strip),
             "--images: without masks and labels there is no --json and no --strip; leave it out"),
            (args.present_only and not (args.checkpoint and args.data),
             "--present-only: of what a model predicts where a csv has the classes; expected --checkpoint seg.pt and --data ROOT"),
            (args.oracle_sweep and not args.cams, "--oracle-sweep: tries background scores on CAMs; expected --cams DIR"),
            (args.background_score != "auto" and not args.cams, "--background-score: cuts CAMs; expected --cams DIR"),
            ((args.crf or args.scales) and not args.checkpoint,
             "--crf, --scales: of what a model predicts; expected --checkpoint seg.pt (CAMs: make_pseudo.py --crf)"),
            (not all(0 < scale < 10 for scale in args.scales or []),
             f"--scales {args.scales}: expected numbers above 0 and below 10"),
            (args.columns and not args.strip, "--columns: of the picture strip; expected --strip FILE"),
            (any("=" not in column for column in args.columns),
             f"--columns {' '.join(args.columns)}: expected CAPTION=DIR, DIR a folder of CAMs or label PNGs")]:
        if wrong:
            raise InputError(message)


def main(args):
    check_flags(args)
    rank, world, device = start_processes(args.device)
    quiet = None if rank == 0 else True
    if args.checkpoint:
        model, recipe, classes = load_segmenter(args.checkpoint)
        model = model.to(device)
        recipe |= {"test_scales": args.scales or recipe["test_scales"], "test_crf": args.crf or recipe["test_crf"]}

    # ------------------------------------------------------------------------------------------ any photos
    if args.images:
        paths = sorted(path for path in Path(args.images).glob("*") if path.suffix.lower() in PHOTOS and path.name[0] != ".")
        names = {path.stem for path in paths}
        if len(names) < max(1, len(paths)):
            raise InputError(f"{args.images}: {len(paths)} photos, {len(names)} names before the dot; expected one "
                             f"photo or more that end in {' '.join(sorted(PHOTOS))}, with unlike names; masks have their names")
        if Path(args.save).resolve() == Path(args.images).resolve():
            raise InputError(f"{args.save}: holds the photos, which would be overwritten; expected another folder to --save in")
        if rank == 0:
            hold(args.save)
        for path in tqdm(paths[rank::world], desc="predict", disable=quiet):
            photo = read_image(path)
            with explained("predict", [path.name], SMALLER):
                labels = predict_labels(model, photo, recipe, args.flip, device)
            write_labels(Path(args.save) / f"{path.stem}.png", labels)
            write_file(Path(args.save) / f"overlays/{path.stem}.jpg", overlay(np.asarray(photo), labels).save)
        if rank == 0:
            print(f"{args.save}: masks of {len(paths)} photos; 0 background, "
                  + ", ".join(f"{i} {name}" for i, name in enumerate(classes, 1)))
        return end_processes()

    # ------------------------------------------------------------------------------------------ predict and count
    split = Split(args.data, args.split)
    truth_folder, C = Path(args.truth or split.root / "masks"), len(split.classes) + 1
    scored = not args.save or any((truth_folder / f"{name}.png").is_file() for name in split.names)
    if args.json and not scored:
        raise InputError(f"{truth_folder}: no masks for split {args.split}, so no score for --json; leave it out, or add the masks")
    read_from = {truth_folder.resolve(), *(path.resolve().parent for path in split.paths.values())}
    if args.save and Path(args.save).resolve() in read_from:
        raise InputError(f"{args.save}: holds photos or masks of the data, which would be overwritten; expected another folder")
    if args.save and rank == 0:
        hold(args.save)
    tries, chosen = [None], None
    if args.checkpoint:
        check_classes(args.checkpoint, {"classes": classes}, split.classes)
    if args.cams:
        score, chosen = background_score(args.background_score, args.cams)
        kind = kind_of_cams(args.cams, split)
        tries = [score, *(SWEEP if args.oracle_sweep else [])]

    def labels_of(name, size):
        """Labels (H, W) of a photo, one for each background score tried. size: (H, W), or None where unknown."""
        if args.pred:
            return [read_labels(f"{args.pred}/{name}.png", size, C)]
        if args.checkpoint:
            ids = [0, *(1 + np.flatnonzero(split.labels[name]))] if args.present_only else slice(None)
            with explained("predict", [name], SMALLER):
                return [predict_labels(model, split.image(name), recipe, args.flip, device, ids)]
        present = np.flatnonzero(split.labels[name])
        cams = read_cams(args.cams, name, present, size or split.image(name).size[::-1])
        return [score_labels(cams, present, score) for score in tries]

    def count(name):
        """Counts (tries, C, C) of a photo, whose prediction is written if asked."""
        truth = read_labels(truth_folder / f"{name}.png", None, C) if scored else None
        labels = labels_of(name, truth.shape if scored else None)
        if scored and labels[0].shape != truth.shape:
            raise InputError(f"{truth_folder / name}.png: {truth.shape[0]}x{truth.shape[1]} (height x width), its photo is "
                             f"{labels[0].shape[0]}x{labels[0].shape[1]}; expected equal sizes; make the mask again")
        if args.save:
            write_labels(Path(args.save) / f"{name}.png", labels[0])
        return np.stack([confusion_matrix(each, truth, C) for each in labels]) if scored else 0

    with ThreadPoolExecutor(1 if args.checkpoint else 4) as pool:  # decoding leaves Python's lock; a model works alone
        names = split.names[rank::world]
        none = np.zeros((len(tries), C, C), np.int64)  # also where there are more processes than photos
        counts = sum(tqdm(pool.map(count, names), f"eval {args.split}", len(names), disable=quiet), none)
    counts = sum_over_processes(torch.as_tensor(counts, dtype=torch.float64), device).numpy()  # float64: exact to 2^53
    end_processes()
    if rank:
        return

    # ------------------------------------------------------------------------------------------ pictures
    if args.strip:
        rows = []
        for name in examples(split, args.strip_count):
            photo = split.image(name)
            cells = [strip_cell(column.split("=", 1)[1], split, name, np.array(photo)) for column in args.columns]
            cells.append(coloured(labels_of(name, photo.size[::-1])[0]))
            if scored:
                cells.append(coloured(read_labels(truth_folder / f"{name}.png", photo.size[::-1], C)))
            rows.append([photo, *cells])
        captions = ["photo", *(column.split("=", 1)[0] for column in args.columns),
                    Path(args.pred or args.cams or args.checkpoint).stem, "truth"]
        picture_strip(rows, captions[:len(rows[0])], args.strip)

    # ------------------------------------------------------------------------------------------ report
    what = "pred" if args.pred else "cams" if args.cams else "checkpoint"
    tested = (f", scales {recipe['test_scales']}, flip {args.flip}, CRF {recipe['test_crf']}"
              + ", present classes only" * args.present_only) if args.checkpoint else ""
    if not scored:
        print(f"{args.save}: masks of {len(split.names)} photos of {args.split}{tested}; not scored, there are no true ones")
        return
    per_class, labels = 100 * iou(counts[0]), ["background", *split.classes]
    result = {"miou": round(float(np.nanmean(per_class)), 6),
              "iou": {name: None if np.isnan(value) else round(float(value), 6) for name, value in zip(labels, per_class)},
              "images": len(split.names), "list": args.split, "classes": labels, "what": what, "source": getattr(args, what),
              "background_score": tries[0], "background_score_chosen": chosen,
              "crf": "none" if args.cams else "as in the files", "scales": None, "flip": None}
    if args.checkpoint:
        result |= {"crf": recipe["test_crf"], "scales": recipe["test_scales"], "flip": args.flip, "present_only": args.present_only}
    for name, value in result["iou"].items():
        print(f"{name:>16}  {'  absent' if value is None else f'{value:8.2f}'}")
    print(f"{'mIoU':>16}  {result['miou']:8.2f}   {what} {result['source']} on {len(split.names)} images of {args.split}"
          + (f", CAMs {kind}, background score {tries[0]} ({chosen})" if args.cams else "") + tested)
    if args.oracle_sweep:
        scores = [100 * float(np.nanmean(iou(matrix))) for matrix in counts[1:]]
        best = int(np.argmax(scores))
        result["oracle"] = {"miou": round(scores[best], 3), "background_score": SWEEP[best],
                            "background_score_chosen": "tuned on ground truth"}
        print(f"{'oracle mIoU':>16}  {scores[best]:8.2f}   background score {SWEEP[best]}, TUNED ON GROUND TRUTH")
    if args.json:
        write_file(args.json, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    run(main, parse_args())
