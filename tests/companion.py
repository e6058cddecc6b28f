"""The pictures and tables of docs/method.md, and a page that shows a whole run: RUN/index.html. Two minutes on two cores.

    python tests/companion.py --run runs/toy                          # after make demo, which ends with this
    python tests/companion.py --run runs/toy --figures figures/method # the pictures of docs/method.md as well

Reads a finished run of tests/demo.py on the toy world with the ViT, and writes RUN/companion/*.png, RUN/companion/tables.json
and RUN/index.html. Drawn with Pillow alone; the same run gives the same bytes. What uses true masks or true background words says
so: it is analysis, nothing is trained or chosen by it. One section a picture, in the order of docs/method.md.
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


def plot(curves, path, x_label, y_label, marks=(), size=(520, 300), low=None, high=None):
    """curves {name: (xs, ys)} -> a PNG; marks [(x, text)], vertical lines; low, high of the y axis, from the values if None"""
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
    for i in range(5):
        y, x = low + (high - low) * i / 4, x0 + (x1 - x0) * i / 4
        pen.line([place(x0, y), place(x1, y)], GREY)
        pen.text((left - 6, place(x0, y)[1]), f"{y:.2f}", INK, font, anchor="rm")
        pen.text((place(x, low)[0], bottom + 4), f"{x:,.0f}" if x1 > 20 else f"{x:.2f}", INK, font, anchor="ma")
    for x, text in marks:
        pen.line([place(x, low), place(x, high)], (150, 150, 150))
        pen.text((place(x, high)[0] + 3, top + 2), text, INK, font)
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
    colour = np.where(v > 0, np.array([230, 40, 30]), np.array([30, 70, 220]))
    return Image.fromarray(
        (0.5 * (1 - abs(v)) * grey.mean(axis=2, keepdims=True) + 127 * (1 - abs(v)) + abs(v) * colour).astype(np.uint8)
    )


def as_picture(X):
    """X (3, R, R) in CLIP's normalisation -> picture"""
    pixels = X * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    return v2.functional.to_pil_image(pixels.clamp(0, 1))


def grown(array, side):
    """(h, w) -> float (side, side), bilinear"""
    return F.interpolate(torch.as_tensor(array, dtype=torch.float32)[None, None], size=(side, side), mode="bilinear")[0, 0].numpy()


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
        return Run(
            folder,
            split,
            clip,
            class_texts(clip, split.words, "cpu"),
            train_cam.load_background(None, folder / "cam/prompts.pt", clip, split),
            words,
            class_texts(clip, words, "cpu"),
            {phase: load_generator(folder / f"cam/{phase}.pt", split.classes) for phase in ("classify", "match", "refine")},
            examples(split, len(split.classes)),
            begun["seed"],
        )


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
    rows = []
    for name in r.chosen:
        k, photo = class_of(r, name), r.split.image(name)
        generator = r.generators["classify"]
        _, logits = generator(scaled_input(photo, 1, generator.trunk.patch))
        p = logits.mean(dim=0)[0].sigmoid()
        best = p.argsort(descending=True)[:3].tolist()
        told = "\n".join(f"{r.split.classes[i]} {p[i]:.2f}" for i in best)
        pixels = np.array(photo)
        rows.append(
            [
                (photo, told),
                *(
                    (heat(pixels, read_cams(r.folder / f"cams_{phase}", name, [k], pixels.shape[:2])), "")
                    for phase in ("classify", "match", "refine")
                ),
            ]
        )
    sheet(rows, out / "1_looks.png", ("photo, P(class)", "classification", "matching", "refinement"), lines=3)
    shares = {}
    for phase in ("classify", "match", "refine"):  # ANALYSIS: with true masks
        found = []
        for name in [name for name in r.split.names if r.split.labels[name].sum() == 1][:100]:
            k = class_of(r, name)
            cam = read_cams(r.folder / f"cams_{phase}", name, [k], r.split.image(name).size[::-1])[0].numpy()
            found.append(float(cam[truth(r, name, k)].sum() / max(cam.sum(), 1e-9)))
        shares[phase] = round(float(np.mean(found)), 3)
    return {"share of the CAM's mass on the object": shares}


def cooccurrence(r, out):
    """The ablation's table in docs/results.md, drawn; not of this run"""
    text, curves = (ROOT / "docs/results.md").read_text(encoding="utf-8"), {}
    usual = {"classification": "classification", "matching": "matching only", "the method": "the method"}
    for name, at_95 in usual.items():
        found = {95: float(re.findall(rf"^    {at_95} +([\d.]+) ±", text, re.M)[-1])}
        found |= {int(p): float(v) for p, v in re.findall(rf"^    co-occurrence (\d+) %, {name} +([\d.]+) ±", text, re.M)}
        curves[name] = zip(*sorted(found.items()), strict=True)
    curves = {name: tuple(map(list, points)) for name, points in curves.items()}
    plot(curves, out / "1_cooccurrence.png", "co-occurrence in %", "mIoU of the CAMs, train", low=0, high=100)
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# 2. The regions CLIP is shown
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def regions(r, out):
    name = r.chosen[0]
    k, X, rows, table = class_of(r, name), view(r, name), [], {}
    for phase in ("classify", "match", "refine"):
        M = mask_of(r, phase, name, k)
        cells = [("X", X, None), ("M X", M * X, 0), ("(1 - M) X", (1 - M) * X, 1)]
        features = [r.clip.encode_image(x) for _, x, _ in cells]
        row = [(as_picture(X[0]), ""), (Image.fromarray((255 * M[0, 0]).byte().numpy()), f"{phase}")]
        for (title, x, _), v in zip(cells, features):
            values = [cosine(v, u[k][None]).item() for u in (r.u_f, r.u_w, r.u_b)]
            table[f"{phase}, {title}"] = [round(value, 2) for value in values]
            if title != "X":
                row.append(
                    (
                        as_picture(x[0]),
                        f"{r.split.classes[k]} {values[0]:.2f}\n{r.words[k]} {values[1]:.2f}\nprompt {values[2]:.2f}",
                    )
                )
        row[0] = (
            row[0][0],
            "\n".join(
                f"{title} {value:.2f}" for title, value in zip((r.split.classes[k], r.words[k], "prompt"), table[f"{phase}, X"])
            ),
        )
        rows.append(row)
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
    names = [name for name in r.split.names if r.split.labels[name].sum() == 1][:count]
    total = torch.zeros(3, len(shares))
    for name in names:
        k, X = class_of(r, name), view(r, name)
        inside = truth(r, name, k, (R, R))
        steps, masks = depth(inside) + 0.001 * np.random.default_rng(0).random((R, R)), []
        for share in shares:
            kept = np.zeros((R, R), bool)
            kept[inside] = steps[inside] >= np.quantile(steps[inside], max(0, 1 - share))
            kept[~inside] = steps[~inside] <= np.quantile(steps[~inside], share - 1) if share > 1 else False
            masks.append(kept)
        v = r.clip.encode_image(torch.from_numpy(np.array(masks, np.float32))[:, None] * X)
        total += torch.stack([cosine(v, u[k][None]) for u in (r.u_f, r.u_w, r.u_b)])
    mean = (total / len(names)).tolist()
    plot(
        {"class text": (shares, mean[0]), "true background word": (shares, mean[1]), "learned prompt": (shares, mean[2])},
        out / "3_growing.png",
        "kept: 1 = the object, 2 = the whole photo",
        "cosine",
        [(1, "the object")],
        low=0,
        high=1,
    )
    loss = [
        [-math.log(min(max(c, 1e-4), 1 - 1e-4)) for c in mean[0]],
        [-math.log(1 - min(max(c, 1e-4), 1 - 1e-4)) for c in mean[2]],
    ]
    plot(
        {"first term of L_match": (shares, loss[0]), "L_refine": (shares, loss[1])},
        out / "3_losses.png",
        "kept: 1 = the object, 2 = the whole photo",
        "loss at the mean cosine",
        [(1, "the object")],
        low=0,
    )
    pick = lambda row: {f"{share:.1f}": round(value, 2) for share, value in zip(shares, row) if round(share, 1) in (0.5, 1, 1.5, 2)}  # noqa: E731
    return {
        "cosine of what is kept": {
            "class text": pick(mean[0]),
            "true background word": pick(mean[1]),
            "learned prompt": pick(mean[2]),
        }
    }


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
    rows, table, side = [], {}, 128
    for name in r.chosen:
        k, X = class_of(r, name), view(r, name)
        features = dense_features(r.clip, X)[0].flatten(1).t()  # (g*g, E)
        photo = np.array(as_picture(X[0]).resize((side, side), Image.BICUBIC))
        row = [(Image.fromarray(photo), "")]
        inside = truth(r, name, k, (r.clip.visual.grid,) * 2).flatten()
        for title, u in (("class text", r.u_f), ("prompt", r.u_b), ("true word", r.u_w)):
            similar = cosine(features, u[k][None]).numpy()
            scaled = (similar - similar.min()) / (similar.max() - similar.min())
            row.append((heat(photo, torch.from_numpy(grown(scaled.reshape(r.clip.visual.grid, -1), side))[None]), ""))
            if 0 < inside.sum() < len(inside):
                table.setdefault(title, []).append((similar[inside].mean(), similar[~inside].mean()))
        rows.append(row)
    sheet(rows, out / "4_heat.png", ("photo", "class text", "learned prompt", "true word"))
    return {
        "mean cosine of patches on the object, beside it": {
            title: [round(float(value), 2) for value in np.mean(pairs, axis=0)] for title, pairs in table.items()
        }
    }


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

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(r.folder / "cam/match.pt", folder)
        train_cam.prompt_learning, train_cam.prompt_loss = watched_learning, watched_loss
        try:
            train_cam.main(
                train_cam.parse_args(
                    [
                        "--data",
                        str(r.folder / "data"),
                        "--recipe",
                        "toy",
                        "--clip",
                        str(r.folder / "clip.pt"),
                        "--out",
                        folder,
                        "--phase",
                        "prompts",
                        "--workers",
                        "0",
                        "--seed",
                        str(recipe["seed"]),
                        "--steps",
                        str(recipe["steps"]),
                        "--batch",
                        str(recipe["batch"]),
                    ]
                )
            )
        finally:
            train_cam.prompt_learning, train_cam.prompt_loss = learn
        again = [read_checkpoint(Path(at) / "prompts.pt", "vectors", "")["vectors"] for at in (folder, r.folder / "cam")]
    difference = (again[0] - again[1]).abs().max().item()
    if difference > 0.05:
        raise InputError(
            f"{r.folder / 'cam/prompts.pt'}: learned again they differ by {difference}; expected the same but for "
            "rounding; was this run made by another version? run the demo again"
        )
    xs = [(step + 0.5) / per_epoch for step in steps]
    smooth = lambda values: [float(np.mean(values[max(0, i - 4) : i + 5])) for i in range(len(values))]  # noqa: E731
    plot(
        {
            title: (xs, smooth([row[i] for row in losses]))
            for i, title in enumerate(("sim(v^b, u^b), pulled up", "sim(v^f, u^b)", "sim(u^f, u^b), pushed down"))
        },
        out / "4_prompts.png",
        "epoch",
        "cosine",
    )
    return {"nearest word after epochs": {str(epoch): row for epoch, row in words.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# 5. What refinement removes
# ---------------------------------------------------------------------------------------------------------------------


def removes(r, out, count=300):
    """For each class the photo, of the first ones, from whose CAM refinement takes most."""
    found, rows = {}, []
    for name in r.split.names[:count]:
        if r.split.labels[name].sum() == 1:
            k, size = class_of(r, name), r.split.image(name).size[::-1]
            before, after = (read_cams(r.folder / f"cams_{phase}", name, [k], size) for phase in ("match", "refine"))
            taken = (before - after).clamp(min=0).mean().item()
            if taken > found.get(k, (-1,))[0]:
                found[k] = taken, name, before, after
    for k, (_, name, before, after) in sorted(found.items()):
        photo = np.array(r.split.image(name))
        size = photo.shape[:2]
        with torch.no_grad():
            M, X = mask_of(r, "match", name, k), view(r, name)
        M.requires_grad_(True)
        v_f, _ = embed_masked(r.clip, X, M)
        (gradient,) = torch.autograd.grad(refine_loss(v_f, r.u_b[k][None]), M)
        g = grown(F.avg_pool2d(gradient, 5, 1, 2)[0, 0], size[0])
        rows.append(
            [
                (Image.fromarray(photo), ""),
                (heat(photo, before), ""),
                (heat(photo, after), ""),
                (blend(photo, (before - after)[0].numpy()), ""),
                (blend(photo, g / (abs(g).max() + 1e-12)), ""),
            ]
        )
    sheet(rows, out / "5_removes.png", ("photo", "CAM, matching", "CAM, refined", "their difference", "dL_refine / dM"))
    return {}


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
    found = [float(np.nanmean(iou(matrix))) for matrix in counts]
    best = chosen["background_score"]
    plot({"loss under CLIP": (scores, losses)}, out / "6_score.png", "background score", "loss", [(best, f"chosen {best}")])
    plot(
        {"mIoU (analysis only, true masks)": (scores, found)},
        out / "6_miou.png",
        "background score",
        "mIoU",
        [(best, f"chosen {best}")],
    )
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
    return {
        "background score": {
            "chosen": best,
            "mIoU there": round(100 * found[scores.index(best)], 1),
            "best mIoU of the 16": round(100 * max(found), 1),
            "at": scores[int(np.argmax(found))],
        }
    }


# ---------------------------------------------------------------------------------------------------------------------
# 7. From masks to a model
# ---------------------------------------------------------------------------------------------------------------------


def model(r, out, count=48):
    """ANALYSIS: of the first photos, the three where the model's labels are better than its teacher's by most, and the worst."""
    segmenter, recipe, classes = load_segmenter(r.folder / "seg/seg.pt")
    C, found = len(classes) + 1, []
    for name in r.split.names[:count]:
        photo = r.split.image(name)
        labels, teacher = (
            read_labels(r.split.root / f"masks/{name}.png", None, C),
            read_labels(r.folder / f"masks/{name}.png", None, C),
        )
        predicted = predict_labels(segmenter, photo, recipe, True, torch.device("cpu"))
        right = [float((each == labels).mean()) for each in (teacher, predicted)]
        found.append((right[1] - right[0], name, right, [photo, *map(coloured, (teacher, predicted, labels))]))
    found.sort(key=lambda row: (row[0], row[1]))
    rows = [
        [
            (cells[0], ""),
            (cells[1], f"{100 * right[0]:.0f} % of pixels right"),
            (cells[2], f"{100 * right[1]:.0f} %"),
            (cells[3], ""),
        ]
        for _, _, right, cells in [*found[:-4:-1], found[0]]
    ]
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
        plot(
            {name: (xs, [row[name] for row in rows]) for name in names},
            out / f"log_{path.parent.name}_{phase}.png",
            "step",
            "loss, and sim in prompts",
            size=(420, 240),
        )
    return [f"log_{path.parent.name}_{phase}.png" for phase in phases]


CAPTIONS = [  # picture, heading or "" where it goes with the one before, what it shows
    (
        "1_looks.png",
        "What a classifier looks at",
        "A photo of each class, the classifier's probabilities; CAMs after classification, matching, refinement (blue 0, red 1).",
    ),
    ("1_cooccurrence.png", "", "mIoU of the CAMs over co-occurrence, from the ablation of three seeds in docs/results.md."),
    (
        "2_regions.png",
        "The regions CLIP is shown",
        "X, mask, kept and dropped region of one photo, with their cosines to the class text, the true background word (analysis "
        "only) and the learned prompt; rows: classification, matching, refinement.",
    ),
    (
        "3_growing.png",
        "L_match as a curve",
        "Cosines of what a mask keeps that grows from the middle of the true object to the whole photo "
        "(analysis only); means of 48 photos.",
    ),
    (
        "3_losses.png",
        "",
        "The same as losses: the pull of L_match is nearly flat from the object to the whole photo, L_refine is not.",
    ),
    (
        "4_heat.png",
        "What the prompts learn",
        "Patch features of CLIP against class text, learned prompt and true background word (analysis only).",
    ),
    ("4_prompts.png", "", "Cosines of the learned prompts with dropped region, kept region and class text during prompt learning."),
    (
        "5_removes.png",
        "What refinement removes",
        "For each class the photo from which refinement takes most: CAM after matching, after refinement, their difference (red: "
        "taken away, blue: added), and the gradient of L_refine on the mask after matching (red: the mask should shrink there).",
    ),
    ("6_score.png", "From CAM to mask", "The loss under CLIP of the 16 background scores; the least is chosen."),
    ("6_miou.png", "", "mIoU of the same scores, found with true masks: analysis only, nothing reads it."),
    ("6_crf.png", "", "The dense CRF after 0, 1, 3 and 10 steps, and the truth."),
    (
        "7_model.png",
        "From masks to a model",
        "Where the model corrects its teacher most, among 48 training photos, and in the last row "
        "where it spoils most (chosen with true masks: analysis only).",
    ),
]


def page(r, tables, logs):
    """RUN/index.html: plain HTML, pictures beside it, no scripts, nothing from the network"""
    table = json.loads((r.folder / "table.json").read_text())
    picture = lambda file, alt: f'<img src="{html.escape(file)}" alt="{html.escape(alt)}">'  # noqa: E731
    figure = lambda file, text: f"<figure>{picture(file, text)}<figcaption>{html.escape(text)}</figcaption></figure>"  # noqa: E731
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"  # noqa: E731
    titles = {
        "classify": "classification CAM",
        "match": "matching CAM",
        "refine": "refined CAM",
        "masks_plain": "pseudo mask, no CRF",
        "masks": "pseudo mask, CRF",
        "seg": "segmentation (val)",
        "full": "fully supervised (val)",
    }
    words = tables["nearest word after epochs"]
    body = [
        "<h1>SemPLeS on the toy world</h1>",
        f"<p>Seed {r.seed}. The method, section by section, with these pictures: docs/method.md.</p>",
        "<h2>Scores</h2><table>",
        cells("th", ("stage", "mIoU")),
        *(cells("td", (titles[key], f"{table[key]:.1f}")) for key in titles),
        "</table>",
        "<h2>A photo of each class</h2>",
        figure("strip.png", "Photo; CAM after classification, matching, refinement; pseudo mask; truth."),
    ]
    for file, heading, text in CAPTIONS:
        body += [f"<h2>{heading}</h2>"] * bool(heading) + [figure(f"companion/{file}", text)]
        if file == "4_prompts.png":
            body += [
                "<p>The noun nearest to each class's prompt after so many epochs:</p>",
                "<div><table>",
                cells("th", ("epoch", *r.split.classes)),
                *(cells("td", (epoch, *row)) for epoch, row in words.items()),
                "</table></div>",
            ]
    body += [
        "<h2>Trainings</h2>",
        *(
            figure(f"companion/{name}", f"Losses of {name.split('_', 2)[2][:-4]} ({name.split('_')[1]}/log.jsonl).")
            for name in logs
        ),
    ]
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
