"""Scores predictions, CAMs or a segmentation model against masks, the only stage that opens one; predicts where there is none.

    IoU_c = |pred = c and truth = c| / |pred = c or truth = c| over all pixels of the list whose truth is not 255  [eq. E1]
    mIoU  = mean over the K classes and the background that occur in pred or truth, in percent

Counts are summed over the whole list before dividing, as the VOC server does. A predicted 255 counts as background.
Reads photos, masks and (for --cams) image-level labels of any of the three layouts of train_cam.Data.
Prints a table; writes a JSON, the predicted PNGs and a picture strip where asked. --images needs no data set: it predicts
any photos, with the classes of the checkpoint. --voc-server packs predictions as PASCAL VOC's evaluation server takes them.

    python eval.py --data data/VOCdevkit/VOC2012 --split val --checkpoint runs/voc/seg.pt --scales 0.75 1 1.25 --crf prob
    python eval.py --data data/VOCdevkit/VOC2012 --split train --pred runs/voc/masks --json runs/voc/masks.json
    python eval.py --data data/VOCdevkit/VOC2012 --split train --cams runs/voc/cams
    python eval.py --images holiday --checkpoint runs/voc/seg.pt --save runs/holiday
    torchrun --nproc-per-node 4 eval.py --data data/VOCdevkit/VOC2012 --split test --checkpoint seg.pt --save runs/test --voc-server
"""
import argparse
import json
import os
import tarfile
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
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
from train_cam import VOC_CLASSES, Data, DataSet, Photos, composed, end_processes, scaled_input, start_processes, write_file
from train_seg import load_segmenter

# Dimension key: K classes, C = K + 1 labels, H W pixels.

SERVER = "results/VOC2012/Segmentation/comp6_test_cls"  # comp5 would be: trained on VOC's own data alone, without ImageNet and CLIP
LARGEST = 1024  # pixels: of a larger photo the model and the CRF see a copy of this side; data sets of the field are smaller


def confusion_matrix(pred, truth, num_classes, ignore=255):
    """Pixel counts (C, C) int64, rows truth, columns prediction; C = num_classes, background included.

    pred, truth: integer arrays of one shape. Pixels whose truth is `ignore` are left out; a prediction of `ignore`
    counts as background (0). Raises ValueError for other labels outside [0, C) or for unequal shapes."""
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
    pred, truth = pred.ravel(), truth.ravel()
    # Masks are made of regions: counting runs of equal pixels takes a third of the time that counting pixels takes. Most
    # of it would go into finding the few pixels at which a run ends, so eight are looked at together first.
    ends = np.zeros(-(-truth.size // 8) * 8, bool)
    inner = ends[:max(0, truth.size - 1)]
    np.not_equal(truth[1:], truth[:-1], out=inner)
    inner |= pred[1:] != pred[:-1]
    eights = ends.view(np.uint64)
    some = np.flatnonzero(eights != 0)
    i = np.flatnonzero(eights[some].view(bool))
    last = np.append(8 * some[i >> 3] + (i & 7), truth.size - 1)[:truth.size]                   # (runs,)
    length = np.diff(last, prepend=-1)
    pred, truth = pred[last], truth[last]
    valid = truth != ignore
    truth, pred = truth * valid, pred * (valid & (pred != ignore))
    low, high = min(pred.min(initial=0), truth.min(initial=0)), max(pred.max(initial=0), truth.max(initial=0))
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels from {low} to {high}, expected 0 to {num_classes - 1} or {ignore}")
    pair = num_classes * truth.astype(np.intp) + pred.astype(np.intp)
    counts = np.bincount(pair, valid * length, minlength=num_classes ** 2)                      # float64: exact to 2^53
    return counts.astype(np.int64).reshape(num_classes, num_classes)


def iou(matrix):
    """Confusion matrix (C, C) -> IoU per class (C,) in [0, 1], NaN for a class in neither truth nor prediction [eq. E1]"""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


# ---------------------------------------------------------------------------------------------------------------------
# The truth. COCO keeps it as outlines, which are drawn here just as COCO's own API draws them
# ---------------------------------------------------------------------------------------------------------------------

def has_truth(data):
    """Whether any image of the split has a mask."""
    return hasattr(data, "objects") or any((data.root / folder / f"{name}.png").is_file()
                                           for name in data.names for folder in data.masks)


def read_truth(data, name, size=None):
    """The mask of an image -> uint8 (H, W), 0 background, 1..K, 255 ignore. size is (H, W) of its photo, if that was opened."""
    if hasattr(data, "objects"):
        json_size, objects = data.objects(name)
        return draw_objects(json_size, objects, size or json_size, f"{data.json}: {name}")
    path, *others = [f"{data.root}/{folder}/{name}.png" for folder in data.masks]  # text: joining Paths costs more than checking
    if not os.path.isfile(path):  # SBD's mask where VOC itself has none
        path = next(filter(os.path.isfile, others), path)
        if path not in others:
            raise InputError(f"{path}: no such mask; " + (
                "VOC keeps those of its test images: expected another --split, or prediction only, which its server scores "
                "(eval.py --checkpoint with --save, and --voc-server)" if data.split == "test" else
                f"expected the true mask of every image of split {data.split}, to score with; add it, or predict only "
                "(eval.py --images FOLDER --checkpoint with --save)"))
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
    if outline.get("size", list(size)) != list(size):
        raise ValueError(f"runs of a picture of {outline['size']}")
    return decode_runs(unpack_runs(counts) if isinstance(counts, str) else counts, size)


def draw_polygon(polygon, size):
    """(x0, y0, x1, y1, ...) in pixels -> bool (H, W): down each column of pixels, every crossing of the outline switches
    between out and in. COCO's way to say where that is: walk the outline on a grid five times as fine, one step at a time
    along the longer of |dx| and |dy|; it crosses a column at the step that leaves the fine column in the pixels' middle."""
    H, W = size
    corners = np.reshape(polygon, (-1, 2))                                                      # (V, 2), x and y
    if not np.all(np.abs(corners) < 1e5):
        raise ValueError("a corner far outside any photo, or none")
    start = (5 * corners + 0.5).astype(np.int64)
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


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and pictures
# ---------------------------------------------------------------------------------------------------------------------

class Folder(DataSet):
    """Any photos of a folder, without labels and masks."""

    note, masks, upright = "photos", (), True

    def __init__(self, root, classes):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; expected a folder of photos; pass it with --images")
        files = sorted(path for path in root.iterdir() if path.suffix.lower() in Photos.suffixes and path.name[0] != ".")
        self.files = {}
        for path in files:
            twin = self.files.setdefault(composed(path.stem), path)
            if twin != path:
                raise InputError(f"{path}: {twin.name} has the same name before the dot; expected unlike names, as masks are "
                                 "named by them; rename one")
        if not files:
            raise InputError(f"{root}: no photo in it; expected files that end in {' '.join(sorted(Photos.suffixes))}; "
                             "pass the folder that holds them")
        super().__init__(root, root.name, [path.stem for path in files], classes, classes, root)

    def photo_path(self, name):
        return self.files[composed(name)]


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


def predict_labels(model, photo, args, device):
    """PIL photo -> labels uint8 (H, W) of the model, sharpened by the CRF of --crf"""
    view = photo.copy()
    view.thumbnail((LARGEST, LARGEST))                                                          # smaller ones stay as they are
    prob = predict(model, view, args.scales, args.flip, device)
    if args.crf != "none":
        kernels = {key: PRESETS[args.crf][key] for key in ("gaussian", "bilateral")}
        prob = dense_crf(torch.from_numpy(np.array(view)), prob, **kernels)
    labels = Image.fromarray(prob.argmax(0).cpu().numpy().astype(np.uint8))
    return np.array(labels.resize(photo.size, Image.NEAREST))


def coloured(labels):
    """labels uint8 (H, W) -> picture in VOC's colours"""
    picture = Image.fromarray(labels, "P")
    picture.putpalette(PALETTE)
    return picture.convert("RGB")


def overlay(photo, labels):
    """photo (H, W, 3) uint8, labels (H, W) -> picture: the photo, things under a veil of their colour, with white outlines"""
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    veil = np.where(edge[..., None], 255, np.asarray(coloured(labels)))
    share = np.where(edge, 1, 0.5 * (labels > 0))[..., None]
    return Image.fromarray(((1 - share) * photo + share * veil).astype(np.uint8))


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


class Predictions(Dataset):
    """Item i: image i predicted, written where asked, and counted against its mask: int64 (1 + thresholds tried, C, C).

    Stands on args; without truth (scored False) the counts are zeros. Reads a photo only where the pixels are needed."""

    def __init__(self, args, data, names, model, thresholds, scored, device):
        self.args, self.data, self.names, self.model, self.device = args, data, names, model, device
        self.thresholds, self.scored, self.C = thresholds, scored, len(data.classes) + 1
        self.folder = Path(args.save or "") / (SERVER if args.voc_server else "")

    def __len__(self):
        return len(self.names)

    def labels(self, name, photo, size):
        """What is scored for an image, uint8 (H, W) each: the PNG, the CAMs cut at each threshold, or the model's labels.
        photo may be None unless a model looks at it; size (H, W) may be None for a PNG of any size."""
        if self.args.pred:
            return [read_labels(f"{self.args.pred}/{name}.png", size, self.C)]
        if self.args.cams:
            present = np.flatnonzero(self.data.labels(name))
            cams = read_cams(self.args.cams, name, present, size)
            return [score_labels(cams, present, threshold) for threshold in self.thresholds]
        return [predict_labels(self.model, photo, self.args, self.device)]

    def __getitem__(self, i):
        name = self.names[i]
        photo = self.data.image(name) if self.model or not self.scored else None
        size = photo.size[::-1] if photo else None
        truth = read_truth(self.data, name, size) if self.scored else None
        labels = self.labels(name, photo, truth.shape if self.args.cams and self.scored else size)
        if self.scored and labels[0].shape != truth.shape:
            (h, w), (H, W) = labels[0].shape, truth.shape
            raise InputError(f"{Path(self.args.pred) / name}.png: {h}x{w} (height x width), the mask of this image is {H}x{W}; "
                             "expected both as large as the photo; make the other one again")
        if self.args.save:
            written = np.where(labels[0] == 255, np.uint8(0), labels[0]) if self.args.voc_server else labels[0]
            write_labels(self.folder / f"{name}.png", written)
        if self.args.images:
            picture = overlay(np.asarray(photo), labels[0])
            write_file(self.folder / "overlays" / f"{name}.jpg", lambda path: picture.save(path, quality=90))
        if not self.scored:
            return np.zeros((len(labels), self.C, self.C), np.int64)
        return np.stack([confusion_matrix(prediction, truth, self.C) for prediction in labels])


def draw_strip(path, count, columns, predictions):
    """--strip: photo, columns, prediction and, where there is one, the truth of the first images."""
    data, rows = predictions.data, []
    for name in data.names[:count]:
        photo = data.image(name)
        cells = [strip_cell(data, column.split("=", 1)[1], name, np.array(photo)) for column in columns]
        cells.append(coloured(predictions.labels(name, photo, photo.size[::-1])[0]))
        if predictions.scored:
            cells.append(coloured(read_truth(data, name, photo.size[::-1])))
        rows.append([photo, *cells])
    captions = ["photo", *(column.split("=", 1)[0] for column in columns), "prediction", "truth"]
    picture_strip(rows, captions[:len(rows[0])], path)


def check_names(folder, names, complete):
    """--voc-server: no PNG beside those of the list; with complete, all of them."""
    expected = {f"{name}.png" for name in names}
    found = {path.name for path in folder.glob("*") if path.name[0] != "."}
    if found - expected:
        raise InputError(f"{folder}: {min(found - expected)} is no image of the split; expected its {len(names)} PNGs and nothing "
                         "else; remove it, or pass another --save")
    if complete and expected - found:
        raise InputError(f"{folder}: {min(expected - found)} is missing; expected the PNGs of all {len(names)} images; "
                         "let all processes write to one disk")


def pack_for_server(out, names):
    """OUT/results.tar.gz: the PNGs of all names, below the path where PASCAL VOC's server looks for them."""
    check_names(out / SERVER, names, complete=True)

    def write(path):
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                archive.add(out / SERVER / f"{name}.png", f"{SERVER}/{name}.png")
    write_file(out / "results.tar.gz", write)


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Scores predictions against masks, or predicts photos that have none.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    images = parser.add_argument_group("images (one of --data, --images)")
    images.add_argument("--data", metavar="ROOT", help="as for train_cam.py")
    images.add_argument("--split", default="val", help="as for train_cam.py")
    images.add_argument("--images", metavar="FOLDER", help="any photos, to be predicted: --checkpoint and --save go with it")
    what = parser.add_argument_group("what to score (one of --pred, --cams, --checkpoint, --save-truth)")
    what.add_argument("--pred", metavar="DIR", help="score label PNGs")
    what.add_argument("--cams", metavar="DIR", help="score CAMs, cut at --threshold")
    what.add_argument("--checkpoint", metavar="FILE", help="score a segmentation model, seg.pt of train_seg.py")
    what.add_argument("--save-truth", metavar="DIR", help="only write the truth as label PNGs: COCO has outlines, VOC two folders")
    what.add_argument("--threshold", default="auto", metavar="T",
                      help="--cams: background score, as --bg-score of make_pseudo.py")
    what.add_argument("--oracle-sweep", action=argparse.BooleanOptionalAction, default=False,
                      help="--cams: also the best threshold, FOUND WITH THE MASKS: for analysis, not for results")
    what.add_argument("--scales", type=float, nargs="+", default=[1.0], help="--checkpoint: image scales, averaged")
    what.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="--checkpoint: mirror images too")
    what.add_argument("--crf", choices=list(PRESETS), default="none", help="--checkpoint: dense CRF with this preset's kernels")
    files = parser.add_argument_group("what to write")
    files.add_argument("--save", metavar="DIR", help="the predicted label PNGs, and with --images DIR/overlays/NAME.jpg, the photo "
                       "under them. A split without any mask is then predicted and not scored")
    files.add_argument("--voc-server", action=argparse.BooleanOptionalAction, default=False, help="--split test, --save DIR: the "
                       f"PNGs go to DIR/{SERVER}, and DIR/results.tar.gz is for the evaluation server")
    files.add_argument("--json", metavar="FILE", help="the scores")
    files.add_argument("--strip", metavar="FILE", help="a picture strip: photo, columns, prediction, truth")
    files.add_argument("--strip-count", type=int, default=8, help="images in the strip")
    files.add_argument("--columns", nargs="*", default=[], metavar="CAPTION=DIR",
                       help="more columns for the strip: folders of CAMs or label PNGs")
    work = parser.add_argument_group("how to run")
    work.add_argument("--skip-bad", action=argparse.BooleanOptionalAction, default=False, help="read all photos and masks "
                      "once before; score without those that cannot be read, list them at the end, exit 3")
    work.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="--pred, --cams: processes that read and "
                      "count (per process of torchrun); 0: none. A model works in one")
    work.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    work.add_argument("--seed", type=int, default=0, help="nothing here is random; accepted for uniformity")
    return parser.parse_args(argv)


def check_flags(args):
    """Flags that do not go together end here, in one line."""
    sources = [flag for flag in ("pred", "cams", "checkpoint", "save_truth") if getattr(args, flag)]
    captionless = [column for column in args.columns if "=" not in column]
    for wrong, message in [
            (len(sources) != 1, "expected one of --pred, --cams, --checkpoint, --save-truth: what to score"),
            (bool(args.data) == bool(args.images), "expected one of --data ROOT, a data set, and --images FOLDER, any photos"),
            (args.images and not args.checkpoint, "--images: photos alone can only be predicted; expected --checkpoint seg.pt"),
            (args.images and not args.save, "--images: expected --save DIR, where masks and overlays go"),
            (args.images and args.json, "--json: photos of --images have no masks, there is no score to write; leave it out"),
            (args.voc_server and (args.images or args.split != "test" or not args.save or args.save_truth),
             "--voc-server: expected --data VOCdevkit/VOC2012 --split test --save DIR; the server scores that split only"),
            (args.voc_server and args.skip_bad, "--skip-bad: the server wants every image of the list; leave it out"),
            (args.voc_server and args.json, "--json: only the server has the masks of split test; leave it out"),
            (args.save_truth and (args.save or args.json or args.strip), "--save-truth: nothing is predicted or scored with it; "
             "leave out --save, --json and --strip"),
            (args.oracle_sweep and not args.cams, "--oracle-sweep: tries thresholds on CAMs; expected --cams DIR"),
            (args.threshold != "auto" and not args.cams, "--threshold: cuts CAMs; expected --cams DIR"),
            (args.crf != "none" and not args.checkpoint, "--crf: sharpens what a model predicts; expected --checkpoint seg.pt "
             "(CAMs: make_pseudo.py --crf)"),
            (args.scales != [1.0] and not args.checkpoint, "--scales: of what a model sees; expected --checkpoint seg.pt"),
            (not all(0 < scale < 10 for scale in args.scales),
             f"--scales {' '.join(map(str, args.scales))}: expected numbers above 0 and below 10"),
            (args.columns and not args.strip, "--columns: columns of a picture strip; expected --strip FILE"),
            (captionless, f"--columns {' '.join(captionless)}: expected CAPTION=DIR, DIR a folder of CAMs or label PNGs")]:
        if wrong:
            raise InputError(message)


def main(args):
    check_flags(args)
    rank, world, device = start_processes(args.device)
    model = load_segmenter(args.checkpoint).to(device) if args.images else None
    data = Folder(args.images, model.classes) if args.images else Data(args.data, args.split)
    C = len(data.classes) + 1
    read_from = [data.photo_path(data.names[0]).parent, *(data.root / folder for folder in getattr(data, "masks", ()))]
    for folder in filter(None, (args.save, args.save_truth)):
        if Path(folder).resolve() in [path.resolve() for path in read_from]:
            raise InputError(f"{folder}: holds photos or masks of the data, which would be overwritten; pass another folder")
    if args.voc_server and list(data.classes) != VOC_CLASSES:
        raise InputError(f"--voc-server: {args.data} has {len(data.classes)} classes ({', '.join(data.classes[:4])}, ...); "
                         "the server expects VOC's 20, in their order; pass VOC 2012")

    scored = not (args.images or args.voc_server or args.save_truth or args.save and not has_truth(data))
    if args.json and not scored:
        raise InputError(f"{data.root}: no masks for split {args.split}, so no score for --json; leave it out, or add the masks")

    def read(name):  # opens whatever the loop below opens
        size = data.image(name).size[::-1]
        if scored or args.save_truth:
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
    if args.voc_server:
        check_names(Path(args.save) / SERVER, data.names, complete=False)
    if scored:
        read_truth(data, data.names[0])  # COCO's outlines are read before there are workers, which then share that memory

    # -------------------------------------------------------------------------------------------- predict and count
    what = "pred" if args.pred else "cams" if args.cams else "checkpoint"
    threshold, chosen = background_score(args.threshold, data, args.cams, rank, world, device) if args.cams else (None, None)
    if args.checkpoint and not model:
        model = load_segmenter(args.checkpoint, data.classes).to(device)
    sweep = [round(0.02 * i, 2) for i in range(1, 50)] if args.oracle_sweep else []
    predictions = Predictions(args, data, data.names[rank::world], model, [threshold, *sweep], scored, device)
    step = 1 if model else 64  # images whose counts a worker adds up before it hands them over
    loader = DataLoader(predictions, step, num_workers=0 if model else min(args.workers, len(predictions) // step), collate_fn=sum)
    counts = np.zeros((1 + len(sweep), C, C), np.int64)
    with tqdm(total=len(predictions), desc=f"eval {data.split}", disable=None if rank == 0 else True) as bar:
        for part in loader:
            counts += part
            bar.update(min(step, bar.total - bar.n))
    if world > 1:
        total = torch.from_numpy(counts).to(device)
        dist.all_reduce(total)
        counts = total.cpu().numpy()
        dist.destroy_process_group()
    if rank:
        return []

    # -------------------------------------------------------------------------------------------- report
    if args.strip:
        draw_strip(args.strip, args.strip_count, args.columns, predictions)
    tested = f", scales {args.scales}, flip {args.flip}, CRF {args.crf}" if model else ""
    if args.voc_server:
        pack_for_server(Path(args.save), data.names)
        print(f"{args.save}/results.tar.gz: {len(data.names)} PNGs for the evaluation server, competition comp6{tested}")
    elif not scored:
        print(f"{args.save}: masks of {len(data.names)} images of {data.split}{tested}; not scored, there are no true ones")
    if not scored:
        return data.skipped
    per_class = 100 * iou(counts[0])
    names = ["background", *data.classes]
    result = {"miou": round(float(np.nanmean(per_class)), 6),
              "iou": {n: None if np.isnan(v) else round(float(v), 6) for n, v in zip(names, per_class)},
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
          + (f", threshold {threshold} ({chosen})" if args.cams else "") + tested)
    if sweep:
        print(f"{'oracle mIoU':>16}  {result['oracle']['miou']:8.2f}   threshold {result['oracle']['threshold']}, "
              "TUNED ON GROUND TRUTH")
    if args.json:
        write_file(args.json, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    return data.skipped


if __name__ == "__main__":
    run(main, parse_args())
