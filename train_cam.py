"""Trains the mask generator through a frozen CLIP, from image-level labels alone (paper, sections 3.2 to 3.4).

    X image, m = S(X)_k the CAM of a class k that X shows, M_k = (m - min m) / (max m - min m + eps) its mask in [0, 1]
    X_k^f = M_k X the kept region, X_k^b = (1 - M_k) X the dropped one
    v_k^f, v_k^b = E_I(X_k^f), E_I(X_k^b)    u_k^f = E_T("a photo of {class}.")    u_k^b = E_T(p_k), p_k a learned prompt
    sim = cosine, c(x) = clamp(x, 1e-4, 1 - 1e-4); all means run over the N (image, shown class) pairs of the batch

    matching         L_match  = mean -log c(sim(v^f, u^f)) + lambda_b mean -log(1 - c(sim(v^b, u^f)))                  [eq. 1]
    prompt learning  L_prompt = mean -log c(sim(v^b, u^b)) + lambda_T mean -log(1 - c(sim(u^f, u^b)))                  [eq. 2]
    refinement       L_total  = L_match + lambda_R L_refine,   L_refine = mean -log(1 - c(sim(v^f, u^b)))              [eq. 3]

    --phase     what trains                          starts from                       loss
    classify    all of S                             an ImageNet trunk                 multi-label soft margin
    match       head and attention fusion of S *     classify.pt                       L_match
    prompts     the vectors p                        random; regions of match.pt       L_prompt
    refine      head and attention fusion of S *     classify.pt, prompts.pt           L_total
    export      nothing: writes the CAMs of refine.pt and, with prompts.pt, the background score that goes with them
    * of the ViT; of the CNN (--generator resnet, chosen in classify) all of it, the trunk at a lower rate

Reads ROOT/classes.txt, ROOT/SPLIT.csv and the photos (docs/data.md); never a mask. Writes OUT/{classify,match,prompts,refine}.pt,
OUT/prompts.txt, OUT/log.jsonl, OUT/cams/NAME.npy, OUT/cams/background.json.

    python train_cam.py --data runs/toy/data --recipe toy --clip runs/toy/clip.pt --vit runs/toy/vit.pth --out runs/toy/cam
    python train_cam.py --data data/VOCdevkit/VOC2012 --split train_aug --out runs/voc                     # one GPU
    torchrun --nproc-per-node 4 train_cam.py ... the same ...                                              # one process a GPU
"""
import argparse
import csv
import datetime
import hashlib
import json
import math
import os
import time
import warnings
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial, reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from clip_model import (
    CLIP_MEAN,
    CLIP_STD,
    MAKE_ROOM,
    InputError,
    at_least,
    load_clip,
    load_tensors,
    nearest_words,
    pick_device,
    read_image,
    read_nouns,
    run,
    tokenize,
)
from mask_generator import IMAGENET_MEAN, IMAGENET_STD, CNNGenerator, MaskGenerator, ResNet, ViT, load_resnet, load_vit

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

# Dimension key: B images, K classes, N (image, class) pairs, H W pixels, h w patch grid, E CLIP width, P prompt length,
#                R side of CLIP's input.

TABLE = {  # AdamW; lr is not multiplied by batch / 512; steps: 60 epochs of VOC's 10,582, COCO's 82,081 images
    #                                 voc          coco            toy
    ("classify", "steps"):           (9_900,       76_920,         76),
    ("classify", "batch"):           (64,          64,             32),
    ("classify", "lr"):              (7.5e-5,      6.25e-5,        1e-3),
    ("classify", "trunk_lr"):        (1,           1,              0.02),         # the trunk's share of lr
    ("classify", "warmup"):          (825,         6_410,          0),            # steps from a rate of 1e-6 up to lr
    ("classify", "last_lr"):         (1e-5,        1e-5,           0),            # where the cosine ends; 0 in the other phases
    ("classify", "weight_decay"):    (0.03,        0.05,           0.03),
    ("classify", "class_attention"): (True,        True,           False),        # A_c2p in [eq. W3]
    ("classify", "pool"):            ("max",       "mean",         "max"),        # of the head features in [eq. W2]
    ("classify", "reduction"):       (8,           4,              2),            # of the L*A channels in the middle of its MLP
    ("match", "steps"):              (9_900,       153_900,        304),
    ("match", "batch"):              (64,          32,             16),
    ("match", "lr"):                 (6.4e-5,      3.2e-7,         1e-3),
    ("match", "trunk_lr"):           (0.1,         0.1,            0.02),         # of a CNN; a ViT's trunk stands still
    ("match", "weight_decay"):       (0.03,        0.03,           0.03),
    ("match", "lambda_b"):           (2.4,         0.75,           0.75),
    ("prompts", "steps"):            (4_920,       38_460,         190),
    ("prompts", "batch"):            (128,         128,            32),
    ("prompts", "lr"):               (2.5e-2,      2.5e-3,         2.5e-2),
    ("prompts", "weight_decay"):     (0.03,        0.03,           0.03),
    ("prompts", "lambda_t"):         (0.02,        0.01,           0.02),
    ("prompts", "repel"):            ("text",      "text",         "text"),       # what L_T pushes a prompt from
    ("prompts", "length"):           (30,          30,             30),           # P
    ("refine", "steps"):             (9_900,       205_200,        304),
    ("refine", "batch"):             (64,          24,             16),
    ("refine", "lr"):                (6.4e-5,      2.4e-7,         1e-3),
    ("refine", "trunk_lr"):          (0.1,         0.1,            0.02),
    ("refine", "weight_decay"):      (0.03,        0.03,           0.03),
    ("refine", "lambda_b"):          (2.4,         0.75,           0.75),
    ("refine", "lambda_r"):          (0.05,        0.2,            1),
    ("views", "epochs"):             (60,          60,             None),         # the rate changes with these; None: each step
    ("views", "crop"):               (224,         224,            64),           # side in pixels
    ("views", "min_area"):           (0.08,        0.08,           0.4),          # smallest crop, as a share of the photo
    ("views", "augment"):            (True,        True,           False),        # RandAugment and erasing, not in prompts
    ("views", "drop_path"):          (0.1,         0.1,            0),            # not in prompts
    ("export", "scales"):            ((1, 1.2),    (1, 0.8, 1.2),  (1, 1.2)),     # each with its mirror image
}
RECIPES = {name: {phase: {key: row[i] for (of, key), row in TABLE.items() if of == phase} for phase, _ in TABLE}
           for i, name in enumerate(("voc", "coco", "toy"))}
PHASES = ["classify", "match", "prompts", "refine"]
STARTS_FROM = {"classify": [], "match": ["classify"], "prompts": ["match"], "refine": ["classify", "prompts"]}
MEAN_COLOUR = [round(255 * value) for value in IMAGENET_MEAN]
BACKGROUND = "background.json"  # beside exported CAMs: the background score that goes with them
SCORES = [round(0.05 * i, 2) for i in range(3, 19)]  # those it is chosen from


# ---------------------------------------------------------------------------------------------------------------------
# Losses. Features (N, E) in, a scalar out; without any pair it is 0
# ---------------------------------------------------------------------------------------------------------------------

def cosine(a, b):
    """sim(a, b) = <a, b> / (|a| |b|), (N, E) twice -> (N,), in float32"""
    return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(dim=-1)


def c(x):
    """c(x) = clamp(x, 1e-4, 1 - 1e-4) keeps the logarithms finite. Outside, its gradient is zero: a cosine below 1e-4 is at rest
    where a term pushes it down, -log(1 - c), but stuck where a term should raise it, -log c."""
    return x.clamp(1e-4, 1 - 1e-4)


def pair_mean(x):
    return x.sum() / max(1, len(x))


def match_loss(v_f, v_b, u_f, lambda_b=2.4):
    """L_match = mean -log c(sim(v^f, u^f)) + lambda_b mean -log(1 - c(sim(v^b, u^f)))                         [eq. 1]

    What the mask keeps reads as the class, what it drops does not."""
    return pair_mean(-c(cosine(v_f, u_f)).log()) + lambda_b * pair_mean(-(1 - c(cosine(v_b, u_f))).log())


def prompt_loss(v_b, u_b, u_f, lambda_t=0.02, repel="text", v_f=None):
    """L_prompt = L_I + lambda_T L_T,  L_I = mean -log c(sim(v^b, u^b))                                        [eq. 2]

    The prompt reads as what the mask drops, and not as the class. What L_T pushes it from:
        "text"      L_T = mean -log(1 - c(sim(u^f, u^b)))     the class text, as in the paper's figure
        "text-log"  L_T = mean  log c(sim(u^f, u^b))          the same without a bound, as in the official code
        "image"     L_T = mean -log(1 - c(sim(v^f, u^b)))     the kept region, as a published summary of the paper has it"""
    L_I = pair_mean(-c(cosine(v_b, u_b)).log())
    L_T = {"text": lambda: pair_mean(-(1 - c(cosine(u_f, u_b))).log()),
           "text-log": lambda: pair_mean(c(cosine(u_f, u_b)).log()),
           "image": lambda: pair_mean(-(1 - c(cosine(v_f, u_b))).log())}[repel]()
    return L_I + lambda_t * L_T


def refine_loss(v_f, u_b):
    """L_refine = mean -log(1 - c(sim(v^f, u^b)))                                                              [eq. 3]

    What the mask keeps does not read as the class's background prompt."""
    return pair_mean(-(1 - c(cosine(v_f, u_b))).log())


# ---------------------------------------------------------------------------------------------------------------------
# Regions and prompts: what CLIP is shown
# ---------------------------------------------------------------------------------------------------------------------

def region_masks(cam, size, eps):
    """M = (m - min m) / (max m - min m + eps), m the CAM up-sampled to size (H, W): (N, h, w) -> (N, 1, H, W) in [0, 1]

    eps: 0.1 where S is trained, 1e-4 for the prompts, as in the official code; 1e-12 for the export."""
    m = F.interpolate(cam[:, None].float(), size=size, mode="bilinear", align_corners=False)    # (N, 1, H, W)
    low, high = m.amin(dim=(2, 3), keepdim=True), m.amax(dim=(2, 3), keepdim=True)
    return (m - low) / (high - low + eps)


def clip_view(clip, image):
    """ImageNet-normalised images (B, 3, H, W) -> X (B, 3, R, R), of CLIP's size and in its normalisation.

    There 0 is CLIP's mean colour: what M hides in M X fades into it."""
    if image.shape[2:] != (clip.resolution, clip.resolution):
        image = F.interpolate(image, size=(clip.resolution, clip.resolution), mode="bicubic", antialias=True)
    mean, std, clip_mean, clip_std = normalisations(image.device)
    return (image * std + mean - clip_mean) / clip_std


@cache
def normalisations(device):
    """ImageNet's mean and standard deviation, CLIP's mean and standard deviation, (3, 1, 1) each; copied to a device once"""
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)]


def embed_masked(clip, X, M):
    """v^f = E_I(M X), v^b = E_I((1 - M) X): X (N, 3, R, R), M (N, 1, R, R) -> both (N, E), in one pass"""
    return clip.encode_image(torch.cat([M * X, (1 - M) * X])).chunk(2)


def embed_regions(clip, image, cam, labels, eps):
    """v^f, v^b (N, E) and the class k (N,) of every pair, in order of image, class.

    image (B, 3, H, W) ImageNet-normalised, cam (B, K, h, w), labels (B, K), on the CPU, so that listing the pairs does not
    wait for a GPU. Only the maps of shown classes are touched."""
    b, k = labels.nonzero().T.contiguous().to(image.device, non_blocking=True)                  # (N,), (N,)
    M = region_masks(cam[b, k], (clip.resolution, clip.resolution), eps)                        # (N, 1, R, R)
    return *embed_masked(clip, clip_view(clip, image)[b], M), k


@torch.no_grad()
def class_texts(clip, words, device):
    """u_k^f = E_T("a photo of {class}."): K words -> (K, E)"""
    return clip.encode_text(tokenize([f"a photo of {word}." for word in words], clip.context_length).to(device))


class Prompts(nn.Module):
    """u_k^b = E_T(p_k): for each class, P vectors that learn to name what comes along with it (paper, section 3.3)."""

    def __init__(self, clip, num_classes, length):
        super().__init__()
        self.clip = [clip]  # in a list: CLIP is no part of this module's state
        self.vectors = nn.Parameter(torch.rand(num_classes, length, clip.text_width))  # U[0, 1) as in the official code

    def forward(self, k):
        """classes (N,) -> u^b (N, E); each class is encoded once, whether it occurs or not: a batch shows nearly all of them"""
        return self.clip[0].encode_prompts(self.vectors)[k]


# ---------------------------------------------------------------------------------------------------------------------
# The four phases: what one step minimises. A batch is image (B, 3, H, W), ImageNet-normalised, and labels (B, K) on the CPU;
# returned are {name: scalar}, of which "loss" is minimised and all are logged, and how many things they are means over.
# u_f and u_b are (K, E), a row a class
# ---------------------------------------------------------------------------------------------------------------------

def classification(generator, image, labels, predictions):
    """loss = mean_jk -(y_k log σ(z_jk) + (1 - y_k) log σ(-z_jk)): multi-label soft margin of S's predictions z, of which a ViT
    has three, tokens, coarse and fine, and a CNN one"""
    _, logits = generator(image)                                                                # (3, B, K) or (1, B, K)
    losses = [F.multilabel_soft_margin_loss(z.float(), labels.to(image.device)) for z in logits]
    return {"loss": sum(losses) / len(losses), **dict(zip(predictions, losses))}, len(image)


def matching(generator, image, labels, clip, u_f, lambda_b):
    """loss = L_match [eq. 1]; the head and the fusion of S are trained"""
    cam, _ = generator(image)                                                                   # (B, K, h, w)
    v_f, v_b, k = embed_regions(clip, image, cam, labels, eps=0.1)                              # (N, E), (N, E), (N,)
    return {"loss": match_loss(v_f, v_b, u_f[k], lambda_b)}, len(k)


def prompt_learning(prompts, image, labels, generator, clip, u_f, lambda_t, repel):
    """loss = L_prompt [eq. 2]; the prompts are trained, S stands still"""
    with torch.no_grad():
        cam, _ = generator(image)                                                               # (B, K, h, w)
        v_f, v_b, k = embed_regions(clip, image, cam, labels, eps=1e-4)                         # (N, E), (N, E), (N,)
    u_b = prompts(k)                                                                            # (N, E)
    return {"loss": prompt_loss(v_b, u_b, u_f[k], lambda_t, repel, v_f), "sim": pair_mean(cosine(v_b, u_b))}, len(k)


def refinement(generator, image, labels, clip, u_f, u_b, lambda_b, lambda_r):
    """loss = L_total = L_match + lambda_R L_refine [eq. 3]; the head and the fusion of S are trained, the prompts stand still"""
    cam, _ = generator(image)                                                                   # (B, K, h, w)
    v_f, v_b, k = embed_regions(clip, image, cam, labels, eps=0.1)                              # (N, E), (N, E), (N,)
    L_match, L_refine = match_loss(v_f, v_b, u_f[k], lambda_b), refine_loss(v_f, u_b[k])
    return {"loss": L_match + lambda_r * L_refine, "match": L_match, "refine": L_refine}, len(k)


# ---------------------------------------------------------------------------------------------------------------------
# Export: CAMs, and the score below which a pixel is background
# ---------------------------------------------------------------------------------------------------------------------

def scaled_input(photo, scale, patch, most=8192):
    """PIL photo -> (1, 3, h*patch, w*patch) ImageNet-normalised: resized by scale to whole patches, so nothing is padded.

    A photo that would have more than `most` patches is shown smaller: attention takes memory by their square."""
    W, H = photo.size
    scale = min(scale, patch * (most / (H * W)) ** 0.5)
    size = [max(1, round(side * scale / patch)) * patch for side in (H, W)]
    pixels = v2.functional.pil_to_tensor(v2.functional.resize(photo, size, InterpolationMode.BICUBIC))
    return v2.functional.normalize(pixels.float() / 255, IMAGENET_MEAN, IMAGENET_STD)[None]


@torch.no_grad()
def export_cams(generator, split, folder, scales, device, rank, world):
    """Write folder/NAME.npy: float16 (n, ceil(H/4), ceil(W/4)) in [0, 1], the n shown classes in class order. One that is there
    is kept. In float32 whatever S was trained in: masks of bfloat16 maps have an IoU of 0.986 with these.

    Each scale and its mirror image is one pass; the maps are summed, then brought to [0, 1] per class. All L*A attention
    maps are held at once: 2,500 patches (640 x 640 at scale 1.25) take 4 GB with DeiT-S, a phone's photo would take 1,000."""
    for name in tqdm(split.names[rank::world], desc="export", disable=None if rank == 0 else True):
        if (folder / f"{name}.npy").is_file():
            continue
        photo, present = split.image(name), torch.from_numpy(split.labels[name]).nonzero()[:, 0].to(device)
        W, H = photo.size
        quarter, total = (-(-H // 4), -(-W // 4)), 0
        for scale in scales:
            x = scaled_input(photo, scale, generator.trunk.patch, most=2500).to(device)
            for flip in (False, True):
                with explained("export", [name], "make the photo smaller, or pass --device cpu"):
                    cam, _ = generator(x.flip(3) if flip else x)
                cam = cam[0, present, None].float()                                             # (n, 1, h, w)
                total = total + F.interpolate(cam.flip(3) if flip else cam, size=quarter, mode="bilinear", align_corners=False)
        maps = region_masks(total[:, 0], quarter, eps=1e-12)[:, 0].cpu().numpy().astype(np.float16)    # (n, H/4, W/4)
        write_file(folder / f"{name}.npy", lambda path, maps=maps: np.save(path, maps))


@torch.no_grad()
def background_losses(clip, u_f, u_b, split, folder, device, rank, world, most=200):
    """Losses (pairs, scores), float64: how well CLIP reads the hard regions that each of SCORES cuts from the exported CAMs.

    A pair's loss has the cosines of L_match [eq. 1] and L_refine [eq. 3], two about the object, one about the background with
    their weight together,
        sim(v^b, u^f) - sim(v^f, u^f) + 2 sim(v^f, u^b),   of the mask M_k = 1 where k has the greatest CAM and that is above
    the score, else 0. No logarithm: its slope depends on where a CLIP's cosines lie, which is near 0.25 in the real one.
    For the pairs of up to `most` images, spread over the split. Looks at photos, labels and CAMs; at no mask."""
    rows, R = [torch.zeros(0, len(SCORES), dtype=torch.float64)], clip.resolution
    names = split.names[::math.ceil(len(split.names) / most)]
    for name in tqdm(names[rank::world], desc="background score", disable=None if rank == 0 else True):
        k = torch.from_numpy(split.labels[name]).nonzero()[:, 0].to(device)                     # (n,)
        if len(k) == 0:
            continue
        photo = v2.functional.pil_to_tensor(split.image(name)).to(device).float() / 255
        X = clip_view(clip, v2.functional.normalize(photo, IMAGENET_MEAN, IMAGENET_STD)[None])  # (1, 3, R, R)
        cams = torch.from_numpy(np.load(folder / f"{name}.npy")).to(device).float()             # (n, H/4, W/4)
        cams = F.interpolate(cams[None], size=(R, R), mode="bilinear", align_corners=False)[0]  # (n, R, R)
        M = ((cams == cams.amax(0)) & (cams > cams.new_tensor(SCORES)[:, None, None, None])).float()  # (scores, n, R, R)
        v_f, v_b = (v.unflatten(0, M.shape[:2]) for v in embed_masked(clip, X, M.flatten(0, 1)[:, None]))
        losses = cosine(v_b, u_f[k]) - cosine(v_f, u_f[k]) + 2 * cosine(v_f, u_b[k])            # (scores, n)
        rows.append(losses.T.cpu().double())
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
        rows = sum(parts, [])
    return torch.cat(rows)


def choose_score(losses):
    """Losses (pairs, scores) -> the background score, and the lowest and highest of SCORES that are not told from the best one.

    The mean loss is flat around its minimum: which score has the least is chance, as the standard errors of the differences say
    (two scores are told apart where the mean difference over the pairs exceeds two of them). The flanks of the valley are steep,
    so chance hardly moves them: the background score is the middle between them, at a quarter of the valley's height."""
    n = max(1, len(losses))
    mean = losses.sum(dim=0) / n                                                                # (scores,)
    error = (losses - losses[:, mean.argmin(), None]).std(dim=0, correction=0).nan_to_num() / n ** 0.5
    close = torch.tensor(SCORES)[mean - mean.min() <= 2 * error]
    at = np.linspace(SCORES[0], SCORES[-1], 301)
    curve = np.interp(at, SCORES, mean)
    flanks = np.flatnonzero(curve > curve.min() + (curve.max() - curve.min()) / 4)
    low = max(flanks[flanks < curve.argmin()], default=-1) + 1  # where there is no flank, the end of the scores
    high = min(flanks[flanks > curve.argmin()], default=len(at)) - 1
    return round((at[low] + at[high]) / 2, 2), round(close.min().item(), 2), round(close.max().item(), 2)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, also train_seg.py's
# ---------------------------------------------------------------------------------------------------------------------

def cosine_decay(step, steps, epochs=None, warmup=0, first=0, last=0):
    """The rate at a step, as a share of lr: from `first` up to 1 in `warmup` steps, else on a half cosine from 1 at step 0
    down to `last`.

    epochs: as with timm's schedule in DeiT's loop, the rate changes with these only, and one of them late; None: at each step."""
    if epochs:
        step = max(0, step * epochs // steps - 1) * steps / epochs
    if step < warmup:
        return first + (1 - first) * step / warmup
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * step / steps))


def mixed_seed(*numbers):
    """Whole numbers -> one seed for all of them"""
    return reduce(lambda seed, number: (seed * 1_000_003 + number) % 2**63, numbers)


@lru_cache(maxsize=4)
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch))).tolist()


def batches(n, batch, start, steps, seed, rank, world):
    """Shuffled passes over n images, one after the other, cut into batches -> this process's part [(epoch, i), ...] of each.

    Depends on (seed, step) alone, so a resumed run sees what an uninterrupted one sees, and W processes what one sees."""
    for step in range(start, steps):
        yield [(place // n, shuffled(n, seed, place // n)[place % n])
               for place in range(step * batch + rank, (step + 1) * batch, world)]


def train(phase, model, step_loss, dataset, optimizer, decay, recipe, args, rank, world, device):
    """Minimise step_loss(model, image, labels) -> ({"loss": scalar, ...}, n), each a mean over this process's n images (classify),
    pairs (match, prompts, refine) or labelled pixels (seg). A group's rate at a step is its
    "peak" times decay(step).

    recipe has "steps" and "batch", the images of a step over all processes. About sixty times a run the means over all n of all
    processes go to OUT/log.jsonl (images_per_s; gib, the most GPU memory so far), and all that --resume needs for an exact
    continuation to OUT/PHASE.part."""
    part, steps, start = Path(args.out) / f"{phase}.part", recipe["steps"], 0
    if recipe["batch"] < world:
        raise InputError(f"{phase}: {recipe['batch']} images a step for {world} processes; expected an image or more for each; "
                         "change --batch")
    mixed = autocast(device, args.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=mixed.fast_dtype == torch.float16)  # its small gradients would vanish
    if args.resume and part.is_file():
        state = read_checkpoint(part, "scaler", f"delete it to start {phase} again")
        check_recipe(part, state["recipe"], recipe)
        with fitting(part, f"delete it to start {phase} again"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty after float32 and bfloat16: then the new one begins with its own
                scaler.load_state_dict(state["scaler"])
            start = state["step"]
    n_images, interval = len(dataset), max(1, steps // 60)
    order = partial(batches, n_images, recipe["batch"], steps=steps, seed=args.seed, rank=rank, world=world)
    loader = DataLoader(dataset, batch_sampler=order(start), num_workers=args.workers, pin_memory=device.type == "cuda")
    parallel = DistributedDataParallel(model.train()) if world > 1 else model.train()
    bar = tqdm(total=steps, initial=start, desc=phase, disable=None if rank == 0 else True)
    began, since_log = time.time(), []  # (images, values, n) of each step since the last log line
    loaded = iter(loader)
    for step in range(start + 1, steps + 1):
        torch.manual_seed(mixed_seed(args.seed, step, rank))  # drop path: a resumed run drops the same
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * decay(step - 1)
        names = [dataset.split.names[i] for _, i in next(order(step - 1))]
        with explained(f"{phase}, step {step}", names, f"lower --batch or --workers; --resume goes on from {part}"):
            image, labels, i = next(loaded)
            with mixed:
                values, n = step_loss(parallel, image.to(device, non_blocking=True), labels)
            share = share_of_all(n, device)  # so that the mean runs over all n of all processes
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(values["loss"] * share).backward()
        scaler.step(optimizer)
        scaler.update()
        since_log.append((i, {name: value.detach() for name, value in values.items()}, n))
        bar.update()
        if step % interval and step < steps:
            continue

        means = window_means(since_log, device)
        if not math.isfinite(means["loss"]):
            bad = next((i for i, values, _ in since_log if not torch.isfinite(values["loss"])), [])
            raise InputError(f"{phase}: the loss is {means['loss']} before step {step + 1}, first on "
                             f"{', '.join(dataset.split.names[j] for j in bad) or 'images of another process'}; expected a number; "
                             "take these photos out and go on from the last good state with --resume, or lower lr in TABLE and "
                             "start the phase anew; at the first steps, get the weights again that it starts from")
        since_log, took = [], time.time() - began
        row = {"phase": phase, "step": step, "epoch": round(step * recipe["batch"] / n_images, 2), **means,
               "lr": optimizer.param_groups[-1]["lr"], "images_per_s": round((step - start) * recipe["batch"] / took, 1),
               "eta_s": round(took / (step - start) * (steps - step)),
               "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else 0}
        if rank == 0:
            if step <= start + interval:  # the first line
                forget_log(args.out, phase, start)
            log(args.out, row)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
                     "recipe": recipe}
            write_file(part, lambda path, state=state: torch.save(state, path))
    bar.close()


@contextmanager
def explained(where, names, remedy):
    """What the system takes away, memory or a process that loads images, as one line with the names of the images at work."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not out_of_memory and "DataLoader worker (pid" not in str(error):
            raise
        what = "out of memory" if out_of_memory else "a process that loads images was killed"
        raise InputError(f"{where}: {what}, with images {', '.join(names)}; expected memory for them; {remedy}") from None


def share_of_all(n, device):
    """n over its mean of all processes, by which DistributedDataParallel's mean becomes one over all n; stays on the device"""
    if not dist.is_initialized():
        return 1
    total = torch.full((), float(n), device=device)
    dist.all_reduce(total)
    return n * dist.get_world_size() / total.clamp(min=1)


def window_means(rows, device):
    """[(images, {name: mean over n}, n), ...] -> {name: mean over all n of all rows and processes}"""
    count = torch.tensor([n for _, _, n in rows], dtype=torch.float64)
    values = {name: torch.stack([values[name] for _, values, _ in rows]).cpu().double() for name in rows[0][1]}  # (steps,)
    total = max(1, sum_over_processes(count.sum(), device).item())
    return {name: round(sum_over_processes((value * count).sum(), device).item() / total, 5) for name, value in values.items()}


def forget_log(out, phase, step):
    """Of OUT/log.jsonl the phase's lines after this step: of a run that was killed before it saved them, or of an earlier one."""
    path = Path(out) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) if line.endswith("}\n") else {"phase": phase, "step": math.inf} for line in lines]  # a torn line
    kept = [line for line, row in zip(lines, rows) if row["phase"] != phase or row["step"] <= step]
    if len(kept) < len(lines):
        write_file(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def log(out, row):
    """One line on the terminal, the same numbers appended to OUT/log.jsonl."""
    tqdm.write(" | ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    with open(Path(out) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def autocast(device, precision):
    """Matrix products in bfloat16 or float16, all else in float32. "auto": float32 on a CPU, bfloat16 on a GPU that has it."""
    if precision == "auto":
        cuda = lambda: "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"  # noqa: E731
        precision = "float32" if device.type == "cpu" else cuda()
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def start_processes(device):
    """Join torchrun's process group if there is one. Returns (rank, number of processes, this process's device)."""
    device = pick_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    return dist.get_rank(), dist.get_world_size(), device


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def end_processes():
    if dist.is_initialized():
        dist.barrier()  # torchrun kills the others when one process ends with an exit code
        dist.destroy_process_group()


def sum_over_processes(value, device):
    """A number or a tensor -> its sum over all processes, as a number or on the CPU."""
    total = torch.as_tensor(value, dtype=torch.float64).to(device, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.cpu() if torch.is_tensor(value) else total.item()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and files
# ---------------------------------------------------------------------------------------------------------------------

def write_file(path, write):
    """Call write(temporary path), then put the file in place: a killed run leaves the old file or none, never half, and what it
    left of the temporary one is overwritten by the next. Raises InputError where the place is full or cannot be written to."""
    path = Path(path)
    temporary = path.with_name(f".writing.{path.name}")  # keeps the suffix, which PIL and numpy look at
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save, where the disk is full
        reason = getattr(error, "strerror", None) or "no room for all of it"
        raise InputError(f"{path}: cannot be written ({reason}){MAKE_ROOM}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


HELD = {}  # folder: its open descriptor


def hold(folder):
    """Make a folder that one run at a time may write to. The lock is the system's and ends with the process, however that ends."""
    folder = Path(folder).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl and folder not in HELD:
            HELD[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(HELD.pop(folder))
        raise InputError(f"{folder}: another run is writing there; expected one at a time; wait for it, or pass another folder"
                         ) from None


def clear_unless(kept, folder, made_of, files):
    """Remove these files of a folder, unless they are to be kept and were made of the same, which folder/made_of.json says."""
    note = folder / "made_of.json"
    if not (kept and note.is_file() and json.loads(note.read_text()) == made_of):
        for file in files:
            (folder / file).unlink(missing_ok=True)
        write_file(note, lambda path: path.write_text(json.dumps(made_of)))


def file_digest(path):
    """The first 16 hexadecimal digits of a file's SHA-256"""
    with suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def read_checkpoint(path, needs, remedy):
    """A checkpoint of ours -> dict. `needs` is the key that makes it the right one."""
    path = Path(path)
    try:
        state = load_tensors(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a checkpoint; {remedy}") from None
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); expected a whole one written by this "
                         f"project; {remedy}") from None
    others = {"recipe"} if path.suffix == ".part" else {"recipe", "classes"}
    if not isinstance(state, dict) or not {needs, *others} <= set(state) or "generator" in state and "options" not in state:
        raise InputError(f"{path}: holds no {needs!r}; expected a checkpoint written by this project; {remedy}")
    return state


@contextmanager
def fitting(path, remedy):
    """What is read from a file goes where it should; else InputError."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"{path}: its contents do not fit ({type(error).__name__}: {reason}); expected those of such a model; "
                         f"{remedy}") from None


def build(path, make, state, remedy):
    """make() with the weights of a checkpoint. Its sizes are the file's, so it is first made without memory (on "meta")."""
    with fitting(path, remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            make().load_state_dict(state)
        model = make()
        model.load_state_dict(state)
        return model


def check_recipe(path, before, now):
    """--resume goes on with the recipe a run was begun with."""
    for key in now:
        if before.get(key) != now[key]:
            raise InputError(f"{path}: begun with {key} {before.get(key)}, now it is {now[key]}; expected the same to go on with; "
                             "give that one again, or delete that file to start this phase anew")


def check_photos(path, recipe):
    """A phase goes on with the photos and labels of the earlier phase, unless it names another split."""
    before = read_checkpoint(path, "recipe", EARLIER)["recipe"]
    if before["split"] == recipe["split"] and before.get("photos") != recipe["photos"]:
        raise InputError(f"{path}: trained with another {recipe['split']}.csv ({before.get('photos')}, now {recipe['photos']}); "
                         "expected the same photos and labels; restore it, or run all phases again in a new --out")


def check_classes(path, state, classes):
    if state["classes"] != list(classes):
        raise InputError(f"{path}: trained for {len(state['classes'])} classes, {', '.join(state['classes'][:4])}, ...; the "
                         f"data has {len(classes)}: {', '.join(classes[:4])}, ...; pass the data it was trained for")


EARLIER = "run the earlier phases first (--phase all runs them in order)"


def load_generator(path, classes, drop_path=0.0):
    """A phase's checkpoint -> MaskGenerator or CNNGenerator, as it was trained, in eval mode, on the CPU."""
    state = read_checkpoint(path, "generator", EARLIER)
    check_classes(path, state, classes)
    if "vit" in state:
        make = lambda: MaskGenerator(ViT(**state["vit"], drop_path=drop_path), len(classes), **state["options"])  # noqa: E731
    else:
        make = lambda: CNNGenerator(ResNet(**state["resnet"]), len(classes))  # noqa: E731
    return build(path, make, state["generator"], EARLIER).eval()


@torch.no_grad()
def load_background(words, path, clip, split):
    """u^b (K, E): of the learned prompts OUT/prompts.pt, or of words written by hand, [[word, ...], ...] in class order, as CLIMS
    and CLIP-ES have them: the mean of the unit vectors E_T("a photo of {word}.") of a class's words."""
    if words:
        device = clip.token_embedding.weight.device
        return torch.stack([F.normalize(class_texts(clip, row, device).float(), dim=1).mean(dim=0) for row in words])
    state = read_checkpoint(path, "vectors", EARLIER)
    check_classes(path, state, split.classes)
    with fitting(path, "run --phase prompts again, with this --clip"):
        if state["vectors"].shape[::2] != (len(split.classes), clip.text_width):
            raise ValueError(f"shape {tuple(state['vectors'].shape)}, {len(split.classes)} classes, CLIP's width {clip.text_width}")
        return clip.encode_prompts(state["vectors"].to(clip.token_embedding.weight.device))


# ---------------------------------------------------------------------------------------------------------------------
# Data: the one layout (docs/data.md), written by prepare/ or by hand
# ---------------------------------------------------------------------------------------------------------------------

class Split:
    """ROOT/classes.txt and ROOT/SPLIT.csv: photos and the classes each of them shows. Opens no photo and no mask.

    names: of all photos, a file's name without its ending, by which CAMs and masks are named too; paths {name: file};
    labels {name: (K,) bool}; classes (K); words (K), the classes as CLIP is told them; upright: EXIF orientation counts;
    digest: tells one list of photos and labels from another."""

    def __init__(self, root, split):
        self.root, self.split = Path(root), split
        self.classes, self.words, self.upright = read_classes(self.root / "classes.txt")
        table = self.root / f"{split}.csv"
        lines = read_text(table, "expected a photo a line, `PATH,CLASS;CLASS`; pass another --split, or write it with prepare/")
        self.paths, self.labels, index = {}, {}, {name: k for k, name in enumerate(self.classes)}
        try:
            rows = list(csv.reader(lines.splitlines(), strict=True))
        except csv.Error as error:
            raise InputError(f"{table}: {error}; expected a photo a line, `PATH,CLASS;CLASS`; correct it") from None
        for number, cells in enumerate(rows, 1):
            if not any(cells):
                continue
            where, path = f"{table}, line {number}", self.root / cells[0].strip()
            found = [name.strip() for name in ";".join(cells[1:]).split(";") if name.strip()]
            unknown = [name for name in found if name not in index]
            if unknown:
                raise InputError(f"{where}: class {unknown[0]!r} is not among the {len(self.classes)} of classes.txt "
                                 f"({', '.join(self.classes[:4])}, ...); expected `PATH,CLASS;CLASS`; correct one of the two files")
            if not path.is_file():
                raise InputError(f"{where}: no photo {cells[0]!r} in {self.root}; expected a path relative to that folder; "
                                 "correct it, or add the photo")
            if path.stem in self.paths:
                raise InputError(f"{where}: a second photo named {path.stem}; expected different names, which masks get too; "
                                 "rename one, or take one line out")
            self.paths[path.stem], self.labels[path.stem] = path, np.zeros(len(index), bool)
            for name in found:
                self.labels[path.stem][index[name]] = True
        self.names = list(self.paths)
        everything = "".join(f"{name}{labels.astype(int)}" for name, labels in self.labels.items())
        self.digest = f"{len(self.names)} photos, {hashlib.sha256(everything.encode()).hexdigest()[:8]}"
        if not self.names:
            raise InputError(f"{table}: empty; expected one photo or more, `PATH,CLASS;CLASS` a line; write it again")

    def image(self, name):
        """The photo as a PIL image, RGB."""
        return read_image(self.paths[name], self.upright)


def read_text(path, remedy):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({getattr(error, 'strerror', None) or error}); {remedy}") from None


def read_background_words(path, classes):
    """`class: word, word, ...` a line, every class once -> [[word, ...], ...] in class order"""
    lines = read_text(path, "expected `class: word, word, ...` a line").splitlines()
    lines = [line.partition(":") for line in lines if line.strip()]
    found = {name.strip(): [word.strip() for word in words.split(",") if word.strip()] for name, _, words in lines}
    if len(lines) != len(classes) or set(found) != set(classes) or not all(found.values()):
        odd = sorted(set(found) ^ set(classes)) or [name for name, words in found.items() if not words] or ["a class twice"]
        raise InputError(f"{path}: {odd[0]}; expected a line `class: word, word, ...` for each of the {len(classes)} classes of "
                         "classes.txt, with a word or more; correct it")
    return [found[name] for name in classes]


def read_classes(path):
    """classes.txt, `name` or `name: words for CLIP` a line -> classes, words, whether EXIF orientation counts"""
    lines = [line.strip() for line in read_text(path, "expected a class a line, beside the lists of photos; prepare/voc.py and "
                                                "prepare/coco.py write it; see docs/data.md").splitlines()]
    parts = [[part.strip() for part in line.partition(":")] for line in lines if line and line[0] != "#"]
    classes = [name for name, _, _ in parts]
    if not 0 < len(classes) < 255 or len(set(classes)) < len(classes) or {"", "background"} & set(classes):
        raise InputError(f"{path}: {len(classes)} classes, {len(set(classes))} of them different; expected 1 to 254, each once, "
                         "none empty and none called background, which is label 0 anyway; correct it")
    return classes, [words or name for name, _, words in parts], "# exif: ignore" not in lines


class Crops(Dataset):
    """Training views: item (epoch, i) is (image (3, side, side) ImageNet-normalised, labels (K,), i).

    A view depends on (seed, epoch, i) alone, so neither workers nor processes nor a resumed run change it."""

    def __init__(self, split, side, seed, min_area, augment):
        self.split, self.seed = split, seed
        self.view = v2.Compose([
            v2.RandomResizedCrop(side, scale=(min_area, 1), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            *([v2.RandomApply([v2.RandAugment(1, 9, 11, InterpolationMode.BICUBIC, MEAN_COLOUR)], 0.5)] * 2 if augment else []),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            *([v2.RandomErasing(0.25, value="random")] if augment else [])])

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, place):
        epoch, i = place
        name = self.split.names[i]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, i))
            image = self.view(self.split.image(name))
        return image, torch.from_numpy(self.split.labels[name]).float(), i


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains the mask generator from image-level labels; exports CAMs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--data", required=True, metavar="ROOT", help="folder with classes.txt and SPLIT.csv; prepare/ writes them")
    files.add_argument("--split", default="train", help="ROOT/SPLIT.csv: the photos to train on and to export")
    files.add_argument("--clip", default="ViT-B/32", metavar="NAME", help="CLIP by name, downloaded once, or a checkpoint file")
    files.add_argument("--vit", default="deit_small", metavar="NAME", help="ImageNet-pretrained DeiT that classify starts from: "
                       "a name, downloaded once, or a checkpoint file")
    files.add_argument("--generator", choices=["vit", "resnet"], default="vit", help="S, chosen in classify; the later phases and "
                       "the export read from its checkpoint which it is")
    files.add_argument("--resnet", default="resnet50", metavar="NAME", help="as --vit, for --generator resnet: a ResNet of "
                       "torchvision")
    files.add_argument("--background-words", metavar="FILE", help="refine, export: words written by hand, `class: word, word` a "
                       "line, in the place of the learned prompts")
    files.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoints, log and CAMs")
    files.add_argument("--checkpoint", metavar="FILE", help="export: the generator whose CAMs are written (default OUT/refine.pt)")
    files.add_argument("--cams", metavar="DIR", help="export: where the CAMs go (default OUT/cams)")
    work = parser.add_argument_group("what to run")
    work.add_argument("--phase", choices=[*PHASES, "export", "all"], default="all",
                      help="one phase, starting from the files of the earlier ones, or all and the export")
    work.add_argument("--resume", action="store_true", help="keep finished phases, go on where a killed one stopped, same recipe")
    work.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    work.add_argument("--seed", type=at_least(0), default=0, help="everything random follows from it")
    work.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                      help="of matrix products; auto: float32 on a CPU, bfloat16 on a GPU, float16 on one without it")
    work.add_argument("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1), help="processes that load images")
    recipe = parser.add_argument_group("recipe, and overrides for the phases that run (all values: TABLE)")
    recipe.add_argument("--recipe", choices=list(RECIPES), default="voc", help="hyper-parameters of all phases and the export")
    recipe.add_argument("--steps", type=at_least(1), metavar="N", help="length of a phase; a few hundred show if data work")
    recipe.add_argument("--batch", type=at_least(1), metavar="N", help="images per step, over all processes; rates stay")
    recipe.add_argument("--lambda-b", type=float, metavar="X", help="background term of L_match; larger: bigger masks")
    recipe.add_argument("--lambda-r", type=float, metavar="X", help="L_refine; larger: tighter masks, too large: holes")
    recipe.add_argument("--repel", choices=["text", "text-log", "image"], help="what L_T pushes a prompt from: the class text, the "
                        "same unbounded, the kept region")
    return parser.parse_args(argv)


def main(args):
    rank, world, device = start_processes(args.device)
    split, out = Split(args.data, args.split), Path(args.out)
    if rank == 0:
        counts = zip(split.classes, np.sum(list(split.labels.values()), axis=0))
        print(f"{args.split}: {len(split.names)} images, which show " + ", ".join(f"{name} {n}" for name, n in counts), flush=True)
    K, phases = len(split.classes), [args.phase] if args.phase != "all" else [*PHASES, "export"]
    export = "export" in phases
    words = read_background_words(Path(args.background_words), split.classes) if args.background_words else None
    exported = Path(args.checkpoint or out / "refine.pt")
    if phases == ["export"] and not words:  # those of the refinement
        words = read_checkpoint(exported, "generator", EARLIER)["recipe"].get("background_words")
    needs_clip = phases != ["classify"] and (phases != ["export"] or words or (out / "prompts.pt").is_file())
    clip = load_clip(args.clip, device) if needs_clip else None
    u_f = class_texts(clip, split.words, device) if clip else None                              # (K, E)
    background = partial(load_background, words, out / "prompts.pt", clip, split)  # () -> u_b (K, E)

    # ------------------------------------------------------------------------------------------ train
    if rank == 0 and phases != ["export"]:
        hold(out)
    for phase in [phase for phase in phases if phase != "export"]:
        recipe = RECIPES[args.recipe][phase] | RECIPES[args.recipe]["views"]
        recipe |= {key: value for key, value in vars(args).items() if key in recipe and value is not None}
        recipe |= {"seed": args.seed, "split": args.split, "classes": split.classes, "photos": split.digest}
        recipe["clip"] = Path(args.clip).name  # the name: folders may have moved
        if phase == "classify":
            recipe[args.generator] = Path(getattr(args, args.generator)).name
        if phase == "refine":
            recipe["background_words"] = words
        checkpoint = out / f"{phase}.pt"
        if args.resume and checkpoint.is_file():
            check_recipe(checkpoint, read_checkpoint(checkpoint, "recipe", f"delete it to run {phase} again")["recipe"], recipe)
            continue
        torch.manual_seed(args.seed)
        if phase == "classify":
            if args.generator == "vit":
                options = {key: recipe[key] for key in ("class_attention", "pool", "reduction")}
                model = MaskGenerator(load_vit(args.vit, recipe["drop_path"]), K, **options).to(device)
            else:
                model = CNNGenerator(load_resnet(args.resnet), K).to(device)
            step_loss = partial(classification, predictions=model.predictions)
        elif phase == "match":
            model = load_generator(out / "classify.pt", split.classes, recipe["drop_path"]).train_through_clip().to(device)
            step_loss = partial(matching, clip=clip, u_f=u_f, lambda_b=recipe["lambda_b"])
        elif phase == "prompts":
            generator = load_generator(out / "match.pt", split.classes).to(device)
            model = Prompts(clip, K, recipe["length"]).to(device)
            step_loss = partial(prompt_learning, generator=generator, clip=clip, u_f=u_f, lambda_t=recipe["lambda_t"],
                                repel=recipe["repel"])
        else:
            model = load_generator(out / "classify.pt", split.classes, recipe["drop_path"]).train_through_clip().to(device)
            step_loss = partial(refinement, clip=clip, u_f=u_f, u_b=background(), lambda_b=recipe["lambda_b"],
                                lambda_r=recipe["lambda_r"])

        for earlier in STARTS_FROM[phase]:
            if earlier != "prompts" or not words:
                check_photos(out / f"{earlier}.pt", recipe)
        crops = Crops(split, recipe["crop"], args.seed, recipe["min_area"], recipe["augment"] and phase != "prompts")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trunk, rest = ([p for name, p in trained.items() if name.startswith("trunk.") == of_trunk] for of_trunk in (True, False))
        lr = recipe["lr"]
        optimizer = torch.optim.AdamW([{"params": trunk, "peak": lr * recipe.get("trunk_lr", 1)}, {"params": rest, "peak": lr}],
                                      weight_decay=recipe["weight_decay"], fused=device.type == "cuda")
        warmup = recipe.get("warmup", 0) * recipe["steps"] // RECIPES[args.recipe][phase]["steps"]  # shorter with fewer --steps
        decay = partial(cosine_decay, steps=recipe["steps"], epochs=recipe["epochs"], warmup=warmup, first=1e-6 / lr,
                        last=recipe.get("last_lr", 0) / lr)
        train(phase, model, step_loss, crops, optimizer, decay, recipe, args, rank, world, device)

        state = {"phase": phase, "classes": split.classes, "words": split.words, "recipe": recipe}
        if phase == "prompts":
            state["vectors"] = model.vectors.detach().cpu()
        else:
            state |= {"generator": model.state_dict(), model.kind: model.trunk.sizes, "options": model.options}
        if rank == 0:
            if phase == "prompts":
                write_nearest_words(out / "prompts.txt", model, clip, split)
            write_file(checkpoint, lambda path, state=state: torch.save(state, path))
            (out / f"{phase}.part").unlink(missing_ok=True)
        wait_for_all()

    # ------------------------------------------------------------------------------------------ export
    if export:
        generator = load_generator(exported, split.classes).to(device)
        folder = Path(args.cams or out / "cams")
        if rank == 0:
            hold(folder)
            (folder / BACKGROUND).unlink(missing_ok=True)  # that of earlier CAMs
        scales = RECIPES[args.recipe]["export"]["scales"]
        if rank == 0:
            made_of = {"generator": file_digest(exported), "scales": list(scales), "photos": split.digest}
            clear_unless(args.resume, folder, made_of, [f"{name}.npy" for name in split.names])
        wait_for_all()
        export_cams(generator, split, folder, scales, device, rank, world)
        wait_for_all()
        if clip:
            losses = background_losses(clip, u_f, background(), split, folder, device, rank, world)
            score, low, high = choose_score(losses)
            if rank == 0:
                means = dict(zip(SCORES, losses.mean(dim=0).tolist()))
                state = {"background_score": score, "not_told_apart": [low, high], "losses": means}
                write_file(folder / BACKGROUND, lambda path: path.write_text(json.dumps(state, indent=1)))
                print("loss of each background score: " + ", ".join(f"{score} {loss:.3f}" for score, loss in means.items()))
                print(f"background score {score} for CAMs in {folder}; {len(losses)} (image, class) pairs do not tell the scores from "
                      f"{low} to {high} from the best" + ("; the range ends there: look at the CAMs, and think of a number of your own "
                                                          "(WeakTr's is 0.43)" if {low, high} & {SCORES[0], SCORES[-1]} else ""))
        elif rank == 0:
            print(f"no background score is chosen without {out / 'prompts.pt'} or --background-words: "
                  "give one to make_pseudo.py --background-score")
    end_processes()


def write_nearest_words(path, prompts, clip, split):
    """OUT/prompts.txt: the nouns nearest to each class's learned prompt, a line `class: word cosine, ...`"""
    with torch.no_grad():
        u_b = prompts(torch.arange(len(split.classes)).to(prompts.vectors.device))              # (K, E)
    found = nearest_words(u_b, sorted({*read_nouns(), *split.words}), clip)
    lines = [f"{name}: " + ", ".join(f"{word} {value:.3f}" for word, value in row) for name, row in zip(split.classes, found)]
    write_file(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    run(main, parse_args())
