"""Trains the mask generator through a frozen CLIP, from image-level labels alone (paper, sections 3.2 to 3.4).

    X image, M_k = S(X)_k in [0, 1] the mask of a present class k, X_k^f = M_k X, X_k^b = (1 - M_k) X
    v = E_I(region), u_k^f = E_T("a photo of {class}."), u_k^b = E_T(p_k), sim = cosine, c(x) = clamp(x, 1e-4, 1 - 1e-4)

    classify  multi-label classification on the three predictions of S; everything but CLIP is trained
    match     L_match  = mean -log c(sim(v^f, u^f)) + lambda_b mean -log(1 - c(sim(v^b, u^f)))           [eq. 1]
    prompts   L_prompt = mean -log c(sim(v^b, u^b)) + lambda_T mean -log(1 - c(sim(u^f, u^b)))           [eq. 2]
    refine    L_total  = L_match + lambda_R mean -log(1 - c(sim(v^f, u^b)))                              [eq. 3]
    export    CAMs over scales and flips, present classes only, quarter resolution, float16

match and refine both start from classify.pt and train the head and the attention fusion only; prompts trains the
prompt vectors p_k only, on the regions of match.pt. All means run over the N (image, present class) pairs of the batch.
Reads JPEGImages, ImageSets, Annotations/*.xml and classes.txt of a VOC root; never a mask.
Writes OUT/{classify,match,prompts,refine}.pt, OUT/prompts.txt, OUT/log.jsonl, OUT/cams/NAME.npy.

    python train_cam.py --data VOCdevkit/VOC2012 --split train_aug --clip ViT-B/32 --vit deit_small.pth --out runs/voc
    torchrun --nproc-per-node 4 train_cam.py ... the same ...                              # one process per GPU
    python train_cam.py --data ROOT --clip CKPT --vit CKPT --out DIR --phase export --checkpoint DIR/match.pt --cams DIR2
"""
import argparse
import datetime
import json
import math
import os
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from clip_model import (
    CLIP_MEAN,
    CLIP_STD,
    InputError,
    load_clip,
    nearest_words,
    pick_device,
    read_image,
    read_nouns,
    run,
    tokenize,
)
from mask_generator import IMAGENET_MEAN, IMAGENET_STD, MaskGenerator, ViT, load_vit

# Dimension key: B images, K classes, N (image, class) pairs, H W pixels, h w patch grid, E CLIP width, P prompt length.

PHASES = ["classify", "match", "prompts", "refine"]
VOC_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
               "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
CLIP_WORDS = {"diningtable": "dining table", "person": "player", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


# ---------------------------------------------------------------------------------------------------------------------
# Data: names, classes and image-level labels of a VOC root
# ---------------------------------------------------------------------------------------------------------------------

class Data:
    """A split of a VOC 2012 root: root, split, names, classes (K), words for CLIP (K). Opens no image and no mask."""

    def __init__(self, root, split):
        self.root, self.split = Path(root), split
        if not (self.root / "JPEGImages").is_dir():
            raise InputError(f"{root}: no folder JPEGImages in it; expected a VOC 2012 root (JPEGImages, Annotations, "
                             "ImageSets/Segmentation); pass it with --data")
        names = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not names.is_file():
            raise InputError(f"{names}: no such list; expected one image name a line; pass another --split")
        self.names = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not self.names:
            raise InputError(f"{names}: the list is empty; expected one image name a line")
        self.classes, self.words = read_classes(self.root / "classes.txt")

    def image(self, name):
        """The photo as a PIL image, RGB."""
        return read_image(self.root / "JPEGImages" / f"{name}.jpg")

    def labels(self, name):
        """Image-level labels (K,), bool. Objects marked `difficult` count too, as in the field's cls_labels.npy."""
        path = self.root / "Annotations" / f"{name}.xml"
        try:
            found = [box.findtext("name", "").strip() for box in ElementTree.parse(path).iter("object")]
        except (OSError, ElementTree.ParseError) as error:
            raise InputError(f"{path}: no readable annotation ({error}); expected VOC XML with the image's objects") from None
        labels = np.zeros(len(self.classes), bool)
        for name in found:
            if name not in self.classes:
                raise InputError(f"{path}: class {name!r} is not among the {len(self.classes)} classes "
                                 f"({', '.join(self.classes[:4])}, ...); add it to {self.root / 'classes.txt'}")
            labels[self.classes.index(name)] = True
        return labels


def read_classes(path):
    """classes.txt, `name` or `name: words for CLIP` a line -> (classes, words); the 20 of VOC where there is no file."""
    lines = VOC_CLASSES
    if path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    classes = [line.split(":")[0].strip() for line in lines]
    words = [line.split(":")[1].strip() if ":" in line else CLIP_WORDS.get(line, line) for line in lines]
    if len(set(classes)) != len(classes) or not classes:
        raise InputError(f"{path}: {'a class twice' if classes else 'no class'}; expected each class once, one a line")
    return classes, words


class Crops(Dataset):
    """Training views: item i is (image (3, side, side) ImageNet-normalised, labels (K,), i).

    A view depends on (seed, epoch, i) alone, so neither workers nor processes nor a resumed run change it."""

    def __init__(self, data, side, seed, min_area=0.08, strong=False):
        self.data, self.side, self.seed, self.epoch = data, side, seed, 0
        self.targets = np.stack([data.labels(name) for name in data.names])                     # (images, K)
        self.view = v2.Compose([
            v2.RandomResizedCrop(side, scale=(min_area, 1), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment(magnitude=9)] if strong else []),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            *([v2.RandomErasing(0.25)] if strong else [])])

    def __len__(self):
        return len(self.data.names)

    def __getitem__(self, i):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + i)
            image = self.view(self.data.image(self.data.names[i]))
        return image, torch.from_numpy(self.targets[i]).float(), i


# ---------------------------------------------------------------------------------------------------------------------
# Processes, files, log
# ---------------------------------------------------------------------------------------------------------------------

def start_processes(device):
    """Join torchrun's process group if there is one. Returns (rank, number of processes, this process's device)."""
    device = pick_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    return dist.get_rank(), dist.get_world_size(), device


def sum_over_processes(value, device):
    """A number -> its sum over all processes."""
    value = torch.tensor(float(value), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


def write_file(path, write):
    """Call write(temporary path), then put the file in place: a killed run leaves the old file or none, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix, which PIL and numpy look at
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path, needs, remedy):
    """A checkpoint of ours -> dict. `needs` is the key that makes it the right one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); {remedy}") from None
    if not isinstance(state, dict) or needs not in state:
        raise InputError(f"{path}: holds no {needs!r}; expected a checkpoint written by this project; {remedy}")
    return state


def vit_sizes(vit):
    """What ViT(**sizes) needs to build the same trunk, as plain types."""
    return {"patch": vit.patch, "width": vit.width, "layers": len(vit.blocks), "grid": list(vit.grid)}


def build_vit(sizes):
    return ViT(sizes["patch"], sizes["width"], sizes["layers"], tuple(sizes["grid"]))


def load_generator(path, classes, remedy):
    """A phase's checkpoint -> MaskGenerator in eval mode, on the CPU."""
    state = read_checkpoint(path, "generator", remedy)
    if state["classes"] != list(classes):
        raise InputError(f"{path}: trained for the {len(state['classes'])} classes {', '.join(state['classes'][:4])}, ...; "
                         f"the data has {len(classes)}: {', '.join(classes[:4])}, ...; train again or pass the other data")
    generator = MaskGenerator(build_vit(state["vit"]), len(classes))
    generator.load_state_dict(state["generator"])
    return generator.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The method: regions, losses, prompts
# ---------------------------------------------------------------------------------------------------------------------

def cosine(a, b):
    return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(dim=-1)


def c(x):
    """The paper's clamp. Its gradient is zero outside: a cosine below 1e-4 is simply satisfied."""
    return x.clamp(1e-4, 1 - 1e-4)


def match_loss(v_f, v_b, u_f, lambda_b=2.4):
    """L_match [eq. 1]: what the mask keeps reads as the class, what it drops does not. All (N, E); scalar."""
    return -c(cosine(v_f, u_f)).log().mean() - lambda_b * (1 - c(cosine(v_b, u_f))).log().mean()


def prompt_loss(v_b, u_b, u_f, lambda_t=0.02, repel="text", v_f=None):
    """L_prompt [eq. 2]: the prompt reads as what the mask drops, and not as the class. All (N, E); scalar.

    repel: what L_T pushes the prompt from. "text": the class text, the paper's figure; "text-log": the same unbounded,
    + log c, as the official code; "image": the foreground region v_f, as a published summary of the paper has it."""
    l_i = -c(cosine(v_b, u_b)).log().mean()
    l_t = {"text": lambda: -(1 - c(cosine(u_f, u_b))).log().mean(),
           "text-log": lambda: c(cosine(u_f, u_b)).log().mean(),
           "image": lambda: -(1 - c(cosine(v_f, u_b))).log().mean()}[repel]()
    return l_i + lambda_t * l_t


def refine_loss(v_f, u_b):
    """L_refine [eq. 3]: what the mask keeps does not read as the class's background prompt. Both (N, E); scalar."""
    return -(1 - c(cosine(v_f, u_b))).log().mean()


def region_masks(cam, size, eps):
    """CAMs of the present classes (N, h, w) -> M (N, 1, H, W) in [0, 1): up-sampled, then min-max per map."""
    m = F.interpolate(cam[:, None], size=size, mode="bilinear", align_corners=False)            # (N, 1, H, W)
    low, high = m.amin(dim=(2, 3), keepdim=True), m.amax(dim=(2, 3), keepdim=True)
    return (m - low) / (high - low + eps)


def for_clip(image):
    """ImageNet-normalised -> CLIP-normalised pixels; 0 becomes CLIP's mean colour, so M X fades into it."""
    constants = [torch.tensor(v, device=image.device).view(3, 1, 1) for v in
                 (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)]
    mean, std, clip_mean, clip_std = constants
    return (image * std + mean - clip_mean) / clip_std


def embed_regions(clip, image, cam, labels, eps, parts="fb"):
    """CLIP's view of every present class's foreground and background.

    image (B, 3, H, W) ImageNet-normalised, cam (B, K, h, w), labels (B, K).
    Returns v_f, v_b (N, E; None where `parts` lacks it) and the classes (N,) of the pairs, in order of image, class."""
    b, k = labels.nonzero(as_tuple=True)                                                        # (N,), (N,)
    side = (clip.resolution, clip.resolution)
    X = for_clip(F.interpolate(image, size=side, mode="bicubic", antialias=True) if image.shape[2:] != side else image)
    X, M = X[b], region_masks(cam[b, k], side, eps)                                             # (N, 3, R, R), (N, 1, R, R)
    regions = ([M * X] if "f" in parts else []) + ([(1 - M) * X] if "b" in parts else [])       # X_k^f, X_k^b
    v = clip.encode_image(torch.cat(regions)).split(len(b)) if len(b) else [X.new_zeros(0, clip.embed_dim)] * 2
    return v[0] if "f" in parts else None, v[-1] if "b" in parts else None, k


class Prompts(nn.Module):
    """p (K, P, width): for each class the vectors that learn to name what comes along with it (paper, section 3.3)."""

    def __init__(self, clip, num_classes, length):
        super().__init__()
        assert length <= clip.max_prompt_length, f"{length} vectors, {clip.max_prompt_length} fit"
        self.clip = [clip]  # in a list: CLIP is no part of this module's state
        self.vectors = nn.Parameter(torch.rand(num_classes, length, clip.text_width))  # U[0, 1) as the official code

    def forward(self):
        """u^b (K, E)"""
        return self.clip[0].encode_prompts(self.vectors)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def cosine_decay(t):
    return 0.5 * (1 + math.cos(math.pi * t))


def train(phase, model, dataset, losses, optimizer, args, *, batch, epochs, rank, world, device, describe, decay=cosine_decay):
    """Optimise model; the rate falls by decay(share of steps done). Exact resume from OUT/{phase}.part.

    losses(model, *batch) -> ({name: scalar, "loss": scalar}, n), means over the n pairs of this process's batch.
    describe(batch) names what is in it, for the message that stops a run whose loss is not finite."""
    part = Path(args.out) / f"{phase}.part"
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=args.seed)
    loader = DataLoader(dataset, max(1, batch // world), sampler=sampler, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    steps, start = epochs * len(loader), 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(min(1, step / max(1, steps))))
    if args.resume and part.is_file():
        state = read_checkpoint(part, "optimizer", f"delete it to start {phase} again")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["epoch"]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    bar = tqdm(total=steps, initial=start * len(loader), desc=phase, disable=None if rank == 0 else True)
    began, seen = time.time(), 0
    for epoch in range(start, epochs):
        sampler.set_epoch(epoch)
        dataset.epoch = epoch
        totals = {}
        for batch_items in loader:
            values, n = losses(wrapped, *(item.to(device, non_blocking=True) for item in batch_items))
            if not torch.isfinite(values["loss"]):
                raise InputError(f"{phase}: the loss is {values['loss'].item()} in epoch {epoch + 1} on {describe(batch_items)}; "
                                 f"expected a number; lower --lr and run again with --resume")
            share = n * world / max(1, sum_over_processes(n, device))  # so that N counts over all processes
            optimizer.zero_grad(set_to_none=True)
            (values["loss"] * share).backward()
            optimizer.step()
            schedule.step()
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.item() * n
            totals["n"], seen = totals.get("n", 0) + n, seen + len(batch_items[0]) * world
            bar.update()
        totals = {name: sum_over_processes(value, device) for name, value in totals.items()}
        count, took = max(1, totals.pop("n")), time.time() - began
        row = {"phase": phase, "epoch": epoch + 1, "step": (epoch + 1) * len(loader),
               **{name: round(value / count, 5) for name, value in totals.items()},
               "lr": schedule.get_last_lr()[-1], "images_per_s": round(seen / took, 1),
               "eta_s": round(took / (epoch + 1 - start) * (epochs - epoch - 1)),
               "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else 0}
        if rank == 0:
            log(args.out, row)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "epoch": epoch + 1}
            write_file(part, lambda path, state=state: torch.save(state, path))
    bar.close()


def log(out, row):
    """One line on the terminal, the same numbers appended to OUT/log.jsonl."""
    tqdm.write(" | ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    with open(Path(out) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def classification_losses(generator, image, labels, i):
    """Multi-label soft margin on the three predictions of the generator, averaged.   (METHOD: WeakTr's pre-training)"""
    _, logits = generator(image)                                                                # (3, B, K)
    each = [F.multilabel_soft_margin_loss(prediction, labels) for prediction in logits]
    return {"loss": sum(each) / 3, "tokens": each[0], "coarse": each[1], "fine": each[2]}, len(image)


@torch.no_grad()
def class_texts(clip, words, device):
    """u^f (K, E): "a photo of {class}." for every class."""
    return clip.encode_text(tokenize([f"a photo of {word}." for word in words], clip.context_length).to(device))


@torch.no_grad()
def background_regions(clip, generator, dataset, views, device, rank, world):
    """For `views` crops of every image: v_f, v_b (N, E) and class (N,) of each present class.

    The generator is frozen in this phase, so a region's embedding is computed once, not once an epoch. [detail 5]"""
    rows = []
    for epoch in range(views):
        dataset.epoch = epoch
        indices = list(range(len(dataset)))[rank::world]
        for start in tqdm(range(0, len(indices), 64), desc=f"regions {epoch + 1}/{views}", disable=None if rank == 0 else True):
            image, labels, _ = (torch.stack(list(map(torch.as_tensor, z))).to(device) for z in
                                zip(*(dataset[i] for i in indices[start:start + 64])))
            v_f, v_b, k = embed_regions(clip, image, generator(image)[0], labels, eps=1e-4)
            order = epoch * len(dataset) + torch.tensor(indices[start:start + 64])  # the pair's place in a run of one process
            rows.append((v_f.cpu(), v_b.cpu(), k.cpu(), order.repeat_interleave(labels.sum(dim=1).long().cpu())))
    parts = [torch.cat(column) for column in zip(*rows)]
    if dist.is_initialized():
        everyone = [None] * world
        dist.all_gather_object(everyone, parts)
        parts = [torch.cat(column) for column in zip(*everyone)]
    order = parts.pop().argsort(stable=True)
    return [part[order] for part in parts]


def scaled_input(photo, scale, patch):
    """PIL photo -> (1, 3, h*patch, w*patch) ImageNet-normalised: resized by scale to whole patches, so nothing is padded."""
    W, H = photo.size
    size = [max(1, round(side * scale / patch)) * patch for side in (H, W)]
    pixels = v2.functional.pil_to_tensor(v2.functional.resize(photo, size, InterpolationMode.BICUBIC))
    return v2.functional.normalize(pixels.float() / 255, IMAGENET_MEAN, IMAGENET_STD)[None]


@torch.no_grad()
def export_cams(generator, data, folder, scales, device, rank, world):
    """Write folder/NAME.npy: float16 (n, ceil(H/4), ceil(W/4)) in [0, 1], the n present classes in class order.

    Each scale and its mirror image is one pass; the maps are summed, then brought to [0, 1] per class."""
    for name in tqdm(data.names[rank::world], desc="export", disable=None if rank == 0 else True):
        photo, present = data.image(name), torch.from_numpy(data.labels(name)).nonzero()[:, 0].to(device)
        W, H = photo.size
        quarter, total = (-(-H // 4), -(-W // 4)), 0
        for scale in scales:
            x = scaled_input(photo, scale, generator.trunk.patch).to(device)
            for flip in (False, True):
                cam, _ = generator(x.flip(3) if flip else x)
                cam = cam.flip(3) if flip else cam                                              # (1, K, h, w)
                total = total + F.interpolate(cam, size=quarter, mode="bilinear", align_corners=False)[0, present]
        maps = region_masks(total, quarter, eps=1e-6)[:, 0] if len(present) else total          # (n, H/4, W/4)
        write_file(folder / f"{name}.npy", lambda path, maps=maps: np.save(path, maps.cpu().numpy().astype(np.float16)))


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains the mask generator from image-level labels; exports CAMs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--data", required=True, metavar="ROOT", help="VOC 2012 root (JPEGImages, Annotations, ImageSets)")
    files.add_argument("--split", default="train", help="list in ImageSets/Segmentation to train on and to export")
    files.add_argument("--clip", metavar="CKPT", help="CLIP checkpoint, or ViT-B/32 to download it")
    files.add_argument("--vit", metavar="CKPT", help="ImageNet-pretrained DeiT that the generator starts from")
    files.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoints, log and CAMs")
    files.add_argument("--checkpoint", metavar="FILE", help="export: the phase to export (default OUT/refine.pt)")
    files.add_argument("--cams", metavar="DIR", help="export: where the CAMs go (default OUT/cams)")
    work = parser.add_argument_group("what to run")
    work.add_argument("--phase", choices=[*PHASES, "export", "all"], default="all",
                      help="one phase, starting from the files of the earlier ones, or all and the export")
    work.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False,
                      help="go on where a killed run with the same flags stopped; finished phases are kept")
    work.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    work.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    work.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that load images; 0: none")
    recipe = parser.add_argument_group("recipe (defaults: VOC)")
    recipe.add_argument("--epochs", type=int, default=60, help="epochs of classify, match and refine")
    recipe.add_argument("--batch", type=int, default=64, help="images per step, over all processes")
    recipe.add_argument("--lr", type=float, default=6.4e-5, help="AdamW's rate in classify, match and refine; COCO 3.2e-7")
    recipe.add_argument("--weight-decay", type=float, default=0.03, help="AdamW's, in every phase")
    recipe.add_argument("--lambda-b", type=float, default=2.4,
                        help="weight of the background term of L_match; larger: bigger masks; COCO 0.75")
    recipe.add_argument("--lambda-r", type=float, default=0.05, help="weight of L_refine; larger: tighter masks; COCO 0.2")
    recipe.add_argument("--prompt-length", type=int, default=30, help="vectors per prompt, at most 71 with OpenAI's CLIP")
    recipe.add_argument("--prompt-epochs", type=int, default=60, help="epochs of prompts")
    recipe.add_argument("--prompt-batch", type=int, default=128, help="(image, class) pairs per step of prompts")
    recipe.add_argument("--prompt-lr", type=float, default=2.5e-2, help="AdamW's rate in prompts; COCO 2.5e-3")
    recipe.add_argument("--prompt-views", type=int, default=4, help="random crops of each image that prompts learns from")
    recipe.add_argument("--lambda-t", type=float, default=0.02, help="weight of L_T; larger: further from the class; COCO 0.01")
    recipe.add_argument("--repel", choices=["text", "text-log", "image"], default="text",
                        help="what L_T pushes the prompt away from: the class text, the same unbounded, the foreground")
    recipe.add_argument("--min-area", type=float, default=0.08, help="smallest crop, as a share of the image")
    recipe.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True,
                        help="RandAugment and random erasing in classify, match and refine")
    recipe.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.2],
                        help="export: each scale and its flip; COCO 1.0 0.8 1.2")
    return parser.parse_args(argv)


def main(args):
    rank, world, device = start_processes(args.device)
    out, data = Path(args.out), Data(args.data, args.split)
    out.mkdir(parents=True, exist_ok=True)
    K = len(data.classes)
    phases = [args.phase] if args.phase != "all" else [*PHASES, "export"]
    remedy = "run the earlier phases first (--phase all runs them in order)"

    if set(phases) & set(PHASES):
        for flag in ("clip", "vit"):
            if getattr(args, flag) is None:
                raise InputError(f"--{flag} is missing; phase {phases[0]} needs that checkpoint; see --help")
        clip = load_clip(args.clip, device)
        u_f = class_texts(clip, data.words, device)                                             # (K, E)
        side = clip.resolution
        plain = Crops(data, side, args.seed, args.min_area)
        strong = Crops(data, side, args.seed, args.min_area, strong=args.augment)
    shared = {"rank": rank, "world": world, "device": device}

    for phase in phases:
        finished = out / f"{phase}.pt"
        if phase == "export" or (args.resume and finished.is_file()):
            continue
        torch.manual_seed(args.seed)
        adamw = lambda lr: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr,  # noqa: E731
                                             weight_decay=args.weight_decay)
        begin = {"epochs": args.epochs, "batch": args.batch, **shared,
                 "describe": lambda items: ", ".join(data.names[i] for i in items[2].tolist())}

        if phase == "classify":
            model = MaskGenerator(load_vit(args.vit), K).to(device)
            train(phase, model, strong, classification_losses, adamw(args.lr), args, **begin)

        elif phase in ("match", "refine"):
            model = load_generator(out / "classify.pt", data.classes, remedy).to(device)  # both start here
            model.requires_grad_(False)
            for parameter in model.mask_parameters():
                parameter.requires_grad_(True)
            if phase == "refine":
                prompts = read_checkpoint(out / "prompts.pt", "vectors", remedy)
                if prompts["classes"] != data.classes or prompts["vectors"].shape[2] != clip.text_width:
                    raise InputError(f"{out / 'prompts.pt'}: prompts for {len(prompts['classes'])} classes of width "
                                     f"{prompts['vectors'].shape[2]}; expected those of this data and CLIP ({K}, "
                                     f"{clip.text_width}); run --phase prompts again")
                with torch.no_grad():
                    u_b = clip.encode_prompts(prompts["vectors"].to(device))                    # (K, E)

            def mask_losses(generator, image, labels, i, phase=phase):
                cam, _ = generator(image, frozen_trunk=True)
                v_f, v_b, k = embed_regions(clip, image, cam, labels, eps=0.1)                  # (N, E), (N, E), (N,)
                if len(k) == 0:
                    names = ["match", "loss", *(["refine"] if phase == "refine" else [])]  # as below: sums run over processes
                    return dict.fromkeys(names, 0 * cam.sum()), 0
                values = {"match": match_loss(v_f, v_b, u_f[k], args.lambda_b)}
                values["loss"] = values["match"]
                if phase == "refine":
                    values["refine"] = refine_loss(v_f, u_b[k])
                    values["loss"] = values["match"] + args.lambda_r * values["refine"]         # L_total
                return values, len(k)

            train(phase, model, strong, mask_losses, adamw(args.lr), args, **begin)

        elif phase == "prompts":
            generator = load_generator(out / "match.pt", data.classes, remedy).to(device)
            regions = TensorDataset(*background_regions(clip, generator, plain, args.prompt_views, device, rank, world))
            model = Prompts(clip, K, args.prompt_length).to(device)

            def prompt_losses(prompts, v_f, v_b, k):
                u_b = prompts()[k]                                                              # (N, E)
                return {"loss": prompt_loss(v_b, u_b, u_f[k], args.lambda_t, args.repel, v_f),
                        "sim": cosine(v_b, u_b).mean().detach()}, len(k)

            train(phase, model, regions, prompt_losses, adamw(args.prompt_lr), args, epochs=args.prompt_epochs,
                  batch=args.prompt_batch, **shared, describe=lambda items: f"classes {sorted(set(items[2].tolist()))}")
            with torch.no_grad():
                found = nearest_words(model(), sorted({*read_nouns(), *data.words}), clip)
            lines = [f"{name}: " + ", ".join(f"{word} {value:.3f}" for word, value in row)
                     for name, row in zip(data.classes, found)]
            if rank == 0:
                write_file(out / "prompts.txt", lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))

        state = {"phase": phase, "classes": data.classes, "words": data.words, "args": vars(args)}
        if phase == "prompts":
            state["vectors"] = model.vectors.detach().cpu()
        else:
            state.update(generator=model.state_dict(), vit=vit_sizes(model.trunk))
        if rank == 0:
            write_file(finished, lambda path, state=state: torch.save(state, path))
            (out / f"{phase}.part").unlink(missing_ok=True)
        if world > 1:
            dist.barrier()

    if "export" in phases:
        generator = load_generator(args.checkpoint or out / "refine.pt", data.classes, remedy).to(device)
        export_cams(generator, data, Path(args.cams or out / "cams"), args.scales, device, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, parse_args())
