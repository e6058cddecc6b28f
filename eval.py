"""Scores predictions, CAMs or a segmentation model against ground truth; predicts photos.

  IoU_c = |pred = c and truth = c| / |pred = c or truth = c|   over all pixels of the list whose
                                                               truth is not 255           [eq. E1]
  mIoU  = mean of IoU_c over those of the K classes and background that occur, in percent

Counts are summed over the whole list before dividing, as the VOC server does. A predicted 255
counts as background. No other stage opens ROOT/masks/NAME.png on its own (docs/data.md).
Prints a table; writes a JSON and the predicted PNGs where asked.

  python eval.py --data runs/toy/data --split train --cams runs/toy/cam/cams
  python eval.py --data runs/toy/data --split train --pred runs/toy/masks --json masks.json
  python eval.py --data runs/toy/data --checkpoint runs/toy/seg/seg.pt
  python eval.py --images holiday --checkpoint runs/voc/seg.pt --save runs/holiday
  torchrun --nproc-per-node 4 eval.py ... the same ...                 # processes share the photos
"""
import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from common import (
    IMAGENET_MEAN, IMAGENET_STD, QUIET, RANK, WORLD, InputError, Split, check_classes, claim,
    digest, end_processes, label_picture, load_photos, read_labels, run, start_processes,
    sum_over_processes, wait_for_all, write_labels, writing)
from make_pseudo import (
    BACKGROUND_SCORE, PRESETS, check_score, dense_crf, read_cams, score_labels)
from mask_generator import scaled_input
from train_seg import load_segmenter

# B images, K classes, C = K + 1 labels, H W pixels

SCALES = (0.5, 0.75, 1, 1.25, 1.5, 1.75)
TEST = {  # by the recipe of train_seg.py: a window of None is the whole photo
    "voc":  dict(scales=SCALES, window=480, stride=320, crf="voc-test"),
    "coco": dict(scales=SCALES, window=480, stride=320, crf="prob"),
    "toy":  dict(scales=(1, 1.25, 1.5), window=None, stride=None, crf="prob"),
}
LARGEST = 1024  # pixels of the longest side: larger photos are shrunk for model and CRF
SWEEP = [round(0.02 * i, 2) for i in range(1, 50)]  # background scores that --oracle-sweep tries


# ---- IoU ----------------------------------------------------------------------------------------

def confusion_matrix(pred, truth, num_classes, ignore=255):
    """Pixel counts (C, C) int64, rows truth, columns prediction; C = num_classes, with background.

    pred, truth: uint8 of one shape. Pixels whose truth is `ignore` are left out; a prediction of
    `ignore` counts as background. Raises ValueError for unequal shapes and other labels."""
    if pred.shape != truth.shape:
        raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
    valid = truth != ignore
    truth, pred = truth[valid].astype(np.int64), pred[valid].astype(np.int64)
    pred[pred == ignore] = 0
    if max(pred.max(initial=0), truth.max(initial=0)) >= num_classes:
        raise ValueError(f"labels up to {max(pred.max(), truth.max())}, expected {num_classes - 1}")
    counts = np.bincount(num_classes * truth + pred, minlength=num_classes ** 2)
    return counts.reshape(num_classes, num_classes)


def iou(matrix):
    """IoU_c = |pred = c and truth = c| / |pred = c or truth = c|  [eq. E1]: confusion matrix (C, C)
    -> (C,) in [0, 1], NaN for a class in neither truth nor prediction"""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


# ---- Prediction ---------------------------------------------------------------------------------

def slide(model, x, window, stride, batch=8):
    """x (B, 3, H, W), no side shorter than a window -> scores (B, C, H, W), means over windows
    `stride` pixels apart, the last at the border; `batch` of them go through the model at a time"""
    B, _, H, W = x.shape
    places = list(product([*range(0, H - window, stride), H - window],
                          [*range(0, W - window, stride), W - window]))
    windows = torch.cat([x[:, :, top:top + window, left:left + window] for top, left in places])
    scores = torch.cat([model(part) for part in windows.split(batch)])
    scores = scores.unflatten(0, (len(places), B))               # (places, B, C, window, window)
    total, seen = scores.new_zeros(B, scores.shape[2], H, W), scores.new_zeros(H, W)
    for part, (top, left) in zip(scores, places):
        total[:, :, top:top + window, left:left + window] += part
        seen[top:top + window, left:left + window] += 1
    return total / seen


def window_view(photo, side, window):
    """PIL photo -> (1, 3, h, w), ImageNet-normalised, as published: the short side has `side`
    pixels, the long one at most eight times as many. If that is less than a window, the view is
    enlarged from there: scale 0.5 of side 520 is a blurred 480."""
    factor = min(side / min(photo.size), 8 * side / max(photo.size))
    W, H = (int(factor * pixels + 0.5) for pixels in photo.size)
    x = v2.functional.pil_to_tensor(photo).float()[None] / 255
    x = F.interpolate(v2.functional.normalize(x, IMAGENET_MEAN, IMAGENET_STD), size=(H, W),
                      mode="bilinear")
    if (short := min(H, W)) < window:
        x = F.interpolate(x, size=(H * window // short, W * window // short), mode="bilinear")
    return x


@torch.no_grad()
def predict(model, photo, recipe, flip, device):
    """PIL photo -> probabilities (C, H, W): mean softmax over scales and mirror images, in float32.
    recipe: a row of TEST, and side, the short side at scale 1"""
    W, H = photo.size
    window, scales, total = recipe["window"], recipe["scales"], 0
    for scale in scales:
        side = scale * recipe["side"]
        x = (window_view(photo, side, window) if window else
             scaled_input(photo, side / min(H, W), model.backbone.patch, 2048)).to(device)
        x = torch.cat([x, x.flip(3)]) if flip else x                     # (2 or 1, 3, h, w)
        scores = slide(model, x, window, recipe["stride"]) if window else model(x)
        scores = torch.cat([scores[:1], scores[1:].flip(3)])             # (2 or 1, C, h, w)
        scores = F.interpolate(scores, size=(H, W), mode="bilinear")
        total = total + scores.softmax(dim=1).mean(dim=0)
    return total / len(scales)


def predict_labels(model, photo, recipe, flip, device, ids=slice(None)):
    """PIL photo -> labels uint8 (H, W), of those in ids, after a dense CRF among the
    labels that win at some pixel"""
    view = photo.copy()
    view.thumbnail((LARGEST, LARGEST))  # smaller ones stay as they are
    prob = predict(model, view, recipe, flip, device)[ids]                       # (len(ids), h, w)
    labels, preset = prob.argmax(0), PRESETS[recipe["crf"]]
    if preset:
        winners = labels.unique()
        Q = dense_crf(torch.from_numpy(np.array(view)), prob[winners], preset["gaussian"],
                      preset["bilateral"])
        labels = winners[Q.argmax(0)]
    labels = Image.fromarray(np.arange(256, dtype=np.uint8)[ids][labels.cpu().numpy()])
    return np.array(labels.resize(photo.size, Image.NEAREST))


def overlay(photo, labels):
    """photo uint8 (H, W, 3), labels (H, W) -> the photo under half-transparent colours, with white
    outlines"""
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    veil = np.where(edge[..., None], 255, np.asarray(label_picture(labels).convert("RGB")))
    share = np.where(edge, 1, 0.5 * (labels > 0))[..., None]
    return Image.fromarray(((1 - share) * photo + share * veil).astype(np.uint8))


class Photos(Split):
    """All photos of a folder, without labels"""

    def __init__(self, folder, classes):
        endings = Image.registered_extensions()
        paths = [path for path in sorted(Path(folder).glob("[!.]*"))
                 if path.suffix.lower() in endings]
        self.paths = {path.stem: path for path in paths}
        if not 0 < len(self.paths) == len(paths):
            raise InputError(f"{folder}: {len(paths)} photos, {len(self.paths)} names before the "
                             "ending; expected one or more, with different names")
        self.root, self.split, self.classes, self.upright = Path(folder), folder, classes, True
        self.names, self.folders = list(self.paths), {Path(folder)}
        self.labels = dict.fromkeys(self.names, np.zeros(len(classes), bool))


# ---- What is scored ------------------------------------------------------------------------------

def png_labels(args, device):
    """--pred -> the Split, a function (name, photo) -> [labels (H, W)], {how they are made}"""
    split = Split(args.data, args.split)
    C = len(split.classes) + 1
    return split, lambda name, photo: [
        read_labels(f"{args.pred}/{name}.png", photo.size[::-1], C)], {}


def cam_labels(args, device):
    """--cams -> the same; labels of each background score that is tried"""
    how = {"background_score": args.background_score, "background_score_chosen": "given"}
    if args.background_score is None:
        how = {"background_score": BACKGROUND_SCORE,
               "background_score_chosen": "WeakTr's, found with train masks of VOC"}
    check_score(how["background_score"])
    split = Split(args.data, args.split)
    scores = [how["background_score"], *(SWEEP if args.oracle_sweep else [])]

    def labels_of(name, photo):
        present = split.present(name)
        maps = read_cams(args.cams, name, present, photo.size[::-1])
        return [score_labels(maps, present, score) for score in scores]
    return split, labels_of, how


def model_labels(args, device):
    """--checkpoint -> the same"""
    segmenter, name, side, classes = load_segmenter(args.checkpoint)
    split = Photos(args.images, classes) if args.images else Split(args.data, args.split)
    check_classes(args.checkpoint, classes, split)
    if args.present_only and not any(shown.any() for shown in split.labels.values()):
        raise InputError(f"--present-only: {args.split}.csv names no class of any photo, so only "
                         "background would remain; leave it out")
    how = {"scales": args.scales or TEST[name]["scales"], "flip": args.flip is not False,
           "crf": args.crf or TEST[name]["crf"], "present_only": args.present_only}
    recipe, segmenter = TEST[name] | how | {"side": side}, segmenter.to(device)

    def labels_of(name, photo):
        ids = [0, *(1 + split.present(name))] if args.present_only else slice(None)
        return [predict_labels(segmenter, photo, recipe, how["flip"], device, ids)]
    return split, labels_of, how


MODES = {"pred": png_labels, "cams": cam_labels, "checkpoint": model_labels}


def count(photo, split, labels_of, save, scored):
    """(name, PIL photo) -> confusion matrices (scores, C, C). The prediction is written if asked"""
    (name, photo), C = photo, len(split.classes) + 1
    labels = labels_of(name, photo)
    if save:
        write_labels(Path(save) / f"{name}.png", labels[0])
        with writing(Path(save) / f"overlays/{name}.jpg") as temporary:
            overlay(np.asarray(photo), labels[0]).save(temporary)
    if not scored:
        return 0
    truth = read_labels(split.root / f"masks/{name}.png", photo.size[::-1], C)
    return np.stack([confusion_matrix(each, truth, C) for each in labels])


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
    add("--background-score", type=float, metavar="T", help="--cams: in (0, 1); None: "
        f"{BACKGROUND_SCORE}, WeakTr's, found there with train masks of VOC (COCO: 0.42)")
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
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser.parse_args(argv)


def check_flags(args):
    """Refuse what the chosen mode would ignore."""
    for mode, flags in (("cams", ("background_score", "oracle_sweep")),
                        ("checkpoint", ("present_only", "scales", "flip", "crf", "images"))):
        given = [flag for flag in flags if getattr(args, flag) not in (None, False)
                 or flag == "flip" and args.flip is False]
        if given and not getattr(args, mode):
            raise InputError(f"--{given[0].replace('_', '-')}: only with --{mode}")
    if args.images and (args.present_only or not args.save):
        raise InputError("--images: these photos have no labels; " + (
            "leave out --present-only" if args.present_only else "pass --save, a folder for them"))
    if args.scales and not min(args.scales) > 0:
        raise InputError(f"--scales {args.scales}: expected numbers above 0")


def main(args):
    check_flags(args)
    device = start_processes(args.device)

    mode = next(mode for mode in MODES if getattr(args, mode))
    split, labels_of, how = MODES[mode](args, device)
    source = Path(getattr(args, mode))
    truths = split.root / "masks"
    scored = not args.save or any((truths / f"{name}.png").is_file() for name in split.names)
    note = source if mode == "checkpoint" else source / "made_of.json"
    record = digest(note) if note.is_file() else None
    if args.save and RANK == 0:
        files = [file for name in split.names for file in (f"{name}.png", f"overlays/{name}.jpg")]
        claim(args.save, files, {"predicted_by": record, **how}, reads=[*split.folders, source])
    wait_for_all()

    C = len(split.classes) + 1
    work = partial(count, split=split, labels_of=labels_of, save=args.save, scored=scored)
    counts = np.zeros((1 + len(SWEEP) * args.oracle_sweep, C, C), np.int64)
    if args.checkpoint:
        photos = load_photos(split, split.names, f"eval {split.split}", device)
        counts = sum(map(work, photos), counts)
    else:
        with ThreadPoolExecutor(4) as pool:  # decoding leaves Python's lock
            names = tqdm(split.names[RANK::WORLD], f"eval {split.split}", disable=QUIET)
            counts = sum(pool.map(lambda name: work(split.photo(name)), names), counts)
    counts = torch.as_tensor(counts, dtype=torch.float64).to(device)  # exact up to 2^53
    counts = sum_over_processes(counts).cpu().numpy()
    end_processes()
    if RANK == 0:
        report(args, split, mode, counts, how, record, scored)


def report(args, split, mode, counts, how, record, scored):
    """Print the table, write the JSON. counts (scores, C, C)"""
    details = "".join(f", {key.replace('_', ' ')} {value}" for key, value in how.items()
                      if value is not False)
    if not scored:
        print(f"{args.save}: labels of {len(split.names)} photos{details}, not scored: no masks; 0 "
              "background, " + ", ".join(f"{i} {name}" for i, name in enumerate(split.classes, 1)))
        return
    if not counts[0].any():
        raise InputError(f"{split.root / 'masks'}: every pixel is 255 (ignore); expected some with "
                         "a label")
    labels, per_class = ["background", *split.classes], 100 * iou(counts[0])
    result = {"miou": round(float(np.nanmean(per_class)), 6),
              "iou": {name: None if np.isnan(value) else round(float(value), 6)
                      for name, value in zip(labels, per_class)},
              "list": split.split, "images": len(split.names), mode: getattr(args, mode), **how,
              "record": record}
    for name, value in result["iou"].items():
        print(f"{name:>16}  {'  absent' if value is None else f'{value:8.2f}'}")
    print(f"{'mIoU':>16}  {result['miou']:8.2f}   {mode} {getattr(args, mode)} on "
          f"{len(split.names)} images of {split.split}{details}")
    if args.oracle_sweep:
        found = [100 * float(np.nanmean(iou(matrix))) for matrix in counts]
        best = int(np.argmax(found))
        score = [how["background_score"], *SWEEP][best]
        result["oracle"] = {"miou": round(found[best], 3), "background_score": score,
                            "background_score_chosen": "tuned on ground truth"}
        print(f"{'oracle mIoU':>16}  {found[best]:8.2f}   background score {score}, TUNED ON "
              "GROUND TRUTH")
    if args.json:
        with writing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main, parse_args())
