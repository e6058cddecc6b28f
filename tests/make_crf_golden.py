"""Writes tests/crf_golden.npz: what pydensecrf2 makes of two drawn images. It needs a C++ compiler (see bench_crf.py).

    python tests/make_crf_golden.py

For each image and each preset the file holds Q after ten steps as uint16, 65535 for probability 1.
"""
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from bench_crf import Peer, draw_scene, random_prob  # noqa: E402

from make_pseudo import PRESETS  # noqa: E402


def main():
    peer = Peer(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "runs" / "pydensecrf-env")
    golden = {}
    for name, (H, W), C, grain in [("grainy", (36, 52), 3, 4), ("flat", (44, 28), 5, 0)]:
        image, prob = draw_scene(H, W, seed=C, grain=grain)[0], random_prob(H, W, C).half()
        golden[f"{name}/image"], golden[f"{name}/prob"] = image.numpy(), prob.numpy()
        for preset_name in ("voc", "irn", "prob"):
            preset = PRESETS[preset_name]
            hard = {"labels": prob.argmax(0), "num_labels": C}
            Q, _ = peer(image, hard if preset["unary"] == "hard" else {"prob": prob.float()}, preset)
            golden[f"{name}/Q/{preset_name}"] = (Q * 65535).round().to(torch.int32).numpy().astype(np.uint16)
    peer.close()
    np.savez_compressed(HERE / "crf_golden.npz", **golden)


if __name__ == "__main__":
    main()
