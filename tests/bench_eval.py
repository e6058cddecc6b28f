"""Scoring label PNGs against merely decoding them with Pillow, and the scores against torchmetrics'.

    python tests/bench.py eval                                   # 2,000 pairs of 500x375, a minute
    python tests/bench.py eval --count 10582 --workers 2         # as many as VOC's train_aug has

Both decode the same files in the same number of processes, in turns; starting these processes is in both times, loading
Python and torch in neither. The ratio is the median over the rounds of scoring / decoding. The exit code is 1 if the IoU
of a class differs from torchmetrics' by more than 1e-6.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchmetrics import JaccardIndex

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval  # noqa: E402
from make_pseudo import write_labels  # noqa: E402
from train_cam import VOC_CLASSES  # noqa: E402

C = len(VOC_CLASSES) + 1


def draw_pair(seed, height=375, width=500):
    """A mask as VOC's are, three quarters background, one to three classes in regions with smooth borders, 255 around them,
    five pixels wide; and a prediction of it, with borders of its own and now and then a class that is not there.
    -> truth, pred uint8 (height, width)"""
    rng = np.random.default_rng(seed)
    labels = np.array([0, *rng.choice(np.arange(1, C), rng.choice([1, 1, 1, 2, 2, 3]), replace=False)], np.uint8)

    def smooth(cells):  # noise, (labels, height, width)
        small = [Image.fromarray(rng.normal(size=cells).astype(np.float32)) for _ in labels]
        return np.stack([np.asarray(image.resize((width, height), Image.BICUBIC)) for image in small])
    scores = smooth((4, 5))
    scores[0] += 1
    truth, pred = labels[scores.argmax(0)], labels[(scores + 0.15 * smooth((24, 32))).argmax(0)]
    if rng.random() < 0.2:
        pred[pred == labels[-1]] = rng.integers(1, C)
    edge = np.zeros(truth.shape, bool)
    for axis in (0, 1):
        change = truth != np.roll(truth, 1, axis)
        for shift in range(-2, 3):
            edge |= np.roll(change, shift, axis)
    return np.where(edge, np.uint8(255), truth), pred


def make_root(root, distinct, count):
    """A VOC root without photos, predictions beside it; lists `distinct`, and `count`, whose further files are links."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "pred"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        for folder, labels in zip(("SegmentationClass", "pred"), draw_pair(i) if i < distinct else (None, None), strict=True):
            path = root / folder / f"{i:06}.png"
            if labels is None:
                os.link(root / folder / f"{i % distinct:06}.png", path)
            else:
                write_labels(path, labels)
    for name, length in (("distinct", distinct), ("count", count)):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(f"{i:06}" for i in range(length)))


def score(root, split, workers):
    """eval.py's main in this process -> its JSON"""
    flags = ["--data", root, "--split", split, "--pred", root / "pred", "--json", root / "scores.json", "--workers", workers,
             "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        eval.main(eval.parse_args([str(flag) for flag in flags]))
    return json.loads((root / "scores.json").read_text())


def decode(path):
    with Image.open(path) as picture:
        picture.load()


def decode_all(root, workers):
    paths = [path for folder in ("SegmentationClass", "pred") for path in sorted((root / folder).iterdir())]
    with multiprocessing.Pool(workers) as pool:
        for _ in pool.imap_unordered(decode, paths, chunksize=128):
            pass


def worst_difference(root, distinct):
    """Largest |IoU - torchmetrics' IoU| of a class, as shares of 1, over the distinct pairs"""
    metric = JaccardIndex(task="multiclass", num_classes=C, average="none", ignore_index=255)
    for i in range(distinct):
        truth, pred = (torch.from_numpy(np.array(Image.open(root / folder / f"{i:06}.png")))
                       for folder in ("SegmentationClass", "pred"))
        metric.update(pred[None], truth[None])
    ours = score(root, "distinct", 0)["iou"]
    return max(abs(value / 100 - theirs) for value, theirs in zip(ours.values(), metric.compute().tolist(), strict=True))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="pairs of PNGs (default %(default)s)")
    parser.add_argument("--distinct", type=int, default=300, help="of them drawn, the others are links (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each (default %(default)s)")
    args = parser.parse_args(argv)
    args.distinct = min(args.distinct, args.count)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_root(root, args.distinct, args.count)
        difference = worst_difference(root, args.distinct)
        print(f"{args.distinct} pairs: no class's IoU differs from torchmetrics' by more than {difference:.1e}", flush=True)
        scoring, decoding = [], []
        for _ in range(args.rounds):
            for times, work in ((decoding, lambda: decode_all(root, args.workers)),
                                (scoring, lambda: score(root, "count", args.workers))):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(scoring, decoding, strict=True)]
    print(f"{args.count} pairs of 500x375, {args.workers} processes, {args.rounds} rounds: scoring {median(scoring):.2f} s "
          f"({args.count / median(scoring):.0f} images/s), decoding alone {median(decoding):.2f} s; scoring / decoding: median "
          f"{median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    sys.exit(difference > 1e-6)


if __name__ == "__main__":
    main()
