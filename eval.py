"""Scores predictions, CAMs or a segmentation model against masks: the only stage that ever opens one.

    IoU_c = |pred = c and truth = c| / |pred = c or truth = c| over all pixels of the list whose truth is not 255  [eq. E1]
    mIoU  = mean over the K classes and the background that occur in pred or truth, in percent

Counts are summed over the whole list before dividing, as the VOC server does. A predicted 255 counts as background.
Reads photos, masks and (for --cams) image-level labels of any of the three layouts of train_cam.Data.
Prints a table; writes a JSON, the predicted PNGs and a picture strip where asked.

    python eval.py --data VOCdevkit/VOC2012 --split val --checkpoint runs/voc/seg.pt --scales 0.75 1 1.25 --crf prob
    python eval.py --data VOCdevkit/VOC2012 --split train --pred runs/voc/masks --json runs/voc/masks.json
    python eval.py --data VOCdevkit/VOC2012 --split train --cams runs/voc/cams
"""
import argparse
import json
from functools import reduce
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
from train_cam import Data, end_processes, scaled_input, start_processes, write_file
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


# ---------------------------------------------------------------------------------------------------------------------
# The truth. COCO keeps it as outlines, which are drawn here just as COCO's own API draws them
# ---------------------------------------------------------------------------------------------------------------------

def read_truth(data, name, size):
    """The mask of an image -> uint8 (H, W), 0 background, 1..K, 255 ignore. size is (H, W) of its photo."""
    if hasattr(data, "objects"):
        return draw_objects(*data.objects(name), size, f"{data.json}: {name}")
    paths = [data.root / folder / f"{name}.png" for folder in data.masks]
    if data.split == "test" and not paths[0].is_file():
        raise InputError(f"{paths[0]}: no such mask; expected one for each image of split test, and VOC gives none: pass another "
                         "--split, or predict only (eval.py --checkpoint with --images or --voc-server), for its server to score")
    path = next((path for path in paths if path.is_file()), paths[0])  # SBD's mask where VOC itself has none
    return read_labels(path, size, len(data.classes) + 1)


def draw_objects(json_size, objects, size, where):
    """objects [(class, is a crowd, outline)] -> labels uint8 (H, W). Where objects overlap the smaller one is seen; a crowd
    is 255 (ignore), below all objects: its outline takes in whatever stands between the people."""
    if json_size != size:
        raise InputError(f"{where}: {json_size[0]}x{json_size[1]} (height x width), its photo is {size[0]}x{size[1]}; "
                         "expected equal sizes; download the photo again")
    masks = []
    for k, crowd, outline in objects:
        try:
            mask = draw_outline(outline, size)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"{where}: an object without a readable outline ({error}); expected polygons or run lengths; "
                             "download the annotations again") from None
        masks.append((not crowd, -mask.sum(), 255 if crowd else 1 + k, mask))
    labels = np.zeros(size, np.uint8)
    for _, _, label, mask in sorted(masks, key=lambda entry: entry[:2]):
        labels[mask] = label
    return labels


def draw_outline(outline, size):
    """`segmentation` of COCO's json -> bool (H, W): a list of polygons, or run lengths, as a list or packed into text."""
    if isinstance(outline, list):
        return reduce(np.logical_or, (draw_polygon(polygon, size) for polygon in outline), np.zeros(size, bool))
    counts = outline["counts"]
    return decode_runs(unpack_runs(counts) if isinstance(counts, str) else counts, size)


def draw_polygon(polygon, size):
    """(x0, y0, x1, y1, ...) in pixels -> bool (H, W): down each column of pixels, every crossing of the outline switches
    between out and in. COCO's way to say where that is: walk the outline on a grid five times as fine, one step at a time
    along the longer of |dx| and |dy|; it crosses a column at the step that leaves the fine column in the pixels' middle."""
    H, W = size
    start = (5 * np.reshape(polygon, (-1, 2)) + 0.5).astype(np.int64)                           # (V, 2), x and y
    end = np.roll(start, -1, axis=0)
    long = np.abs(end - start).argmax(axis=1)                                                   # (V,): 0 along x, 1 along y
    edge = np.arange(len(start))
    backwards = start[edge, long] > end[edge, long]
    start, end = np.where(backwards[:, None], (end, start), (start, end))
    steps = (end - start)[edge, long]                                                           # (V,)
    slope = (end - start)[edge, 1 - long] / np.maximum(steps, 1)

    edge = np.repeat(edge, steps + 1)                                                           # (T,): of every point walked
    t = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    point = np.empty((len(edge), 2), np.int64)
    point[np.arange(len(edge)), long[edge]] = start[edge, long[edge]] + t
    point[np.arange(len(edge)), 1 - long[edge]] = start[edge, 1 - long[edge]] + slope[edge] * t + 0.5  # cut to an integer
    x, y = np.minimum(point[1:], point[:-1]).T                                                  # of every step
    crosses = (t[1:] > 0) & (point[1:, 0] != point[:-1, 0]) & (x % 5 == 2) & (x // 5 >= 0) & (x // 5 < W)
    mask = np.zeros((W, H), bool)
    if crosses.any():
        column, first_below = x[crosses] // 5, ((y[crosses] + 2) // 5).clip(0, H)
        left, right = column.min(), column.max() + 1
        switches = np.bincount((column - left) * H + first_below, minlength=(right - left) * H + 1)[:-1]
        mask[left:right] = (switches.cumsum() % 2 == 1).reshape(right - left, H)
    return mask.T


def decode_runs(counts, size):
    """Run lengths, out first, then in and so on, down the columns -> bool (H, W)."""
    H, W = size
    if sum(counts) != H * W or min(counts, default=0) < 0:
        raise ValueError(f"runs of {sum(counts)} pixels in all, for {H}x{W}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(W, H).T


def unpack_runs(text):
    """COCO's text -> run lengths. A character is 48 and six bits: five of the number, the lowest first, then "more follow";
    the last one's fifth bit is the sign. From the fourth run on the number is the difference to the run before the last."""
    counts, value, shift = [], 0, 0
    for character in text.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


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
    parser.add_argument("--data", required=True, metavar="ROOT", help="as for train_cam.py")
    parser.add_argument("--split", default="val", help="as for train_cam.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pred", metavar="DIR", help="score label PNGs")
    what.add_argument("--cams", metavar="DIR", help="score CAMs, cut at --threshold")
    what.add_argument("--checkpoint", metavar="FILE", help="score a segmentation model, seg.pt of train_seg.py")
    what.add_argument("--save-truth", metavar="DIR", help="only write the truth as label PNGs: COCO has outlines, VOC two folders")
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
    parser.add_argument("--skip-bad", action=argparse.BooleanOptionalAction, default=False, help="read all photos and masks "
                        "once before; score without those that cannot be read, list them at the end, exit 3")
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

    def read(name):  # opens whatever the loop below opens
        size = data.image(name).size[::-1]
        read_truth(data, name, size)
        if args.pred:
            read_labels(Path(args.pred) / f"{name}.png", size, C)
        if args.cams:
            read_cams(args.cams, name, np.flatnonzero(data.labels(name)), size)
    if args.skip_bad:
        data.leave_out_bad(read)
    if args.save_truth:
        for name in tqdm(data.names[rank::world], desc="truth", disable=None if rank == 0 else True):
            write_labels(Path(args.save_truth) / f"{name}.png", read_truth(data, name, data.image(name).size[::-1]))
        return end_processes(data, rank, world)
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
        truth = read_truth(data, name, size)
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
        return []
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
    return data.skipped


if __name__ == "__main__":
    run(main, parse_args())
