"""A dry run at real size without downloads: what a GPU user will do, on any machine, in minutes.

Makes a VOC of random photos of 500 x 375, and random weights of ViT-B/32 and DeiT-S in the official
formats; then runs prepare/voc.py and all stages with the voc recipe, cut to a few steps, CAMs and
masks for a few photos. Prints every command, and at the end time and peak memory of each (on a GPU
the lines of the log tell its own memory, "gib"). Batches: 8 images, on a GPU 64.

  python experiments/rehearsal.py --out runs/rehearsal --photos 200 --few 4
"""
import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clip_model import CLIP  # noqa: E402
from common import write_labels  # noqa: E402
from mask_generator import ViT  # noqa: E402

CLASSES = ["aeroplane", "bird", "boat", "cow", "person"]


def make_voc(root, photos):
    """VOC's layout: coloured boxes on noise; a tenth of the photos is val"""
    rng, names = np.random.default_rng(0), [f"2007_{i:06d}" for i in range(photos)]
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        W, H = (500, 375) if i % 4 else (375, 500)
        noise = Image.fromarray(rng.integers(0, 256, (H // 25, W // 25, 3), dtype=np.uint8))
        photo, labels, boxes = np.array(noise.resize((W, H))), np.zeros((H, W), np.uint8), ""
        for k in rng.choice(len(CLASSES), rng.integers(1, 3), replace=False):
            top, left = rng.integers(0, H // 2), rng.integers(0, W // 2)
            photo[top:top + H // 3, left:left + W // 3] = 50 * k
            labels[top:top + H // 3, left:left + W // 3] = 1 + k
            boxes += f"<object><name>{CLASSES[k]}</name></object>"
        Image.fromarray(photo).save(root / f"JPEGImages/{name}.jpg")
        write_labels(root / f"SegmentationClass/{name}.png", labels)
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{boxes}</annotation>")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    val = max(1, photos // 10)
    for split, members in (("train", names[val:]), ("val", names[:val])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(members))


def timed(path, *flags):
    """Run one of our scripts -> its command, seconds, GiB of its peak memory"""
    words = [word for flag in flags for word in shlex.split(str(flag))]
    print(f"$ python {path} {shlex.join(words)}", flush=True)
    began = time.time()
    child = subprocess.Popen([sys.executable, str(ROOT / path), *words])
    _, status, used = os.wait4(child.pid, 0)
    if status:
        sys.exit(os.waitstatus_to_exitcode(status))
    phase = words[words.index("--phase") + 1] if "--phase" in words else ""
    return f"{path} {phase}", time.time() - began, used.ru_maxrss / 2**20


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="A dry run at real size.")
    parser.add_argument("--out", default="runs/rehearsal", help="folder for everything")
    parser.add_argument("--photos", type=int, default=200, help="of the data set (200)")
    parser.add_argument("--few", type=int, default=4, help="photos that get CAMs and masks (4)")
    return parser.parse_args(argv)


def main(args):
    folder, out = Path(args.out), shlex.quote(args.out)
    make_voc(folder / "VOC", args.photos)
    torch.manual_seed(0)
    torch.save(CLIP().half().state_dict(), folder / "clip.pt")
    torch.save({"model": ViT().state_dict()}, folder / "vit.pth")
    rows = [timed("prepare/voc.py", f"--voc {out}/VOC")]
    lines = (folder / "VOC/train.csv").read_text().splitlines(keepends=True)
    (folder / "VOC/few.csv").write_text("".join(lines[:args.few]))
    data, vit, few = f"--data {out}/VOC", f"--vit {out}/vit.pth", "--split few"
    short = f"--workers 1 --steps 3 --batch {64 if torch.cuda.is_available() else 8}"
    cam = f"{data} --clip {out}/clip.pt --out {out}/cam"
    for phase in ("classify", "match", "prompts", "refine"):
        rows.append(timed("train_cam.py", cam, vit, short, f"--phase {phase}"))
    rows += [
        timed("train_cam.py", cam, few, "--phase export"),
        timed("make_pseudo.py", data, few, f"--cams {out}/cam/cams --out {out}/masks"),
        timed("eval.py", data, few, f"--pred {out}/masks"),
        timed("train_seg.py", data, few, "--workers 1 --steps 3", vit,
              f"--labels {out}/masks --out {out}/seg"),
        timed("eval.py", data, few, f"--checkpoint {out}/seg/seg.pt --present-only --crf none "
              "--scales 0.5 --no-flip")]
    for title, took, peak in rows:
        print(f"{title:<24}{took:8.0f} s{peak:8.1f} GiB")


if __name__ == "__main__":
    main(parse_args())
