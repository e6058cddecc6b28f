"""The weights of the toy world's models, toy_weights.npz, and how the ViT and the ResNet learned.

  python prepare/toy_pretrain.py clip vit resnet    # all again: 21, 35 and 15 minutes, a core

The CLIP learns in toy_clip.py. The backbones learn, in the place of ImageNet's training, which of
12 things a picture shows. Pictures are views of scenes in which objects and backgrounds are NOT
tied, and windows of them, 12 to 24 pixels wide, with their own labels; none is of the data set.
With labels of whole scenes alone matching gains less (docs/results.md).
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import CLIP
from common import IMAGENET_MEAN, IMAGENET_STD, run, writing
from mask_generator import ResNet, ViT
from toy_clip import SIZES, fit, normalized, train_clip
from toy_scenes import BACKGROUNDS, OBJECTS, SIDE, THINGS, USUAL, scene

WEIGHTS = Path(__file__).with_name("toy_weights.npz")
VIT = dict(patch=4, width=128, layers=4, grid=(SIDE // 4, SIDE // 4))
RESNET = dict(block="BasicBlock", layers=(1, 1, 1, 1), first=24, stem=3)
FURTHER = ((102, 400, 1e-3, 0.5),)  # a round of toy_clip.py, for other pairs than the usual ones


def windows(x, top, left, side):
    """x (B, H, W, ...), top and left (N,), N a multiple of B -> (N, side, side, ...)"""
    index, inside = torch.arange(len(x)).repeat(len(top) // len(x)), torch.arange(side)
    rows, columns = top[:, None] + inside, left[:, None] + inside                # (N, side)
    return x[index[:, None, None], rows[:, :, None], columns[:, None]]


def untied_scenes(count, seed):
    """-> images (count, 3, H, W), parts uint8 (count, H, W); a fifth of the halves has no object"""
    rng, scenes = np.random.default_rng(seed), []
    for _ in tqdm(range(count), desc="scenes", disable=None):
        scenes.append(scene(rng, [
            (None if rng.random() < 0.2 else rng.choice(OBJECTS), rng.choice(BACKGROUNDS))
            for _ in range(2 if rng.random() < 0.35 else 1)]))
    images, parts = zip(*scenes)
    return normalized(images, IMAGENET_MEAN, IMAGENET_STD), torch.from_numpy(np.stack(parts))


def warped(x, parts, scale):
    """x (B, 3, H, W), parts (B, C, H, W): mirrored, moved, and enlarged by 1 / scale (B,)"""
    B = len(x)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(B) < 0.5, -1.0, 1.0), scale
    theta[:, :, 2] = (2 * torch.rand(B, 2) - 1) * (1 - scale[:, None])
    grid = F.affine_grid(theta, (B, 3, SIDE, SIDE), align_corners=False)
    return [F.grid_sample(values, grid, mode, padding_mode="reflection", align_corners=False)
            for values, mode in ((x, "bilinear"), (parts, "nearest"))]


def train_vit(steps=4200):
    """Answers: the logits of all patches, and those that the mean attention map spreads. [CLS]
    learns nothing. In bfloat16: several times as fast on CPUs that have it, ten times as slow on
    others."""
    vit, head = ViT(**VIT), nn.Linear(VIT["width"], len(THINGS))

    def answers(view):
        with torch.autocast("cpu", torch.bfloat16):
            tokens, (h, w) = vit.embed(view, vit.cls_token + vit.pos_embed[:, :1])
            p2p = 0
            for block in vit.blocks:
                tokens, maps, _ = block(tokens, with_maps=True)
                p2p = p2p + maps.mean(dim=1)[:, 1:, 1:] / len(vit.blocks)        # (B, h*w, h*w)
            logits = head(vit.norm(tokens[:, 1:]))                               # (B, h*w, 12)
            spread = p2p / p2p.sum(dim=2, keepdim=True) @ logits
        return [z.float().unflatten(1, (h, w)) for z in (logits, spread)]

    train_backbone("vit", [*vit.parameters(), *head.parameters()], answers, steps)
    return vit.state_dict()


def train_resnet(steps=1500):
    """Answers: the logits of all cells. Batch norm is measured once more at the end, on views."""
    backbone, head = ResNet(**RESNET, norm=nn.BatchNorm2d), nn.Conv2d(8 * RESNET["first"], 12, 1)

    def answers(view):
        with torch.autocast("cpu", torch.bfloat16):
            return [head(backbone(view)).float().movedim(1, 3)]                     # (B, h, w, 12)

    x = train_backbone("resnet", [*backbone.parameters(), *head.parameters()], answers, steps)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all that follows
    with torch.no_grad():
        for part in x[:2000].split(100):
            backbone(part)
    return backbone.state_dict()


def train_backbone(title, parameters, answers, steps, B=48):
    """answers(images) is a list of logits (B, h, w, 12). Returns the images. The answer must stand
    in a tenth of the patches, before and after attention spreads it; where a window shows a single
    thing, in all. And a patch must say in the view what it says in the window: tokens and attention
    stay local."""
    (x, parts), rng = untied_scenes(24000, seed=2000), np.random.default_rng(2001)
    bce = F.binary_cross_entropy_with_logits

    def shows(part, pixels):
        return (F.one_hot(part.flatten(1), len(THINGS)).sum(dim=1) >= pixels).float()

    def classify(z, labels):
        top = z.flatten(1, 2).topk(max(1, z.shape[1] * z.shape[2] // 10), dim=1).values
        return bce(top.mean(dim=1), labels)

    def loss():
        index = torch.randint(len(x), (B,))
        scale = torch.where(torch.rand(B) < 0.4, 1.0, 1 / (1 + torch.rand(B)))
        view, part = warped(x[index], parts[index][:, None].float(), scale)
        part = part[:, 0].long()                                                 # (B, H, W)
        side, count = ((12, 8), (16, 6), (24, 3))[rng.integers(3)]  # fewer of larger windows
        top, left = 4 * torch.randint((SIDE - side) // 4 + 1, (2, B * count))  # on the patch grid
        window = windows(view.movedim(1, 3), top, left, side).movedim(3, 1)  # (N, 3, side, side)
        labels = shows(windows(part, top, left, side), 6)                        # (N, 12)
        whole, near = answers(view), answers(window)
        pure = labels.sum(dim=1) == 1
        says = torch.where(pure[:, None, None, None], 1, near[0].detach().sigmoid())
        says = says * labels[:, None, None]                                      # (N, h, w, 12)
        same = bce(near[0][pure], says[pure]) + sum(bce(z, says) for z in near[1:]) + sum(
            bce(windows(z, top // 4, left // 4, side // 4), says) for z in whole)
        return (sum(classify(z, shows(part, 10)) for z in whole)
                + sum(classify(z, labels) for z in near) + 2 * same)

    fit(title, parameters, loss, steps, peak=1.5e-3, weight_decay=0.05)
    return x


def pack(**states):
    """State dicts in one compressed file, in half precision"""
    arrays = {f"{title}/{key}": (value.half() if value.is_floating_point() else value).numpy()
              for title, state in states.items() for key, value in state.items()}
    with writing(WEIGHTS) as path:
        np.savez_compressed(path, **arrays)


def unpack():
    """-> {"clip", "vit", "resnet": state dict} of the committed file"""
    states = {"clip": {}, "vit": {}, "resnet": {}}
    for key, array in np.load(WEIGHTS).items():
        (title, _, name), value = key.partition("/"), torch.from_numpy(array)
        states[title][name] = value.float() if value.is_floating_point() else value
    return states


def models_for(pairs):
    """-> (CLIP, {"vit", "resnet": state dict}); with other pairs CLIP learns further"""
    states, clip = unpack(), CLIP(**SIZES)
    state = states.pop("clip")
    clip.load_state_dict(state if pairs == USUAL else train_clip(pairs, FURTHER, state))
    return clip, states


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains parts of toy_weights.npz again.")
    parser.add_argument("parts", nargs="+", choices=["clip", "vit", "resnet"],
                        help="what to train; the other parts stay")
    return parser.parse_args(argv)


def main(args):
    """Each part from a seed of its own"""
    states, trainings = unpack(), {"clip": train_clip, "vit": train_vit, "resnet": train_resnet}
    for seed, (part, train) in enumerate(trainings.items(), 1):
        if part in args.parts:
            torch.manual_seed(seed)
            states[part] = train()
    pack(**states)
    return f"{WEIGHTS}: {', '.join(args.parts)}; next:\n    python prepare/toy.py --out OUT"


if __name__ == "__main__":
    run(main, parse_args())
