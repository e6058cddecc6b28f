"""Trains the segmentation model on pseudo masks: the last step of the method (paper, section 4.1).

A plain ViT reads the photo. Segmenter's mask transformer (Strudel et al. 2021), two more blocks
over patches and K + 1 label vectors, scores each of the K + 1 labels for every patch; the scores
are up-sampled to pixels:

  score(patch, label) = LayerNorm over the labels of cos(P patch, Q label), P, Q matrices   [eq. S1]
  L_i  = -log softmax(scores_i)_y at pixel i with label y, 0 where y is 255 (ignore)
  loss = mean of L_i over all pixels i of the batch, ignored ones too

Wrong pseudo masks cause high losses. For VOC and COCO these are clipped, as in WeakTr, in each
batch whose mean of L is at most 1.2:

  L_i := min(L_i, max(mean of L over i's 120 x 120 tile of all images, mean of L))          [eq. S2]

Reads ROOT/classes.txt, ROOT/SPLIT.csv, photos, and label PNGs of any origin (0 background, 1..K
classes, 255 ignore); --labels ROOT/masks gives the fully supervised upper bound. Writes OUT/seg.pt
and OUT/seg.jsonl (the log).

  python train_seg.py --data runs/toy/data --recipe toy --labels runs/toy/masks \
                      --vit runs/toy/vit.pth --out runs/toy/seg
  torchrun --nproc-per-node 4 train_seg.py ... the same ...
"""
import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from common import (
    IMAGENET_MEAN, IMAGENET_STD, WORLD, InputError, Split, Training, digest, earlier_run,
    end_processes, folder_digest, in_first_process, load_weights, mixed_seed, read_changes,
    read_checkpoint, read_labels, run, schedule, start_processes, sum_over_processes)
from mask_generator import Block, ViT, load_vit, weight_file

# B images, K classes, H W pixels, h w patch grid, D ViT width

TABLE = {  # SGD: Nesterov, momentum 0.9. Of VOC's 10,582 images 100 epochs are 264,600 steps
    #                voc          coco         toy
    "epochs":       (100,         100,         14),
    "batch":        (4,           4,           8),
    "optimizer":    ("sgd",       "sgd",       "adamw"),
    "lr":           (1e-4,        1e-4,        3e-4),         # of the decoder
    "backbone_lr":  (0.1,         0.1,         1.0),           # times lr
    "last_lr":      (1e-5,        1e-5,        0.0),           # of the decoder, at the end
    "weight_decay": (0.0,         0.0,         1e-4),
    "clip_start":   (1.2,         1.2,         0.0),           # [eq. S2]; 0: no clipping
    "clip_patch":   (120,         120,         64),
    "drop_path":    (0.1,         0.1,         0.0),           # in the backbone
    "dropout":      (0.1,         0.1,         0.0),           # in the decoder
    "side":         (520,         520,         64),           # short side in pixels at scale 1
    "scale":        ((0.5, 2),    (0.5, 2),    (0.75, 1.5)),  # random, before the crop
    "crop":         (480,         480,         64),
}
RECIPES = ("voc", "coco", "toy")
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
              "adamw": torch.optim.AdamW}


class Segmenter(nn.Module):
    """ViT and mask transformer: image (B, 3, H, W) ImageNet-normalised -> scores (B, K + 1, H, W),
    background first"""

    def __init__(self, vit, num_labels, dropout=0.0):
        super().__init__()
        self.backbone, self.num_labels, D = vit, num_labels, vit.width
        self.enter = nn.Linear(D, D)
        self.label_vectors = nn.Parameter(torch.randn(1, num_labels, D) * 0.02)
        self.blocks = nn.ModuleList(Block(D, dropout=dropout, eps=1e-5) for _ in range(2))
        self.norm = nn.LayerNorm(D)
        for layer in (self.enter, *self.blocks.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.P, self.Q = (nn.Parameter(D ** -0.5 * torch.randn(D, D)) for _ in range(2))
        self.label_norm = nn.LayerNorm(num_labels)

    def forward(self, image):
        tokens, (h, w) = self.backbone(image)
        x = self.enter(self.backbone.norm(tokens)[:, 1:])                           # (B, h*w, D)
        x = torch.cat([x, self.label_vectors.expand(len(image), -1, -1)], dim=1)
        for block in self.blocks:
            x, _, _ = block(x)                                           # (B, h*w + K + 1, D)
        patches, labels = self.norm(x).split([h * w, self.num_labels], dim=1)
        patches, labels = F.normalize(patches @ self.P, dim=2), F.normalize(labels @ self.Q, dim=2)
        scores = self.label_norm(patches @ labels.transpose(1, 2))       # (B, h*w, K + 1) [eq. S1]
        scores = scores.float().transpose(1, 2).unflatten(2, (h, w))
        scores = F.interpolate(scores, scale_factor=self.backbone.patch, mode="bilinear")
        return scores[:, :, :image.shape[2], :image.shape[3]]  # the backbone pads to whole patches


def clip_high_losses(losses, start, patch):
    """L_i := min(L_i, max(mean of L over i's tile of all images, mean of L)) where the mean of L is
    at most `start`   [eq. S2]

    losses L (B, H, W). Means run over all pixels of all processes, which have equally many; no
    gradient passes through the bounds."""
    _, H, W = losses.shape
    average = sum_over_processes(losses.detach().mean(0)) / WORLD      # over images, (H, W)
    mean = average.mean()
    means = F.avg_pool2d(average[None], patch, ceil_mode=True)[0]        # (H/patch, W/patch)
    bound = means.maximum(mean).repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:H, :W]
    return torch.where(mean <= start, losses.minimum(bound), losses)


def segmentation(args, recipe, record, split, device):
    """The model learns the masks of --labels, pixel by pixel: the mean of L_i."""
    torch.manual_seed(args.seed % 2**63)
    vit = load_backbone(args.vit, recipe)                               # starts from ImageNet
    model = Segmenter(vit, len(split.classes) + 1, recipe["dropout"]).to(device)
    loop = Training(args.out / "seg", model, Labelled(split, args.labels, recipe, args.seed),
                    recipe, record, args, device, OPTIMIZERS[recipe["optimizer"]], poly_rate,
                    lambda: segmenter_state(model, args.recipe, recipe["side"], split.classes))
    for image, labels in loop.batches():
        labels = labels.to(device, non_blocking=True).long()            # (B, H, W)
        with loop.autocast:
            scores = loop.model(image)                                  # (B, K + 1, H, W)
            losses = F.cross_entropy(scores, labels, ignore_index=255, reduction="none")
            if recipe["clip_start"]:
                losses = clip_high_losses(losses, recipe["clip_start"], recipe["clip_patch"])
        loop.step({"loss": losses.mean()}, losses.numel())
    loop.finish()                                                       # seg.pt


def poly_rate(step, recipe):
    """The decoder's rate at a step: from lr down to last_lr, with exponent 0.9"""
    lr, last = recipe["lr"], recipe["last_lr"]
    return last + (lr - last) * (1 - step / recipe["steps"]) ** 0.9


class Labelled(Dataset):
    """Item (epoch, i): image (3, crop, crop), labels uint8 (crop, crop), augmented alike: scale,
    crop, flip, colours, pad. Where a photo is smaller than the crop, mean colour and label 255 are
    added below and at the right."""

    def __init__(self, split, folder, recipe, seed):
        self.split, self.folder, self.recipe, self.seed = split, Path(folder), recipe, seed
        self.augment = v2.Compose([
            v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3, 0.05),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, item):
        epoch, i = item
        name, crop = self.split.names[i], self.recipe["crop"]
        photo = v2.functional.pil_to_tensor(self.split.image(name))              # (3, H, W) uint8
        H, W = photo.shape[1:]
        labels = read_labels(self.folder / f"{name}.png", (H, W), len(self.split.classes) + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, i))
            low, high = self.recipe["scale"]
            side = self.recipe["side"]  # of the short side; a long one has at most 4 times as much
            scale = (low + (high - low) * torch.rand(()).item()) * min(side / min(H, W),
                                                                       4 * side / max(H, W))
            size = [max(1, round(H * scale)), max(1, round(W * scale))]
            photo = v2.functional.resize(photo, size, InterpolationMode.BICUBIC)
            labels = v2.functional.resize(torch.from_numpy(labels)[None], size,
                                          InterpolationMode.NEAREST_EXACT)
            top, left = (int(torch.randint(max(0, full - crop) + 1, ())) for full in size)
            photo, labels = (x[:, top:top + crop, left:left + crop] for x in (photo, labels))
            photo, labels = self.augment(tv_tensors.Image(photo), tv_tensors.Mask(labels))
        around = (0, crop - photo.shape[2], 0, crop - photo.shape[1])
        photo, labels = photo.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)
        return F.pad(photo, around), F.pad(labels, around, value=255)[0]


def load_backbone(path, recipe):
    """A DeiT, by name or file, as Segmenter trains it: positions resized once, to the patches of a
    crop, and norms with eps 1e-5"""
    vit = load_vit(path)
    side = -(-recipe["crop"] // vit.patch)
    positions = torch.cat([vit.pos_embed[:, :1], vit.position(side, side, "bilinear")], dim=1)
    backbone = ViT(**vit.sizes | {"grid": (side, side), "eps": 1e-5}, drop_path=recipe["drop_path"])
    backbone.load_state_dict(vit.state_dict() | {"pos_embed": positions})
    return backbone


def segmenter_state(model, recipe, side, classes):
    """What seg.pt holds. recipe: its name; side: of a photo at scale 1, in pixels"""
    return {"segmenter": model.state_dict(), "vit": model.backbone.sizes, "recipe": recipe,
            "side": side, "classes": classes}


def load_segmenter(path):
    """OUT/seg.pt -> Segmenter in eval mode, the recipe's name, `side`, the classes it knows"""
    remedy = "train one with train_seg.py"
    state = read_checkpoint(path, "segmenter", remedy)
    model = load_weights(lambda: Segmenter(ViT(**state["vit"]), len(state["classes"]) + 1),
                         state["segmenter"], path, f"a segmentation model; {remedy}")
    return model.eval(), state["recipe"], state["side"], state["classes"]


# -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains the segmentation model on label PNGs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="ROOT", help="as for train_cam.py")
    add("--split", default="train", help="ROOT/SPLIT.csv: the photos to train on")
    add("--labels", required=True, metavar="DIR", help="NAME.png: pseudo masks, or ROOT/masks")
    add("--vit", default="deit_small", metavar="NAME", help="ImageNet-pretrained DeiT: name, file")
    add("--out", required=True, type=Path, metavar="DIR", help="where seg.pt and seg.jsonl go")
    add("--recipe", choices=RECIPES, default="voc", help="hyper-parameters: a column of TABLE")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other values "
        "than the recipe's")
    add("--steps", type=int, metavar="N", help="a trial: the whole schedule in N steps (None: the "
        "recipe's epochs)")
    add("--batch", type=int, metavar="N", help="short for --set batch=N: images per step, over all "
        "processes; the rates stay")
    add("--resume", action="store_true", help="keep a finished seg.pt of the same inputs, or "
        "continue a killed run exactly; without it all is trained again")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of matrix products; auto: float32 on a CPU, bfloat16 on a GPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading processes")
    add("--seed", type=int, default=0, help="everything random follows from it")
    return parser.parse_args(argv)


def main(args):
    device = start_processes(args.device)
    split = Split(args.data, args.split)
    recipe = {key: row[RECIPES.index(args.recipe)] for key, row in TABLE.items()}
    recipe |= read_changes(args, recipe, {"optimizer": tuple(OPTIMIZERS)})
    recipe |= schedule(recipe, len(split.names), args.steps)
    if recipe["batch"] % WORLD:
        raise InputError(f"--batch {recipe['batch']}: expected a multiple of the {WORLD} "
                         "processes")
    record = {"script": "train_seg.py", "recipe": args.recipe, **recipe, "seed": args.seed,
              "photos": split.digest, "weights": digest(weight_file(args.vit)),
              "labels": folder_digest(args.labels, [f"{name}.png" for name in split.names],
                                      "make_pseudo.py writes them")}
    if in_first_process(lambda: earlier_run(args.out / "seg", record, args.resume)) == "finished":
        print(f"kept {args.out}/seg.pt")
    else:
        segmentation(args, recipe, record, split, device)
    end_processes()
    return (f"{args.out}/seg.pt; next:\n    python eval.py --data {args.data} --checkpoint "
            f"{args.out}/seg.pt")


if __name__ == "__main__":
    run(main, parse_args())
