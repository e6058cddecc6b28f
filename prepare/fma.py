"""CAMs in the form that FMA-WSSS reads: its masks and Mask2Former are the paper's last step.

  python prepare/fma.py --data ROOT --split train_aug --cams CAMS --out fma_cams

Writes OUT/NAME.npz, compressed: cam float32 (n, H, W) in [0, 1] at the photo's size, and fg_cls
int64 (n,), the numbers of the n shown classes, counted from 0. What follows in that repository is
in docs/data.md. CAMS are those of train_cam.py, or of prepare/foreign.py.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Split, claim, folder_digest, progress, run, writing
from make_pseudo import check_cams, read_cams


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="CAMs -> the files that FMA-WSSS reads.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="ROOT", help="as for train_cam.py")
    add("--split", default="train", help="ROOT/SPLIT.csv: the photos")
    add("--cams", required=True, metavar="DIR", help="NAME.npy of train_cam.py or foreign.py")
    add("--out", required=True, type=Path, metavar="DIR", help="where NAME.npz go")
    add("--resume", action="store_true", help="go on with a run of the same inputs, whose finished "
        "files are kept")
    return parser.parse_args(argv)


def main(args):
    split = Split(args.data, args.split)
    shown = [name for name in split.names if split.labels[name].any()]
    check_cams(args.cams, split)
    record = {"script": "fma.py", "photos": split.digest,
              "cams": folder_digest(args.cams, [f"{name}.npy" for name in shown], "export them")}
    claim(args.out, [f"{name}.npz" for name in shown], record, args.resume,
          [*split.folders, args.cams])
    left = [name for name in shown if not (args.out / f"{name}.npz").exists()]
    for name in progress(left, "converted"):
        present = split.present(name)
        cam = read_cams(args.cams, name, present, split.size(name)).numpy()      # (n, H, W)
        with writing(args.out / f"{name}.npz") as path:
            np.savez_compressed(path, cam=cam, fg_cls=present)
    return f"{args.out}: {len(shown)} files; docs/data.md says how FMA-WSSS goes on"


if __name__ == "__main__":
    run(main, parse_args())
