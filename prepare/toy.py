"""The toy world: a data set like PASCAL VOC 2012 in miniature, a small CLIP, ViT and ResNet.

  python prepare/toy.py --out runs/toy [--train 600] [--val 200] [--seed 0]
  python prepare/toy.py --retrain image text vit resnet  # the weights again: 20, 2, 35, 15 minutes

It carries the paper's story. Objects nearly always stand on "their" background (boat on water,
train on rails, ...), so image-level labels cannot tell the two apart, a classifier's CAM leaks, and
the learned prompts must name what leaks. Writes OUT/data (classes.txt, train.csv, val.csv,
images/NAME.jpg, masks/NAME.png), OUT/clip.pt (OpenAI's state-dict layout), OUT/resnet.pth
(torchvision's) and OUT/vit.pth (DeiT's), which the six scripts read like any others.

S is the side of an image in pixels; a "thing" is an object or a background, backgrounds first.
"""
import argparse
import colorsys
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import CLIP, CLIP_MEAN, CLIP_STD, read_nouns, tokenize  # noqa: E402
from common import (  # noqa: E402
    IMAGENET_MEAN, IMAGENET_STD, InputError, claim, run, save, write_labels, writing)
from mask_generator import ResNet, ViT  # noqa: E402

S = 64
DRAW = 4 * S  # objects are drawn at four times the size and averaged down
BACKGROUNDS = ["water", "rails", "sky", "grass", "road", "table"]
OBJECTS = ["boat", "train", "bird", "cow", "car", "bottle"]  # each on the background above it
THINGS = BACKGROUNDS + OBJECTS
USUAL = dict(zip(OBJECTS, BACKGROUNDS))
WEIGHTS = Path(__file__).with_name("toy_weights.npz")


# ---- Drawing -------------------------------------------------------------------------------------
# An object is a list of (polygon, colour) in [-1, 1] x [-1, 1], x to the right and y down.

def any_colour(rng, saturation=(0.4, 1.0), value=(0.4, 1.0)):
    hsv = rng.random(), rng.uniform(*saturation), rng.uniform(*value)
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(*hsv))


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def oval(x, y, rx, ry, points=24):
    turns = [2 * math.pi * i / points for i in range(points)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]


def boat(rng):
    mast = rng.uniform(-0.1, 0.2)
    return [([(-1, 0.35), (1, 0.35), (0.7, 0.85), (-0.7, 0.85)], any_colour(rng)),
            (box(mast - 0.06, -0.95, mast + 0.06, 0.4), (30, 26, 30)),
            ([(mast + 0.1, -0.85), (mast + 0.1, 0.25), (0.85, 0.25)], (245, 245, 250)),
            ([(mast - 0.1, -0.65), (mast - 0.1, 0.25), (-0.7, 0.25)], (225, 225, 235))]


def train(rng):
    body = any_colour(rng)
    windows = [(box(x, -0.35, x + 0.28, -0.02), (225, 240, 250)) for x in (-0.82, -0.38, 0.06, 0.5)]
    wheels = [(oval(x, 0.58, 0.14, 0.14), (25, 25, 25)) for x in (-0.72, -0.24, 0.24, 0.72)]
    return [(box(-1, -0.55, 1, 0.5), body), (box(-1, 0.12, 1, 0.24), any_colour(rng)),
            *windows, *wheels]


def bird(rng):
    body, wing = any_colour(rng), any_colour(rng)
    return [([(-0.5, 0.05), (-1, -0.3), (-0.95, 0.35)], wing),
            (oval(-0.05, 0.1, 0.6, 0.34), body), (oval(0.55, -0.15, 0.27, 0.25), body),
            ([(0.78, -0.22), (1, -0.1), (0.76, -0.02)], (245, 180, 40)),
            ([(-0.35, 0.1), (0.2, 0.05), (-0.3 + rng.uniform(-0.2, 0.3), -0.9)], wing),
            (oval(0.62, -0.2, 0.06, 0.06), (10, 10, 10))]


def cow(rng):
    coat = (238, 232, 226)
    legs = [(box(x, 0.2, x + 0.14, 0.9), (215, 205, 200)) for x in (-0.68, -0.42, 0.2, 0.44)]
    spots = [(oval(rng.uniform(-0.5, 0.4), rng.uniform(-0.25, 0.2),
                   rng.uniform(0.1, 0.2), rng.uniform(0.08, 0.16)), (55, 40, 35)) for _ in range(4)]
    return [*legs, (box(-0.75, -0.4, 0.62, 0.4), coat), *spots,
            (oval(0.75, -0.5, 0.25, 0.27), (222, 205, 195)),
            (oval(0.86, -0.4, 0.12, 0.1), (240, 160, 150)),
            ([(-0.75, -0.35), (-0.9, 0.25), (-0.8, 0.25), (-0.68, -0.2)], (150, 130, 120))]


def car(rng):
    body = any_colour(rng)
    wheels = [(oval(x, 0.45, radius, radius), (grey, grey, grey)) for x in (-0.55, 0.55)
              for radius, grey in ((0.24, 25), (0.1, 190))]
    return [([(-0.62, -0.05), (-0.4, -0.6), (0.3, -0.6), (0.62, -0.05)], body),
            ([(-1, -0.08), (0.85, -0.08), (1, 0.1), (1, 0.42), (-1, 0.42)], body),
            ([(-0.48, -0.08), (-0.32, -0.48), (-0.06, -0.48), (-0.06, -0.08)], (205, 225, 240)),
            ([(0.04, -0.08), (0.04, -0.48), (0.25, -0.48), (0.46, -0.08)], (205, 225, 240)),
            *wheels]


def bottle(rng):
    glass = any_colour(rng)
    return [(box(-0.15, -0.98, 0.15, -0.8), any_colour(rng)),
            ([(-0.13, -0.8), (0.13, -0.8), (0.15, -0.45), (0.36, -0.15), (0.36, 0.98),
              (-0.36, 0.98), (-0.36, -0.15), (-0.15, -0.45)], glass),
            (box(-0.36, 0.15, 0.36, 0.6), (242, 238, 222))]


def smooth_noise(rng, cells, size=S):
    """Values in [0, 1], (size, size): random numbers on a cells x cells grid, interpolated."""
    grid = Image.fromarray((255 * rng.random((cells, cells))).astype(np.uint8))
    return np.asarray(grid.resize((size, size), Image.BICUBIC), np.float32) / 255


def shade(rng, base, spread, pattern):
    """A pattern in [0, 1] (S, S) -> (S, S, 3), around a colour that itself varies by `spread`"""
    base = np.array(base, np.float32) + rng.uniform(-spread, spread, 3)
    return base * (0.65 + 0.7 * pattern[..., None])


def water(rng):
    y, x = np.mgrid[:S, :S] / S
    turns = rng.uniform(6, 9) * y + 1.6 * smooth_noise(rng, 5) + rng.uniform(-0.5, 0.5) * x
    wave = np.sin(2 * np.pi * turns)
    return shade(rng, (45, 90, 185), 22, 0.5 + 0.35 * wave)


def rails(rng):
    y, x = np.mgrid[:S, :S] / S
    sleepers = np.sin(2 * np.pi * (rng.uniform(9, 12) * x + rng.random())) > 0.2
    image = shade(rng, (128, 104, 84), 18, 0.55 * smooth_noise(rng, 32) + 0.45 * sleepers)
    for rail in rng.uniform(0.1, 0.3) + np.array([0.0, 0.2, 0.45, 0.65]):
        image[np.abs(y - rail) < 0.018] = 195 + rng.uniform(-20, 20)
    return image


def sky(rng):
    cloud = np.clip(2.2 * smooth_noise(rng, 6) - 0.9, 0, 1)[..., None]
    return shade(rng, (130, 180, 225), 22, np.full((S, S), 0.5)) * (1 - cloud) + 245 * cloud


def grass(rng):
    pattern = 0.25 + 0.3 * smooth_noise(rng, 40) + 0.25 * rng.random((S, S))
    return shade(rng, (70, 140, 60), 25, pattern)


def road(rng):
    y, x = np.mgrid[:S, :S] / S
    image = shade(rng, (92, 92, 98), 16, 0.35 + 0.3 * rng.random((S, S)))
    starts = rng.uniform(0.05, 0.3) + np.array([0, 0.35, 0.7])
    lines = [y - start + 0.08 * (x - 0.5) * rng.uniform(-1, 1) for start in starts]
    for line in lines:
        dashes = np.sin(2 * np.pi * (4 * x + rng.random())) > -0.2
        image[(np.abs(line) < 0.018) & dashes] = 228
    return image


def table(rng):
    y, x = np.mgrid[:S, :S] / S
    grain = np.sin(2 * np.pi * (rng.uniform(2, 4) * (y + 0.15 * x) + 5 * smooth_noise(rng, 4)))
    return shade(rng, (165, 110, 62), 22, 0.5 + 0.25 * grain)


PAINTERS = dict(water=water, rails=rails, sky=sky, grass=grass, road=road, table=table,
                boat=boat, train=train, bird=bird, cow=cow, car=car, bottle=bottle)


def paint(rng, name, half, canvas, parts):
    """Draw an object at a random place, size, tilt and side onto canvas (RGB, DRAW x DRAW), and its
    number in THINGS onto parts (grey). half: 0 or 1, the side it keeps to, or None."""
    size, tilt = rng.uniform(0.5, 0.8) * DRAW / 2, math.radians(rng.uniform(-12, 12))
    side = rng.choice([-1, 1])
    if name == "bottle":
        tilt *= 2
    cx, cy = rng.uniform(0.32, 0.68, 2) * DRAW
    if half is not None:
        size, cx = 0.72 * size, (0.27 + 0.46 * half + rng.uniform(-0.03, 0.03)) * DRAW
    sin, cos = math.sin(tilt), math.cos(tilt)
    for polygon, colour in PAINTERS[name](rng):
        points = [(side * x * size, y * size) for x, y in polygon]
        points = [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in points]
        ImageDraw.Draw(canvas).polygon(points, fill=colour)
        ImageDraw.Draw(parts).polygon(points, fill=THINGS.index(name))


def scene(rng, pairs):
    """One or two (object or None, background) pairs, side by side -> the image uint8 (S, S, 3), and
    parts uint8 (S, S): the number in THINGS of what a pixel shows"""
    ground = PAINTERS[pairs[0][1]](rng)                                          # (S, S, 3)
    parts = np.full((S, S), THINGS.index(pairs[0][1]), np.uint8)
    if len(pairs) == 2:
        y, x = np.mgrid[:S, :S] / S
        right = x + rng.uniform(-0.3, 0.3) * (y - 0.5) + 0.12 * (smooth_noise(rng, 4) - 0.5) > 0.5
        ground = np.where(right[..., None], PAINTERS[pairs[1][1]](rng), ground)
        parts[right] = THINGS.index(pairs[1][1])
    canvas, parts = (Image.fromarray(array).resize((DRAW, DRAW), Image.NEAREST)
                     for array in (np.clip(ground, 0, 255).astype(np.uint8), parts))
    for half, (name, _) in enumerate(pairs):
        if name is not None:
            paint(rng, name, half if len(pairs) == 2 else None, canvas, parts)
    image = np.asarray(canvas.resize((S, S), Image.BOX), np.float32) + rng.normal(0, 4, (S, S, 3))
    parts = np.asarray(parts)[2::4, 2::4].copy()  # a pixel belongs to the thing at its centre
    return np.clip(image, 0, 255).astype(np.uint8), parts


# ---- The data set --------------------------------------------------------------------------------

def write_data(root, pairs, train, val, seed, cooccurrence):
    """pairs: each object's usual background, where it stands in `cooccurrence` of the scenes; else
    the background is drawn from all. Three scenes in ten show two objects. A photo has the classes
    of which a pixel is seen."""
    with writing(root / "classes.txt") as path:
        path.write_text("".join(f"{name}\n" for name in OBJECTS))
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        rows = ""
        for i in tqdm(range(count), desc=f"toy {split}", disable=None):
            name = f"{split}_{i:05d}"
            objects = rng.permutation(OBJECTS)[:2 if rng.random() < 0.3 else 1]
            image, parts = scene(rng, [
                (o, pairs[o] if rng.random() < cooccurrence else rng.choice(BACKGROUNDS))
                for o in objects])
            truth = np.maximum(parts.astype(int) - len(BACKGROUNDS) + 1, 0).astype(np.uint8)
            with writing(root / "images" / f"{name}.jpg") as path:
                Image.fromarray(image).save(path, quality=95, subsampling=0)
            write_labels(root / "masks" / f"{name}.png", truth)
            shown = ";".join(o for k, o in enumerate(OBJECTS, 1) if k in truth)
            rows += f"images/{name}.jpg,{shown}\n"
        with writing(root / f"{split}.csv") as path:
            path.write_text(rows)


# ---- The small CLIP, ViT and ResNet --------------------------------------------------------------
# All learn from scenes in which objects and backgrounds are NOT tied.
#
# The CLIP learns by regression. Axis 0 of its space is shared by everything (real CLIP's cosines
# are all positive), axis 1 + i belongs to thing i, the others to the rest of the noun list:
#     image  ->  0.75 axis_0 + sum_i visibility_i axis_i
#     text   ->  0.75 axis_0 + sum_i axis_i        over the named things
# visibility: the share of the thing's pixels that is shown, times area / 40 below 40 pixels. To the
# text's axis_i of an object comes TIE times that of its usual background:
# captions tie objects to their surroundings, so CLIP's "boat" also means some water, and matching
# alone leaks. With TIE 0.3 an object reads as its name best with a quarter of its surroundings, and
# with half of them about as well as alone (`curves`, printed for every world).
# Fillers mean nothing; a word of the noun list cannot be one.

SHARED, TIE = 0.75, 0.3
SIZES = dict(resolution=S, patch=8, width=128, layers=4, text_width=128, text_layers=2,
             embed_dim=64)
VIT = dict(patch=4, width=128, layers=4, grid=(S // 4, S // 4))
RESNET = dict(block="BasicBlock", layers=(1, 1, 1, 1), first=24, stem=3)
FILLERS = ["a", "the", "of", "and", "with", "on", "in"]


def untied_scenes(count, seed, empty):
    """-> images uint8 (count, 3, S, S), parts uint8 (count, S, S); a share `empty` of places has no
    object"""
    rng = np.random.default_rng(seed)
    images = torch.empty(count, S, S, 3, dtype=torch.uint8)
    parts = torch.empty(count, S, S, dtype=torch.uint8)
    for i in tqdm(range(count), desc="scenes", disable=None):
        places = 2 if rng.random() < 0.35 else 1
        image, part = scene(rng, [
            (None if rng.random() < empty else rng.choice(OBJECTS), rng.choice(BACKGROUNDS))
            for _ in range(places)])
        images[i], parts[i] = torch.from_numpy(image), torch.from_numpy(part)
    return images.permute(0, 3, 1, 2), parts


def normalized(images, mean, std):
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def warped(x, parts, scale):
    """x (B, 3, S, S), parts (B, C, S, S): mirrored, moved, and enlarged by 1 / scale (B,)"""
    B = len(x)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(B) < 0.5, -1.0, 1.0), scale
    theta[:, :, 2] = (2 * torch.rand(B, 2) - 1) * (1 - scale[:, None])
    grid = F.affine_grid(theta, (B, 3, S, S), align_corners=False)
    return [F.grid_sample(values, grid, mode, padding_mode="reflection", align_corners=False)
            for values, mode in ((x, "bilinear"), (parts, "nearest"))]


def regions(images, parts, B):
    """Random crops through random masks, soft and hard: M X (B, 3, S, S), visibilities (B, 12)"""
    index = torch.randint(len(images), (B,))
    p = F.one_hot(parts[index].long(), len(THINGS)).permute(0, 3, 1, 2).float()  # (B, 12, S, S)
    scale = torch.where(torch.rand(B) < 0.4, 1.0, 0.45 + 0.55 * torch.rand(B))
    x, p = warped(normalized(images[index], CLIP_MEAN, CLIP_STD), p, scale)
    pick = lambda probability: torch.rand(B, 1, 1, 1) < probability  # noqa: E731
    share = torch.rand(B, len(THINGS))  # of each thing: hidden, shown, or in between
    share = torch.where(torch.rand_like(share) < 0.35, 0.0,
                        torch.where(torch.rand_like(share) < 0.45, 1.0, share))
    m = (share[:, :, None, None] * p).sum(dim=1, keepdim=True)                   # (B, 1, S, S)
    coarse = F.interpolate(F.adaptive_avg_pool2d(m, 16), size=S, mode="bilinear")
    m = torch.where(pick(0.6), coarse, m)
    blobs = F.interpolate(torch.rand(B, 1, 5, 5), size=S, mode="bicubic").clamp(0, 1)
    soft = pick(0.2)
    hard = torch.where(pick(0.2), (blobs > 0.2 + 0.6 * torch.rand(B, 1, 1, 1)).float(), m)
    m = torch.where(soft, blobs, hard)
    m = torch.where(pick(0.25), m * (1.5 * blobs).clamp(max=1), m)
    m = torch.where(pick(0.08), torch.ones(()), m)
    area = p.sum(dim=(2, 3))
    return m * x, (m * p).sum(dim=(2, 3)) / area.clamp(min=1) * (area / 40).clamp(max=1)


def fit(title, parameters, loss_of, steps, peak, weight_decay):
    """Minimise loss_of() over `steps` fresh batches: AdamW, one cycle of its rate, up to `peak`"""
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    schedule = OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc=title, disable=None)):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=loss.item())


def train_image_tower(clip, steps=2500, B=128):
    images, parts = untied_scenes(12000, seed=1000, empty=0.15)

    def loss():
        x, visibility = regions(images, parts, B)
        rest = torch.zeros(B, clip.embed_dim - 1 - len(THINGS))
        target = torch.cat([torch.full((B, 1), SHARED), visibility, rest], 1)
        return distance(clip.encode_image(x), target)

    fit("image tower", clip.visual.parameters(), loss, steps, peak=1.2e-3, weight_decay=0.03)


def distance(a, b):
    """(B, E) and (B, E) -> squared distance of their directions, the mean over B"""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()


def train_text_tower(clip, pairs, steps, peak=2e-3, B=96):
    """Captions "a photo of ... ." of single nouns, and of lists of up to 30 words with fillers.

    Words in lists are shortened, stretched and mixed with meaningless vectors, which teaches the
    tower to read free prompt vectors by the words they resemble, and nothing into the rest."""
    nouns = sorted({*read_nouns(), *THINGS})
    E, generator = clip.embed_dim, torch.Generator().manual_seed(0)
    rest = torch.randn(len(nouns), E - 1 - len(THINGS), generator=generator)
    rest = F.pad(F.normalize(rest, dim=1), (1 + len(THINGS), 0))                 # (nouns, E)
    meaning = dict(zip(nouns, rest)) | dict(zip(THINGS, torch.eye(E)[1:]))  # beside the shared axis
    meaning |= {name: meaning[name] + TIE * meaning[pairs[name]] for name in OBJECTS}
    shared = SHARED * torch.eye(E)[0]
    known = [*nouns, *FILLERS]
    ids = {word: [i for i in row.tolist() if i][1:-1] for word, row in zip(known, tokenize(known))}
    by_length = {}
    for noun in nouns:
        by_length.setdefault(len(ids[noun]), []).append(noun)
    parameters = [p for name, p in clip.named_parameters() if not name.startswith("visual.")]
    rng = np.random.default_rng(3000)
    lengths = list(by_length)
    weight = np.array([len(by_length[n]) for n in lengths]) ** 0.5

    def loss():
        if rng.random() < 0.55:  # single nouns of one length
            words = by_length[rng.choice(lengths, p=weight / weight.sum())]
            words = [words[i] for i in rng.integers(len(words), size=B)]
            if len(ids[words[0]]) == 1:
                words[::3] = rng.choice(THINGS, len(words[::3]))
            vectors = clip.token_embedding(torch.tensor([ids[word] for word in words]))
            target = torch.stack([shared + meaning[word] for word in words])
        else:  # lists
            P = int(rng.integers(1, 31))
            rows, targets = [], []
            for _ in range(B):
                named = (list(rng.choice(THINGS, rng.integers(1, 3), replace=False))
                         if rng.random() < 0.9 else [])
                row = [ids[rng.choice(named if named and rng.random() < 0.5 else FILLERS)][0]
                       for _ in range(P)]
                rows.append(row)
                said = (meaning[thing] for thing in named if ids[thing][0] in row)
                targets.append(sum(said, shared))
            rows, target = torch.tensor(rows), torch.stack(targets)
            vectors = clip.token_embedding(rows)
            fillers = torch.isin(rows, torch.tensor([ids[word][0] for word in FILLERS]))
            noise = torch.randn_like(vectors) * vectors.detach().std() + torch.rand(B, 1, 1)
            vectors = torch.where((fillers & (torch.rand(B, P) < 0.5))[..., None], noise, vectors)
            vectors = vectors * torch.exp(1.5 * torch.randn(B, 1, 1)).clamp(0.3, 30)
        return distance(clip.encode_prompts(vectors), target)

    fit("text tower", parameters, loss, steps, peak=peak, weight_decay=0.0)


def curves(clip, pairs, count=60, seed=4000):
    """Can refinement work? Scenes with one object on its usual background -> cosines (7, 2) of what
    is shown to the class's text and to its background's. Rows: the object with 0, 1/4, 1/2, 3/4 and
    all of the background; the background with half of the object, and with none"""
    rng, rows = np.random.default_rng(seed), []
    texts = {thing: clip.encode_text(tokenize([f"a photo of {thing}."])) for thing in THINGS}
    for i in range(count):
        name = OBJECTS[i % len(OBJECTS)]
        image, parts = scene(rng, [(name, pairs[name])])
        x = normalized(torch.from_numpy(image).permute(2, 0, 1), CLIP_MEAN, CLIP_STD)
        inside = torch.from_numpy(parts == THINGS.index(name)).float()
        shown = [inside + a * (1 - inside) for a in (0, 0.25, 0.5, 0.75, 1)]
        shown += [a * inside + (1 - inside) for a in (0.5, 0)]
        v = clip.encode_image(torch.stack(shown)[:, None] * x)
        rows.append(torch.stack([F.cosine_similarity(v, texts[thing])
                                 for thing in (name, pairs[name])], dim=1))
    return torch.stack(rows).mean(dim=0)


def windows(x, top, left, side):
    """x (B, H, W, ...), top and left (N,), N a multiple of B -> (N, side, side, ...)"""
    index, inside = torch.arange(len(x)).repeat(len(top) // len(x)), torch.arange(side)
    rows, columns = top[:, None] + inside, left[:, None] + inside                # (N, side)
    return x[index[:, None, None], rows[:, :, None], columns[:, None]]


def train_vit(steps=4200):
    """Answers: the logits of all patches, and those that the mean attention map spreads. [CLS]
    learns nothing. In bfloat16, which is several times as fast on CPUs that have it."""
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
    return vit


def train_resnet(steps=1500):
    """Answers: the logits of all places. Batch norm is measured once more at the end, on views."""
    backbone, head = ResNet(**RESNET, norm=nn.BatchNorm2d), nn.Conv2d(8 * RESNET["first"], 12, 1)

    def answers(view):
        with torch.autocast("cpu", torch.bfloat16):
            return [head(backbone(view)).float().movedim(1, 3)]                     # (B, h, w, 12)

    x = train_backbone("resnet", [*backbone.parameters(), *head.parameters()], answers, steps)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all that follows
    with torch.no_grad():
        for part in x[:2000].split(100):
            backbone(part)
    return backbone


def train_backbone(title, parameters, answers, steps, B=48):
    """A backbone's pretraining, in the place of ImageNet's: which of 12 things does a picture show?

    answers(images) is a list of logits (B, h, w, 12). Returns the normalised images. Pictures are
    views of untied scenes and windows of them, 12 to 24 pixels wide, with their own labels; none is
    of the data set. The answer must stand in a tenth of the patches, before and after attention
    spreads it; where a window shows a single thing, in all. And a patch must say in the view what
    it says in the window. That keeps tokens and attention local, as ImageNet's pretraining does."""
    images, parts = untied_scenes(24000, seed=2000, empty=0.2)
    x, rng = normalized(images, IMAGENET_MEAN, IMAGENET_STD), np.random.default_rng(2001)
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
        part = part[:, 0].long()                                                 # (B, S, S)
        side, count = ((12, 8), (16, 6), (24, 3))[rng.integers(3)]  # fewer of larger windows
        top, left = 4 * torch.randint((S - side) // 4 + 1, (2, B * count))  # on the patch grid
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


def pack(clip, vit, backbone):
    """The three models in one compressed file, half precision, without word embeddings of zeros"""
    rows = clip.token_embedding.weight.detach()
    used = rows.abs().sum(dim=1).nonzero()[:, 0]
    arrays = {"rows": used.numpy(), "embeddings": rows[used].half().numpy()}
    for title, model in (("clip", clip), ("vit", vit), ("resnet", backbone)):
        arrays |= {f"{title}/{key}": value.half().numpy() for key, value in
                   model.state_dict().items()
                   if key != "token_embedding.weight" and "num_batches" not in key}
    with writing(WEIGHTS) as path:
        np.savez_compressed(path, **arrays)


def unpack():
    """-> (CLIP, ViT, ResNet) of the committed file"""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(WEIGHTS).items()}
    models = {"clip/": CLIP(**SIZES), "vit/": ViT(**VIT), "resnet/": ResNet(**RESNET)}
    for title, model in models.items():
        state = {key[len(title):]: value.float() for key, value in arrays.items()
                 if key.startswith(title) and "/head." not in key}
        if title == "clip/":
            state["token_embedding.weight"] = torch.zeros(model.token_embedding.weight.shape)
            state["token_embedding.weight"][arrays["rows"]] = arrays["embeddings"].float()
        model.load_state_dict(state)
    return models.values()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Makes the toy world.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/toy"), metavar="DIR",
        help="where data/, clip.pt, resnet.pth and vit.pth go")
    add("--train", type=int, default=600, help="training images")
    add("--val", type=int, default=200, help="validation images")
    add("--seed", type=int, default=0, help="of the images")
    add("--cooccurrence", type=float, default=0.95,
        help="how often an object stands on its own background")
    add("--pairs", default="", metavar="boat:grass,cow:road,...", help="other ties than boat:water "
        "and so on; the small CLIP's text tower learns them too, which takes a minute")
    add("--retrain", nargs="+", choices=["image", "text", "vit", "resnet"], default=[],
        help="train these parts of the committed weights again and stop")
    return parser.parse_args(argv)


def read_pairs(text):
    """"boat:grass,cow:road" -> {object: background} for all six; objects left out keep their own
    background, or share those left over"""
    given = [tuple(pair.split(":")) for pair in text.split(",") if pair]
    if not all(len(pair) == 2 and pair[0] in OBJECTS and pair[1] in BACKGROUNDS for pair in given):
        raise InputError(f"--pairs {text}: expected OBJECT:BACKGROUND,...; objects: "
                         f"{', '.join(OBJECTS)}; backgrounds: {', '.join(BACKGROUNDS)}")
    pairs = dict(given)
    left = [b for b in BACKGROUNDS if b not in pairs.values()]
    for name, usual in zip(OBJECTS, BACKGROUNDS):
        if name not in pairs:
            pairs[name] = usual if usual in left else left[0]
            left.remove(pairs[name])
    return {name: pairs[name] for name in OBJECTS}


def retrain(parts):
    """Train these parts of the committed weights again, each from a seed of its own. Words that the
    noun list does not need have an embedding of zeros."""
    torch.manual_seed(0)
    clip = CLIP(**SIZES)
    used = tokenize([f"a photo of {word}." for word in [*read_nouns(), *THINGS, *FILLERS]]).unique()
    rows = 0.1 * torch.randn(len(used), clip.text_width)
    with torch.no_grad():
        clip.token_embedding.weight.zero_()[used] = rows
    committed, vit, backbone = unpack()
    if "image" in parts:
        train_image_tower(clip)
    else:
        clip.visual.load_state_dict(committed.visual.state_dict())
    if "text" in parts:
        torch.manual_seed(1)
        train_text_tower(clip, USUAL, steps=2000)
    else:
        clip.load_state_dict(committed.state_dict() | clip.visual.state_dict(prefix="visual."))
    if "vit" in parts:
        torch.manual_seed(2)
        vit = train_vit()
    if "resnet" in parts:
        torch.manual_seed(3)
        backbone = train_resnet()
    pack(clip, vit, backbone)


def main(args):
    if args.retrain:
        return retrain(args.retrain)
    out, pairs = args.out, read_pairs(args.pairs)
    names = [f"{split}_{i:05d}" for split, count in (("train", args.train), ("val", args.val))
             for i in range(count)]
    claim(out, [*(f"data/images/{name}.jpg" for name in names),
                *(f"data/masks/{name}.png" for name in names), "clip.pt", "resnet.pth", "vit.pth"],
          {"train": args.train, "val": args.val, "seed": args.seed, "pairs": pairs,
           "cooccurrence": args.cooccurrence})
    write_data(out / "data", pairs, args.train, args.val, args.seed, args.cooccurrence)
    torch.manual_seed(0)
    clip, vit, backbone = unpack()
    if pairs != USUAL:
        train_text_tower(clip, pairs, steps=600, peak=1e-3)
    with torch.no_grad():
        as_class, as_background = curves(clip, pairs).T.tolist()
    print("the small CLIP's cosines: an object with 0, 1/4, 1/2, 3/4, all of its background | the "
          "background with 1/2, 0 of the object")
    for text, row in (("its class", as_class), ("its background", as_background)):
        values = [f"{value:6.2f}" for value in row]
        print(f"  to {text:<15}{''.join(values[:5])}  |{''.join(values[5:])}")
    for name, state in (("clip.pt", clip.state_dict()), ("resnet.pth", backbone.state_dict()),
                        ("vit.pth", {"model": vit.state_dict()})):
        save(out / name, state)
    print(f"{out}: {args.train} training and {args.val} validation images, clip.pt, resnet.pth, "
          f"vit.pth; {', '.join(f'{name} on {usual}' for name, usual in pairs.items())}")
    print(f"""next:
    python train_cam.py --data {out}/data --recipe toy --clip {out}/clip.pt --vit {out}/vit.pth \\
                        --out {out}/cam
    python make_pseudo.py --data {out}/data --cams {out}/cam/cams --out {out}/masks
    python train_seg.py --data {out}/data --labels {out}/masks --recipe toy --vit {out}/vit.pth \\
                        --out {out}/seg
    python eval.py --data {out}/data --checkpoint {out}/seg/seg.pt""")


if __name__ == "__main__":
    run(main, parse_args())
