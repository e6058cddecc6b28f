"""The pictures and tables of docs/method.md, and a page that shows a whole run, in its order.

Reads a finished run of demo.py on the toy world. Trains nothing. Writes RUN/strip.png,
RUN/companion/*.png, RUN/companion/tables.json and RUN/index.html; the same run gives the same
bytes. What uses true masks or true background words says ANALYSIS: nothing is chosen by it.

  python experiments/companion.py --run runs/toy            # the last step of make demo: a minute
  python experiments/companion.py --run runs/toy --figures figures/method   # for docs/method.md
"""
import argparse
import html
import json
import math
import re
import shutil
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import toy  # noqa: E402
from clip_model import CLIP_MEAN, CLIP_STD, linear, load_clip  # noqa: E402
from common import (  # noqa: E402
    IMAGENET_MEAN, IMAGENET_STD, InputError, Split, read_cams, read_labels, run, scaled_input,
    writing)
from demo import TABLE  # noqa: E402
from eval import coloured, confusion_matrix, iou, predict_labels  # noqa: E402
from make_pseudo import PRESETS, dense_crf, hard_unary, score_labels  # noqa: E402
from pictures import blend, grown, heat, plot, save, sheet  # noqa: E402
from train_cam import (  # noqa: E402
    Stage, class_texts, clip_view, cosine, embed_masked, load_generator, load_prompts, match_loss,
    recipe_of, refine_loss, region_masks)
from train_seg import load_segmenter  # noqa: E402

CPU, RECIPE = torch.device("cpu"), recipe_of("toy", "match", {})
PHASES = {"classify": "classification", "match": "matching", "refine": "refinement"}  # with CAMs


# ---- What a run holds ----------------------------------------------------------------------------

def open_run(folder):
    """split: of train; u_f, u_b, u_w (K, E): class texts, prompts, words; words: each class's true
    background, for ANALYSIS; generators {phase: S}; chosen [(name, k)]: a photo of each class"""
    split, clip = Split(folder / "data", "train"), load_clip(folder / "clip.pt")
    begun = json.loads((folder / "demo.json").read_text())
    pairs = toy.read_pairs(toy.parse_args(begun["world"].split()).pairs)
    words = [pairs[name] for name in split.classes]
    u_f, u_w = (class_texts(clip, texts, CPU) for texts in (split.words, words))
    args = Namespace(clip=folder / "clip.pt")
    stage = Stage("export", {}, split, folder / "cam", CPU, args, clip, u_f)
    generators = {phase: load_generator(stage, folder / f"cam/{phase}.pt").eval()
                  for phase in PHASES}
    first = [sorted((name for name in split.names if split.labels[name][k]),
                    key=lambda name: split.labels[name].sum())[:1] for k in range(len(words))]
    return Namespace(folder=folder, split=split, clip=clip, u_f=u_f, u_w=u_w, words=words,
                     u_b=load_prompts(stage), generators=generators, seed=begun["seed"],
                     chosen=[(name, k) for k, names in enumerate(first) for name in names])


def with_one_class(r, count):
    """The first photos that show one class: [(name, k)]"""
    found = [(name, r.split.labels[name].nonzero()[0]) for name in r.split.names]
    return [(name, int(k[0])) for name, k in found if len(k) == 1][:count]


def view(r, name):
    """A photo as CLIP sees it: X (1, 3, R, R)"""
    photo = v2.functional.pil_to_tensor(r.split.image(name)).float() / 255
    photo = v2.functional.normalize(photo, IMAGENET_MEAN, IMAGENET_STD)
    return clip_view(r.clip, photo[None])


def forward(r, phase, name):
    """CAM (1, K, h, w) and logits of a whole photo"""
    generator = r.generators[phase]
    return generator(scaled_input(r.split.image(name), 1, generator.trunk.patch, 2500))


def mask_of(r, phase, name, k):
    """M (1, 1, R, R) that a generator makes of a photo for class k, as in the losses"""
    cam, _ = forward(r, phase, name)
    return region_masks(cam[:, k], (r.clip.resolution,) * 2, RECIPE["eps"])


def cams_of(r, name, *phases):
    """The CAMs of each phase that the export wrote: a list of (n, H, W), of the photo's size"""
    size, present = r.split.image(name).size[::-1], r.split.labels[name].nonzero()[0]
    return [read_cams(r.folder / f"cams_{phase}", name, present, size) for phase in phases]


def labels_of(r, name):
    """The pseudo mask and the true mask: uint8 (H, W) twice"""
    return [read_labels(folder / f"masks/{name}.png", None, len(r.split.classes) + 1)
            for folder in (r.folder, r.split.root)]


def truth(r, name, k, size=None):
    """Where a true mask has class k: bool (H, W)"""
    labels = Image.fromarray(labels_of(r, name)[1])
    return np.array(labels.resize(size or labels.size, Image.NEAREST)) == 1 + k


def as_picture(X):
    """X (3, R, R) in CLIP's normalisation -> picture"""
    pixels = X * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    return v2.functional.to_pil_image(pixels.clamp(0, 1))


def rounded(values, digits):
    return [round(float(value), digits) for value in values]


def strip(r, out):
    """A row per class: photo, CAM after each phase, pseudo mask, truth"""
    rows = []
    for name, _ in r.chosen:
        photo = r.split.image(name)
        cams = [heat(np.array(photo), cams) for cams in cams_of(r, name, *PHASES)]
        masks = map(coloured, labels_of(r, name))
        rows.append([(cell, "") for cell in (photo, *cams, *masks)])
    sheet(rows, r.folder / "strip.png", ("photo", *PHASES.values(), "pseudo mask", "truth"))
    return {}


# ---- 1. What a classifier looks at ---------------------------------------------------------------

@torch.no_grad()
def looks(r, out):
    rows, shares = [], []
    for name, _ in r.chosen:
        _, logits = forward(r, "classify", name)
        photo, p = r.split.image(name), torch.stack(list(logits.values())).mean(dim=0)[0].sigmoid()
        told = "\n".join(f"{r.split.classes[i]} {p[i]:.2f}"
                         for i in p.argsort(descending=True)[:3].tolist())
        cams = [heat(np.array(photo), cams) for cams in cams_of(r, name, *PHASES)]
        rows.append([(photo, told), *((cam, "") for cam in cams)])
    sheet(rows, out / "1_looks.png", ("photo, P(class)", *PHASES.values()), lines=3)
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks
        inside = truth(r, name, k)
        cams = [cam[0].numpy() for cam in cams_of(r, name, *PHASES)]
        shares.append([inside.mean(), *(cam[inside].sum() / max(cam.sum(), 1e-9) for cam in cams)])
    shares = dict(zip(("pixels", *PHASES), rounded(np.mean(shares, axis=0), 3)))
    return {"share on the object, of pixels and of the CAM's mass": shares}


def cooccurrence(r, out):
    """The ablation's table in docs/results.md, drawn; not of this run"""
    text, curves = (ROOT / "docs/results.md").read_text(encoding="utf-8"), {}
    usual = {"classification": "classification", "matching": "matching only"}
    for name in ("classification", "matching", "the method"):
        at_95 = re.findall(rf"^    {usual.get(name, name)} +([\d.]+) ±", text, re.M)[-1]
        others = re.findall(rf"^    co-occurrence (\d+) %, {name} +([\d.]+) ±", text, re.M)
        points = sorted([(95, float(at_95)), *((int(p), float(miou)) for p, miou in others)])
        curves[name] = tuple(zip(*points))
    ticks = {p: str(p) for p in (50, 80, 95, 100)}
    save(plot(curves, "co-occurrence in %", "mIoU of the CAMs, train", ticks, low=0, high=100),
         out / "1_cooccurrence.png")
    return {}


# ---- 2. The regions CLIP is shown ----------------------------------------------------------------

@torch.no_grad()
def regions(r, out):
    (name, k), rows, table = r.chosen[0], [], {}
    X, words = view(r, name), (r.split.classes[k], r.words[k], "prompt")
    for phase, title in PHASES.items():
        M = mask_of(r, phase, name, k)
        row = []
        for region, x in (("X", X), ("M X", M * X), ("(1 - M) X", (1 - M) * X)):
            v = r.clip.encode_image(x)
            values = [cosine(v, u[k][None]).item() for u in (r.u_f, r.u_w, r.u_b)]
            told = "\n".join(f"{word} {value:.2f}" for word, value in zip(words, values))
            row.append((as_picture(x[0]), told))
            table[f"{phase}, {region}"] = rounded(values, 2)
        mask = Image.fromarray((255 * M[0, 0]).byte().numpy())
        rows.append([row[0], (mask, f"after {title}"), *row[1:]])
    sheet(rows, out / "2_regions.png", ("X", "mask M", "X^f = M X", "X^b = (1 - M) X"), lines=3)
    return {"cosines to class, true background word, learned prompt": table}


# ---- 3. L_match as a curve -----------------------------------------------------------------------

@torch.no_grad()
def growing(r, out, count=48):
    """ANALYSIS: masks that grow from the middle of the true object to its border (0 to 1), then
    over the background (1 to 2)."""
    shares, R = np.linspace(0.1, 2, 20), r.clip.resolution
    cosines, losses = torch.zeros(4, len(shares)), torch.zeros(3, len(shares))
    photos = with_one_class(r, count)
    for name, k in photos:
        inside = torch.from_numpy(truth(r, name, k, (R, R))).double()
        n = inside.sum().item()
        depth = v2.functional.gaussian_blur(inside[None], 2 * R - 1, R / 8)[0]   # (R, R)
        rank = (inside + depth).flatten().argsort(descending=True, stable=True).argsort().view(R, R)
        kept = [min(share, 1) * n + max(share - 1, 0) * (R * R - n) for share in shares]
        masks = torch.stack([rank < pixels for pixels in kept]).float()[:, None]
        v_f, v_b = embed_masked(r.clip, view(r, name).expand(len(masks), -1, -1, -1), masks)
        u_f, u_w, u_b = (u[k][None] for u in (r.u_f, r.u_w, r.u_b))
        cosines += torch.stack([cosine(v, u) for v, u in (
            (v_f, u_f), (v_b, u_f), (v_f, u_w), (v_f, u_b))]) / len(photos)
        for i in range(len(shares)):
            f, b = v_f[i:i + 1], v_b[i:i + 1]
            terms = match_loss(f, b, u_f, 0), match_loss(f, b, u_f, RECIPE["lambda_b"])
            terms = *terms, refine_loss(f, u_b)
            losses[:, i] += torch.stack(terms) / len(photos)
    tables = {}
    for file, label, rows, titles, high in (
            ("3_growing.png", "cosine", cosines, ("kept, class text", "dropped, class text",
                                                  "kept, true word", "kept, prompt"), 1),
            ("3_losses.png", "loss", losses, ("first term", "L_match", "L_refine"), None)):
        save(plot({title: (shares, row.tolist()) for title, row in zip(titles, rows)},
                  "kept: 1 = the object, 2 = the whole photo", label,
                  {x: f"{x:g}" for x in (0.1, 0.5, 1, 1.5, 2)}, [(1, "the object")], low=0,
                  high=high), out / file)
        at = {f"{share:.1f}": i for i, share in enumerate(shares)}
        tables[f"growing, {'losses' if label == 'loss' else 'cosines'}"] = {
            title: {x: round(row[at[x]].item(), 2) for x in ("0.5", "1.0", "1.5", "2.0")}
            for title, row in zip(titles, rows)}
    return tables


# ---- 4. What the prompts learn -------------------------------------------------------------------

@torch.no_grad()
def dense_features(clip, X):
    """X (N, 3, R, R) -> (N, E, g, g): a feature of each patch, the value path of the last block,
    projected as the class token is. After MaskCLIP (Zhou, Loy, Dai: Extract Free Dense Labels from
    CLIP, ECCV 2022)."""
    visual, caught = clip.visual, []
    last = visual.transformer.resblocks[-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    clip.encode_image(X)
    hook.remove()
    D = caught[0].shape[2]
    value = linear(last.ln_1(caught[0]), last.attn.in_proj_weight[2 * D:],
                   last.attn.in_proj_bias[2 * D:])                       # (N, T, D)
    features = visual.ln_post(last.attn.out_proj(value)) @ visual.proj   # (N, T, E)
    return features[:, 1:].transpose(1, 2).unflatten(2, (visual.grid, visual.grid))


def heat_maps(r, out):
    rows, side, grid, table = [], 128, r.clip.visual.grid, defaultdict(list)
    texts = {"class text": r.u_f, "prompt": r.u_b, "true word": r.u_w}

    def similar(name, k):  # -> {text: (g, g)}
        features = dense_features(r.clip, view(r, name))[0].movedim(0, 2)        # (g, g, E)
        return {title: cosine(features, u[k]).numpy() for title, u in texts.items()}

    for name, k in r.chosen:
        photo = as_picture(view(r, name)[0]).resize((side, side), Image.BICUBIC)
        maps = [torch.from_numpy(grown((m - m.min()) / (m.max() - m.min()), (side, side)))[None]
                for m in similar(name, k).values()]
        rows.append([(photo, ""), *((heat(np.array(photo), m), "") for m in maps)])
    sheet(rows, out / "4_heat.png", ("photo", *texts))
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks, brought to the patches
        inside = truth(r, name, k, (grid, grid))
        if 0 < inside.sum() < inside.size:
            for title, m in similar(name, k).items():
                for kind in ("all", r.split.classes[k]):
                    table[f"{title}, {kind}"].append((m[inside].mean(), m[~inside].mean()))
    table = {key: rounded(np.mean(pairs, axis=0), 2) for key, pairs in sorted(table.items())}
    return {"mean cosine of patches on the object, beside it": table}


def prompts(r, out):
    """What the phase has logged, and the nouns nearest to the learned prompts"""
    rows = log_of(r.folder / "cam/prompts.jsonl")
    curves = {f"{key}{what}": ([row["epoch"] for row in rows], [row[key] for row in rows])
              for key, what in (("sim(v_b, u_b)", ", pulled up"), ("sim(v_f, u_b)", ""),
                                ("sim(u_f, u_b)", ", pushed down"))}
    save(plot(curves, "epoch", "cosine, means since the last point"), out / "4_prompts.png")
    lines = (r.folder / "cam/prompts.txt").read_text(encoding="utf-8").splitlines()
    return {"nouns nearest to the prompt": dict(line.split(": ") for line in lines)}


# ---- 5. What refinement removes ------------------------------------------------------------------

def mask_gradient(r, name, k):
    """dL_refine / dM (R, R) of one photo, M that of matching; mean over 5 x 5 pixels"""
    with torch.no_grad():
        M, X = mask_of(r, "match", name, k), view(r, name)
    M.requires_grad_(True)
    v_f, _ = embed_masked(r.clip, X, M)
    (gradient,) = torch.autograd.grad(refine_loss(v_f, r.u_b[k][None]), M)
    return F.avg_pool2d(gradient, 5, 1, 2)[0, 0]


def removes(r, out, count=300):
    """For each class the photo, of the first ones with one class, whose CAM refinement changes most
    (mean squared difference)."""
    found, rows, difference, gradient = {}, [], defaultdict(list), []
    for name, k in with_one_class(r, count):
        before, after = cams_of(r, name, "match", "refine")
        change = (before - after).square().mean().item()
        if change > found.get(k, (-1,))[0]:
            found[k] = change, name, before, after
    for k, (_, name, before, after) in sorted(found.items()):
        photo = np.array(r.split.image(name))
        g = grown(mask_gradient(r, name, k), photo.shape[:2])
        cells = (Image.fromarray(photo), heat(photo, before), heat(photo, after),
                 blend(photo, (before - after)[0].numpy()), blend(photo, g / abs(g).max()))
        rows.append([(cell, "") for cell in cells])
    head = ("photo", "CAM, matching", "CAM, refined", "their difference", "dL_refine / dM")
    sheet(rows, out / "5_removes.png", head)
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks
        before, after = (cam[0].numpy() for cam in cams_of(r, name, "match", "refine"))
        inside = truth(r, name, k)
        for kind in ("all", r.split.classes[k]):
            difference[kind].append([(after - before)[at].mean() for at in (inside, ~inside)])
        inside, g = truth(r, name, k, (r.clip.resolution,) * 2), mask_gradient(r, name, k).numpy()
        gradient.append([part[inside].sum() / max(part.sum(), 1e-12)
                         for part in (g.clip(min=0), (-g).clip(min=0))])
    table = {kind: rounded(np.mean(pairs, axis=0), 3) for kind, pairs in sorted(difference.items())}
    shares = dict(zip(("red", "blue"), rounded(np.mean(gradient, axis=0), 3)))
    return {"refined minus matching CAM, on the object, beside it": table,
            "share of the gradient on the object": shares}


# ---- 6. From CAM to mask -------------------------------------------------------------------------

def score_and_crf(r, out):
    chosen = json.loads((r.folder / "cams_refine/background.json").read_text())
    scores, losses = [float(s) for s in chosen["losses"]], list(chosen["losses"].values())
    counts, rows, best, preset = 0, [], chosen["background_score"], PRESETS["voc"]
    C = 1 + len(r.split.classes)
    for name in r.split.names[::math.ceil(len(r.split.names) / 100)]:  # ANALYSIS: with true masks
        present, (cams,) = r.split.labels[name].nonzero()[0], cams_of(r, name, "refine")
        counts = counts + np.stack([
            confusion_matrix(score_labels(cams, present, score), labels_of(r, name)[1], C)
            for score in scores])
    found = [100 * float(np.nanmean(iou(matrix))) for matrix in counts]
    ticks, mark = {i / 10: f"0.{i}" for i in range(2, 10)}, [(best, f"chosen {best}")]
    for file, title, ys, label in (
            ("6_score.png", "2 sim(v_f, u_b) + sim(v_b, u_f) - sim(v_f, u_f)", losses, "loss"),
            ("6_miou.png", "mIoU (analysis only, true masks)", found, "mIoU")):
        save(plot({title: (scores, ys)}, "background score", label, ticks, mark), out / file)
    for name, _ in r.chosen[::2]:
        present, photo = r.split.labels[name].nonzero()[0], np.array(r.split.image(name))
        (cams,), steps_of = cams_of(r, name, "refine"), []
        stacked = torch.cat([torch.full_like(cams[:1], best), cams])
        prob = hard_unary(stacked.argmax(0), len(stacked))
        for steps in (0, 1, 3, 10):
            Q = dense_crf(torch.from_numpy(photo), prob, preset["gaussian"], preset["bilateral"],
                          iterations=steps)
            steps_of.append(np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).numpy()])
        cells = [Image.fromarray(photo), *map(coloured, [*steps_of, labels_of(r, name)[1]])]
        rows.append([(cell, "") for cell in cells])
    head = ("photo", "CRF, 0 steps", "1 step", "3 steps", "10 steps", "truth")
    sheet(rows, out / "6_crf.png", head)
    return {"background score": {
        "chosen": best, "mIoU there": round(float(np.interp(best, scores, found)), 1),
        "best mIoU of the 16": round(max(found), 1), "at": scores[int(np.argmax(found))]}}


# ---- 7. From masks to a model --------------------------------------------------------------------

def model(r, out, count=48):
    """ANALYSIS: of the first photos, the three where the model's labels are better than its
    teacher's by most, and the worst."""
    segmenter, recipe, _ = load_segmenter(r.folder / "seg/seg.pt")
    found, rows = [], []
    for name in r.split.names[:count]:
        photo, (teacher, labels) = r.split.image(name), labels_of(r, name)
        predicted = predict_labels(segmenter, photo, recipe, True, CPU)
        right = [float((each == labels).mean()) for each in (teacher, predicted)]
        cells = [photo, *map(coloured, (teacher, predicted, labels))]
        found.append((right[1] - right[0], name, right, cells))
    found.sort(key=lambda row: row[:2])
    for _, _, right, cells in [*found[:-4:-1], found[0]]:
        told = ("", f"{right[0]:.0%} of pixels right", f"{right[1]:.0%}", "")
        rows.append(list(zip(cells, told)))
    sheet(rows, out / "7_model.png", ("photo", "pseudo mask", "prediction", "truth"), lines=1)
    better = sum(row[0] > 0 for row in found)
    return {"photos on which the model is better than its pseudo mask": f"{better} of {len(found)}"}


# ---- Curves of the trainings, and the page -------------------------------------------------------

def log_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trainings(r, out):
    """A picture of what each training logs -> {file: caption}"""
    logs = {}
    for folder, phase in (*(("cam", phase) for phase in ("classify", "match", "prompts", "refine")),
                          ("seg", "seg"), ("full", "seg")):
        rows = log_of(r.folder / folder / f"{phase}.jsonl")
        names = list(rows[0])[list(rows[0]).index("epoch") + 1:list(rows[0]).index("lr")]
        steps = [row["step"] for row in rows]
        save(plot({name: (steps, [row[name] for row in rows]) for name in names}, "step",
                  "loss" + ", cosines" * (phase == "prompts"), size=(420, 240)),
             out / f"log_{folder}_{phase}.png")
        logs[f"log_{folder}_{phase}.png"] = f"The log {folder}/{phase}.jsonl."
    return logs


CAPTIONS = [  # picture, heading or "" where it goes with the one before, what it shows
    ("1_looks.png", "What a classifier looks at", "A photo of each class, the classifier's "
     "probabilities, CAMs (blue 0, red 1)."),
    ("1_cooccurrence.png", "", "mIoU of the CAMs. Not of this run: from docs/results.md."),
    ("2_regions.png", "The regions CLIP is shown", "Mask, kept and dropped region of a photo; "
     "cosines to class text, true background word (analysis only) and learned prompt."),
    ("3_growing.png", "L_match as a curve", "Cosines as a mask grows from the middle of the true "
     "object to the whole photo; means of 48 photos (analysis only)."),
    ("3_losses.png", "", "The losses of these masks: L_match, its first term, and L_refine."),
    ("4_heat.png", "What the prompts learn", "Patch features of CLIP against three texts; blue the "
     "least, red the most similar patch of each photo (true word: analysis only)."),
    ("4_prompts.png", "", "Cosines of the prompts during prompt learning."),
    ("5_removes.png", "What refinement removes", "For each class the photo that refinement changes "
     "most. Difference: red removed, blue added. Gradient: red where the mask should shrink."),
    ("6_score.png", "From CAM to mask", "The loss under CLIP of the 16 background scores."),
    ("6_miou.png", "", "mIoU of the same scores, found with true masks: analysis only."),
    ("6_crf.png", "", "The dense CRF after 0, 1, 3 and 10 steps, and the truth."),
    ("7_model.png", "From masks to a model", "The three of 48 training photos on which the model "
     "corrects its teacher most; last the one that it spoils most (analysis only)."),
]
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #444; }
td, th { padding: 0.1rem 0.6rem 0.1rem 0; text-align: left; }"""


def page(r, tables, logs):
    """RUN/index.html: plain HTML, pictures beside it, no scripts, nothing from the network"""
    def figure(file, text):
        file, text = html.escape(file), html.escape(text)
        return f'<figure><img src="{file}" alt="{text}"><figcaption>{text}</figcaption></figure>'

    def table(rows):
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

    scores = json.loads((r.folder / "table.json").read_text())
    body = ["<h1>SemPLeS on the toy world</h1>", f"<p>Seed {r.seed}. The method, section by "
            "section, with these pictures: docs/method.md.</p>", "<h2>mIoU</h2>",
            table((title, f"{scores[key]:.1f}") for key, title in TABLE.items()),
            "<h2>A photo of each class</h2>",
            figure("strip.png", "Photo; CAM after each phase; pseudo mask; truth.")]
    for file, heading, text in CAPTIONS:
        body += [f"<h2>{heading}</h2>"] * bool(heading) + [figure(f"companion/{file}", text)]
        if file == "4_prompts.png":
            body += ["<p>The nouns nearest to each class's prompt:</p>",
                     table(tables["nouns nearest to the prompt"].items())]
    body += ["<h2>Trainings</h2>", *(figure(f"companion/{file}", t) for file, t in logs.items())]
    with writing(r.folder / "index.html") as temporary:
        temporary.write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>SemPLeS</title>'
            f"<style>\n{STYLE}\n</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n",
            encoding="utf-8")


# -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Pictures, tables and a page of a finished demo.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="the --out of demo.py")
    add("--figures", type=Path, metavar="DIR", help="copy the pictures and tables.json there too")
    return parser.parse_args(argv)


def main(args):
    if not (args.run / "table.json").is_file():
        raise InputError(f"{args.run}: no table.json; expected a finished run of "
                         "experiments/demo.py; run make demo first")
    r, out, tables = open_run(args.run), args.run / "companion", {}
    for section in (strip, looks, cooccurrence, regions, growing, heat_maps, prompts, removes,
                    score_and_crf, model):
        tables |= section(r, out)
        print(f"{section.__name__}: drawn", flush=True)
    logs = trainings(r, out)
    with writing(out / "tables.json") as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n")
    page(r, tables, logs)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name in ("tables.json", *(file for file, _, _ in CAPTIONS)):
            shutil.copy(out / name, args.figures)
    print(f"{args.run / 'index.html'}: {len(CAPTIONS) + len(logs) + 1} pictures, tables in "
          f"{out / 'tables.json'}")


if __name__ == "__main__":
    run(main, parse_args())
