"""RUN/explore.html: one page on which phase, background score and training step can be moved.

Reads a run of demo.py, or of the README's command lines on any data; needs no CLIP, trains nothing.
Fills experiments/explore.html with six photos, their CAMs after each phase and at its snapshots,
and, for ANALYSIS, their true masks and the mIoU of all exported CAMs at each background score.
All of it is at the page's size, at most 128 pixels a side. The same run gives the same bytes.

  python experiments/explore.py --run runs/toy                    # the last step of make demo
  python experiments/explore.py --data mine --run runs/mine       # your photos; VOC: --split too
"""
import argparse
import html
import io
import json
import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from a_run import cams_by, cams_of, find_run, labels_of  # noqa: E402
from common import (  # noqa: E402
    PALETTE, InputError, progress, read_checkpoint, read_record, run, snapshots, writing)
from companion import HEAT  # noqa: E402
from eval import iou, sweep_matrices  # noqa: E402
from make_pseudo import RECIPES, read_cams  # noqa: E402
from mask_generator import load_generator  # noqa: E402

SIDE, CELLS = 128, 24  # the most pixels of a photo's side on the page, and cells of a CAM's
SCORES = [round(0.01 * i, 2) for i in range(1, 100)]  # the slider's
OURS = '<meta name="generator" content="experiments/explore.py">'


def shrunk(size, most):
    """(H, W) with sides of at most so many"""
    return tuple(max(1, round(side * min(1, most / max(size)))) for side in size)


def true_labels(r, name, size):
    return np.array(Image.fromarray(labels_of(r, name)).resize(size[::-1], Image.NEAREST))


def six_photos(r):
    """A photo of each of the first classes; the last one, if there is such, shows another too"""
    names, last = [name for name, _ in r.chosen], r.chosen[-1][1]
    both = [name for name, shown in r.split.labels.items() if shown[last] and shown.sum() == 2]
    return list(dict.fromkeys(names[:-1] + (both or names[-1:])[:1]))


def photo_of(r, name):
    """A photo for the page. cells: of its CAMs, those of the export or fewer"""
    photo, buffer = r.split.image(name), io.BytesIO()
    H, W = size = shrunk(photo.size[::-1], SIDE)
    photo.resize((W, H), Image.LANCZOS).save(buffer, "JPEG", quality=90)
    return {"photo": buffer.getvalue(), "size": size, "present": r.split.present(name).tolist(),
            "cells": shrunk([-(-side // 4) for side in photo.size[::-1]], CELLS),
            "truth": true_labels(r, name, size) if name in r.true else None}


def phase_of(r, phase, photos):
    """A phase for the page. cams: of each step and photo, a map (h, w) of 8 bits for each class"""
    record, steps = (read_record(r.cams[phase]) if phase in r.cams else None) or {}, {}
    for path in snapshots(r.paths[phase].with_suffix("")):
        S, step = load_generator(path, r.split).eval(), int(path.stem.rpartition("-")[2])
        steps[step] = [cams_by(r, S, name, photo["cells"], record.get("scales"))
                       for name, photo in photos.items()]                        # (n, h, w)
    last = read_checkpoint(r.paths[phase], "record", "")["record"].get("steps", 0)
    steps[last] = [cams_of(r, name, phase, size=photo["cells"])[0]
                   for name, photo in photos.items()]
    cams = [[[*(255 * maps).round().byte().numpy()] for maps in steps[x]] for x in sorted(steps)]
    return {"title": r.phases[phase], "steps": sorted(steps), "cams": cams, "miou": curve(r, phase)}


def curve(r, phase):
    """ANALYSIS: mIoU in percent at each background score of SCORES, of all photos with a true mask;
    None without masks or export"""
    if not r.true or phase not in r.cams:
        return None
    C, counts = len(r.split.classes) + 1, 0
    for name in progress(r.true, f"mIoU after {r.phases[phase]}"):
        size, present = shrunk(r.split.size(name), SIDE), r.split.present(name)
        maps = read_cams(r.cams[phase], name, present, size)                     # (n, H, W)
        counts += sweep_matrices(maps, present, true_labels(r, name, size), C, SCORES)
    return np.nanmean([100 * iou(matrix) for matrix in counts], axis=1).round(2).tolist()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="A page of a run on which things move.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="the --out of demo.py or train_cam.py")
    add("--data", type=Path, metavar="ROOT", help="its data; left out: RUN/data")
    add("--split", default="train", help="the photos that it was trained on")
    return parser.parse_args(argv)


def main(args):
    out = args.run / "explore.html"
    if out.exists() and OURS not in out.read_text("utf-8", "replace"):
        raise InputError(f"{out}: is there already, and explore.py did not write it; move it away")
    r = find_run(args)
    if not r.chosen:
        raise InputError(f"{args.split}.csv names no class of any photo: there are no CAMs to show")
    photos = {name: photo_of(r, name) for name in six_photos(r)}
    data = {"classes": [*map(html.escape, r.split.classes)], "count": len(r.true),
            "palette": np.reshape(PALETTE, (-1, 3)).tolist(), "score": RECIPES["voc"][0],
            "heat": HEAT(range(256), bytes=True)[:, :3].tolist(), "photos": [*photos.values()],
            "phases": [phase_of(r, phase, photos) for phase in r.phases]}
    data = json.dumps(data, separators=(",", ":"), default=lambda array: b64encode(array).decode())
    page = (ROOT / "experiments/explore.html").read_text("utf-8").replace("{{RUN}}", data)
    with writing(out) as temporary:
        temporary.write_text(page, "utf-8")
    return f"{out}: {out.stat().st_size / 1000:.0f} KB; open it in a browser"


if __name__ == "__main__":
    run(main, parse_args())
