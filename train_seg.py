"""Trains the segmentation model on pseudo masks: the last step of the method (paper, section 4.1).

A plain ViT reads the photo; Segmenter's mask transformer (Strudel et al. 2021), two more blocks over patches and K + 1 label
vectors, gives every patch a score for each of the K + 1 labels; the scores are up-sampled:

    score(patch, label) = LayerNorm over the labels of cos(P patch, Q label), P and Q learned matrices         [eq. S1]
    loss = mean L_i,   L_i = -log softmax(scores_i)_y   over the pixels i whose label y is not 255 (ignore)

WeakTr's clipping of high losses, which wrong pseudo masks cause, is on for VOC and COCO: once the batch's mean of L is at most 1.2,

    L_i := min(L_i, max(mean of L over i's patch of 120 x 120 and the batch, mean of L)),   no gradient through the bounds   [eq. S2]

Reads ROOT/classes.txt, ROOT/SPLIT.csv, photos, and label PNGs (0 background, 1..K classes, 255 ignore) of any origin; --labels
ROOT/masks gives the fully supervised upper bound. Writes OUT/seg.pt and OUT/log.jsonl.

    python train_seg.py --data runs/toy/data --recipe toy --labels runs/toy/masks --vit runs/toy/vit.pth --out runs/toy/seg
    python train_seg.py --data data/VOCdevkit/VOC2012 --split train_aug --labels runs/voc/masks --out runs/voc
    torchrun --nproc-per-node 4 train_seg.py ... the same ...
"""
import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from clip_model import Linear, at_least, run
from make_pseudo import read_labels
from mask_generator import IMAGENET_MEAN, IMAGENET_STD, Block, ViT, load_vit
from train_cam import (
    Split,
    build,
    check_recipe,
    end_processes,
    hold,
    mixed_seed,
    read_checkpoint,
    start_processes,
    train,
    write_file,
)

# Dimension key: B images, K classes, H W pixels, h w patch grid, D ViT width.

TABLE = {  # SGD with Nesterov momentum 0.9; steps: 100 epochs of VOC's 10,582, COCO's 82,081 images
    #                voc                               coco                              toy
    "steps":        (264_500,                          2_052_000,                        1_050),
    "batch":        (4,                                4,                                8),
    "optimizer":    ("sgd",                            "sgd",                            "adamw"),
    "lr":           (1e-4,                             1e-4,                             3e-4),    # of the decoder
    "trunk_lr":     (0.1,                              0.1,                              1),       # the trunk's share of lr
    "last_lr":      (1e-5,                             1e-5,                             0),       # of the decoder, at the end
    "weight_decay": (0,                                0,                                1e-4),
    "clip_start":   (1.2,                              1.2,                              0),       # [eq. S2]; 0: no clipping
    "clip_patch":   (120,                              120,                              64),
    "drop_path":    (0.1,                              0.1,                              0),       # in the trunk
    "dropout":      (0.1,                              0.1,                              0),       # in the decoder
    "side":         (520,                              520,                              64),      # short side at scale 1
    "scale":        ((0.5, 2),                         (0.5, 2),                         (0.75, 1.5)),  # random, before the crop
    "crop":         (480,                              480,                              64),
    # of eval.py; it looks through windows of this side, toy at the whole
    "test_scales":  ((0.5, 0.75, 1, 1.25, 1.5, 1.75),  (0.5, 0.75, 1, 1.25, 1.5, 1.75),  (0.75, 1, 1.25, 1.5, 1.75)),
    "test_window":  (480,                              480,                              None),
    "test_stride":  (320,                              320,                              None),
    "test_crf":     ("voc-test",                       "prob",                           "prob"),
}
RECIPES = {name: {key: row[i] for key, row in TABLE.items()} for i, name in enumerate(("voc", "coco", "toy"))}


class Segmenter(nn.Module):
    """ViT and mask transformer: image (B, 3, H, W) ImageNet-normalised -> scores (B, K + 1, H, W), background first.

        score(patch, label) = LayerNorm over the labels of cos(P patch, Q label)                              [eq. S1]"""

    def __init__(self, vit, num_labels, dropout=0.0):
        super().__init__()
        self.trunk, self.num_labels = vit, num_labels
        vit.head = None
        self.enter = Linear(vit.width, vit.width)
        self.label_vectors = nn.Parameter(torch.randn(1, num_labels, vit.width) * 0.02)
        self.blocks = nn.ModuleList(Block(vit.width, dropout=dropout, eps=1e-5) for _ in range(2))
        self.norm = nn.LayerNorm(vit.width)
        for layer in (self.enter, *self.blocks.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.P, self.Q = (nn.Parameter(vit.width ** -0.5 * torch.randn(vit.width, vit.width)) for _ in range(2))
        self.label_norm = nn.LayerNorm(num_labels)

    def forward(self, image):
        tokens, (h, w) = self.trunk(image)
        x = self.enter(self.trunk.norm(tokens)[:, 1:])
        x = torch.cat([x, self.label_vectors.expand(len(image), -1, -1)], dim=1)    # (B, h*w + K + 1, D)
        for block in self.blocks:
            x, _, _ = block(x)
        patches, labels = self.norm(x).split([h * w, self.num_labels], dim=1)
        patches, labels = F.normalize(patches @ self.P, dim=2), F.normalize(labels @ self.Q, dim=2)
        scores = self.label_norm(patches @ labels.transpose(1, 2))                 # [eq. S1]   # (B, h*w, K + 1)
        scores = scores.float().transpose(1, 2).unflatten(2, (h, w))
        padded = (h * self.trunk.patch, w * self.trunk.patch)  # the trunk pads to whole patches: cut that off again
        scores = F.interpolate(scores, size=padded, mode="bilinear", align_corners=False)
        return scores[:, :, :image.shape[2], :image.shape[3]]


def load_segmenter(path):
    """OUT/seg.pt -> Segmenter in eval mode, on the CPU; its recipe; the classes it was trained for"""
    state = read_checkpoint(path, "segmenter", "train one with train_seg.py")
    model = build(path, lambda: Segmenter(ViT(**state["vit"]), len(state["classes"]) + 1), state["segmenter"],
                  "train one with train_seg.py")
    return model.eval(), state["recipe"], state["classes"]


class Labelled(Dataset):
    """Item (epoch, i): image (3, crop, crop), labels (crop, crop) int64, i, augmented alike: scale, crop, flip, colours, pad.

    Where a photo is smaller than the crop, mean colour and label 255 are added below and at the right. An item depends on
    (seed, epoch, i) alone."""

    def __init__(self, split, folder, side, scale, crop, seed):
        self.split, self.folder, self.side, self.scale, self.crop, self.seed = split, Path(folder), side, scale, crop, seed
        self.augment = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3, 0.05),
                                   v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                                   v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, place):
        epoch, i = place
        name, side = self.split.names[i], self.crop
        photo = self.split.image(name)
        W, H = photo.size
        labels = torch.from_numpy(read_labels(self.folder / f"{name}.png", (H, W), len(self.split.classes) + 1).copy())  # (H, W)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, i))
            low, high = self.scale
            scale = (low + (high - low) * torch.rand(()).item()) * self.side / min(H, W)
            size = [max(1, round(H * scale)), max(1, round(W * scale))]
            photo = v2.functional.resize(v2.functional.pil_to_tensor(photo), size, InterpolationMode.BICUBIC)
            labels = v2.functional.resize(labels[None], size, InterpolationMode.NEAREST_EXACT)
            top, left = (int(torch.randint(max(0, full - side) + 1, ())) for full in size)
            photo, labels = (part[:, top:top + side, left:left + side] for part in (photo, labels))
            photo, labels = self.augment(tv_tensors.Image(photo), tv_tensors.Mask(labels))
        around = (0, side - photo.shape[2], 0, side - photo.shape[1])
        photo, labels = F.pad(photo.as_subclass(torch.Tensor), around), F.pad(labels.as_subclass(torch.Tensor), around, value=255)
        return photo, labels[0].long(), i


def clip_high_losses(losses, counted, start, patch):
    """L_i := min(L_i, max(mean of L over i's patch and the batch, mean of L)) once the mean of L is at most `start`  [eq. S2]

    losses L (B, H, W), 0 where counted (B, H, W) is 0; means run over the counted pixels of all processes."""
    _, H, W = losses.shape
    sums = torch.stack([losses.detach().sum(0), counted.sum(0)])                                # (2, H, W)
    sums = F.avg_pool2d(F.pad(sums, (0, -W % patch, 0, -H % patch)), patch)                     # (2, H/patch, W/patch)
    if dist.is_initialized():
        dist.all_reduce(sums)
    mean, means = sums[0].sum() / sums[1].sum(), sums[0] / sums[1].clamp(min=1e-9)
    bound = means.maximum(mean).repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:H, :W]
    return torch.where(mean <= start, losses.minimum(bound), losses)


def segmentation(model, image, labels, clip_start, clip_patch):
    """loss = mean L_i over the n pixels that are not 255, 0 where all are -> ({"loss": it}, n)   [eq. S1], [eq. S2]"""
    n = (labels != 255).sum().item()  # on the CPU
    scores, labels = model(image), labels.to(image.device, non_blocking=True)                   # (B, K + 1, H, W), (B, H, W)
    losses = F.cross_entropy(scores, labels, ignore_index=255, reduction="none")                # (B, H, W)
    if clip_start:
        losses = clip_high_losses(losses, (labels != 255).float(), clip_start, clip_patch)
    return {"loss": losses.sum() / max(1, n)}, n


def poly_decay(step, steps, last):
    """The rate at a step, as a share of lr: last + (1 - last) (1 - step / steps)^0.9"""
    return last + (1 - last) * (1 - step / steps) ** 0.9


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains the segmentation model on label PNGs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, metavar="ROOT", help="as for train_cam.py; photos are read")
    parser.add_argument("--split", default="train", help="ROOT/SPLIT.csv: the photos to train on")
    parser.add_argument("--labels", required=True, metavar="DIR", help="NAME.png: pseudo masks, or ROOT/masks for full supervision")
    parser.add_argument("--vit", default="deit_small", metavar="NAME", help="ImageNet-pretrained DeiT, by name or a file")
    parser.add_argument("--out", required=True, metavar="DIR", help="where seg.pt and log.jsonl go")
    parser.add_argument("--recipe", choices=list(RECIPES), default="voc", help="all hyper-parameters, those of eval.py too")
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="length of the training, instead of the recipe's")
    parser.add_argument("--batch", type=at_least(1), metavar="N", help="images per step over all processes, not the recipe's")
    parser.add_argument("--resume", action="store_true", help="keep a finished seg.pt, go on where a killed run stopped")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--seed", type=at_least(0), default=0, help="everything random follows from it")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="of matrix products, as in train_cam.py")
    parser.add_argument("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1), help="processes that load images")
    return parser.parse_args(argv)


def main(args):
    rank, world, device = start_processes(args.device)
    split, out = Split(args.data, args.split), Path(args.out)
    recipe = RECIPES[args.recipe] | {key: value for key, value in vars(args).items() if key in TABLE and value is not None}
    recipe |= {"seed": args.seed, "split": args.split, "photos": split.digest,
               "labels": "/".join(Path(args.labels).resolve().parts[-2:])}
    checkpoint = out / "seg.pt"
    if args.resume and checkpoint.is_file():
        check_recipe(checkpoint, read_checkpoint(checkpoint, "recipe", "delete it to train again")["recipe"], recipe)
        return end_processes()
    if rank == 0:
        hold(out)
    torch.manual_seed(args.seed)
    dataset = Labelled(split, args.labels, recipe["side"], recipe["scale"], recipe["crop"], args.seed)
    model = Segmenter(load_vit(args.vit, recipe["drop_path"]), len(split.classes) + 1, recipe["dropout"]).to(device)
    decoder = [p for name, p in model.named_parameters() if not name.startswith("trunk.")]
    groups = [{"params": list(model.trunk.parameters()), "peak": recipe["lr"] * recipe["trunk_lr"]},
              {"params": decoder, "peak": recipe["lr"]}]
    make = {"sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True), "adamw": torch.optim.AdamW}[recipe["optimizer"]]
    optimizer = make(groups, lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    decay = partial(poly_decay, steps=recipe["steps"], last=recipe["last_lr"] / recipe["lr"])
    step_loss = partial(segmentation, clip_start=recipe["clip_start"], clip_patch=recipe["clip_patch"])
    train("seg", model, step_loss, dataset, optimizer, decay, recipe, args, rank, world, device)
    if rank == 0:
        state = {"segmenter": model.state_dict(), "vit": model.trunk.sizes, "classes": split.classes, "words": split.words,
                 "recipe": recipe}
        write_file(checkpoint, lambda path: torch.save(state, path))
        (out / "seg.part").unlink(missing_ok=True)
    end_processes()


if __name__ == "__main__":
    run(main, parse_args())
