"""Trains the mask generator through a frozen CLIP, from image-level labels (paper, section 3).

X image, m = S(X)_k the CAM of a class k that X shows, M = (m - min m) / (max m - min m + eps)
X_k^f = M X the kept region (f: foreground), X_k^b = (1 - M) X the dropped one (b: background)
v_k^f, v_k^b = E_I(X_k^f), E_I(X_k^b). S sees X in ImageNet's normalisation, CLIP in its own.
u_k^f = E_T("a photo of {class}.")    u_k^b = E_T(p_k), p_k the learned background prompt of k
sim = cosine, c(x) = clamp(x, 1e-4, 1 - 1e-4), means over the N (image, shown class) pairs

  L_match  = mean -log c(sim(v^f, u^f)) + lambda_b mean -log(1 - c(sim(v^b, u^f)))       [eq. 1]
  L_prompt = mean -log c(sim(v^b, u^b)) + lambda_T mean -log(1 - c(sim(u^f, u^b)))       [eq. 2]
  L_total  = L_match + lambda_R L_refine,  L_refine = mean -log(1 - c(sim(v^f, u^b)))    [eq. 3]

--phase    starts from                       what trains                     loss
classify   an ImageNet backbone                 all of S                        soft margin
match      classify.pt                       head and attention fusion *     L_match
prompts    random vectors; match.pt is S     the prompts p; S is frozen      L_prompt
refine     classify.pt, prompts.pt           head and attention fusion *     L_total
export     refine.pt                         nothing: writes CAMs
* of the ViT; all of a CNN (--generator resnet), its backbone at a lower rate

Reads ROOT/classes.txt, ROOT/SPLIT.csv and the photos (docs/data.md), never a mask. A training phase
writes OUT/PHASE.pt (weights, and the record of what they were made of) and OUT/PHASE.jsonl (the
log); prompts also OUT/prompts.txt; export OUT/cams/NAME.npy and made_of.json (their record).

  python train_cam.py --data runs/toy/data --recipe toy --clip runs/toy/clip.pt \
                      --vit runs/toy/vit.pth --out runs/toy/cam
  python train_cam.py --data data/VOCdevkit/VOC2012 --split train_aug --out runs/voc   # one GPU
  torchrun --nproc-per-node 4 train_cam.py ... the same ...
"""
import argparse
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from clip_model import CLIP_MEAN, CLIP_STD, class_texts, load_clip, nearest_words, read_nouns
from common import (
    IMAGENET_MEAN, IMAGENET_STD, RANK, WORLD, InputError, Split, Training, allow_tf32,
    check_classes, check_folder, claim, digest, earlier_run, end_processes, in_first_process,
    load_photos, mixed_seed, read_changes, read_checkpoint, run, schedule, snapshots,
    start_processes, writing)
from mask_generator import (
    CNNGenerator, MaskGenerator, generator_state, load_generator, load_resnet, load_vit, photo_cams,
    weight_file)

# B images, K classes, N (image, class) pairs, H W pixels, h w patch grid, E width of CLIP's
# features, P prompt length, R side of CLIP's input

# AdamW; lr is used as it is, not scaled by the batch. With VOC's 10,582 images, the epochs of
# classify, match and refine are 9,900 steps each, those of prompts 4,920
TABLE = {
    #                                 voc         coco           toy
    ("classify", "epochs"):          (60,         60,            4),
    ("classify", "batch"):           (64,         64,            32),
    ("classify", "lr"):              (7.5e-5,     6.25e-5,       1e-3),
    ("classify", "backbone_lr"):     (1.0,        1.0,           0.02),   # times lr
    ("classify", "weight_decay"):    (0.03,       0.05,          0.03),
    ("classify", "warmup"):          (5 / 60,     5 / 60,        0.0),    # share of the steps
    ("classify", "first_lr"):        (1e-6,       1e-6,          0.0),    # where the warm-up begins
    ("classify", "last_lr"):         (1e-5,       1e-5,          0.0),    # where the cosine ends
    ("classify", "class_attention"): (True,       True,          False),  # A_c2p in [eq. W3]
    ("classify", "pool"):            ("max",      "mean",        "max"),  # features in [eq. W2]
    ("classify", "reduction"):       (8,          4,             2),      # in the MLP of [eq. W2]
    ("match", "epochs"):             (60,         60,            8),
    ("match", "batch"):              (64,         32,            16),
    ("match", "lr"):                 (6.4e-5,     3.2e-7,        1e-3),
    ("prompts", "epochs"):           (60,         60,            10),
    ("prompts", "batch"):            (128,        128,           32),
    ("prompts", "lr"):               (2.5e-2,     2.5e-3,        2.5e-2),
    ("prompts", "lambda_t"):         (0.02,       0.01,          0.1),
    ("prompts", "repel"):            ("text",     "text",        "text"),  # see prompt_loss
    ("prompts", "length"):           (30,         30,            30),     # P
    ("prompts", "eps"):              (1e-4,       1e-4,          1e-4),   # in M
    ("refine", "epochs"):            (60,         60,            8),
    ("refine", "batch"):             (64,         24,            16),
    ("refine", "lr"):                (6.4e-5,     2.4e-7,        1e-3),
    ("refine", "lambda_r"):          (0.05,       0.2,           0.5),
    ("match refine", "lambda_b"):    (2.4,        0.75,          0.75),
    ("match refine", "eps"):         (0.1,        0.1,           0.1),
    ("match refine", "backbone_lr"): (0.1,        0.1,           0.02),   # of a CNN, times lr
    ("match prompts refine", "weight_decay"): (0.03, 0.03,       0.03),
    ("classify match prompts refine", "drop_last"): (True, True, False),  # counts whole batches
    ("classify match prompts refine", "rate_changes"): ("epoch", "epoch", "step"),
    ("classify match prompts refine", "crop"): (224, 224,        64),     # side in pixels
    ("classify match prompts refine", "min_area"): (0.08, 0.08,  0.4),    # least share of the photo
    ("classify match refine", "augment"): (True,  True,          False),
    ("classify match refine", "drop_path"): (0.1, 0.1,           0.0),
    ("export", "scales"):            ((1, 1.2),   (1, 0.8, 1.2), (1, 1.2)),
}
RECIPES = ("voc", "coco", "toy")
CHOICES = {"repel": ("text", "text-log", "image"), "pool": ("max", "mean"),
           "rate_changes": ("epoch", "step")}


# ---- Losses: features (N, E) -> a scalar, 0 without any pair -------------------------------------

def cosine(a, b):
    """sim(a, b) = <a, b> / (|a| |b|), in float32: (..., E) twice -> (...)"""
    return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(dim=-1)


def c(x):
    """c(x) = clamp(x, 1e-4, 1 - 1e-4) keeps the logarithms finite. Outside, its gradient is 0: -log
    c does not recover from a cosine below 1e-4, nor -log(1 - c) from one above 1 - 1e-4."""
    return x.clamp(1e-4, 1 - 1e-4)


def pair_mean(x):
    return x.sum() / max(1, len(x))


def match_loss(v_f, v_b, u_f, lambda_b):
    """L_match = mean -log c(sim(v^f, u^f)) + lambda_b mean -log(1 - c(sim(v^b, u^f)))   [eq. 1]
    The kept region matches the class text, the dropped region does not."""
    return (pair_mean(-c(cosine(v_f, u_f)).log())
            + lambda_b * pair_mean(-(1 - c(cosine(v_b, u_f))).log()))


def prompt_loss(v_b, u_b, u_f, lambda_t, repel="text", v_f=None):
    """L_prompt = L_I + lambda_T L_T,  L_I = mean -log c(sim(v^b, u^b))                  [eq. 2]
    The prompt matches the dropped region, and not the class. For L_T the paper's figure says
    "repel", without a formula. Three forms:
      text      mean -log(1 - c(sim(u^f, u^b)))   away from the class text (our inference)
      text-log  mean  log c(sim(u^f, u^b))        the same without a bound (the official code)
      image     mean -log(1 - c(sim(v^f, u^b)))   away from the kept region (a third reading)"""
    L_I = pair_mean(-c(cosine(v_b, u_b)).log())
    if repel == "text":
        L_T = pair_mean(-(1 - c(cosine(u_f, u_b))).log())
    elif repel == "text-log":
        L_T = pair_mean(c(cosine(u_f, u_b)).log())
    elif repel == "image":
        L_T = pair_mean(-(1 - c(cosine(v_f, u_b))).log())
    return L_I + lambda_t * L_T


def refine_loss(v_f, u_b):
    """L_refine = mean -log(1 - c(sim(v^f, u^b))), the second part of L_total            [eq. 3]
    The kept region does not match the background prompt of its class."""
    return pair_mean(-(1 - c(cosine(v_f, u_b))).log())


# ---- Regions and prompts: what CLIP is shown -----------------------------------------------------

def region_masks(cam, size, eps):
    """M = (m - min m) / (max m - min m + eps), m the CAM at size (H, W): (N, h, w) -> (N, 1, H, W)

    With eps 0.1 a faint map gives a faint mask, so S learns strength as well as shape; the prompts
    want the whole region of a finished map: 1e-4."""
    m = F.interpolate(cam[:, None].float(), size=size, mode="bilinear")          # (N, 1, H, W)
    low, high = m.amin(dim=(2, 3), keepdim=True), m.amax(dim=(2, 3), keepdim=True)
    return (m - low) / (high - low + eps)


def clip_view(clip, image):
    """ImageNet-normalised (B, 3, H, W) -> X (B, 3, R, R) in CLIP's normalisation and size.
    In it 0 is CLIP's mean colour, which masked pixels take."""
    if image.shape[2:] != (clip.resolution, clip.resolution):
        image = F.interpolate(image, size=(clip.resolution, clip.resolution), mode="bicubic",
                              antialias=True)
    mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return v2.functional.normalize(image * std + mean, CLIP_MEAN, CLIP_STD)


def embed_masked(clip, X, M):
    """v^f = E_I(M X), v^b = E_I((1 - M) X): X (N, 3, R, R), M (N, 1, R, R) -> (N, E) twice"""
    return clip.encode_image(torch.cat([M * X, (1 - M) * X])).chunk(2)


def embed_regions(clip, image, cam, labels, eps):
    """v^f (N, E), v^b (N, E) and the class k (N,) of every pair, in order of image, class.

    image (B, 3, H, W), cam (B, K, h, w), labels (B, K) on the CPU, so that nothing waits for a
    GPU to count the pairs. Only the maps of shown classes are touched."""
    b, k = labels.nonzero().T.contiguous().to(image.device, non_blocking=True)   # (N,), (N,)
    M = region_masks(cam[b, k], (clip.resolution, clip.resolution), eps)         # (N, 1, R, R)
    return *embed_masked(clip, clip_view(clip, image)[b], M), k


class Prompts(nn.Module):
    """u_k^b = E_T(p_k): P learned vectors per class (paper, section 3.3)"""

    def __init__(self, clip, num_classes, length):
        super().__init__()
        self.encode = clip.encode_prompts                                        # E_T, frozen
        self.vectors = nn.Parameter(torch.rand(num_classes, length, clip.text_width))  # U[0, 1)

    def forward(self):
        """-> u^b (K, E)"""
        return self.encode(self.vectors)


# ---- The phases ----------------------------------------------------------------------------------
# recipe: hyper-parameters, a column of TABLE; record: what the phase's file is made of;
# u_f (K, E): the class texts. loop.step minimises "loss" and logs all that it is given

def classification(args, recipe, record, split, device):
    """All of S learns which classes a photo shows: the mean over photos j, classes k and S's
    predictions z of -(y_jk log σ(z_jk) + (1 - y_jk) log σ(-z_jk)). A ViT has three predictions:
    tokens, coarse, fine. A CNN has one."""
    K = len(split.classes)
    if args.generator == "resnet":
        S = CNNGenerator(load_resnet(args.resnet), K)                   # starts from ImageNet
    else:
        S = MaskGenerator(load_vit(args.vit, recipe["drop_path"]), K, recipe["class_attention"],
                          recipe["pool"], recipe["reduction"])
    loop = training(S, args, recipe, record, split, device)
    for image, labels in loop.batches():
        with loop.autocast:
            _, logits = loop.model(image)                               # {name: (B, K)}
            losses = {name: F.multilabel_soft_margin_loss(z.float(), labels.to(device))
                      for name, z in logits.items()}
        loop.step({"loss": sum(losses.values()) / len(losses), **losses}, len(image))
    loop.finish()                                                       # classify.pt


def matching(args, recipe, record, split, device, clip, u_f):
    """S learns masks whose kept region matches the class text: L_match [eq. 1]."""
    S = load_generator(args.out / "classify.pt", split, recipe["drop_path"])
    S.train_through_clip()
    loop = training(S, args, recipe, record, split, device)
    for image, labels in loop.batches():
        with loop.autocast:
            cam, _ = loop.model(image)                                  # (B, K, h, w)
            v_f, v_b, k = embed_regions(clip, image, cam, labels, recipe["eps"])   # (N, E), (N,)
            L_match = match_loss(v_f, v_b, u_f[k], recipe["lambda_b"])  # [eq. 1]
        loop.step({"loss": L_match}, len(k))
    loop.finish()                                                       # match.pt


def prompt_learning(args, recipe, record, split, device, clip, u_f):
    """The prompts learn to name what the masks drop: L_prompt [eq. 2]."""
    S = load_generator(args.out / "match.pt", split).to(device).eval().requires_grad_(False)
    prompts = Prompts(clip, len(split.classes), recipe["length"])
    loop = training(prompts, args, recipe, record, split, device)
    for image, labels in loop.batches():
        with loop.autocast:
            with torch.no_grad():
                cam, _ = S(image)                                       # (B, K, h, w)
                v_f, v_b, k = embed_regions(clip, image, cam, labels, recipe["eps"])
            u_b = loop.model()[k]                                       # (N, E)
            L_prompt = prompt_loss(v_b, u_b, u_f[k], recipe["lambda_t"], recipe["repel"], v_f)
        loop.step({"loss": L_prompt, "sim(v_b, u_b)": pair_mean(cosine(v_b, u_b)),
                   "sim(u_f, u_b)": pair_mean(cosine(u_f[k], u_b)),
                   "sim(v_f, u_b)": pair_mean(cosine(v_f, u_b))}, len(k))
    with torch.no_grad():
        u_b = prompts()                                                 # (K, E)
    write_words(args.out, u_b, split, clip)                             # prompts.txt
    loop.finish({"u_b": u_b.cpu(), "vectors": prompts.vectors.detach().cpu(),
                 "classes": split.classes})                             # prompts.pt


def refinement(args, recipe, record, split, device, clip, u_f):
    """As matching, and the kept region must not match the background prompts: L_total [eq. 3].
    As published it starts from classify.pt, not from match.pt."""
    S = load_generator(args.out / "classify.pt", split, recipe["drop_path"])
    S.train_through_clip()
    u_b = load_prompts(args.out / "prompts.pt", split, clip).to(device)     # (K, E), frozen
    loop = training(S, args, recipe, record, split, device)
    for image, labels in loop.batches():
        with loop.autocast:
            cam, _ = loop.model(image)                                  # (B, K, h, w)
            v_f, v_b, k = embed_regions(clip, image, cam, labels, recipe["eps"])   # (N, E), (N,)
            L_match = match_loss(v_f, v_b, u_f[k], recipe["lambda_b"])
            L_refine = refine_loss(v_f, u_b[k])
            L_total = L_match + recipe["lambda_r"] * L_refine           # [eq. 3]
        loop.step({"loss": L_total, "match": L_match, "refine": L_refine}, len(k))
    loop.finish()                                                       # refine.pt


# ---- How a phase trains: optimizer, learning rate, crops -----------------------------------------

def training(model, args, recipe, record, split, device):
    """The loop of a phase: AdamW, cosine_rate, random crops. OUT/PHASE.pt holds the generator."""
    return Training(args.out / record["phase"], model.to(device), Crops(split, recipe, args.seed),
                    recipe, record, args, device, torch.optim.AdamW, cosine_rate,
                    partial(generator_state, model, split.classes),
                    0 if isinstance(model, Prompts) else args.snapshots)


def cosine_rate(step, recipe):
    """The rate of step 0, 1, ..: up from first_lr in the warm-up (if the recipe has one), then on
    half a cosine to last_lr (or 0). The cosine counts from step 0, not from the end of the warm-up.
    If the rate changes once an epoch, it is that of the start of the epoch before, as in DeiT."""
    steps, lr, last = recipe["steps"], recipe["lr"], recipe.get("last_lr", 0)
    if recipe["rate_changes"] == "epoch":
        epochs = recipe["epochs"]
        step = max(0, step * epochs // steps - 1) * steps / epochs
    if step < (warmup := steps * recipe.get("warmup", 0)):
        return recipe["first_lr"] + (lr - recipe["first_lr"]) * step / warmup
    return last + (lr - last) * (1 + math.cos(math.pi * step / steps)) / 2


class Crops(Dataset):
    """Item (epoch, i): a view (3, crop, crop), ImageNet-normalised, and labels (K,)."""

    def __init__(self, split, recipe, seed):
        self.split, self.seed = split, seed
        augment = recipe.get("augment")  # the prompts see crops and mirror images alone
        grey = [round(255 * value) for value in IMAGENET_MEAN]
        rand_augment = v2.RandAugment(1, 9, 11, InterpolationMode.BICUBIC, grey)
        self.view = v2.Compose([
            v2.RandomResizedCrop(recipe["crop"], scale=(recipe["min_area"], 1),
                                 interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            *([v2.RandomApply([rand_augment], 0.5)] * 2 if augment else []),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            *([v2.RandomErasing(0.25, value="random")] if augment else [])])

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, item):
        epoch, i = item
        name = self.split.names[i]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, i))
            image = self.view(self.split.image(name))
        return image, torch.from_numpy(self.split.labels[name]).float()


# ---- Export --------------------------------------------------------------------------------------

def export(args, recipe, record, split, device):
    """Write the CAMs of refine.pt, or of --checkpoint: computed in float32, stored as float16."""
    S = load_generator(args.checkpoint, split).eval().to(device)
    claim(args.cams, [f"{name}.npy" for name in split.names], record, args.resume, split.folders)
    allow_tf32(False)
    left = [name for name in split.names[RANK::WORLD] if not (args.cams / f"{name}.npy").exists()]
    for name, photo in load_photos(split, left, "export", args.workers):
        present = torch.from_numpy(split.present(name)).to(device)
        maps = photo_cams(S, photo, present, recipe["scales"])                   # (n, h, w)
        maps = region_masks(maps, maps.shape[1:], eps=1e-12)[:, 0]
        with writing(args.cams / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, maps.cpu().numpy().astype(np.float16))


# ---- Checkpoints, and the records of what they were made of --------------------------------------

STARTS = {"match": ["classify"], "prompts": ["match"], "refine": ["classify", "prompts"]}


def record_of(phase, recipe, args, split, texts):
    """What a phase's output depends on: hyper-parameters, and digests of what it reads"""
    record = {"script": "train_cam.py", "phase": phase, **recipe, "photos": split.digest}
    if phase == "export":
        shown = {name: split.present(name).tolist() for name in split.names}
        record |= {"classes": split.classes, "shown": shown}
    else:
        record["seed"] = args.seed
    if phase == "classify":
        record["weights"] = digest(weight_file(getattr(args, args.generator)))
    if phase in STARTS:
        record |= {"words": digest(split.words), "clip": texts["clip"].sha256}
    earlier = {name: args.out / f"{name}.pt" for name in STARTS.get(phase, [])}
    for name, path in ({"generator": args.checkpoint} if phase == "export" else earlier).items():
        if not path.is_file():
            missing = path.stem if path.stem in PHASES else "all"
            raise InputError(f"{path}: no such file; expected a checkpoint; run --phase {missing} "
                             "first")
        record[name] = digest(path)
    return record


def phases_left(args, phases, recipes, split, texts):
    """The phases that must run: those without a file of the same inputs that --resume keeps.
    Raises InputError for files in the way, before the first step of work."""
    left = []
    for phase in phases:
        path, must_be_new = args.out / phase, len(phases) > 1 and (left or not args.resume)
        record = None if must_be_new else record_of(phase, recipes[phase], args, split, texts)
        ends = (".jsonl", ".txt") if phase == "prompts" else (".jsonl",)
        if phase == "export":
            check_folder(args.cams, [f"{name}.npy" for name in split.names], record, args.resume,
                         split.folders)
        elif must_be_new:
            files = [path.with_suffix(end) for end in (".pt", ".part", *ends)]
            if there := [file for file in (*files, *snapshots(path)) if file.exists()]:
                why = (f"made of an earlier {left[0]}.pt, which is not there" if left else
                       "--phase all needs an --out without files of the phases; add --resume to go "
                       "on")
                raise InputError(f"{there[0]}: {why}; pass another --out, or run one --phase")
        elif earlier_run(path, record, args.resume, ends) == "finished":
            continue
        left.append(phase)
    return left


def load_prompts(path, split, clip):
    """prompts.pt -> u^b (K, E)"""
    state = read_checkpoint(path, "u_b", "run --phase prompts first")
    check_classes(path, state["classes"], split)
    if state["record"]["clip"] != clip.sha256:
        raise InputError(f"{path}: prompts of another CLIP; expected that of --clip; pass the one "
                         "that they were made with, or run --phase prompts again")
    return state["u_b"]


def write_words(out, u_b, split, clip):
    """OUT/prompts.txt: the nouns nearest to each class's u^b (K, E)"""
    if RANK > 0:
        return
    rows = nearest_words(u_b, sorted({*(split.nouns or read_nouns()), *split.words}), clip)
    with writing(out / "prompts.txt") as temporary:
        temporary.write_text("".join(
            f"{name}: " + ", ".join(f"{word} {value:.3f}" for word, value in row) + "\n"
            for name, row in zip(split.classes, rows)), encoding="utf-8")


# -------------------------------------------------------------------------------------------------

PHASES = {"classify": classification, "match": matching, "prompts": prompt_learning,
          "refine": refinement, "export": export}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Trains the mask generator from image-level labels; exports CAMs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="ROOT", help="folder with classes.txt and SPLIT.csv")
    add("--split", default="train", help="ROOT/SPLIT.csv: the photos to train on and to export")
    add("--out", required=True, type=Path, metavar="DIR", help="for checkpoints, logs and CAMs")
    add("--recipe", choices=RECIPES, default="voc", help="hyper-parameters: a column of TABLE")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other values "
        "than the recipe's, in all phases that run and have the key: --set lambda_r=0.2 length=4")
    add("--steps", type=int, metavar="N", help="a trial: each phase's whole schedule in N steps "
        "(None: the recipe's epochs)")
    add("--batch", type=int, metavar="N", help="short for --set batch=N: images per step, over "
        "all processes; the rates stay")
    add("--phase", choices=[*PHASES, "all"], default="all", help="one phase, which starts from "
        "the files of the earlier ones, or all of them")
    add("--resume", action="store_true", help="keep what was made of the same inputs, and continue "
        "exactly where a killed run stopped; without it one phase is made again, and all of them "
        "need an OUT without their files")
    add("--clip", default="ViT-B/32", metavar="NAME", help="a CLIP by name, downloaded once, or "
        "a checkpoint file")
    add("--snapshots", type=int, default=0, metavar="N", help="OUT/PHASE-STEP.pt too, N times "
        "on the way, but not of prompts: for the published protocol, which chooses with masks")
    add("--generator", choices=["vit", "resnet"], default="vit", help="S; chosen in classify")
    add("--vit", default="deit_small", metavar="NAME", help="classify: an ImageNet-pretrained "
        "DeiT by name, downloaded once, or a checkpoint file")
    add("--resnet", default="resnet50", metavar="NAME", help="the same, with --generator resnet")
    add("--checkpoint", type=Path, metavar="FILE", help="export: this generator (None: "
        "OUT/refine.pt)")
    add("--cams", type=Path, metavar="DIR", help="export: where the CAMs go (None: OUT/cams)")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of matrix products in training; auto: float32 on a CPU, bfloat16 on a GPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading processes")
    add("--seed", type=int, default=0, help="everything random follows from it")
    return parser.parse_args(argv)


def recipe_of(name, phase, changes):
    """The recipe of a phase {key: value}, with those changes that it has a key for"""
    column = RECIPES.index(name)
    recipe = {key: row[column] for (phases, key), row in TABLE.items() if phase in phases.split()}
    return recipe | {key: value for key, value in changes.items() if key in recipe}


def main(args):
    device, split = start_processes(args.device), Split(args.data, args.split)
    phases = list(PHASES) if args.phase == "all" else [args.phase]
    if args.checkpoint and phases != ["export"]:
        raise InputError("--checkpoint: of --phase export alone; other phases make their own")
    args.checkpoint = args.checkpoint or args.out / "refine.pt"
    args.cams = args.cams or args.out / "cams"
    defaults = {key: x for phase in phases for key, x in recipe_of(args.recipe, phase, {}).items()}
    changes, texts = read_changes(args, defaults, CHOICES), {}
    if set(phases) & set(STARTS):  # those which ask CLIP
        clip = load_clip(args.clip, device)
        texts = {"clip": clip, "u_f": class_texts(clip, split.words)}            # (K, E)
    if RANK == 0:
        counts = zip(split.classes, np.sum(list(split.labels.values()), axis=0))
        print(f"{args.split}: {len(split.names)} images, which show "
              + ", ".join(f"{name} {n}" for name, n in counts), flush=True)
    recipes = {phase: recipe_of(args.recipe, phase, changes) for phase in phases}
    for recipe in (recipe for recipe in recipes.values() if "epochs" in recipe):  # of trainings
        recipe |= schedule(recipe, len(split.names), args.steps)
    left = in_first_process(lambda: phases_left(args, phases, recipes, split, texts))
    for phase in phases:
        if phase not in left:
            if RANK == 0:
                print(f"kept {args.out / phase}.pt")
            continue
        torch.manual_seed(args.seed % 2**63)
        record = record_of(phase, recipes[phase], args, split, texts)
        given = texts if phase in STARTS else {}
        PHASES[phase](args, recipes[phase], record, split, device, **given)
    end_processes()
    flags = f"--data {args.data} --split {args.split}"
    if "export" in phases:
        return (f"{args.cams}: CAMs of {len(split.names)} photos; next:\n    python make_pseudo.py "
                f"{flags} --cams {args.cams} --out {args.out}/masks")
    following = list(PHASES)[list(PHASES).index(phases[-1]) + 1]
    return f"{args.out / phases[-1]}.pt; next: the same command with --phase {following}"


if __name__ == "__main__":
    run(main, parse_args())
