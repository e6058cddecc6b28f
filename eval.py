"""Scores predictions, CAMs or a segmentation model against ground truth; predicts photos.

  IoU_c = |pred = c and truth = c| / |pred = c or truth = c|   over all pixels of the list whose
                                                               truth is not 255           [eq. E1]
  mIoU  = mean of IoU_c over those of the K classes and background that occur, in percent

Counts are summed over the whole list before dividing, as the VOC server does. A predicted 255
counts as background. No other stage opens ROOT/masks/NAME.png on its own (docs/data.md). Prints
a table; writes a JSON and the predicted PNGs where asked.

  python eval.py --data runs/toy/data --split train --cams runs/toy/cam/cams
  python eval.py --data runs/toy/data --split train --pred runs/toy/masks --json masks.json
  python eval.py --data runs/toy/data --checkpoint runs/toy/seg/seg.pt
  python eval.py --images holiday --checkpoint runs/voc/seg.pt --save runs/holiday
  torchrun --nproc-per-node 4 eval.py ... the same ...                 # processes share the photos
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from common import (
    IMAGENET_MEAN, IMAGENET_STD, PALETTE, RANK, WORLD, InputError, Split, check_classes, claim,
    digest, end_processes, in_first_process, label_picture, load_photos, progress, read_labels, run,
    start_processes, sum_over_processes, write_labels, writing)
from make_pseudo import (
    PRESETS, RECIPES, check_cams, check_score, dense_crf, read_cams, score_labels, with_background)
from mask_generator import scaled_input
from train_seg import load_segmenter

# B images, K classes, C = K + 1 labels, H W pixels, n classes that a photo shows, S scores of SWEEP

SCALES = (0.5, 0.75, 1, 1.25, 1.5, 1.75)
TEST = {  # by the recipe of train_seg.py: a window of None is the whole photo
    "voc":  dict(scales=SCALES, window=480, stride=320, crf="weaktr-test"),
    "coco": dict(scales=SCALES, window=480, stride=320, crf="clip-es"),
    "toy":  dict(scales=(1, 1.25, 1.5), window=None, stride=None, crf="clip-es"),
}
LARGEST = 1024  # pixels of the longest side: larger photos are shrunk for model and CRF
SWEEP = [round(0.02 * i, 2) for i in range(1, 50)]  # background scores of --oracle-sweep, upwards


# ---- IoU ----------------------------------------------------------------------------------------

def confusion_matrix(pred, truth, num_labels):
    """Pixel counts (C, C) int64, rows truth, columns prediction. pred, truth: uint8 of one shape,
    labels below C = num_labels or 255: such a truth is left out, such a prediction background"""
    C, known = num_labels, truth != 255
    cell = C * truth[known].astype(np.int64) + np.where(pred == 255, 0, pred)[known]
    return np.bincount(cell, minlength=C * C).reshape(C, C)


def iou(matrix):
    """IoU_c = |pred = c and truth = c| / |pred = c or truth = c|  [eq. E1]: confusion matrix (C, C)
    -> (C,) in [0, 1], NaN for a class in neither truth nor prediction"""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def sweep_matrices(maps, present, truth, num_labels, sweep=SWEEP):
    """The confusion matrix at each of the background scores, upwards, (S, C, C), of one histogram:
    over truth, label of the highest map, and how many scores lie below that map. At those it wins;
    at the others, one that it equals too, background does [eq. P1].
    maps: float32 (n, H, W) of the classes present (n,); truth: uint8 (H, W)"""
    C, S = num_labels, len(sweep)
    top, winner = with_background(maps, 0).max(0)                                # (H, W)
    label = np.array([0, *(1 + present)])[winner.numpy()]
    below = torch.bucketize(top, torch.tensor(sweep)).numpy()  # in float32, as score_labels does
    cell = ((C * truth.astype(np.int64) + label) * (S + 1) + below)[truth != 255]
    counts = np.bincount(cell, minlength=C * C * (S + 1)).reshape(C, C, S + 1)
    won = counts.sum(axis=2, keepdims=True) - counts.cumsum(axis=2)[:, :, :S]    # (C, C, S)
    won[:, 0] += counts.sum(axis=(1, 2))[:, None] - won.sum(axis=1)  # the rest is background
    return np.moveaxis(won, 2, 0)


# ---- Prediction ---------------------------------------------------------------------------------

def slide(model, x, window, stride, batch=8):
    """x (B, 3, H, W), no side shorter than a window -> scores (B, C, H, W), means over windows
    `stride` pixels apart, the last at the border; `batch` of them go through the model at a time"""
    B, _, H, W = x.shape
    windows = [(b, slice(top, top + window), slice(left, left + window))
               for top in [*range(0, H - window, stride), H - window]
               for left in [*range(0, W - window, stride), W - window] for b in range(B)]
    total, seen = x.new_zeros(B, model.num_labels, H, W), x.new_zeros(B, 1, H, W)
    for i in range(0, len(windows), batch):
        part = windows[i:i + batch]
        scores = model(torch.stack([x[b, :, rows, columns] for b, rows, columns in part]))
        for score, (b, rows, columns) in zip(scores, part):                  # (C, window, window)
            total[b, :, rows, columns] += score
            seen[b, :, rows, columns] += 1
    return total.div_(seen)  # in place: COCO's 81 labels at scale 1.75 take 0.7 GiB


def window_view(photo, side, window):
    """PIL photo -> (1, 3, h, w), ImageNet-normalised, as published: the short side has `side`
    pixels, the long one at most eight times as many; if that is less than a window, the view is
    enlarged from there: scale 0.5 of side 520 is a blurred 480. At most 32 windows long."""
    factor = min(side / min(photo.size), 8 * side / max(photo.size))
    W, H = (int(factor * pixels + 0.5) for pixels in photo.size)
    x = v2.functional.pil_to_tensor(photo).float()[None] / 255
    x = F.interpolate(v2.functional.normalize(x, IMAGENET_MEAN, IMAGENET_STD), size=(H, W),
                      mode="bilinear")
    if (short := min(H, W)) < window:
        size = [min(pixels * window // short, 32 * window) for pixels in (H, W)]
        x = F.interpolate(x, size=size, mode="bilinear")
    return x


@torch.no_grad()
def predict(model, photo, test, flip, device):
    """PIL photo -> probabilities (C, H, W): mean softmax over scales and mirror images, in float32.
    test: a row of TEST, and side, the short side at scale 1"""
    (W, H), window, total = photo.size, test["window"], 0
    for scale in test["scales"]:
        side = scale * test["side"]
        x = (window_view(photo, side, window) if window else
             scaled_input(photo, side / min(H, W), model.backbone.patch, 2048)).to(device)
        x = torch.cat([x, x.flip(3)]) if flip else x                     # (2 or 1, 3, h, w)
        scores = slide(model, x, window, test["stride"]) if window else model(x)
        scores[1:] = scores[1:].flip(3)                                  # (2 or 1, C, h, w)
        scores = F.interpolate(scores, size=(H, W), mode="bilinear")
        total = total + scores.softmax(dim=1).mean(dim=0)
    return total / len(test["scales"])


def predict_labels(model, photo, test, flip, device, ids=slice(None)):
    """PIL photo -> labels uint8 (H, W) among ids, after a CRF among those that win at some pixel"""
    view = photo.copy()
    view.thumbnail((LARGEST, LARGEST))  # smaller ones stay as they are
    prob = predict(model, view, test, flip, device)[ids]                         # (len(ids), h, w)
    labels, preset = prob.argmax(0), PRESETS[test["crf"]]
    if preset:
        winners = labels.unique()
        Q = dense_crf(torch.from_numpy(np.array(view)), prob[winners], preset["gaussian"],
                      preset["bilateral"])
        labels = winners[Q.argmax(0)]
    labels = Image.fromarray(np.arange(256, dtype=np.uint8)[ids][labels.cpu().numpy()])
    return np.array(labels.resize(photo.size, Image.NEAREST))


def overlay(photo, labels):
    """PIL photo, labels (H, W) -> the photo under half-transparent colours, with white outlines"""
    photo, colour = (np.array(x, int) for x in (photo, label_picture(labels).convert("RGB")))
    mixed = np.where(labels[..., None] > 0, (photo + colour) // 2, photo)        # (H, W, 3)
    mixed[1:][labels[1:] != labels[:-1]] = 255
    mixed[:, 1:][labels[:, 1:] != labels[:, :-1]] = 255
    return Image.fromarray(mixed.astype(np.uint8))


# ---- Labels of this process's photos: (name, uint8 (H, W)) one by one ----------------------------

def labels_of_pngs(folder, split):
    for name in progress(split.names[RANK::WORLD], "eval"):
        yield name, read_labels(folder / f"{name}.png", split.size(name), len(split.classes) + 1)


def labels_of_cams(folder, split, background_score):
    for name in progress(split.names[RANK::WORLD], "eval"):
        maps = read_cams(folder, name, split.present(name), split.size(name))    # (n, H, W)
        yield name, score_labels(maps, split.present(name), background_score)


def labels_of_model(model, split, test, device, workers):
    """test: a row of TEST with side, flip, and present_only: other classes cannot win"""
    for name, photo in load_photos(split, split.names[RANK::WORLD], "eval", workers):
        ids = [0, *(1 + split.present(name))] if test["present_only"] else slice(None)
        yield name, predict_labels(model, photo, test, test["flip"], device, ids)


class Photos(Split):
    """All photos of a folder, without labels"""

    def __init__(self, folder, classes):
        self.root, self.split, self.classes, self.upright = Path(folder), folder, classes, True
        kinds = Image.registered_extensions()  # of those that Pillow writes, it cannot read all
        paths = [x for x in sorted(self.root.glob("[!.]*"))
                 if kinds.get(x.suffix.lower()) in Image.OPEN]
        self.paths = {path.stem: path for path in paths}
        self.names, self.folders = list(self.paths), {self.root}
        if not 0 < len(self.names) == len(paths):
            raise InputError(f"{folder}: {len(paths)} photos, {len(self.names)} names before the "
                             "ending; expected one or more, with different names")


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Scores against masks, or predicts photos.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, group = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--data", metavar="ROOT", help="folder with classes.txt, SPLIT.csv, masks/")
    group.add_argument("--images", metavar="DIR", help="any photos, to predict with --checkpoint")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--pred", metavar="DIR", help="score label PNGs")
    group.add_argument("--cams", metavar="DIR", help="score CAMs, cut at the background score")
    group.add_argument("--checkpoint", metavar="FILE", help="score a segmentation model, seg.pt")
    add("--split", default="val", help="ROOT/SPLIT.csv: the photos")
    add("--recipe", choices=list(RECIPES), help="--cams: whose background score; None: voc's, 0.43 "
        "(coco: 0.42), WeakTr's, found there with train masks. A checkpoint knows its own")
    add("--background-score", type=float, metavar="T", help="--cams: another one, in (0, 1)")
    add("--oracle-sweep", action="store_true", help="--cams: also the best background score, FOUND "
        "WITH THE MASKS: for analysis, not for results")
    add("--present-only", action="store_true", help="--checkpoint: only background and the classes "
        "that the csv says a photo shows, as published scores of masks on train have it")
    add("--scales", type=float, nargs="+", help="--checkpoint: image scales (None: the recipe's)")
    add("--flip", action=argparse.BooleanOptionalAction, help="--checkpoint: mirror images too "
        "(None: yes)")
    add("--crf", choices=list(PRESETS), help="--checkpoint: dense CRF (None: the recipe's)")
    add("--save", metavar="DIR", help="write the predicted label PNGs and DIR/overlays/NAME.jpg; a "
        "split without masks is predicted and not scored")
    add("--json", metavar="FILE", help="write the scores")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading processes")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser.parse_args(argv)


def main(args):
    # ---- Refuse what the chosen mode would ignore
    mode = "pred" if args.pred else "cams" if args.cams else "checkpoint"
    needs = dict.fromkeys(("recipe", "background_score", "oracle_sweep"), "cams") | dict.fromkeys(
        ("present_only", "scales", "flip", "crf", "images"), "checkpoint")
    for flag, needed in needs.items():
        given = getattr(args, flag) not in (None, False) or flag == "flip" and args.flip is False
        if given and mode != needed:
            raise InputError(f"--{flag.replace('_', '-')}: only with --{needed}")
    if args.images and (args.present_only or not args.save):
        raise InputError("--images: these photos have no labels; " + (
            "leave out --present-only" if args.present_only else "pass --save, a folder for them"))
    if args.scales and not all(0 < scale < 100 for scale in args.scales):
        raise InputError(f"--scales {args.scales}: expected numbers above 0 and below 100")
    if args.background_score is not None:
        check_score(args.background_score)

    # ---- Whose labels, and how they are made
    device, source, settings = start_processes(args.device), Path(getattr(args, mode)), {}
    for path in (source, Path(args.images or ".")):
        if not path.exists():
            raise InputError(f"{path}: not there; expected what --{mode} and --images name")
    if args.checkpoint:
        model, recipe, side, classes = load_segmenter(source)
    split = Photos(args.images, classes) if args.images else Split(args.data, args.split)
    if args.pred:
        predictions = labels_of_pngs(source, split)
    elif args.cams:
        score, chosen = args.background_score, "given"
        if score is None:
            score, _ = RECIPES[args.recipe or "voc"]
            chosen = f"WeakTr's, found with train masks of {'COCO' if score < 0.43 else 'VOC'}"
        check_cams(source, split)
        settings = {"background_score": score, "background_score_chosen": chosen}
        predictions = labels_of_cams(source, split, score)
    else:
        check_classes(source, classes, split)
        if args.present_only and not any(shown.any() for shown in split.labels.values()):
            raise InputError(f"--present-only: {args.split}.csv names no class of any photo, so "
                             "only background would remain; leave it out")
        settings = {"scales": args.scales or TEST[recipe]["scales"], "flip": args.flip is not False,
                    "crf": args.crf or TEST[recipe]["crf"], "present_only": args.present_only}
        test = TEST[recipe] | settings | {"side": side}
        predictions = labels_of_model(model.to(device), split, test, device, args.workers)

    # ---- Whether there is truth, and where labels go
    truths = {name: split.root / f"masks/{name}.png" for name in split.names}
    missing = in_first_process(lambda: [path for path in truths.values() if not path.is_file()])
    C, scored = len(split.classes) + 1, not args.save or len(missing) < len(truths)
    scored = scored and not args.images
    if scored and missing:
        read_labels(missing[0], None, C)  # is refused, before any work
    note = source if args.checkpoint else source / "made_of.json"
    record = digest(note) if note.is_file() else None
    if args.save:
        files = [file for name in truths for file in (f"{name}.png", f"overlays/{name}.jpg")]
        claim(args.save, files, {"script": "eval.py", "predicted_by": record, **settings},
              reads=[*split.folders, source])

    # ---- Predict, then score
    counts = np.zeros((1 + len(SWEEP) * args.oracle_sweep, C, C), np.int64)
    for name, labels in predictions:                                             # (H, W)
        if args.save:
            write_labels(Path(args.save, f"{name}.png"), labels)
            with writing(Path(args.save, f"overlays/{name}.jpg")) as temporary:
                overlay(split.image(name), labels).save(temporary)
        if scored:
            truth = read_labels(truths[name], labels.shape, C)
            counts[0] += confusion_matrix(labels, truth, C)
        if scored and args.oracle_sweep:
            maps = read_cams(source, name, split.present(name), labels.shape)    # (n, H, W)
            counts[1:] += sweep_matrices(maps, split.present(name), truth, C, SWEEP)
    counts = sum_over_processes(torch.from_numpy(counts).to(device)).cpu().numpy()
    end_processes()
    if RANK > 0:
        return

    # ---- Report: a table and a JSON
    details = "".join(f", {key.replace('_', ' ')} {value}" for key, value in settings.items()
                      if value is not False)
    if not scored:
        names = (f"{i} {name} #{bytes(PALETTE[3 * i:3 * i + 3]).hex()}"
                 for i, name in enumerate(["background", *split.classes]))
        print(f"{args.save}: labels of {len(truths)} photos{details}, not scored: no masks; labels "
              f"and their colours: {', '.join(names)}")
        return
    if not counts.any():
        raise InputError(f"{split.root}/masks: every pixel is 255 (ignore); expected some with a "
                         "label")
    ious = 100 * np.stack([iou(matrix) for matrix in counts])                    # (1 or 1 + S, C)
    miou, *mious = np.nanmean(ious, axis=1).round(6).tolist()
    ious = [None if np.isnan(x) else round(x, 6) for x in ious[0].tolist()]
    result = {"miou": miou, "iou": dict(zip(["background", *split.classes], ious)),
              "list": split.split, "images": len(truths), mode: getattr(args, mode), **settings,
              "record": record}
    for name, value in result["iou"].items():
        print(f"{name:>16}  {'  absent' if value is None else f'{value:8.2f}'}")
    print(f"{'mIoU':>16}  {miou:8.2f}   {mode} {result[mode]} on {len(truths)} images of "
          f"{split.split}{details}")
    if args.oracle_sweep:
        curve = {score: miou} | dict(zip(SWEEP, mious))
        best = max(curve, key=curve.get)
        result["oracle"] = {"miou": curve[best], "background_score": best,
                            "background_score_chosen": "tuned on ground truth",
                            "curve": dict(sorted(curve.items()))}
        print(f"{'oracle mIoU':>16}  {curve[best]:8.2f}   background score {best}, TUNED ON GROUND "
              "TRUTH")
    if args.json:
        with writing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main, parse_args())
