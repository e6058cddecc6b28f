"""The pictures and tables of docs/method.md, and a page that shows a whole run, in its order.

Reads a run of demo.py, or of the README's command lines on any data; draws what its files allow.
Keeps nothing that it trains. Writes RUN/strip.png, RUN/companion/*.png, RUN/companion/tables.json
and RUN/index.html; the same run gives the same bytes. What uses true masks or true background words
says ANALYSIS: nothing is chosen by it.

  python experiments/companion.py --run runs/toy            # the last step of make demo
  python experiments/companion.py --run runs/toy --figures figures/method   # for docs/method.md
  python experiments/companion.py --data mine --run runs/mine     # your photos; VOC: --split too
"""
import argparse
import html
import json
import math
import shutil
import sys
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
from a_run import (  # noqa: E402
    CPU, PHASES, SHARES, cams_of, forward, growing_masks, labels_of, mask_gradients, mask_of,
    one_batch, open_run, parts_of, truth, view, with_one_class)
from ablation import read_results  # noqa: E402
from clip_model import CLIP_MEAN, CLIP_STD  # noqa: E402
from common import label_picture, run, writing  # noqa: E402
from demo import TABLE  # noqa: E402
from eval import TEST, confusion_matrix, iou, predict_labels  # noqa: E402
from make_pseudo import BACKGROUND_SCORE, PRESETS, dense_crf, hard_unary, score_labels  # noqa: E402
from pictures import HEAT, heat, in_colours, plot, sheet  # noqa: E402
from train_cam import (  # noqa: E402
    cosine, embed_masked, match_loss, recipe_of, refine_loss, region_masks)
from train_seg import load_segmenter  # noqa: E402

CAM_BAR = HEAT, 0, 1, "CAM"


def coloured(labels):
    return label_picture(labels).convert("RGB")


def as_picture(X):
    """X (3, R, R) in CLIP's normalisation -> picture"""
    pixels = X * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    return v2.functional.to_pil_image(pixels.clamp(0, 1))


def rounded(values, digits):
    return [round(float(value), digits) for value in values]


def strip(r, out):
    """A row per class: photo, CAM after each phase, pseudo mask, truth, as far as there are any"""
    rows, more = [], {"masks": "pseudo mask"} if "pseudo masks" in r.has else {}
    if all(name in r.true for name, _ in r.chosen):
        more[None] = "truth"
    for name, _ in r.chosen:
        photo = r.split.image(name)
        cams = [heat(np.array(photo), cams) for cams in cams_of(r, name, *r.phases)]
        masks = [coloured(labels_of(r, name, folder)) for folder in more]
        rows.append([(cell, "") for cell in (photo, *cams, *masks)])
    sheet(rows, r.folder / "strip.png", ("photo", *r.phases.values(), *more.values()))
    return {}


# ---- 1. What a classifier looks at ---------------------------------------------------------------

def inside(r, out):
    (name, k), rows = r.chosen[0], []
    for phase, title in r.phases.items():
        maps, patch = parts_of(r, phase, name, k)
        h, w = maps["fine"].shape
        photo = np.array(r.split.image(name).resize((8 * w, 8 * h), Image.BICUBIC))
        y, x = 8 * (patch // w), 8 * (patch % w)
        square = photo[y:y + 8, x:x + 8]
        square[[0, 1, -2, -1]] = square[:, [0, 1, -2, -1]] = (255, 0, 0)
        rows.append([(Image.fromarray(photo), f"after {title}"), *(
            (in_colours(m, HEAT, 0, m.max()), f"0 to {m.max():.2g}") for m in maps.values())])
    head = ("photo, a patch", "coarse [W1]", "A_c2p [W2]", "A_p2p, of patch [W2]", "fine [W3]")
    sheet(rows, out / "1_inside.png", head, lines=1,
          bars=[(HEAT, 0, 1, "share of each map's maximum")])
    return {}


@torch.no_grad()
def looks(r, out):
    rows, shares = [], []
    for name, _ in r.chosen:
        _, logits = forward(r, "classify", name)
        photo, p = r.split.image(name), torch.stack(list(logits.values())).mean(dim=0)[0].sigmoid()
        told = "\n".join(f"{r.split.classes[i]} {p[i]:.2f}"
                         for i in p.argsort(descending=True)[:3].tolist())
        cams = [heat(np.array(photo), cams) for cams in cams_of(r, name, *r.phases)]
        rows.append([(photo, told), *((cam, "") for cam in cams)])
    sheet(rows, out / "1_looks.png", lines=3, bars=[CAM_BAR],
          head=("photo, P(class)", *(f"CAM, {title}" for title in r.phases.values())))
    if not r.true or r.cams.keys() != PHASES.keys():
        return {}
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks
        inside = truth(r, name, k)
        cams = [cam[0].numpy() for cam in cams_of(r, name, *PHASES)]
        shares.append([inside.mean(), *(cam[inside].sum() / max(cam.sum(), 1e-9) for cam in cams)])
    shares = dict(zip(("pixels", *PHASES), rounded(np.mean(shares, axis=0), 3)))
    return {"share on the object, of pixels and of the CAM's mass": shares}


def cooccurrence(r, out):
    """The ablation's table in docs/results.md, drawn; not of this run"""
    found = read_results((ROOT / "docs/results.md").read_text(encoding="utf-8"))
    curves = {}
    for name, at_95 in (("classification", "classification"), ("matching", "matching only"),
                        ("the method", "the method")):
        rows = {p: f"co-occurrence {p} %, {name}" for p in (50, 80, 100)} | {95: at_95}
        curves[name] = tuple(zip(*((p, *found[rows[p]]) for p in sorted(rows))))
    plot(out / "1_cooccurrence.png", {
        "curves": curves, "x": "co-occurrence in %", "y": "mIoU of the CAMs, train", "high": 100,
        "ticks": {p: str(p) for p in rows}})
    return {}


# ---- 2. The regions CLIP is shown ----------------------------------------------------------------

@torch.no_grad()
def regions(r, out):
    (name, k), rows = r.chosen[0], []
    words = {"class text": r.split.classes[k], "true word": r.words and r.words[k]}
    X = view(r, name)
    for phase, title in r.phases.items():
        M, row = mask_of(r, phase, name, k), []
        for x in (X, M * X, (1 - M) * X):
            v = r.clip.encode_image(x)
            told = [f"{words.get(text, text)} {cosine(v, u[k][None]).item():.2f}"
                    for text, u in r.texts.items()]
            row.append((as_picture(x[0]), "\n".join(told)))
        row.insert(1, (in_colours(M[0, 0], "gray", 0, 1), f"after {title}"))
        rows.append(row)
    sheet(rows, out / "2_regions.png", ("X", "mask M", "X^f = M X", "X^b = (1 - M) X"), lines=3)
    return {}


# ---- 3. L_match as a curve -----------------------------------------------------------------------

@torch.no_grad()
def growing(r, out):
    """ANALYSIS: cosines and losses of growing masks: hard ones, and soft ones as S makes them, by
    region_masks of a coarse map. Soft ones end before 2: a constant map has no mask."""
    voc, photos = recipe_of("voc", "refine", {}), with_one_class(r, 24)
    kinds = [(f"kept, {text}", text) for text in r.texts] + [("dropped, class text", "class text")]
    cosines, losses = np.zeros((len(kinds), len(SHARES))), np.zeros((2, 5, len(SHARES)))
    grid = r.recipe["crop"] // r.generators["match"].backbone.patch
    for name, k in photos:
        hard = growing_masks(torch.from_numpy(truth(r, name, k, (r.clip.resolution,) * 2)))
        soft = F.adaptive_avg_pool2d(hard, grid)[:, 0]                           # (S, h, w)
        masks = torch.cat([hard, region_masks(soft, hard.shape[2:], r.recipe["eps"])])
        X = view(r, name).expand(len(masks), -1, -1, -1)
        v_f, v_b = embed_masked(r.clip, X, masks)
        u = {text: u[k][None] for text, u in r.texts.items()}
        if name == photos[0][0]:
            kept = [(as_picture(x), "") for x in X * masks]
        for row, (title, text) in zip(cosines, kinds):
            v = v_f if "kept" in title else v_b
            row += cosine(v[:len(hard)], u[text]).numpy() / len(photos)
        for i in range(len(masks)):
            f, b = v_f[i:i + 1], v_b[i:i + 1]
            first, own, published = (match_loss(f, b, u["class text"], weight)
                                     for weight in (0, r.recipe["lambda_b"], voc["lambda_b"]))
            refine = refine_loss(f, u["prompt"])
            terms = (first, own, refine, own + r.recipe["lambda_r"] * refine,
                     published + voc["lambda_r"] * refine)
            losses[i // len(SHARES), :, i % len(SHARES)] += np.array(terms) / len(photos)
    losses[1, :, -1] = np.nan
    shown = [SHARES.index(share) for share in (0.25, 0.5, 1, 1.25, 1.5, 2)]
    sheet([[kept[i] for i in shown], [kept[len(SHARES) + i] for i in shown[:-1]]],
          out / "3_masks.png", [f"kept: {SHARES[i]:g}" for i in shown])
    names = ("first term", "L_match", "L_refine", "L_total", "L_total, VOC's weights")
    axis = {"x": "kept: 1 = the object, 2 = the whole photo", "mark": (1, "the object"),
            "ticks": {x: f"{x:g}" for x in (0.1, 0.5, 1, 1.5, 2)}}
    cosines = {title: row for (title, _), row in zip(kinds, cosines)}
    hard, soft = (dict(zip(names, rows)) for rows in losses)
    plot(out / "3_growing.png", axis | {
        "curves": {title: (SHARES, row) for title, row in cosines.items()}, "y": "cosine",
        "high": 1})
    plot(out / "3_losses.png", *(axis | {
        "curves": {title: (SHARES, row) for title, row in rows.items()}, "y": "loss",
        "title": title, "high": 1.05 * np.nanmax(losses)}
        for title, rows in (("hard masks", hard), ("soft masks", soft))))
    at = {f"{share:g}": SHARES.index(share) for share in (0.5, 1, 1.5, 2)}
    return {f"growing, {title}": {name: {x: None if np.isnan(row[i]) else round(row[i], 2)
                                         for x, i in at.items()} for name, row in rows.items()}
            for title, rows in (("cosines", cosines), ("hard", hard), ("soft", soft))}


@torch.no_grad()
def floors(r, out):
    """ANALYSIS: the class text against 20 pictures of its background alone and against a blank"""
    rng, pairs = np.random.default_rng(0), []
    for background, u in zip(r.words, r.texts["class text"]):
        X = np.stack([toy.scene(rng, [(None, background)])[0] for _ in range(20)])
        X = toy.normalized(torch.from_numpy(X).movedim(3, 1), CLIP_MEAN, CLIP_STD)
        pairs.append([cosine(r.clip.encode_image(x), u[None]).mean().item()
                      for x in (X, torch.zeros_like(X[:1]))])
    table = dict(zip(r.split.classes, pairs)) | {"all": np.mean(pairs, axis=0)}
    return {"class text against its background, a blank":
            {name: rounded(row, 2) for name, row in table.items()},
            "second term of L_match there": rounded(
                (-r.recipe["lambda_b"] * math.log(1 - x) for x in table["all"]), 2)}


# ---- 4. What the prompts learn -------------------------------------------------------------------

def prompts(r, out):
    """What the phase has logged, and the nouns nearest to the learned prompts"""
    rows = log_of(r.cam / "prompts.jsonl")
    curves = {f"{key}{what}": ([row["epoch"] for row in rows], [row[key] for row in rows])
              for key, what in (("sim(v_b, u_b)", ", pulled up"), ("sim(v_f, u_b)", ""),
                                ("sim(u_f, u_b)", ", pushed down a little"))}
    plot(out / "4_prompts.png", {"curves": curves, "x": "epoch", "y": "cosine", "high": 1})
    lines = (r.cam / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return {"nouns nearest to the prompt": dict(line.split(": ") for line in lines)}


# ---- 5. What refinement removes ------------------------------------------------------------------

def removes(r, out):
    """For each class the photo, of the first 300 with one class, whose CAM refinement changes most
    (mean squared difference); of a run without exports, the chosen ones"""
    found, rows, slopes = {}, [], []
    exported = {"match", "refine"} <= r.cams.keys() and r.true
    for name, k in with_one_class(r, 300) if exported else r.chosen:
        n = r.split.labels[name][:k].sum()
        before, after = (cams[n:n + 1] for cams in cams_of(r, name, "match", "refine"))
        change = (before - after).square().mean().item()
        if change > found.get(k, (-1,))[0]:
            found[k] = change, name, before, after
    for k, (_, name, before, after) in sorted(found.items()):
        photo = r.split.image(name)
        cells = (photo, heat(np.array(photo), before), heat(np.array(photo), after),
                 in_colours((before - after)[0], "RdBu_r", -0.3, 0.3))
        rows.append([(cell, "") for cell in cells])
        M, *gradients = mask_gradients(r, name, k)
        most = max(abs(g).max() for g in gradients)
        cells = (as_picture(view(r, name)[0]), in_colours(M, "gray", 0, 1),
                 *(in_colours(g, "RdBu_r", -most, most).resize(M.shape, Image.NEAREST)
                   for g in gradients))
        slopes.append([(cell, "") for cell in cells])
    sheet(rows, out / "5_removes.png", ("photo", "CAM, matching", "CAM, refined", "difference"),
          bars=[CAM_BAR, ("RdBu_r", -0.3, 0.3, "matching minus refined")])
    head = ("X", "M of matching", "dL_match / dM", "lambda_R dL_refine/dM", "dL_total / dM")
    sheet(slopes, out / "5_gradients.png", head,
          bars=[("RdBu_r", -1, 1, "gradient on M, over the greatest of the photo")])
    if not exported:
        return {}
    difference, shares = defaultdict(list), []
    for name, k in with_one_class(r, 100):  # ANALYSIS: with true masks
        before, after = (cam[0].numpy() for cam in cams_of(r, name, "match", "refine"))
        inside, (_, *gradients) = truth(r, name, k), mask_gradients(r, name, k)
        for kind in ("all", r.split.classes[k]):
            difference[kind].append([(after - before)[at].mean() for at in (inside, ~inside)])
        inside = torch.from_numpy(inside).float()[None, None]
        inside = F.adaptive_avg_pool2d(inside, gradients[0].shape)[0, 0]         # (h, w), shares
        shares.append([[(inside * part).sum() / part.sum().clamp(min=1e-12)
                        for part in (g.clamp(min=0), (-g).clamp(min=0))] for g in gradients])
    table = {kind: rounded(np.mean(pairs, axis=0), 3) for kind, pairs in sorted(difference.items())}
    shares = zip(("L_match", "L_refine", "sum"), np.mean(shares, axis=0))
    return {"refined minus matching CAM, on the object, beside it": table,
            "gradient on the object, share of red, of blue":
            {name: rounded(row, 2) for name, row in shares}}


def gains(r, out):
    """ANALYSIS: IoU of each class; what becomes of the pixels that refinement changes; mIoU with
    only what it removes, and with only what it adds"""
    counts, changed, pixels, C = defaultdict(int), np.zeros((2, 2)), 0, 1 + len(r.split.classes)
    for name in r.true:
        present, true = r.split.labels[name].nonzero()[0], labels_of(r, name)
        match, refine = (score_labels(cams, present, BACKGROUND_SCORE)
                         for cams in cams_of(r, name, "match", "refine"))
        for key, labels in (("matching", match), ("refinement", refine),
                            ("only removed", np.where(refine == 0, 0, match)),
                            ("only added", np.where(match == 0, refine, match))):
            counts[key] = counts[key] + confusion_matrix(labels, true, C)
        pixels += (true < 255).sum()
        for row, place in zip(changed, (true == 0, (true > 0) & (true < 255))):
            row += [(place & (now == true) & (was != true)).sum()
                    for now, was in ((refine, match), (match, refine))]
    ious = {key: 100 * iou(matrix) for key, matrix in counts.items()}
    names = ("mean", "background", *r.split.classes)
    return {"IoU": {key: dict(zip(names, rounded((np.nanmean(ious[key]), *ious[key]), 1)))
                    for key in ("matching", "refinement")},
            "mIoU": {key: round(float(np.nanmean(x)), 1) for key, x in ious.items()},
            "pixels that become right, become wrong, in percent": {
                place: rounded(100 * row / pixels, 1)
                for place, row in zip(("background", "object"), changed)}}


# ---- 6. From CAM to mask -------------------------------------------------------------------------

def crf(r, out):
    rows, preset = [], PRESETS["voc"]
    for name, _ in r.chosen[::2]:
        present, photo = r.split.labels[name].nonzero()[0], r.split.image(name)
        photo.thumbnail((256, 256))  # a large photo takes long
        (cams,), cells = cams_of(r, name, "refine"), [photo]
        cams = F.interpolate(cams[None], size=photo.size[::-1], mode="bilinear")[0]
        stacked = torch.cat([torch.full_like(cams[:1], BACKGROUND_SCORE), cams])
        prob = hard_unary(stacked.argmax(0), len(stacked))
        for steps in (0, 1, 3, 10):
            Q = dense_crf(torch.from_numpy(np.array(photo)), prob, preset["gaussian"],
                          preset["bilateral"], iterations=steps)
            cells.append(coloured(np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).numpy()]))
        if name in r.true:
            cells.append(coloured(labels_of(r, name)))
        rows.append([(cell, "") for cell in cells])
    sheet(rows, out / "6_crf.png", ("photo", "CRF, 0 steps", "1 step", "3 steps", "10 steps",
                                    *["truth"] * (len(rows[0]) == 6)))
    return {}


# ---- 7. From masks to a model --------------------------------------------------------------------

def model(r, out):
    """Pseudo mask and prediction. ANALYSIS, on the toy world: of the first 24 photos, the three
    where the model is better than its pseudo mask by most, and the worst; else the first four"""
    segmenter, name, side, _ = load_segmenter(r.seg)
    recipe = TEST[name] | {"side": side}
    found, told, gain = [], ("",) * 4, 0
    for name in r.split.names[:24 if r.words else 4]:
        photo, teacher = r.split.image(name), labels_of(r, name, "masks")
        predicted = predict_labels(segmenter, photo, recipe, True, CPU)
        cells = [photo, coloured(teacher), coloured(predicted)]
        if r.words:
            true = labels_of(r, name)
            right = [float((each == true).mean()) for each in (teacher, predicted)]
            told = ("", *(f"{share:.0%} of pixels right" for share in right), "")
            gain, cells = right[1] - right[0], [*cells, coloured(true)]
        found.append((gain, name, list(zip(cells, told))))
    if r.words:
        better = f"{sum(gain > 0 for gain, _, _ in found)} of {len(found)}"
        found.sort(key=lambda row: row[:2])
        found = [*found[:-4:-1], found[0]]
    head = ("photo", "pseudo mask", "prediction", "truth")
    sheet([row for _, _, row in found], out / "7_model.png", head[:3 + bool(r.words)], lines=1)
    return {"model better than its pseudo mask": better} if r.words else {}


# ---- Curves of the trainings, and the page -------------------------------------------------------

def log_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trainings(r, out):
    """A picture of what each training logs -> {file: caption}"""
    logs = {}
    for path in sorted([*r.folder.glob("*.jsonl"), *r.folder.glob("*/*.jsonl")]):
        rows, name = log_of(path), path.relative_to(r.folder).as_posix()
        keys = list(rows[0])[list(rows[0]).index("epoch") + 1:list(rows[0]).index("lr")]
        curves = {key: ([row["step"] for row in rows], [row[key] for row in rows]) for key in keys}
        file = f"log_{name[:-6].replace('/', '_')}.png"
        plot(out / file, {"curves": curves, "x": "step", "y": "loss, cosine" if "sim" in str(keys)
                          else "loss"})
        logs[file] = f"The log {name}."
    return logs


SECTIONS = {  # what draws: what it needs
    strip: "", inside: "vit", looks: "classify", cooccurrence: "true word",
    regions: "", growing: "match,prompt,true masks", floors: "true word", prompts: "log",
    removes: "match,refine,prompt", gains: "true masks,cams of match,cams of refine",
    crf: "cams of refine", model: "seg,pseudo masks"}
CAPTIONS = {  # picture: heading, or "" where it goes with the one before; what it shows
    "1_inside.png": ("Inside the mask generator", "Of one photo: the coarse map, the attention of "
                     "the class token and of the marked patch, the fine map."),
    "1_looks.png": ("What a classifier looks at", "A photo of each class, the classifier's "
                    "probabilities, CAMs."),
    "1_cooccurrence.png": ("", "mIoU of the CAMs, mean and deviation; hollow: one seed. Not of "
                           "this run: from docs/results.md."),
    "2_regions.png": ("The regions CLIP is shown", "Mask, kept and dropped region of a photo, "
                      "cosines to texts. A true background word is analysis."),
    "3_masks.png": ("L_match as a curve", "A mask grows from the middle of the true object (1: its "
                    "border) to the whole photo (2): hard, soft as in training (analysis only)."),
    "3_growing.png": ("", "Cosines of these masks, means of 24 photos (analysis only)."),
    "3_losses.png": ("", "The losses of these masks (analysis only)."),
    "4_prompts.png": ("What the prompts learn", "Cosines during prompt learning, from its log."),
    "5_removes.png": ("What refinement removes", "For each class the photo that refinement "
                      "changes most. Red: removed. Blue: added."),
    "5_gradients.png": ("", "Gradients on the mask of matching. Red: a smaller mask lowers the "
                        "loss. Blue: a larger one does."),
    "6_crf.png": ("From CAM to mask", "The dense CRF after 0, 1, 3 and 10 steps; truth, if known "
                  "(analysis)."),
    "7_model.png": ("From masks to a model", "Pseudo mask and prediction; with truth, the three "
                    "photos on which the model is better by most, and the worst (analysis)."),
}
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
figure { margin: 1rem 0; } figcaption { color: #444; } figure div, .table { overflow-x: auto; }
img { max-width: 100%; height: auto; } img.wide { min-width: 34rem; }
td { padding: 0.1rem 0.8rem 0.1rem 0; }"""


def page(r, tables, logs):
    """RUN/index.html: plain HTML, pictures beside it, no scripts, nothing from the network"""
    def figure(file, text):
        wide = ' class="wide"' * (Image.open(r.folder / file).width > 540)
        file, text = html.escape(file), html.escape(text)
        return (f'<figure><div><img{wide} src="{file}" alt="{text}"></div>'
                f"<figcaption>{text}</figcaption></figure>")

    def table(title, rows):
        rows = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
        rows = "".join(f"<tr>{row}</tr>" for row in rows)
        return f'<p>{title}:</p><div class="table"><table>{rows}</table></div>'

    body = ["<h1>SemPLeS, a run</h1>", "<p>The method, section by section, with these pictures on "
            "the toy world: docs/method.md.</p>"]
    if "demo" in r.has:
        scores = json.loads((r.folder / "table.json").read_text())
        body.append(table("mIoU in percent", ((title, f"{scores[key]:.1f}")
                                               for key, title in TABLE.items())))
    body.append(figure("strip.png", "Photo; CAM after each phase; pseudo mask; truth, if known "
                       "(analysis)."))
    if found := tables.get("one batch of matching"):
        body.append(table("One batch of matching: what its functions return", found.items()))
    for file, (heading, text) in CAPTIONS.items():
        if (r.folder / "companion" / file).is_file():
            body += [f"<h2>{heading}</h2>"] * bool(heading) + [figure(f"companion/{file}", text)]
        if file == "4_prompts.png" and (found := tables.get("nouns nearest to the prompt")):
            body.append(table("The nouns nearest to each class's prompt", found.items()))
        if file == "5_gradients.png" and (found := tables.get("IoU")):
            body.append(table("IoU of the CAMs in percent (analysis only)", [
                ("", *found), *((key, *(row[key] for row in found.values()))
                                for key in found["matching"])]))
    body += ["<h2>Trainings</h2>", *(figure(f"companion/{file}", t) for file, t in logs.items())]
    with writing(r.folder / "index.html") as temporary:
        temporary.write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>SemPLeS</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>\n{STYLE}\n</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n",
            encoding="utf-8")


# -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Pictures, tables and a page of a run.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="the --out of demo.py or train_cam.py")
    add("--data", type=Path, metavar="ROOT", help="its data; left out: RUN/data")
    add("--split", default="train", help="the photos that it was trained on")
    add("--clip", metavar="NAME", help="its CLIP; left out: RUN/clip.pt, or ViT-B/32")
    add("--figures", type=Path, metavar="DIR", help="copy the pictures and tables.json there too")
    return parser.parse_args(argv)


def main(args):
    r, out, tables = open_run(args), args.run / "companion", {}
    for picture in out.glob("*.png"):
        picture.unlink()
    if "classify" in r.has:
        tables["one batch of matching"] = one_batch(r)
    for section, needs in SECTIONS.items():
        if {need for need in needs.split(",") if need} <= r.has:
            tables |= section(r, out)
            print(f"{section.__name__}: drawn", flush=True)
    logs = trainings(r, out)
    with writing(out / "tables.json") as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n")
    page(r, tables, logs)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name in ("tables.json", *CAPTIONS):
            shutil.copy(out / name, args.figures)
    print(f"{args.run / 'index.html'}: {len(list(out.glob('*.png'))) + 1} pictures, tables in "
          f"{out / 'tables.json'}")


if __name__ == "__main__":
    run(main, parse_args())
