"""A dry run at real size, without downloads: what a GPU user will do, on any machine, in some minutes.

    python tests/rehearsal.py --out runs/rehearsal [--photos 200] [--few 4] [--steps 2] [--batch 4]

Makes a VOC of random photos of 500x375 with boxes and masks, and random weights of ViT-B/32 and DeiT-S in the official formats;
then runs prepare/voc.py and all stages with the voc recipe, cut to a few steps. The lists have all photos; CAMs, masks and
predictions are made for `few` of them: a CPU takes seconds for each. Prints every command, its time and peak memory.
"""
import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clip_model import CLIP  # noqa: E402
from make_pseudo import write_labels  # noqa: E402
from mask_generator import ViT  # noqa: E402

CLASSES = ["aeroplane", "bird", "boat", "cow", "person"]


def make_voc(root, photos):
    """root/{JPEGImages,Annotations,SegmentationClass,ImageSets/Segmentation}: coloured boxes on noise; a tenth is val."""
    rng = np.random.default_rng(0)
    names = [f"2007_{i:06d}" for i in range(photos)]
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(tqdm(names, "photos", disable=None)):
        W, H = (500, 375) if i % 4 else (375, 500)
        photo = np.asarray(Image.fromarray(rng.integers(0, 256, (H // 25, W // 25, 3), dtype=np.uint8)).resize((W, H))).copy()
        labels, boxes = np.zeros((H, W), np.uint8), ""
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


def run(script, *flags):
    """One of our scripts; its time and, on Linux, its peak memory."""
    words = [script, *(word for flag in flags for word in shlex.split(str(flag)))]
    print("$ python " + shlex.join(words), flush=True)
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.')\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally: print('peak memory', *[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line], 'KiB')")
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT)
    print(f"{time.time() - began:.0f} s\n", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def main():
    parser = argparse.ArgumentParser(description="A dry run at real size.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/rehearsal")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--few", type=int, default=4, help="photos whose CAMs and masks are made")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    voc = out / "VOC2012"
    make_voc(voc, args.photos)
    torch.manual_seed(0)
    torch.save(CLIP().half().state_dict(), out / "clip.pt")
    torch.save({"model": ViT(num_classes=1000).state_dict()}, out / "vit.pth")
    common, short = f"--data {voc} --workers 1", f"--steps {args.steps} --batch {args.batch}"
    run("prepare/voc.py", f"--voc {voc}")
    lines = (voc / "train.csv").read_text().splitlines(keepends=True)
    (voc / "few.csv").write_text("".join(lines[:args.few]))
    for phase in ("classify", "match", "prompts", "refine"):
        run("train_cam.py", common, short, f"--clip {out}/clip.pt --vit {out}/vit.pth --out {out}/cam --phase {phase}")
    run("train_cam.py", common, f"--split few --clip {out}/clip.pt --out {out}/cam --phase export")
    run("make_pseudo.py", f"--data {voc} --split few --cams {out}/cam/cams --out {out}/masks")
    run("eval.py", f"--data {voc} --split few --pred {out}/masks")
    run("train_seg.py", common, short, f"--split few --labels {out}/masks --vit {out}/vit.pth --out {out}/seg")
    run("eval.py", f"--data {voc} --split few --checkpoint {out}/seg/seg.pt --present-only --crf none --scales 0.5 --no-flip")


if __name__ == "__main__":
    main()
