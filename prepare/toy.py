"""The toy world: a data set like PASCAL VOC 2012 in miniature, a small CLIP, a small pretrained ViT and ResNet, from a seed.

    python prepare/toy.py --out runs/toy [--train 600] [--val 200] [--seed 0]
    python prepare/toy.py --retrain image text vit resnet    # the committed weights again (about 20, 2, 35 and 15 minutes)

It carries the paper's story: objects nearly always stand on "their" background (boat on water, train on rails, ...),
so image-level labels cannot tell the two apart, a classifier's CAM leaks, and the learned prompts must name what leaks.
Writes OUT/data (classes.txt, train.csv, val.csv, images/NAME.jpg, masks/NAME.png), OUT/clip.pt (OpenAI's state-dict layout),
OUT/resnet.pth (torchvision's) and OUT/vit.pth (DeiT's). The six scripts read these files like any others.

S is the image side in pixels; a "thing" is an object or a background; things are numbered backgrounds first.
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
from clip_model import CLIP, CLIP_MEAN, CLIP_STD, InputError, at_least, read_nouns, run, tokenize  # noqa: E402
from make_pseudo import write_labels  # noqa: E402
from mask_generator import IMAGENET_MEAN, IMAGENET_STD, ResNet, ViT  # noqa: E402
from train_cam import hold, write_file  # noqa: E402

S = 64
DRAW = 4 * S  # objects are drawn at four times the size and averaged down
BACKGROUNDS = ["water", "rails", "sky", "grass", "road", "table"]
OBJECTS = ["boat", "train", "bird", "cow", "car", "bottle"]  # each on the background of the same place in the list
THINGS = BACKGROUNDS + OBJECTS
WEIGHTS = Path(__file__).with_name("toy_weights.npz")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing. An object is a list of (polygon, colour) in a frame of [-1, 1] x [-1, 1], x to the right and y down.
# ---------------------------------------------------------------------------------------------------------------------

def any_colour(rng, saturation=(0.4, 1.0), value=(0.4, 1.0)):
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


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
    return [(box(-1, -0.55, 1, 0.5), body), (box(-1, 0.12, 1, 0.24), any_colour(rng)), *windows, *wheels]


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
    spots = [(oval(rng.uniform(-0.5, 0.4), rng.uniform(-0.25, 0.2), rng.uniform(0.1, 0.2), rng.uniform(0.08, 0.16)),
              (55, 40, 35)) for _ in range(4)]
    return [*legs, (box(-0.75, -0.4, 0.62, 0.4), coat), *spots,
            (oval(0.75, -0.5, 0.25, 0.27), (222, 205, 195)), (oval(0.86, -0.4, 0.12, 0.1), (240, 160, 150)),
            ([(-0.75, -0.35), (-0.9, 0.25), (-0.8, 0.25), (-0.68, -0.2)], (150, 130, 120))]


def car(rng):
    body = any_colour(rng)
    wheels = [part for x in (-0.55, 0.55) for part in
              ((oval(x, 0.45, 0.24, 0.24), (25, 25, 25)), (oval(x, 0.45, 0.1, 0.1), (190, 190, 190)))]
    return [([(-0.62, -0.05), (-0.4, -0.6), (0.3, -0.6), (0.62, -0.05)], body),
            ([(-1, -0.08), (0.85, -0.08), (1, 0.1), (1, 0.42), (-1, 0.42)], body),
            ([(-0.48, -0.08), (-0.32, -0.48), (-0.06, -0.48), (-0.06, -0.08)], (205, 225, 240)),
            ([(0.04, -0.08), (0.04, -0.48), (0.25, -0.48), (0.46, -0.08)], (205, 225, 240)), *wheels]


def bottle(rng):
    glass = any_colour(rng)
    return [(box(-0.15, -0.98, 0.15, -0.8), any_colour(rng)),
            ([(-0.13, -0.8), (0.13, -0.8), (0.15, -0.45), (0.36, -0.15), (0.36, 0.98), (-0.36, 0.98), (-0.36, -0.15),
              (-0.15, -0.45)], glass),
            (box(-0.36, 0.15, 0.36, 0.6), (242, 238, 222))]


def smooth_noise(rng, cells, size=S):
    """Values in [0, 1], (size, size): random numbers on a cells x cells grid, interpolated."""
    grid = Image.fromarray((255 * rng.random((cells, cells))).astype(np.uint8))
    return np.asarray(grid.resize((size, size), Image.BICUBIC), np.float32) / 255


def shade(rng, base, spread, pattern):
    """Colour a pattern in [0, 1] (S, S) around a base colour that itself varies by `spread`. Returns (S, S, 3)."""
    base = np.array(base, np.float32) + rng.uniform(-spread, spread, 3)
    return base * (0.65 + 0.7 * pattern[..., None])


def water(rng):
    y, x = np.mgrid[:S, :S] / S
    wave = np.sin(2 * np.pi * (rng.uniform(6, 9) * y + 1.6 * smooth_noise(rng, 5) + rng.uniform(-0.5, 0.5) * x))
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
    return shade(rng, (70, 140, 60), 25, 0.25 + 0.3 * smooth_noise(rng, 40) + 0.25 * rng.random((S, S)))


def road(rng):
    y, x = np.mgrid[:S, :S] / S
    image = shade(rng, (92, 92, 98), 16, 0.35 + 0.3 * rng.random((S, S)))
    lines = [(y - at + 0.08 * (x - 0.5) * rng.uniform(-1, 1)) for at in rng.uniform(0.05, 0.3) + np.array([0, 0.35, 0.7])]
    for line in lines:
        image[(np.abs(line) < 0.018) & (np.sin(2 * np.pi * (4 * x + rng.random())) > -0.2)] = 228
    return image


def table(rng):
    y, x = np.mgrid[:S, :S] / S
    grain = np.sin(2 * np.pi * (rng.uniform(2, 4) * (y + 0.15 * x) + 5 * smooth_noise(rng, 4)))
    return shade(rng, (165, 110, 62), 22, 0.5 + 0.25 * grain)


PAINTERS = {f.__name__: f for f in (water, rails, sky, grass, road, table, boat, train, bird, cow, car, bottle)}


def paint(rng, name, parts, canvas):
    """Draw object `name` at a random place, size, tilt and side onto canvas (an RGB image, DRAW x DRAW).
    Marks its pixels in `parts` (a single-channel image of the same size) with its number in THINGS."""
    size, tilt, side = rng.uniform(0.5, 0.8) * DRAW / 2, math.radians(rng.uniform(-12, 12)), rng.choice([-1, 1])
    if name == "bottle":
        tilt *= 2
    centre = rng.uniform(0.32, 0.68, 2) * DRAW
    if parts.info.get("half") is not None:  # one of two: keep to its own side
        size, centre[0] = 0.72 * size, (0.27 + 0.46 * parts.info["half"] + rng.uniform(-0.03, 0.03)) * DRAW
    for polygon, colour in PAINTERS[name](rng):
        points = [(side * x * size, y * size) for x, y in polygon]
        points = [(centre[0] + x * math.cos(tilt) - y * math.sin(tilt), centre[1] + x * math.sin(tilt) + y * math.cos(tilt))
                  for x, y in points]
        ImageDraw.Draw(canvas).polygon(points, fill=colour)
        ImageDraw.Draw(parts).polygon(points, fill=THINGS.index(name))


def scene(rng, pairs):
    """A picture of one or two (object or None, background) pairs, side by side.
    Returns image uint8 (S, S, 3) and parts uint8 (S, S), the number in THINGS of what is seen at each pixel."""
    ground, parts = PAINTERS[pairs[0][1]](rng), np.full((S, S), THINGS.index(pairs[0][1]), np.uint8)
    if len(pairs) == 2:
        y, x = np.mgrid[:S, :S] / S
        right = x + rng.uniform(-0.3, 0.3) * (y - 0.5) + 0.12 * (smooth_noise(rng, 4) - 0.5) > 0.5
        ground = np.where(right[..., None], PAINTERS[pairs[1][1]](rng), ground)
        parts[right] = THINGS.index(pairs[1][1])
    big = lambda array: Image.fromarray(array).resize((DRAW, DRAW), Image.NEAREST)  # noqa: E731
    canvas, parts = big(np.clip(ground, 0, 255).astype(np.uint8)), big(parts)
    for half, (name, _) in enumerate(pairs):
        if name is not None:
            parts.info["half"] = half if len(pairs) == 2 else None
            paint(rng, name, parts, canvas)
    image = np.asarray(canvas.resize((S, S), Image.BOX), np.float32) + rng.normal(0, 4, (S, S, 3))
    # a pixel belongs to the thing at its centre
    return np.clip(image, 0, 255).astype(np.uint8), np.asarray(parts)[2::4, 2::4].copy()


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------

def write_data(root, pairs, train, val, seed, cooccurrence):
    """Write the data set. pairs maps each object to its usual background, where it stands in `cooccurrence` of the
    scenes; elsewhere the background is drawn from all. Three scenes in ten show two objects. A class counts for a photo if at
    least one of its pixels is seen there."""
    write_file(root / "classes.txt", lambda path: path.write_text("".join(f"{name}\n" for name in OBJECTS)))
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        rows = ""
        for name in tqdm([f"{split}_{i:05d}" for i in range(count)], desc=f"toy {split}", disable=None):
            objects = rng.permutation(OBJECTS)[:2 if rng.random() < 0.3 else 1]
            image, parts = scene(rng, [(o, pairs[o] if rng.random() < cooccurrence else rng.choice(BACKGROUNDS))
                                       for o in objects])
            truth = np.where(parts >= len(BACKGROUNDS), parts - len(BACKGROUNDS) + 1, 0).astype(np.uint8)
            write_file(root / "images" / f"{name}.jpg",
                       lambda path: Image.fromarray(image).save(path, quality=95, subsampling=0))
            write_labels(root / "masks" / f"{name}.png", truth)
            rows += f"images/{name}.jpg," + ";".join(o for i, o in enumerate(OBJECTS) if 1 + i in truth) + "\n"
        write_file(root / f"{split}.csv", lambda path: path.write_text(rows))


# ---------------------------------------------------------------------------------------------------------------------
# The small CLIP, the small ViT and the small ResNet. All learn from scenes in which objects and backgrounds are NOT tied.
#
# The CLIP is made by regression: axis 0 of its space is shared by everything (real CLIP's cosines are all positive),
# axis 1 + i belongs to thing i, the others to the rest of the noun list, and
#     image  ->  0.75 axis_0 + sum_i visibility_i axis_i        visibility: share of the thing's pixels that is shown,
#                                                            times area / 40 for things of less than 40 pixels
#     text   ->  0.75 axis_0 + sum_i axis_i over the named things, each object with TIE of its usual background
# Captions tie objects to their surroundings, so CLIP's "boat" also means some water: that is why matching alone leaks. With
# TIE 0.3 an object reads as its name best with a quarter of its usual surroundings, and with half of them about as well as alone
# (`curves`, printed for every world). Fillers mean nothing; a word of the noun list cannot be one.
# ---------------------------------------------------------------------------------------------------------------------

SHARED, TIE = 0.75, 0.3
SIZES = dict(resolution=S, patch=8, width=128, layers=4, text_width=128, text_layers=2, embed_dim=64)
VIT = dict(patch=4, width=128, layers=4, grid=(S // 4, S // 4), num_classes=len(THINGS))
RESNET = dict(block="BasicBlock", layers=(1, 1, 1, 1), first=24, stem=3)
FILLERS = ["a", "the", "of", "and", "with", "on", "in"]


def untied_scenes(count, seed, empty):
    """images uint8 (count, 3, S, S) and parts uint8 (count, S, S); a share `empty` of places has no object."""
    rng = np.random.default_rng(seed)
    images, parts = torch.empty(count, S, S, 3, dtype=torch.uint8), torch.empty(count, S, S, dtype=torch.uint8)
    for i in tqdm(range(count), desc="scenes", disable=None):
        places = 2 if rng.random() < 0.35 else 1
        image, part = scene(rng, [(None if rng.random() < empty else rng.choice(OBJECTS), rng.choice(BACKGROUNDS))
                                  for _ in range(places)])
        images[i], parts[i] = torch.from_numpy(image), torch.from_numpy(part)
    return images.permute(0, 3, 1, 2), parts


def normalized(images, mean, std):
    return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def regions(images, parts, B):
    """A batch of random crops seen through random masks, soft and hard: M X (B, 3, S, S) and visibilities (B, 12)."""
    index = torch.randint(len(images), (B,))
    x = normalized(images[index], CLIP_MEAN, CLIP_STD)
    p = F.one_hot(parts[index].long(), len(THINGS)).permute(0, 3, 1, 2).float()                 # (B, 12, S, S)
    pick = lambda probability: torch.rand(B, 1, 1, 1) < probability  # noqa: E731
    scale = torch.where(torch.rand(B) < 0.4, 1.0, 0.45 + 0.55 * torch.rand(B))
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(B) < 0.5, -1.0, 1.0), scale
    theta[:, :, 2] = (2 * torch.rand(B, 2) - 1) * (1 - scale[:, None])
    grid = F.affine_grid(theta, (B, 3, S, S), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    p = F.grid_sample(p, grid, mode="nearest", padding_mode="reflection", align_corners=False)
    share = torch.rand(B, len(THINGS))  # of each thing: hidden, shown, or in between
    share = torch.where(torch.rand_like(share) < 0.35, 0.0, torch.where(torch.rand_like(share) < 0.45, 1.0, share))
    m = (share[:, :, None, None] * p).sum(dim=1, keepdim=True)                                  # (B, 1, S, S)
    m = torch.where(pick(0.6), F.interpolate(F.adaptive_avg_pool2d(m, 16), size=S, mode="bilinear"), m)
    blobs = F.interpolate(torch.rand(B, 1, 5, 5), size=S, mode="bicubic").clamp(0, 1)
    m = torch.where(pick(0.2), blobs, torch.where(pick(0.2), (blobs > 0.2 + 0.6 * torch.rand(B, 1, 1, 1)).float(), m))
    m = torch.where(pick(0.25), m * (1.5 * blobs).clamp(max=1), m)
    m = torch.where(pick(0.08), torch.ones(()), m)
    area = p.sum(dim=(2, 3))
    return m * x, (m * p).sum(dim=(2, 3)) / area.clamp(min=1) * (area / 40).clamp(max=1)


def directions(pairs, nouns):
    """word -> (E,) what it adds to the shared axis."""
    E = SIZES["embed_dim"]
    free = torch.randn(len(nouns), E - 1 - len(THINGS), generator=torch.Generator().manual_seed(0))
    table = {noun: torch.cat([torch.zeros(1 + len(THINGS)), row]) for noun, row in zip(nouns, F.normalize(free, dim=1))}
    axes = torch.eye(E)
    table |= {thing: axes[1 + i] for i, thing in enumerate(THINGS)}
    table |= {name: axes[1 + THINGS.index(name)] + TIE * axes[1 + THINGS.index(pairs[name])] for name in OBJECTS}
    return table


def fit(title, parameters, loss_of, steps, peak, weight_decay):
    """Minimise loss_of() over `steps` fresh batches: AdamW, one cycle of its rate: peak / 25, up to `peak`, down to about 0."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)  # the schedule sets the rate
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
        target = torch.cat([torch.full((B, 1), SHARED), visibility, torch.zeros(B, clip.embed_dim - 1 - len(THINGS))], 1)
        return (F.normalize(clip.encode_image(x), dim=1) - F.normalize(target, dim=1)).square().sum(dim=1).mean()

    fit("image tower", clip.visual.parameters(), loss, steps, peak=1.2e-3, weight_decay=0.03)


def train_text_tower(clip, pairs, steps, peak=2e-3, B=96):
    """Captions "a photo of ... ." of single nouns and of lists of up to 30 words, among them fillers and noise.

    Words in lists are shortened, stretched and mixed with meaningless vectors, which teaches the tower to read free
    prompt vectors by the words they resemble, and to read nothing into the rest."""
    nouns = sorted({*read_nouns(), *THINGS})
    meaning = directions(pairs, nouns)
    ids = {word: [i for i in row.tolist() if i][1:-1] for word, row in zip([*nouns, *FILLERS], tokenize([*nouns, *FILLERS]))}
    by_length = {}
    for noun in nouns:
        by_length.setdefault(len(ids[noun]), []).append(noun)
    shared = SHARED * torch.eye(clip.embed_dim)[0]
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
                named = list(rng.choice(THINGS, rng.integers(1, 3), replace=False)) if rng.random() < 0.9 else []
                row = [ids[rng.choice(named if named and rng.random() < 0.5 else FILLERS)][0] for _ in range(P)]
                rows.append(row)
                targets.append(shared + sum((meaning[t] for t in named if ids[t][0] in row), torch.zeros(clip.embed_dim)))
            rows, target = torch.tensor(rows), torch.stack(targets)
            vectors = clip.token_embedding(rows)
            fillers = torch.isin(rows, torch.tensor([ids[word][0] for word in FILLERS]))
            noise = torch.randn_like(vectors) * vectors.detach().std() + torch.rand(B, 1, 1)
            vectors = torch.where((fillers & (torch.rand(B, P) < 0.5))[..., None], noise, vectors)
            vectors = vectors * torch.exp(1.5 * torch.randn(B, 1, 1)).clamp(0.3, 30)
        return (F.normalize(clip.encode_prompts(vectors), dim=1) - F.normalize(target, dim=1)).square().sum(dim=1).mean()

    fit("text tower", parameters, loss, steps, peak=peak, weight_decay=0.0)


def curves(clip, pairs, count=60, seed=4000):
    """The two curves that tell whether refinement can work, measured on scenes with one object on its usual background:
    cosines (7, 2) of what is shown to the class's text and to its background's. Rows: the object with 0, 1/4, 1/2, 3/4 and all
    of the background; the background with half of the object, and with none."""
    rng, rows = np.random.default_rng(seed), []
    texts = {thing: clip.encode_text(tokenize([f"a photo of {thing}."])) for thing in THINGS}
    for i in range(count):
        name = OBJECTS[i % len(OBJECTS)]
        image, parts = scene(rng, [(name, pairs[name])])
        x = normalized(torch.from_numpy(image).permute(2, 0, 1), CLIP_MEAN, CLIP_STD)
        inside = torch.from_numpy(parts == THINGS.index(name)).float()
        shown = [inside + a * (1 - inside) for a in (0, 0.25, 0.5, 0.75, 1)] + [a * inside + (1 - inside) for a in (0.5, 0)]
        v = clip.encode_image(torch.stack(shown)[:, None] * x)
        rows.append(torch.stack([F.cosine_similarity(v, texts[thing]) for thing in (name, pairs[name])], dim=1))
    return torch.stack(rows).mean(dim=0)


def new_clip():
    """A CLIP of toy size; the embedding rows of words that the noun list does not need are zero."""
    clip = CLIP(**SIZES)
    used = tokenize([f"a photo of {word}." for word in [*read_nouns(), *THINGS, *FILLERS]]).unique()
    rows = 0.1 * torch.randn(len(used), clip.text_width)
    with torch.no_grad():
        clip.token_embedding.weight.zero_()[used] = rows
    return clip


def zoomed(x, parts, B):
    """B of the images (n, 3, S, S), mirrored at random and enlarged up to twice, with their parts (B, S, S)."""
    index = torch.randint(len(x), (B,))
    scale = torch.where(torch.rand(B) < 0.4, 1.0, 1 / (1 + torch.rand(B)))
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(B) < 0.5, -1.0, 1.0), scale
    theta[:, :, 2] = (2 * torch.rand(B, 2) - 1) * (1 - scale[:, None])
    grid = F.affine_grid(theta, (B, 3, S, S), align_corners=False)
    part = F.grid_sample(parts[index][:, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return F.grid_sample(x[index], grid, padding_mode="reflection", align_corners=False), part[:, 0].long()


def windows(x, top, left, side):
    """x (B, H, W, ...), top and left (N,), N a multiple of B -> (N, side, side, ...): N / B windows of each."""
    index = torch.arange(len(x)).repeat(len(top) // len(x))[:, None, None]
    return x[index, (top[:, None] + torch.arange(side))[:, :, None], (left[:, None] + torch.arange(side))[:, None]]


def train_vit(steps=4200):
    """Answers: the logits of every patch, and those that the mean attention map spreads. [CLS] learns nothing here.

    Runs in bfloat16, several times as fast on CPUs that have it."""
    vit = ViT(**VIT)

    def answers(view):
        with torch.autocast("cpu", torch.bfloat16):
            tokens, (h, w), maps, _ = vit(view, pool="max")
            p2p = maps.mean(dim=1)[:, 1:, 1:]
            logits = vit.head(vit.norm(tokens[:, 1:]))                                          # (B, h*w, 12)
            spread = p2p / p2p.sum(dim=2, keepdim=True) @ logits
        return [z.float().unflatten(1, (h, w)) for z in (logits, spread)]

    train_trunk("vit", vit.parameters(), answers, steps)
    return vit


def train_resnet(steps=1500):
    """Answers: the logits of every place. Batch norm learns in training and is measured once more on whole views at the end."""
    trunk, head = ResNet(**RESNET, norm=nn.BatchNorm2d), nn.Conv2d(8 * RESNET["first"], len(THINGS), 1)

    def answers(view):
        with torch.autocast("cpu", torch.bfloat16):
            return [head(trunk(view)).float().movedim(1, 3)]                                    # (B, h, w, 12)

    x = train_trunk("resnet", [*trunk.parameters(), *head.parameters()], answers, steps)
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all that follows
    with torch.no_grad():
        for part in x[:2000].split(100):
            trunk(part)
    return trunk


def train_trunk(title, parameters, answers, steps, B=48):
    """A trunk's pretraining, in the place of ImageNet's: which of the 12 things are in a picture?

    answers(images) is a list of logits (B, h, w, 12). Returns the images it learned from, normalised.

    Pictures are views of untied scenes and, of each view, windows of 12 to 24 pixels with their own labels, all drawn for this,
    none from the data set. The answer must stand in a tenth of the patches, before and after the attention maps spread it; where
    a window shows a single thing, in all of them. And a patch must say in the view what it says in the window: what lies outside
    is not to matter. That keeps tokens and attention local, which in the paper is the work of ImageNet's pretraining."""
    images, parts = untied_scenes(24000, seed=2000, empty=0.2)
    x, rng = normalized(images, IMAGENET_MEAN, IMAGENET_STD), np.random.default_rng(2001)
    bce = F.binary_cross_entropy_with_logits

    def classify(z, labels):
        top = z.flatten(1, 2).topk(max(1, z.shape[1] * z.shape[2] // 10), dim=1).values         # (B, n, 12)
        return bce(top.mean(dim=1), labels)

    def loss():
        view, part = zoomed(x, parts, B)
        side, count = ((12, 8), (16, 6), (24, 3))[rng.integers(3)]  # windows of a view: fewer of larger ones
        top, left = 4 * torch.randint((S - side) // 4 + 1, (2, B * count))  # on the patch grid
        window, window_part = windows(view.movedim(1, 3), top, left, side).movedim(3, 1), windows(part, top, left, side)
        shows = lambda part, pixels: (F.one_hot(part.flatten(1), len(THINGS)).sum(dim=1) >= pixels).float()  # noqa: E731
        labels = shows(window_part, 6)                                                          # (N, 12)
        whole, near = answers(view), answers(window)
        pure = labels.sum(dim=1) == 1
        says = torch.where(pure[:, None, None, None], 1, near[0].detach().sigmoid()) * labels[:, None, None]
        same = bce(near[0][pure], says[pure]) + sum(bce(z, says) for z in near[1:]) + sum(
            bce(windows(z, top // 4, left // 4, side // 4), says) for z in whole)
        return sum(classify(z, shows(part, 10)) for z in whole) + sum(classify(z, labels) for z in near) + 2 * same

    fit(title, parameters, loss, steps, peak=1.5e-3, weight_decay=0.05)
    return x


def pack(clip, vit, trunk):
    """The three models in one compressed file, half precision; of the 49,408 word embeddings only the rows in use."""
    arrays = {f"clip/{k}": v.half().numpy() for k, v in clip.state_dict().items() if k != "token_embedding.weight"}
    rows = clip.token_embedding.weight.detach()
    used = rows.abs().sum(dim=1).nonzero()[:, 0]
    arrays |= {"rows": used.numpy(), "embeddings": rows[used].half().numpy()}
    arrays |= {f"vit/{k}": v.half().numpy() for k, v in vit.state_dict().items()}
    arrays |= {f"resnet/{k}": v.half().numpy() for k, v in trunk.state_dict().items() if "num_batches" not in k}
    write_file(WEIGHTS, lambda path: np.savez_compressed(path, **arrays))


def unpack():
    """(CLIP, ViT, ResNet) from the committed file."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(WEIGHTS).items()}
    clip, vit, trunk = CLIP(**SIZES), ViT(**VIT), ResNet(**RESNET)
    embedding = torch.zeros_like(clip.token_embedding.weight)
    embedding[arrays["rows"]] = arrays["embeddings"].float()
    states = {tower: {k[len(tower):]: v.float() for k, v in arrays.items() if k.startswith(tower)}
              for tower in ("clip/", "vit/", "resnet/")}
    clip.load_state_dict(states["clip/"] | {"token_embedding.weight": embedding})
    vit.load_state_dict(states["vit/"])
    trunk.load_state_dict(states["resnet/"])
    return clip, vit, trunk


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Makes the toy world.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), metavar="DIR",
                        help="where data/, clip.pt, resnet.pth and vit.pth go")
    parser.add_argument("--train", type=at_least(1), default=600, help="training images")
    parser.add_argument("--val", type=at_least(1), default=200, help="validation images")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the images")
    parser.add_argument("--cooccurrence", type=float, default=0.95, help="how often an object stands on its own background")
    parser.add_argument("--pairs", default="", metavar="boat:grass,cow:road,...", help="other ties than boat:water and so on; "
                        "the small CLIP's text tower learns them too, which takes a minute")
    parser.add_argument("--retrain", nargs="+", choices=["image", "text", "vit", "resnet"], default=[], help="train these parts "
                        "of the committed weights again and stop")
    return parser.parse_args(argv)


def read_pairs(text):
    """"boat:grass,cow:road" -> {object: background} for all six; the objects left out share the backgrounds left over."""
    given = [pair.split(":") for pair in text.split(",") if pair]
    if not all(len(pair) == 2 and pair[0] in OBJECTS and pair[1] in BACKGROUNDS for pair in given):
        raise InputError(f"--pairs {text}: expected OBJECT:BACKGROUND,... like boat:grass,cow:road; objects: {', '.join(OBJECTS)}; "
                         f"backgrounds: {', '.join(BACKGROUNDS)}; correct it")
    given = dict(given)
    left = [b for b in BACKGROUNDS if b not in given.values()]
    pairs = {}
    for name, usual in zip(OBJECTS, BACKGROUNDS):
        if name in given:
            pairs[name] = given[name]
        else:
            pairs[name] = usual if usual in left else left[0]
            left.remove(pairs[name])
    return pairs


def main(args):
    usual = dict(zip(OBJECTS, BACKGROUNDS))
    torch.manual_seed(0)
    if args.retrain:
        clip, (committed, vit, trunk) = new_clip(), unpack()
        if "image" in args.retrain:
            train_image_tower(clip)
        else:
            clip.visual.load_state_dict(committed.visual.state_dict())
        if "text" in args.retrain:
            torch.manual_seed(1)
            train_text_tower(clip, usual, steps=2000)
        else:
            clip.load_state_dict(committed.state_dict() | clip.visual.state_dict(prefix="visual."))
        if "vit" in args.retrain:
            torch.manual_seed(2)
            vit = train_vit()
        if "resnet" in args.retrain:
            torch.manual_seed(3)
            trunk = train_resnet()
        pack(clip, vit, trunk)
        return
    pairs = read_pairs(args.pairs)
    hold(args.out)
    write_data(args.out / "data", pairs, args.train, args.val, args.seed, args.cooccurrence)
    clip, vit, trunk = unpack()
    if pairs != usual:
        train_text_tower(clip, pairs, steps=600, peak=1e-3)
    with torch.no_grad():
        table = curves(clip, pairs).T
    print("what the small CLIP sees: the object and 0, 1/4, 1/2, 3/4, all of its background | half of the object, none of it")
    for name, row in zip(("as its class", "as its background"), table.tolist()):
        print(f"  reads {name:<18}" + "".join(f"{value:6.2f}" for value in row[:5]) + "  |" + "".join(f"{v:6.2f}" for v in row[5:]))
    out = args.out
    write_file(out / "clip.pt", lambda path: torch.save(clip.state_dict(), path))
    write_file(out / "resnet.pth", lambda path: torch.save(trunk.state_dict(), path))
    write_file(out / "vit.pth", lambda path: torch.save({"model": vit.state_dict()}, path))
    print(f"{out}: {args.train} training and {args.val} validation images, clip.pt, resnet.pth, vit.pth; "
          + ", ".join(f"{o} on {b}" for o, b in pairs.items()))
    print(f"""next:
    python train_cam.py   --data {out}/data --recipe toy --clip {out}/clip.pt --vit {out}/vit.pth --out {out}/cam
    python make_pseudo.py --data {out}/data --cams {out}/cam/cams --out {out}/masks
    python train_seg.py   --data {out}/data --labels {out}/masks --recipe toy --vit {out}/vit.pth --out {out}/seg
    python eval.py        --data {out}/data --split val --checkpoint {out}/seg/seg.pt""")


if __name__ == "__main__":
    run(main, parse_args())
