"""The weights of the toy world's models, toy_weights.npz, and how the ViT and the ResNet learned.

  python prepare/toy_pretrain.py clip vit resnet    # all again: 21, 16 and 10 minutes, a busy core

The CLIP learns in toy_clip.py. The backbones learn as in ImageNet's training: which of 12 things
does a picture show? Pictures are of scenes in which objects and backgrounds are NOT tied; none is
of the data set.
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
FURTHER = ((102, 400, 1e-3, 0.5),)  # a round of toy_clip.py, for other than the usual pairs


def untied_scenes(count, seed):
    """-> images (count, 3, H, W), labels (count, 12): the things of the whole scene, 0 or 1"""
    rng, images, labels = np.random.default_rng(seed), [], torch.zeros(count, len(THINGS))
    for i in tqdm(range(count), desc="scenes", disable=None):
        places = [(None if rng.random() < 0.2 else str(rng.choice(OBJECTS)),
                   str(rng.choice(BACKGROUNDS))) for _ in range(2 if rng.random() < 0.35 else 1)]
        images.append(scene(rng, places)[0])
        labels[i, [THINGS.index(name) for place in places for name in place if name]] = 1
    return normalized(images, IMAGENET_MEAN, IMAGENET_STD), labels


def crops(x, side=SIDE // 2):
    """x (B, 3, H, W): a crop of 8 to 100 % of each, half of them mirrored -> (B, 3, side, side)"""
    B = len(x)
    scale = (0.08 + 0.92 * torch.rand(B)).sqrt()
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(B) < 0.5, -1.0, 1.0), scale
    theta[:, :, 2] = (2 * torch.rand(B, 2) - 1) * (1 - scale[:, None])
    grid = F.affine_grid(theta, (B, 3, side, side), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def train_vit(steps=2500):
    """Answers: logits of all patches, and as the mean attention spreads them. [CLS] learns none."""
    vit, head = ViT(**VIT), nn.Linear(VIT["width"], len(THINGS))

    def answers(view):
        tokens, _ = vit.embed(view, vit.cls_token + vit.pos_embed[:, :1])
        p2p = 0
        for block in vit.blocks:
            tokens, maps, _ = block(tokens, with_maps=True)
            p2p = p2p + maps.mean(dim=1)[:, 1:, 1:] / len(vit.blocks)            # (B, hw, hw)
        logits = head(vit.norm(tokens[:, 1:]))                                   # (B, hw, 12)
        return logits, p2p / p2p.sum(dim=2, keepdim=True) @ logits

    train_backbone("vit", [*vit.parameters(), *head.parameters()], answers, steps)
    return vit.state_dict()


def train_resnet(steps=1500):
    """Answers: the logits of all cells. Batch norm is measured once more at the end, on scenes."""
    backbone, head = ResNet(**RESNET, norm=nn.BatchNorm2d), nn.Conv2d(8 * RESNET["first"], 12, 1)
    x = train_backbone("resnet", [*backbone.parameters(), *head.parameters()], lambda view: [
        head(backbone(view)).flatten(2).movedim(1, 2)], steps)                   # (B, hw, 12)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all that follows
    with torch.no_grad():
        for part in x[:2000].split(100):
            backbone(part)
    return backbone.state_dict()


def train_backbone(title, parameters, answers, steps, B=48):
    """answers(images) is a list of logits (B, hw, 12). A thing of the scene must show in a tenth of
    the patches. Returns the images."""
    x, labels = untied_scenes(24000, seed=2000)

    def loss():
        index = torch.randint(len(x), (B,))
        tops = [z.topk(max(1, z.shape[1] // 10), dim=1).values for z in answers(crops(x[index]))]
        return sum(F.binary_cross_entropy_with_logits(top.mean(dim=1), labels[index])
                   for top in tops)                                          # top (B, hw / 10, 12)

    fit(title, parameters, loss, steps, peak=1e-3, weight_decay=0.05)
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
    """-> (CLIP, {"vit", "resnet": state dict}); with other pairs than the usual, CLIP learns on"""
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
