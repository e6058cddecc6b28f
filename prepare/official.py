"""WeakTr's published checkpoints in our form: published numbers can be checked without training.

  python prepare/official.py --cam checkpoint_best_mIoU.pth --data ROOT --split train_aug --out OUT
  python prepare/official.py --seg checkpoint.pth --data ROOT --out OUT

--cam: the mask generator after classification, from which SemPLeS starts matching and refinement;
writes OUT/classify.pt. --seg: the segmentation model; writes OUT/seg.pt. Nothing in a file is
executed. All weights are used, except the backbone's ImageNet classifier in --seg and, of COCO's 90
category ids, the ten that name no class.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from coco import MISSING_IDS
from common import (
    InputError, Split, digest, earlier_run, load_weights, read_tensors, run, save)
from mask_generator import MaskGenerator, ViT, generator_state, vit_sizes
from train_seg import Segmenter, segmenter_state

CAM_NAMES = {"(cls_token|pos_embed|patch_embed|blocks|norm)": r"backbone.\1",  # how a key begins
             "adaptive_attention_fusion.attn_feat_ffn": "fusion.pool",
             "adaptive_attention_fusion.attn_head_ffn": "fusion.excite"}
SEG_NAMES = {"encoder": "backbone", "decoder.proj_dec": "enter", "decoder.cls_emb": "label_vectors",
             "decoder.blocks": "blocks", "decoder.decoder_norm": "norm", "decoder.proj_patch": "P",
             "decoder.proj_classes": "Q", "decoder.mask_norm": "label_norm"}


def allow_numbers():
    """Let torch.load read the stored mIoU, a NumPy number; it refuses what else is no tensor."""
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
        def scalar(dtype, value):
            """Called in place of NumPy's function of this name: nobody needs the number"""
        scalar.__module__, scalar.__qualname__ = module, "scalar"
        torch.serialization.add_safe_globals([scalar, np.dtype, type(np.dtype(float))])


def rename(state, names):
    """A state dict with our names. A key without one stays as it is: load_weights refuses it."""
    for theirs, ours in names.items():
        state = {re.sub(f"^{theirs}", ours, key): value for key, value in state.items()}
    return state


def kept_ids(found, split):
    """Which of the classes 1..found of a file are the data's, in its order"""
    K = len(split.classes)
    if (found, K) == (90, 80):
        print("10 of 90 category ids name no class and are left out. They no longer take part in "
              "attention (CAM) or in the norm over labels (segmentation): near, not equal.")
    elif found != K:
        raise InputError(f"{split.root}: {K} classes, in the checkpoint {found}; pass the --data "
                         "that it was trained for")
    return [i for i in range(1, 1 + found) if found == K or i not in MISSING_IDS]


def convert_cam(state, split, pool):
    """WeakTr's generator -> a function that makes ours, and its state dict"""
    tokens, positions = state["cls_token"], state["pos_embed"]       # (1, K, D), (1, K + h*w, D)
    rows = [i - 1 for i in kept_ids(tokens.shape[1], split)]
    # The backbone's own [CLS], whose place the class tokens have taken, is not in the file
    state["cls_token"] = no_cls = torch.zeros_like(tokens[:, :1])
    state["pos_embed"] = torch.cat([no_cls, positions[:, tokens.shape[1]:]], dim=1)
    ours = rename(state, CAM_NAMES) | {
        "class_tokens": tokens[:, rows], "class_positions": positions[:, rows],
        "head.weight": state["head.weight"][rows], "head.bias": state["head.bias"][rows]}
    # A map's number is head x L + layer there, layer x A + head here
    first, second = ours["fusion.excite.0.weight"], ours["fusion.excite.2.weight"]
    sizes, reduction = vit_sizes(state), len(second) // len(first)
    theirs = torch.arange(len(second)).view(-1, sizes["layers"]).T.flatten()             # (L*A,)
    ours |= {"fusion.excite.0.weight": first[:, theirs], "fusion.excite.2.weight": second[theirs]}
    return lambda: MaskGenerator(ViT(**sizes), len(rows), pool=pool, reduction=reduction), ours


def convert_seg(state, split):
    """WeakTr's segmentation model -> a function that makes ours, and its state dict"""
    state = {key: value for key, value in state.items() if not key.startswith("encoder.head.")}
    sizes = vit_sizes({key.removeprefix("encoder."): value for key, value in state.items()})
    ours = rename(state, SEG_NAMES)
    rows = [0, *kept_ids(ours["label_vectors"].shape[1] - 1, split)]
    ours["label_vectors"] = ours["label_vectors"][:, rows]
    ours |= {key: ours[key][rows] for key in ("label_norm.weight", "label_norm.bias")}
    return lambda: Segmenter(ViT(**sizes, eps=1e-5), len(rows)), ours


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Converts WeakTr's published checkpoints.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--cam", metavar="FILE", help="WeakTr's CAM checkpoint")
    either.add_argument("--seg", metavar="FILE", help="its segmentation checkpoint")
    add("--data", required=True, metavar="ROOT", help="folder with classes.txt and SPLIT.csv")
    add("--split", default="train", help="ROOT/SPLIT.csv: any list of the data")
    add("--out", required=True, metavar="DIR", help="where classify.pt or seg.pt goes")
    add("--pool", choices=["max", "mean"], default="max", help="--cam: max for VOC, mean for COCO")
    add("--recipe", choices=["voc", "coco"], default="voc", help="that of the stages that follow")
    return parser.parse_args(argv)


def main(args):
    split, path = Split(args.data, args.split), args.cam or args.seg
    checkpoint = Path(args.out, "classify.pt" if args.cam else "seg.pt")
    earlier_run(checkpoint.with_suffix(""), {}, False, ())  # refuses a file that is not ours
    expected = f"WeakTr's {'CAM' if args.cam else 'segmentation'} checkpoint"
    allow_numbers()
    try:
        state = {key: x.float() for key, x in read_tensors(path, expected)["model"].items()}
        if (other := "decoder.cls_emb" if args.cam else "cls_token") in state:
            kind, flag = ("segmentation", "--seg") if args.cam else ("CAM", "--cam")
            raise InputError(f"{path}: has {other}: WeakTr's {kind} checkpoint; pass it as {flag}")
        make, ours = convert_cam(state, split, args.pool) if args.cam else convert_seg(state, split)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit ({error!r:.150}); expected {expected}") from None
    model = load_weights(make, ours, path, expected)
    own = generator_state(model, split.classes) if args.cam else segmenter_state(
        model, args.recipe, 520, split.classes)  # a photo's short side at scale 1
    save(checkpoint, own | {"record": {"script": "official.py", "official": digest(Path(path)),
                                       "pool": args.pool, "recipe": args.recipe}})
    flags = f"--data {args.data} --split {args.split} --recipe {args.recipe} --out {args.out}"
    return f"{checkpoint}; next:\n    python " + (
        f"train_cam.py {flags} --phase match --resume" if args.cam else
        f"eval.py --data {args.data} --checkpoint {checkpoint}")


if __name__ == "__main__":
    run(main, parse_args())
