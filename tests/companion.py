"""The pictures and tables of docs/method.md, and a page that shows a whole run: RUN/index.html. A minute or two on two cores.

    python tests/companion.py --run runs/toy                          # after make demo, which ends with this
    python tests/companion.py --run runs/toy --figures figures/method # the pictures of docs/method.md as well

Reads a finished run of tests/demo.py on the toy world with the ViT, and writes RUN/companion/*.png, RUN/companion/tables.json
and RUN/index.html. Drawn with Pillow alone; the same run gives the same bytes. What uses true masks or true background words says
so: it is analysis, nothing is trained or chosen by it. In the order of docs/method.md.
"""

import argparse
import html
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import toy  # noqa: E402
from PIL import Image, ImageDraw, ImageFont, ImageOps  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

import train_cam  # noqa: E402
from clip_model import CLIP_MEAN, CLIP_STD, InputError, linear, load_clip, nearest_words, read_nouns, run  # noqa: E402
from eval import coloured, confusion_matrix, examples, heat, iou, predict_labels  # noqa: E402
from make_pseudo import PRESETS, dense_crf, hard_unary, read_cams, read_labels, score_labels  # noqa: E402
from mask_generator import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from train_cam import (  # noqa: E402
    Split,
    class_texts,
    clip_view,
    cosine,
    embed_masked,
    load_generator,
    match_loss,
    read_checkpoint,
    refine_loss,
    region_masks,
    scaled_input,
    write_file,
)
from train_seg import load_segmenter  # noqa: E402

INK, GREY = (40, 40, 40), (225, 225, 225)
COLOURS = [(40, 90, 180), (215, 100, 30), (50, 140, 80), (150, 70, 160), (120, 120, 120), (190, 40, 60), (0, 140, 150)]
EPOCHS = (0, 1, 2, 5, 10)  # after which the prompts are looked at


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def sheet(rows, path, head=(), side=128, lines=0):
    """rows of (picture, text below it of so many lines) -> a PNG with a line of headings"""
    font, line = ImageFont.load_default(11), 14
    W, H = side + 8, side + 6 + line * lines
    columns = max(map(len, rows))
    picture = Image.new("RGB", (columns * W, line + 4 + len(rows) * H), "white")
    pen = ImageDraw.Draw(picture)
    for column, text in enumerate(head):
        pen.text((column * W + 4, 2), text, INK, font)
    for y, row in enumerate(rows):
        for x, (cell, text) in enumerate(row):
            at = (x * W + 4, line + 4 + y * H)
            picture.paste(ImageOps.contain(cell.convert("RGB"), (side, side), Image.NEAREST), at)
            pen.text((at[0], at[1] + side + 1), text, INK, font)
    write_file(path, picture.save)


def plot(curves, path, x_label, y_label, ticks=(), marks=(), size=(520, 300), low=None, high=None):
    """curves {name: (xs, ys)} -> a PNG; ticks [x], five even ones if empty; marks [(x, text)], vertical lines; low, high of the
    y axis, from the values if None"""
    font, (W, H) = ImageFont.load_default(11), size
    left, top, right, bottom = 52, 24, W - 12, H - 34
    xs, ys = ([v for curve in curves.values() for v in curve[i]] for i in (0, 1))
    x0, x1 = min(xs), max(xs)
    low, high = min(ys) if low is None else low, max(ys) if high is None else high
    high = high if high > low else low + 1

    def place(x, y):
        return left + (right - left) * (x - x0) / ((x1 - x0) or 1), bottom - (bottom - top) * (y - low) / (high - low)

    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for y in np.linspace(low, high, 5):
        pen.line([place(x0, y), place(x1, y)], GREY)
        pen.text((left - 6, place(x0, y)[1]), f"{y:.0f}" if high > 20 else f"{y:.2f}", INK, font, anchor="rm")
    for x in ticks or np.linspace(x0, x1, 5).round():
        pen.text((place(x, low)[0], bottom + 4), f"{x:g}", INK, font, anchor="ma")
    for x, text in marks:
        pen.line([place(x, low), place(x, high)], (150, 150, 150))
        pen.text((place(x, low)[0] + 3, bottom - (bottom - top) / 4), text, INK, font)
    at = left
    for (name, (xs, ys)), colour in zip(curves.items(), COLOURS):
        points = [place(x, min(max(y, low), high)) for x, y in zip(xs, ys)]
        pen.line(points, colour, 2)
        if len(points) < 25:
            for x, y in points:
                pen.ellipse([x - 2, y - 2, x + 2, y + 2], colour)
        pen.text((at, 5), name, colour, font)
        at += pen.textlength(name, font) + 14
    pen.text((right, H - 14), x_label, INK, font, anchor="ra")
    pen.text((6, H - 14), y_label, INK, font)
    write_file(path, picture.save)


def blend(grey, values):
    """A photo (H, W, 3) in grey under values (H, W) in [-1, 1]: red above 0, blue below"""
    v = np.clip(values, -1, 1)[..., None]
    colour = np.where(v > 0, (230, 40, 30), (30, 70, 220))
    grey = 127 + 0.5 * grey.mean(axis=2, keepdims=True)
    return Image.fromarray(((1 - abs(v)) * grey + abs(v) * colour).astype(np.uint8))


def as_picture(X):
    """X (3, R, R) in CLIP's normalisation -> picture"""
    pixels = X * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    return v2.functional.to_pil_image(pixels.clamp(0, 1))


def grown(array, size):
    """(h, w) -> float array of this size, bilinear"""
    return F.interpolate(torch.as_tensor(array, dtype=torch.float32)[None, None], size=size, mode="bilinear")[0, 0].numpy()


# ---------------------------------------------------------------------------------------------------------------------
# What a run holds
# ---------------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    folder: Path
    split: Split  # of train
    clip: torch.nn.Module
    u_f: torch.Tensor  # (K, E) class texts
    u_b: torch.Tensor  # (K, E) learned prompts
    words: list  # the true background of each class, known from prepare/toy.py; for analysis
    u_w: torch.Tensor  # (K, E) "a photo of WORD."
    generators: dict  # phase: S
    chosen: list  # a photo of each class
    seed: int


def open_run(folder):
    split = Split(folder / "data", "train")
    clip = load_clip(folder / "clip.pt")
    begun = json.loads((folder / "demo.json").read_text())
    pairs = toy.read_pairs(toy.parse_args(begun["world"].split()).pairs)
    words = [pairs[name] for name in split.classes]
    with torch.no_grad():
        u_f, u_w = (class_texts(clip, texts, "cpu") for texts in (split.words, words))
        u_b = train_cam.load_background(None, folder / "cam/prompts.pt", clip, split)
    generators = {phase: load_generator(folder / f"cam/{phase}.pt", split.classes) for phase in ("classify", "match", "refine")}
    return Run(folder, split, clip, u_f, u_b, words, u_w, generators, examples(split, len(split.classes)), begun["seed"])


def with_one_class(r, count):
    """The first photos that show one class: [(name, k)]"""
    return [(name, class_of(r, name)) for name in r.split.names if r.split.labels[name].sum() == 1][:count]


def class_of(r, name):
    return int(r.split.labels[name].nonzero()[0][0])


def view(r, name):
    """A photo as CLIP sees it: X (1, 3, R, R)"""
    photo = v2.functional.pil_to_tensor(r.split.image(name)).float() / 255
    return clip_view(r.clip, v2.functional.normalize(photo, IMAGENET_MEAN, IMAGENET_STD)[None])


def mask_of(r, phase, name, k, eps=0.1):
    """M (1, 1, R, R) that a generator makes of a photo for class k, as in the losses"""
    generator = r.generators[phase]
    cam, _ = generator(scaled_input(r.split.image(name), 1, generator.trunk.patch))
    return region_masks(cam[:, k], (r.clip.resolution, r.clip.resolution), eps)


def truth(r, name, k, size=None):
    """Where a true mask has class k: bool (H, W)"""
    labels = Image.fromarray(read_labels(r.split.root / f"masks/{name}.png", None, len(r.split.classes) + 1))
    return np.array(labels.resize(size or labels.size, Image.NEAREST)) == 1 + k


# ---------------------------------------------------------------------------------------------------------------------
# 1. What a classifier looks at
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def looks(r, out):
    rows, phases = [], ("classify", "match", "refine")
    for name in r.chosen:
        k, photo = class_of(r, name), r.split.image(name)
        generator = r.generators["classify"]
        _, logits = generator(scaled_input(photo, 1, generator.trunk.patch))
        p, pixels = logits.mean(dim=0)[0].sigmoid(), np.array(photo)
        told = "\n".join(f"{r.split.classes[i]} {p[i]:.2f}" for i in p.argsort(descending=True)[:3].tolist())
        cams = [read_cams(r.folder / f"cams_{phase}", name, [k], pixels.shape[:2]) for phase in phases]
        rows.append([(photo, told), *((heat(pixels, cam), "") for cam in cams)])
    sheet(rows, out / "1_looks.png", ("photo, P(class)", "classification", "matching", "refinement"), lines=3)
    shares = []
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks
        inside = truth(r, name, k)
        cams = [read_cams(r.folder / f"cams_{phase}", name, [k], inside.shape)[0].numpy() for phase in phases]
        shares.append([inside.mean(), *(cam[inside].sum() / max(cam.sum(), 1e-9) for cam in cams)])
    shares = dict(zip(("pixels", *phases), np.mean(shares, axis=0)))
    return {"share on the object, of pixels and of the CAM's mass": {key: round(float(x), 3) for key, x in shares.items()}}


def cooccurrence(r, out):
    """The ablation's table in docs/results.md, drawn; not of this run"""
    text, curves = (ROOT / "docs/results.md").read_text(encoding="utf-8"), {}
    usual = {"classification": "classification", "matching": "matching only", "the method": "the method"}
    for name, at_95 in usual.items():
        found = {95: float(re.findall(rf"^    {at_95} +([\d.]+) ±", text, re.M)[-1])}
        found |= {int(p): float(v) for p, v in re.findall(rf"^    co-occurrence (\d+) %, {name} +([\d.]+) ±", text, re.M)}
        curves[name] = zip(*sorted(found.items()), strict=True)
    curves = {name: tuple(map(list, points)) for name, points in curves.items()}
    plot(curves, out / "1_cooccurrence.png", "co-occurrence in %", "mIoU of the CAMs, train", (50, 80, 95, 100), low=0, high=100)
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# 2. The regions CLIP is shown
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def regions(r, out):
    name = r.chosen[0]
    k, X, rows, table = class_of(r, name), view(r, name), [], {}
    words = (r.split.classes[k], r.words[k], "prompt")
    for phase, title in (("classify", "classification"), ("match", "matching"), ("refine", "refinement")):
        M = mask_of(r, phase, name, k)
        row = []
        for region, x in (("X", X), ("M X", M * X), ("(1 - M) X", (1 - M) * X)):
            v = r.clip.encode_image(x)
            values = [cosine(v, u[k][None]).item() for u in (r.u_f, r.u_w, r.u_b)]
            row.append((as_picture(x[0]), "\n".join(f"{word} {value:.2f}" for word, value in zip(words, values))))
            table[f"{phase}, {region}"] = [round(value, 2) for value in values]
        rows.append([row[0], (Image.fromarray((255 * M[0, 0]).byte().numpy()), f"after {title}"), *row[1:]])
    sheet(rows, out / "2_regions.png", ("X", "mask M", "X^f = M X", "X^b = (1 - M) X"), lines=3)
    return {"cosines to class, true background word, learned prompt": table}


# ---------------------------------------------------------------------------------------------------------------------
# 3. L_match as a curve
# ---------------------------------------------------------------------------------------------------------------------


def depth(inside):
    """bool (H, W) -> int (H, W): steps to the border, from inside and outside alike"""
    steps = np.zeros(inside.shape, int)
    for part in (inside, ~inside):
        rest, step = torch.from_numpy(part.astype(np.float32))[None, None], 0
        while rest.any():
            step += 1
            steps[rest[0, 0].bool().numpy()] = step
            rest = 1 - F.max_pool2d(1 - rest, 3, 1, 1)
    return steps


@torch.no_grad()
def growing(r, out, count=48):
    """ANALYSIS: masks that grow from the middle of the true object to its border (0 to 1), then over the background (1 to 2)."""
    shares, R = np.linspace(0.1, 2, 20), r.clip.resolution
    lambda_b = read_checkpoint(r.folder / "cam/match.pt", "generator", "")["recipe"]["lambda_b"]
    cosines, losses = torch.zeros(4, len(shares)), torch.zeros(3, len(shares))
    photos = with_one_class(r, count)
    for name, k in photos:
        X, inside = view(r, name), truth(r, name, k, (R, R))
        steps, masks = depth(inside) + 0.001 * np.random.default_rng(0).random((R, R)), []
        for share in shares:
            kept = np.zeros((R, R), bool)
            kept[inside] = steps[inside] >= np.quantile(steps[inside], max(0, 1 - share))
            kept[~inside] = steps[~inside] <= np.quantile(steps[~inside], share - 1) if share > 1 else False
            masks.append(kept)
        v_f, v_b = embed_masked(r.clip, X.expand(len(masks), -1, -1, -1), torch.from_numpy(np.array(masks, np.float32))[:, None])
        u_f, u_w, u_b = (u[k][None] for u in (r.u_f, r.u_w, r.u_b))
        cosines += torch.stack([cosine(v, u) for v, u in ((v_f, u_f), (v_b, u_f), (v_f, u_w), (v_f, u_b))]) / len(photos)
        for i in range(len(shares)):
            f, b = v_f[i : i + 1], v_b[i : i + 1]
            terms = match_loss(f, b, u_f, 0), match_loss(f, b, u_f, lambda_b), refine_loss(f, u_b)
            losses[:, i] += torch.stack(terms) / len(photos)
    titles, at = ("kept, class text", "dropped, class text", "kept, true word", "kept, prompt"), [(1, "the object")]
    curves = {title: (shares, row.tolist()) for title, row in zip(titles, cosines)}
    x_label, ticks = "kept: 1 = the object, 2 = the whole photo", (0.1, 0.5, 1, 1.5, 2)
    plot(curves, out / "3_growing.png", x_label, "cosine", ticks, at, low=0, high=1)
    curves = {title: (shares, row.tolist()) for title, row in zip(("L_match, first term", "L_match", "L_refine"), losses)}
    plot(curves, out / "3_losses.png", x_label, "loss", ticks, at, low=0)

    def pick(rows, names):
        wanted = [i for i, share in enumerate(shares) if round(share, 1) in (0.5, 1, 1.5, 2)]
        return {name: {f"{shares[i]:.1f}": round(row[i].item(), 2) for i in wanted} for name, row in zip(names, rows)}

    return {"growing, cosines": pick(cosines, titles), "growing, losses": pick(losses, ("first term", "L_match", "L_refine"))}


# ---------------------------------------------------------------------------------------------------------------------
# 4. What the prompts learn
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dense_features(clip, X):
    """X (N, 3, R, R) -> (N, E, g, g): a feature of each patch, the value path of the last block, projected as the class token is.
    After MaskCLIP (Zhou, Loy, Dai: Extract Free Dense Labels from CLIP, ECCV 2022)."""
    visual, caught = clip.visual, []
    last = visual.transformer.resblocks[-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    clip.encode_image(X)
    hook.remove()
    D = caught[0].shape[2]
    value = linear(last.ln_1(caught[0]), last.attn.in_proj_weight[2 * D :], last.attn.in_proj_bias[2 * D :])  # (N, T, D)
    features = visual.ln_post(last.attn.out_proj(value)) @ visual.proj  # (N, T, E)
    return features[:, 1:].transpose(1, 2).unflatten(2, (visual.grid, visual.grid))


def heat_maps(r, out):
    rows, side, grid = [], 128, r.clip.visual.grid

    def similar(name, k):  # -> {text: (g, g)}
        features = dense_features(r.clip, view(r, name))[0].flatten(1).t()  # (g*g, E)
        texts = (("class text", r.u_f), ("prompt", r.u_b), ("true word", r.u_w))
        return {title: cosine(features, u[k][None]).reshape(grid, grid).numpy() for title, u in texts}

    for name in r.chosen:
        photo = np.array(as_picture(view(r, name)[0]).resize((side, side), Image.BICUBIC))
        scaled = [(m - m.min()) / (m.max() - m.min()) for m in similar(name, class_of(r, name)).values()]
        maps = [torch.from_numpy(grown(m, (side, side)))[None] for m in scaled]
        rows.append([(Image.fromarray(photo), ""), *((heat(photo, m), "") for m in maps)])
    sheet(rows, out / "4_heat.png", ("photo", "class text", "learned prompt", "true word"))

    table = defaultdict(list)
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks, brought to the patches
        inside = truth(r, name, k, (grid, grid))
        if 0 < inside.sum() < inside.size:
            for title, m in similar(name, k).items():
                for kind in ("all", r.split.classes[k]):
                    table[title, kind].append((m[inside].mean(), m[~inside].mean()))
    rounded = {", ".join(key): [round(float(x), 2) for x in np.mean(pairs, axis=0)] for key, pairs in sorted(table.items())}
    return {"mean cosine of patches on the object, beside it": rounded}


def prompts_again(r, out):
    """Prompt learning once more, watched: train_cam's own phase, which must give the run's prompts again."""
    steps, losses, words, learn = [], [], {}, (train_cam.prompt_learning, train_cam.prompt_loss)
    recipe = read_checkpoint(r.folder / "cam/prompts.pt", "vectors", "")["recipe"]
    per_epoch = len(r.split.names) / recipe["batch"]
    wanted = {round(epoch * per_epoch): epoch for epoch in EPOCHS}
    nouns = sorted({*read_nouns(), *r.split.words})

    def watched_learning(prompts, image, labels, **others):
        if len(steps) in wanted:
            with torch.no_grad():
                u_b = prompts(torch.arange(len(r.split.classes)))
            words[wanted[len(steps)]] = [row[0][0] for row in nearest_words(u_b, nouns, r.clip)]
        return learn[0](prompts, image, labels, **others)

    def watched_loss(v_b, u_b, u_f, lambda_t, repel, v_f):
        steps.append(len(steps))
        with torch.no_grad():
            losses.append([cosine(v_b, u_b).mean().item(), cosine(v_f, u_b).mean().item(), cosine(u_f, u_b).mean().item()])
        return learn[1](v_b, u_b, u_f, lambda_t, repel, v_f)

    flags = {"data": r.folder / "data", "clip": r.folder / "clip.pt", "recipe": "toy", "phase": "prompts", "workers": 0}
    flags |= {key: recipe[key] for key in ("seed", "steps", "batch")}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(r.folder / "cam/match.pt", folder)
        train_cam.prompt_learning, train_cam.prompt_loss = watched_learning, watched_loss
        try:
            flags = [f"--{key}={value}" for key, value in {**flags, "out": folder}.items()]
            train_cam.main(train_cam.parse_args(flags))
        finally:
            train_cam.prompt_learning, train_cam.prompt_loss = learn
        again = [read_checkpoint(Path(at) / "prompts.pt", "vectors", "")["vectors"] for at in (folder, r.folder / "cam")]
    difference = (again[0] - again[1]).abs().max().item()
    if difference > 0.05:
        raise InputError(f"{r.folder / 'cam/prompts.pt'}: learned again they differ by {difference}; expected the same but for "
                         "rounding; was this run made by another version? run the demo again")
    xs = [(step + 0.5) / per_epoch for step in steps]
    smooth = lambda values: [float(np.mean(values[max(0, i - 4) : i + 5])) for i in range(len(values))]  # noqa: E731
    titles = ("sim(v^b, u^b), pulled up", "sim(v^f, u^b)", "sim(u^f, u^b), pushed down")
    curves = {title: (xs, smooth(row)) for title, row in zip(titles, zip(*losses))}
    plot(curves, out / "4_prompts.png", "epoch", "cosine, means of 9 steps", range(1, math.ceil(max(xs))))
    return {"nearest word after epochs": {str(epoch): row for epoch, row in words.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# 5. What refinement removes
# ---------------------------------------------------------------------------------------------------------------------


def mask_gradient(r, name, k):
    """dL_refine / dM (R, R) of one photo, M that of matching; mean over 5 x 5 pixels"""
    with torch.no_grad():
        M, X = mask_of(r, "match", name, k), view(r, name)
    M.requires_grad_(True)
    v_f, _ = embed_masked(r.clip, X, M)
    (gradient,) = torch.autograd.grad(refine_loss(v_f, r.u_b[k][None]), M)
    return F.avg_pool2d(gradient, 5, 1, 2)[0, 0]


def removes(r, out, count=300):
    """For each class the photo, of the first ones with one class, whose CAM refinement changes most (mean squared difference)."""
    def cams(name, k, size):
        return (read_cams(r.folder / f"cams_{phase}", name, [k], size) for phase in ("match", "refine"))

    found, rows = {}, []
    for name, k in with_one_class(r, count):
        before, after = cams(name, k, r.split.image(name).size[::-1])
        change = (before - after).square().mean().item()
        if change > found.get(k, (-1,))[0]:
            found[k] = change, name, before, after
    for k, (_, name, before, after) in sorted(found.items()):
        photo = np.array(r.split.image(name))
        g = grown(mask_gradient(r, name, k), photo.shape[:2])
        cells = (Image.fromarray(photo), heat(photo, before), heat(photo, after), blend(photo, (before - after)[0].numpy()),
                 blend(photo, g / (abs(g).max() + 1e-12)))
        rows.append([(cell, "") for cell in cells])
    sheet(rows, out / "5_removes.png", ("photo", "CAM, matching", "CAM, refined", "their difference", "dL_refine / dM"))

    difference, gradient = defaultdict(list), []
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks
        inside = truth(r, name, k)
        before, after = (cam[0].numpy() for cam in cams(name, k, inside.shape))
        for kind in ("all", r.split.classes[k]):
            difference[kind].append([(after - before)[where].mean() for where in (inside, ~inside)])
        g, inside = mask_gradient(r, name, k).numpy(), truth(r, name, k, (r.clip.resolution,) * 2)
        gradient.append([(part[inside].sum() / max(part.sum(), 1e-12)) for part in (g.clip(min=0), (-g).clip(min=0))])
    rounded = {kind: [round(float(x), 3) for x in np.mean(rows, axis=0)] for kind, rows in sorted(difference.items())}
    shares = dict(zip(("red", "blue"), (round(float(x), 3) for x in np.mean(gradient, axis=0))))
    return {"refined minus matching CAM, on the object, beside it": rounded, "share of the gradient on the object": shares}


# ---------------------------------------------------------------------------------------------------------------------
# 6. From CAM to mask
# ---------------------------------------------------------------------------------------------------------------------


def score_and_crf(r, out):
    chosen = json.loads((r.folder / "cams_refine/background.json").read_text())
    scores, losses = [float(score) for score in chosen["losses"]], list(chosen["losses"].values())
    C, counts = len(r.split.classes) + 1, 0
    for name in r.split.names[:: math.ceil(len(r.split.names) / 100)]:  # ANALYSIS: with true masks
        present = r.split.labels[name].nonzero()[0]
        labels = read_labels(r.split.root / f"masks/{name}.png", None, C)
        cams = read_cams(r.folder / "cams_refine", name, present, labels.shape)
        counts = counts + np.stack([confusion_matrix(score_labels(cams, present, score), labels, C) for score in scores])
    found = [100 * float(np.nanmean(iou(matrix))) for matrix in counts]
    best, ticks = chosen["background_score"], [i / 10 for i in range(2, 10)]
    mark = [(best, f"chosen {best}")]
    plot({"2 sim(v_f, u_b) + sim(v_b, u_f) - sim(v_f, u_f)": (scores, losses)}, out / "6_score.png", "background score", "loss", ticks, mark)
    plot({"mIoU (analysis only, true masks)": (scores, found)}, out / "6_miou.png", "background score", "mIoU", ticks, mark)
    rows, preset = [], PRESETS["voc"]
    for name in r.chosen[::2]:
        present, photo = r.split.labels[name].nonzero()[0], np.array(r.split.image(name))
        cams = read_cams(r.folder / "cams_refine", name, present, photo.shape[:2])
        stacked = torch.cat([torch.full_like(cams[:1], best), cams])
        prob = hard_unary(stacked.argmax(0), len(stacked))
        row = [(Image.fromarray(photo), "")]
        for steps in (0, 1, 3, 10):
            Q = dense_crf(torch.from_numpy(photo), prob, preset["gaussian"], preset["bilateral"], iterations=steps)
            row.append((coloured(np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).numpy()]), ""))
        rows.append([*row, (coloured(read_labels(r.split.root / f"masks/{name}.png", None, C)), "")])
    sheet(rows, out / "6_crf.png", ("photo", "CRF, 0 steps", "1 step", "3 steps", "10 steps", "truth"))
    best_found = {"best mIoU of the 16": round(max(found), 1), "at": scores[int(np.argmax(found))]}
    return {"background score": {"chosen": best, "mIoU there": round(float(np.interp(best, scores, found)), 1), **best_found}}


# ---------------------------------------------------------------------------------------------------------------------
# 7. From masks to a model
# ---------------------------------------------------------------------------------------------------------------------


def model(r, out, count=48):
    """ANALYSIS: of the first photos, the three where the model's labels are better than its teacher's by most, and the worst."""
    segmenter, recipe, classes = load_segmenter(r.folder / "seg/seg.pt")
    C, found = len(classes) + 1, []
    for name in r.split.names[:count]:
        photo = r.split.image(name)
        labels, teacher = (read_labels(folder / f"masks/{name}.png", None, C) for folder in (r.split.root, r.folder))
        predicted = predict_labels(segmenter, photo, recipe, True, torch.device("cpu"))
        right = [float((each == labels).mean()) for each in (teacher, predicted)]
        found.append((right[1] - right[0], name, right, [photo, *map(coloured, (teacher, predicted, labels))]))
    found.sort(key=lambda row: (row[0], row[1]))
    rows = []
    for _, _, right, cells in [*found[:-4:-1], found[0]]:
        told = ("", f"{100 * right[0]:.0f} % of pixels right", f"{100 * right[1]:.0f} %", "")
        rows.append(list(zip(cells, told, strict=True)))
    sheet(rows, out / "7_model.png", ("photo", "pseudo mask", "prediction", "truth"), lines=1)
    better = sum(row[0] > 0 for row in found)
    return {"photos on which the model is better than its pseudo mask": f"{better} of {len(found)}"}


# ---------------------------------------------------------------------------------------------------------------------
# Curves of a training, and the page
# ---------------------------------------------------------------------------------------------------------------------


def log_curves(path, out):
    """log.jsonl -> a picture for each phase of all that it logs; returns their names"""
    phases = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        phases[row["phase"]].append(row)
    for phase, rows in phases.items():
        names = [name for name in rows[0] if name not in ("phase", "step", "epoch", "lr", "images_per_s", "eta_s", "gib")]
        xs = [row["step"] for row in rows]
        curves = {name: (xs, [row[name] for row in rows]) for name in names}
        plot(curves, out / f"log_{path.parent.name}_{phase}.png", "step", "loss, and sim in prompts", size=(420, 240))
    return [f"log_{path.parent.name}_{phase}.png" for phase in phases]


CAPTIONS = [  # picture, heading or "" where it goes with the one before, what it shows
    ("1_looks.png", "What a classifier looks at", "A photo of each class, the classifier's probabilities; CAMs after "
     "classification, matching, refinement (blue 0, red 1)."),
    ("1_cooccurrence.png", "", "mIoU of the CAMs over co-occurrence. Not of this run: from the ablation in docs/results.md."),
    ("2_regions.png", "The regions CLIP is shown", "X, mask, kept and dropped region of one photo, with their cosines to the class "
     "text, the true background word (analysis only) and the learned prompt; rows: after classification, matching, refinement."),
    ("3_growing.png", "L_match as a curve", "Cosines of what a mask keeps and drops that grows from the middle of the true object "
     "to the whole photo (analysis only); means of 48 photos."),
    ("3_losses.png", "", "The losses of these masks: L_match, its first term alone, and L_refine."),
    ("4_heat.png", "What the prompts learn", "Patch features of CLIP against class text, learned prompt and true background word "
     "(analysis only); blue the least, red the most similar patch of each photo."),
    ("4_prompts.png", "", "Cosines of the learned prompts with dropped region, kept region and class text during prompt learning."),
    ("5_removes.png", "What refinement removes", "For each class the photo that refinement changes most: CAM after matching, after "
     "refinement, their difference (red: taken away, blue: added), and the gradient of L_refine on the mask after matching "
     "(red: the mask should shrink there; scaled to each photo's maximum)."),
    ("6_score.png", "From CAM to mask", "The loss under CLIP of the 16 background scores; the least is chosen."),
    ("6_miou.png", "", "mIoU of the same scores, found with true masks: analysis only, nothing reads it."),
    ("6_crf.png", "", "The dense CRF after 0, 1, 3 and 10 steps, and the truth."),
    ("7_model.png", "From masks to a model", "Where the model corrects its teacher most, among 48 training photos, and in the last "
     "row where it spoils most (chosen with true masks: analysis only)."),
]
TITLES = {"classify": "classification CAM", "match": "matching CAM", "refine": "refined CAM", "masks_plain": "pseudo mask, no CRF",
          "masks": "pseudo mask, CRF", "seg": "segmentation (val)", "full": "fully supervised (val)"}


def page(r, tables, logs):
    """RUN/index.html: plain HTML, pictures beside it, no scripts, nothing from the network"""
    table = json.loads((r.folder / "table.json").read_text())
    picture = lambda file, alt: f'<img src="{html.escape(file)}" alt="{html.escape(alt)}">'  # noqa: E731
    figure = lambda file, text: f"<figure>{picture(file, text)}<figcaption>{html.escape(text)}</figcaption></figure>"  # noqa: E731
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"  # noqa: E731
    words = tables["nearest word after epochs"]
    body = [
        "<h1>SemPLeS on the toy world</h1>",
        f"<p>Seed {r.seed}. The method, section by section, with these pictures: docs/method.md.</p>",
        "<h2>Scores</h2><table>",
        cells("th", ("stage", "mIoU")),
        *(cells("td", (TITLES[key], f"{table[key]:.1f}")) for key in TITLES),
        "</table>",
        "<h2>A photo of each class</h2>",
        figure("strip.png", "Photo; CAM after classification, matching, refinement; pseudo mask; truth."),
    ]
    for file, heading, text in CAPTIONS:
        body += [f"<h2>{heading}</h2>"] * bool(heading) + [figure(f"companion/{file}", text)]
        if file == "4_prompts.png":
            rows = (cells("td", (epoch, *row)) for epoch, row in words.items())
            body += ["<p>The noun nearest to each class's prompt after so many epochs:</p>", "<div><table>",
                     cells("th", ("epoch", *r.split.classes)), *rows, "</table></div>"]
    body.append("<h2>Trainings</h2>")
    for name in logs:
        _, folder, phase = name[:-4].split("_", 2)
        body.append(figure(f"companion/{name}", f"Losses of {phase} ({folder}/log.jsonl)."))
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><title>SemPLeS on the toy world</title><style>\n'
        "body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem; }\n"
        "img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #444; }\n"
        "div { overflow-x: auto; } td, th { padding: 0.1rem 0.6rem 0.1rem 0; text-align: left; }\n"
        "</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    write_file(r.folder / "index.html", lambda path: path.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Pictures, tables and a page of a finished demo.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="folder of tests/demo.py (default runs/toy)")
    parser.add_argument("--figures", type=Path, help="copy the pictures and tables.json there too")
    return parser.parse_args(argv)


def main(args):
    if not (args.run / "table.json").is_file():
        raise InputError(f"{args.run}: no table.json; expected a finished run of tests/demo.py; run make demo first")
    r, out, tables = open_run(args.run), args.run / "companion", {}
    for section in (looks, cooccurrence, regions, growing, heat_maps, prompts_again, removes, score_and_crf, model):
        tables |= section(r, out)
        print(f"{section.__name__}: drawn", flush=True)
    logs = [name for folder in ("cam", "seg", "full") for name in log_curves(args.run / folder / "log.jsonl", out)]
    write_file(out / "tables.json", lambda path: path.write_text(json.dumps(tables, indent=1) + "\n"))
    page(r, tables, logs)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name in ("tables.json", *(file for file, _, _ in CAPTIONS)):
            shutil.copy(out / name, args.figures)
    print(f"{args.run / 'index.html'}: {len(CAPTIONS) + len(logs)} pictures, tables in {out / 'tables.json'}")


if __name__ == "__main__":
    run(main, parse_args())
