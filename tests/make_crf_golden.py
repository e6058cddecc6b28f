"""What pydensecrf makes of the images and probabilities in crf_golden.npz, written into that file.

Runs in an environment of its own; pydensecrf2 needs a C++ compiler, cython < 3 and numpy < 2:

    python -m venv crf && crf/bin/pip install "cython<3" "numpy<2" "setuptools<80" wheel
    crf/bin/pip install --no-build-isolation pydensecrf2 && crf/bin/python tests/make_crf_golden.py

For each image and each preset of make_pseudo.py it holds Q after ten steps as uint16, 65535 for
probability 1.
"""
from pathlib import Path

import numpy as np
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_labels, unary_from_softmax

GOLDEN = Path(__file__).with_name("crf_golden.npz")
PRESETS = {"voc": ("hard", 4, 3, 83, 5, 3), "irn": ("hard", 3, 3, 50, 5, 10),
           "clip-es": ("prob", 1, 3, 67, 3, 4)}


def inference(image, prob, unary, sxy_g, w_g, sxy_b, srgb, w_b):
    C, H, W = prob.shape
    crf = DenseCRF2D(W, H, C)
    energy = (unary_from_labels(prob.argmax(0), C, gt_prob=0.7, zero_unsure=False)
              if unary == "hard" else unary_from_softmax(prob))
    crf.setUnaryEnergy(np.ascontiguousarray(energy))
    crf.addPairwiseGaussian(sxy=sxy_g, compat=w_g)
    crf.addPairwiseBilateral(sxy=sxy_b, srgb=srgb, rgbim=np.ascontiguousarray(image), compat=w_b)
    return np.array(crf.inference(10)).reshape(C, H, W)


if __name__ == "__main__":
    golden = dict(np.load(GOLDEN))
    for name in ("grainy", "flat"):
        for preset, settings in PRESETS.items():
            prob = golden[f"{name}/prob"].astype(np.float32)
            Q = inference(golden[f"{name}/image"], prob, *settings)
            golden[f"{name}/Q/{preset}"] = (Q * 65535).round().astype(np.uint16)
    np.savez_compressed(GOLDEN, **golden)
