"""Scores predictions, CAMs or a segmentation model against masks: the only stage that ever opens one.

    IoU_c = |pred = c and truth = c| / |pred = c or truth = c| over all pixels of the list whose truth is not 255  [eq. E1]
    mIoU  = mean over the K classes and the background that occur in pred or truth, in percent

Counts are summed over the whole list before dividing, as the VOC server does. A predicted 255 counts as background.
Reads JPEGImages, ImageSets, SegmentationClass and (for --cams) Annotations of a VOC root.
Prints a table; writes a JSON, the predicted PNGs and a picture strip where asked.

    python eval.py --data VOCdevkit/VOC2012 --split val --checkpoint runs/voc/seg.pt --scales 0.75 1 1.25 --crf prob
    python eval.py --data VOCdevkit/VOC2012 --split train --pred runs/voc/masks --json runs/voc/masks.json
    python eval.py --data VOCdevkit/VOC2012 --split train --cams runs/voc/cams
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from clip_model import InputError, run
from make_pseudo import (
    PALETTE,
    PRESETS,
    background_score,
    dense_crf,
    picture_strip,
    read_cams,
    read_labels,
    score_labels,
    write_labels,
)
from train_cam import Data, scaled_input, start_processes, write_file
from train_seg import load_segmenter

# Dimension key: K classes, C = K + 1 labels, H W pixels.


def confusion_matrix(pred, truth, num_classes, ignore=255):
    """Pixel counts (C, C) int64, rows truth, columns prediction; C = num_classes, background included.

    pred, truth: integer arrays of one shape. Pixels whose truth is `ignore` are left out; a prediction of `ignore`
    counts as background (0). Raises ValueError for other labels outside [0, C) or for unequal shapes."""
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
    valid = truth != ignore
    pred, truth = pred[valid].astype(np.int64), truth[valid].astype(np.int64)
    pred[pred == ignore] = 0
    if len(pred) and max(pred.max(), truth.max()) >= num_classes or len(pred) and min(pred.min(), truth.min()) < 0:
        raise ValueError(f"labels up to {max(pred.max(), truth.max())}, expected 0 to {num_classes - 1} or {ignore}")
    return np.bincount(num_classes * truth + pred, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def iou(matrix):
    """Confusion matrix (C, C) -> IoU per class (C,) in [0, 1], NaN for a class in neither truth nor prediction [eq. E1]"""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


@torch.no_grad()
def predict(model, photo, scales, flip, device):
    """PIL photo -> probabilities (C, H, W): mean of the softmax over scales and mirror images."""
    W, H = photo.size
    total, passes = 0, 0
    for scale in scales:
        x = scaled_input(photo, scale, model.trunk.patch).to(device)
        for mirrored in ((False, True) if flip else (False,)):
            scores = model(x.flip(3) if mirrored else x)
            scores = scores.flip(3) if mirrored else scores                                     # (1, C, h, w)
            total = total + F.interpolate(scores, size=(H, W), mode="bilinear", align_corners=False)[0].softmax(dim=0)
            passes += 1
    return total / passes                                                                       # (C, H, W)


def coloured(labels):
    """labels uint8 (H, W) -> picture in VOC's colours"""
    picture = Image.fromarray(labels, "P")
    picture.putpalette(PALETTE)
    return picture.convert("RGB")


def heat(photo, cams, present):
    """photo (H, W, 3) uint8 under its CAMs (n, H, W): each class in its colour, as strong as its map."""
    picture = 0.4 * photo.astype(np.float32)
    for k, cam in zip(present, cams.numpy()):
        picture += cam[..., None] * (0.6 * np.array(PALETTE[3 * (k + 1):3 * (k + 2)], np.float32) + 60)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def strip_cell(data, folder, name, photo):
    """What a folder holds for an image, as a picture: CAMs (NAME.npy) or labels (NAME.png)."""
    if (Path(folder) / f"{name}.npy").is_file():
        present = np.flatnonzero(data.labels(name))
        return heat(photo, read_cams(folder, name, present, photo.shape[:2]), present)
    return coloured(read_labels(Path(folder) / f"{name}.png", photo.shape[:2], len(data.classes) + 1))


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Scores predictions against masks.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, metavar="ROOT", help="VOC 2012 root")
    parser.add_argument("--split", default="val", help="list in ImageSets/Segmentation")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pred", metavar="DIR", help="score label PNGs")
    what.add_argument("--cams", metavar="DIR", help="score CAMs, cut at --threshold")
    what.add_argument("--checkpoint", metavar="FILE", help="score a segmentation model, seg.pt of train_seg.py")
    parser.add_argument("--threshold", default="auto", metavar="T",
                        help="--cams: background score, as --bg-score of make_pseudo.py")
    parser.add_argument("--oracle-sweep", action=argparse.BooleanOptionalAction, default=False,
                        help="--cams: also the best threshold, FOUND WITH THE MASKS: for analysis, not for results")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="--checkpoint: image scales, averaged")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="--checkpoint: mirror images too")
    parser.add_argument("--crf", choices=list(PRESETS), default="none", help="--checkpoint: dense CRF with this preset's kernels")
    parser.add_argument("--save", metavar="DIR", help="write the predicted label PNGs")
    parser.add_argument("--json", metavar="FILE", help="write the scores")
    parser.add_argument("--strip", metavar="FILE", help="write a picture strip: photo, columns, prediction, truth")
    parser.add_argument("--strip-count", type=int, default=8, help="images in the strip")
    parser.add_argument("--columns", nargs="*", default=[], metavar="CAPTION=DIR",
                        help="more columns for the strip: folders of CAMs or label PNGs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="nothing here is random; accepted for uniformity")
    return parser.parse_args(argv)


def main(args):
    rank, world, device = start_processes(args.device)
    data = Data(args.data, args.split)
    C = len(data.classes) + 1
    for column in args.columns:
        if "=" not in column:
            raise InputError(f"--columns {column}: expected CAPTION=DIR, DIR a folder of CAMs or label PNGs")
    what = "pred" if args.pred else "cams" if args.cams else "checkpoint"
    threshold, chosen = background_score(args.threshold, data, args.cams, rank, world, device) if args.cams else (None, None)
    model = load_segmenter(args.checkpoint, data.classes).to(device) if args.checkpoint else None
    sweep = [round(0.02 * i, 2) for i in range(1, 50)] if args.cams and args.oracle_sweep else []
    counts = np.zeros((1 + len(sweep), C, C), np.int64)
    shown = []

    for name in tqdm(data.names[rank::world], desc=f"eval {args.split}", disable=None if rank == 0 else True):
        image = data.image(name)
        photo = np.array(image)
        size = photo.shape[:2]
        truth = read_labels(data.root / "SegmentationClass" / f"{name}.png", size, C)
        if args.pred:
            pred = read_labels(Path(args.pred) / f"{name}.png", size, C)
        elif args.cams:
            present = np.flatnonzero(data.labels(name))
            cams = read_cams(args.cams, name, present, size)
            pred = score_labels(cams, present, threshold)
            for row, t in enumerate(sweep):
                counts[1 + row] += confusion_matrix(score_labels(cams, present, t), truth, C)
        else:
            prob = predict(model, image, args.scales, args.flip, device)
            if args.crf != "none":
                kernels = {key: PRESETS[args.crf][key] for key in ("gaussian", "bilateral")}
                prob = dense_crf(torch.from_numpy(photo), prob, **kernels)
            pred = prob.argmax(0).cpu().numpy().astype(np.uint8)
        counts[0] += confusion_matrix(pred, truth, C)
        if args.save:
            write_labels(Path(args.save) / f"{name}.png", pred)
        if args.strip and rank == 0 and len(shown) < args.strip_count:
            columns = [strip_cell(data, column.split("=", 1)[1], name, photo) for column in args.columns]
            shown.append([image, *columns, coloured(pred), coloured(truth)])

    if world > 1:
        total = torch.from_numpy(counts).to(device)
        dist.all_reduce(total)
        counts = total.cpu().numpy()
        dist.destroy_process_group()
    if rank:
        return
    per_class = 100 * iou(counts[0])
    names = ["background", *data.classes]
    result = {"miou": round(float(np.nanmean(per_class)), 3),
              "iou": {n: None if np.isnan(v) else round(float(v), 3) for n, v in zip(names, per_class)},
              "images": len(data.names), "list": args.split, "classes": names, "what": what, "source": getattr(args, what),
              "threshold": threshold, "threshold_chosen": chosen, "scales": args.scales if model else None,
              "flip": args.flip if model else None, "crf": args.crf if model else "none" if args.cams else "as in the files"}
    if sweep:
        scores = [100 * float(np.nanmean(iou(matrix))) for matrix in counts[1:]]
        best = int(np.argmax(scores))
        result["oracle"] = {"miou": round(scores[best], 3), "threshold": sweep[best], "threshold_chosen": "tuned on ground truth"}
    for n, value in result["iou"].items():
        print(f"{n:>16}  {'  absent' if value is None else f'{value:8.2f}'}")
    print(f"{'mIoU':>16}  {result['miou']:8.2f}   {what} {result['source']} on {len(data.names)} images of {args.split}"
          + (f", threshold {threshold} ({chosen})" if args.cams else "")
          + (f", scales {args.scales}, flip {args.flip}, CRF {args.crf}" if model else ""))
    if sweep:
        print(f"{'oracle mIoU':>16}  {result['oracle']['miou']:8.2f}   threshold {result['oracle']['threshold']}, "
              "TUNED ON GROUND TRUTH")
    if args.json:
        write_file(args.json, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    if args.strip:
        picture_strip(shown, ["photo", *(column.split("=", 1)[0] for column in args.columns), "prediction", "truth"], args.strip)


if __name__ == "__main__":
    run(main, parse_args())
