"""The pictures and tables of docs/method.md, and a page that shows a whole run, in its order.

Reads a run of demo.py, or of the README's command lines on any data; draws what its files allow.
Trains nothing. Writes RUN/strip.png, RUN/companion/*.png, RUN/companion/tables.json and
RUN/index.html; the same run gives the same bytes. What uses true masks or true background words
says ANALYSIS: nothing is chosen by it.

  python experiments/companion.py --run runs/toy            # the last step of make demo
  python experiments/companion.py --run runs/toy --figures figures/method   # for docs/method.md
  python experiments/companion.py --data mine --run runs/mine     # your photos; VOC: --split too
"""
import argparse
import html
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from a_run import (  # noqa: E402
    PHASES, SHARES, cams_of, forward, growing_masks, labels_of, log_of, mask_of, open_run, parts_of,
    truth, view, with_one_class)
from clip_model import CLIP_MEAN, CLIP_STD  # noqa: E402
from common import InputError, claim, label_picture, run, writing  # noqa: E402
from demo import TABLE  # noqa: E402
from eval import TEST, confusion_matrix, iou, predict_labels  # noqa: E402
from make_pseudo import (  # noqa: E402
    BACKGROUND_SCORE, PRESETS, dense_crf, hard_unary, score_labels, with_background)
from train_cam import (  # noqa: E402
    cosine, embed_masked, match_loss, recipe_of, refine_loss, region_masks)
from train_seg import load_segmenter  # noqa: E402

GREY, HEAT, SIGNED = colormaps["gray"], colormaps["turbo"], colormaps["RdBu_r"]  # of values 0 to 1
CAM_BAR = HEAT, 0, 1, "CAM"


# ---- Drawing -------------------------------------------------------------------------------------

def save(figure, path):
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})


def grid(path, rows, head=(), left=(), texts=(), bars=(), caption=""):
    """Rows of pictures (PIL, or arrays of colours) -> a PNG. head: above the columns; left: beside
    the rows; texts: rows of what stands below each picture; bars: (columns, (colours, lowest,
    highest value, label))"""
    height, width = len(rows), max(map(len, rows))
    lines = max((text.count("\n") + 1 for row in texts for text in row), default=0)
    size = 1.5 * width + 0.8 * bool(left), (1.5 + 0.16 * lines) * height + 0.3 + 0.6 * bool(bars)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for y, row in enumerate(rows):
        for ax, picture in zip(axes[y], row):
            ax.imshow(picture)
        for ax, text in zip(axes[y], texts[y] if texts else ()):
            ax.set_xlabel(text, fontsize=9)
    for ax, text in zip(axes[0], head):
        ax.set_title(text, fontsize=10)
    for ax, text in zip(axes[:, 0], left):
        ax.set_ylabel(text, fontsize=10, rotation=0, ha="right", va="center", ma="left")
    for columns, (colours, low, high, label) in bars:
        figure.colorbar(ScalarMappable(Normalize(low, high), colours), ax=axes[:, columns],
                        location="bottom", aspect=30, label=label)
    figure.supxlabel(caption, fontsize=9)
    save(figure, path)


def plot(path, panels, x, y, **axis):
    """panels {title: {name: (xs, ys)}}, two in a row, axes of the same kind -> a PNG"""
    height, width = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = Figure((5.2 * width, 3.3 * height), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False).flat
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, curves) in zip(axes, panels.items()):
        ax.set_axis_on()
        for name, (xs, ys) in curves.items():
            ax.plot(xs, ys, "o-" if len(xs) < 25 else "-", ms=4, label=name)
        ax.set(title=title, xlabel=x, ylabel=y, **axis)
        ax.set_ylim(bottom=0)
        ax.grid(color="0.9")
        ax.legend(fontsize=8)
    save(figure, path)


def heat(photo, cams):
    """A photo in grey under the strongest of its CAMs (n, H, W)"""
    grey = np.asarray(photo.convert("L"))[..., None] / 255
    return 0.35 * grey + 0.65 * HEAT(cams.amax(dim=0).numpy())[..., :3]


def coloured(labels):
    return label_picture(labels).convert("RGB")


def as_picture(X):
    """X (3, R, R) in CLIP's normalisation -> (R, R, 3) in [0, 1]"""
    return (X.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)).clamp(0, 1)


def rounded(values, digits):
    return [round(float(value), digits) for value in values]


# ---- 1. What a classifier looks at ---------------------------------------------------------------

@torch.no_grad()
def strip(r, out):
    """A row per class: photo, CAM after each phase, pseudo mask, truth, as far as there are any;
    beside it what the classifier says"""
    rows, left, more = [], [], {"masks": "pseudo mask"} if "pseudo masks" in r.has else {}
    if all(name in r.true for name, _ in r.chosen):
        more[None] = "truth"
    for name, k in r.chosen:
        photo = r.split.image(name)
        rows.append([photo, *(heat(photo, cams) for cams in cams_of(r, name, *r.phases)),
                     *(coloured(labels_of(r, name, folder)) for folder in more)])
        left.append(r.split.classes[k])
        if "classify" in r.has:
            z = torch.stack(list(forward(r, "classify", name)[1].values())).mean(dim=0)[0]  # (K,)
            p = z.sigmoid()
            left[-1] = "\n".join(f"{r.split.classes[i]} {p[i]:.2f}"
                                 for i in p.argsort(descending=True)[:3].tolist())
    caption = "CAMs over the photo" + ", after each phase" * (len(r.phases) > 1)
    if "classify" in r.has:
        caption = "Left: the classifier's three highest probabilities. " + caption
    grid(r.folder / "strip.png", rows, ("photo", *r.phases.values(), *more.values()), left,
         bars=[(slice(1, 1 + len(r.phases)), CAM_BAR)], caption=caption)
    return {}


def inside(r, out):
    (name, k), rows, texts = r.chosen[0], [], []
    for phase in r.phases:
        maps, patch = parts_of(r, phase, name, k)
        h, w = maps["fine"].shape
        photo = np.array(r.split.image(name).resize((8 * w, 8 * h), Image.BICUBIC))
        y, x = 8 * (patch // w), 8 * (patch % w)
        square = photo[y:y + 8, x:x + 8]
        square[[0, 1, -2, -1]] = square[:, [0, 1, -2, -1]] = (255, 0, 0)
        rows.append([photo, *(HEAT(m / m.max()) for m in maps.values())])
        texts.append(["", *(f"0 to {m.max():.2g}" for m in maps.values())])
    grid(out / "1_inside.png", rows, ("a patch", "coarse [W1]", "A_c2p [W2]", "A_p2p [W2]",
                                      "fine [W3]"), r.phases.values(), texts,
         bars=[(slice(1, 5), (HEAT, 0, 1, "share of each map's maximum"))])
    return {}


def shares(r, out):
    """ANALYSIS: how much of the photo, and of the CAM after each phase, lies on the object"""
    found = []
    for name, k in with_one_class(r, 100):
        inside = truth(r, name, k)
        cams = [cam[0].numpy() for cam in cams_of(r, name, *PHASES)]
        found.append([inside.mean(), *(cam[inside].sum() / max(cam.sum(), 1e-9) for cam in cams)])
    return {"share on the object, of pixels and of the CAM's mass":
            dict(zip(("pixels", *PHASES), rounded(np.mean(found, axis=0), 3)))}


# ---- 2. The regions CLIP is shown ----------------------------------------------------------------

@torch.no_grad()
def regions(r, out):
    (name, k), rows, texts = r.chosen[0], [], []
    words = {"class text": r.split.classes[k], "true word": r.words and r.words[k]}
    X = view(r, name)
    for phase in r.phases:
        M = mask_of(r, phase, name, k)
        shown = X, M * X, (1 - M) * X
        told = ["\n".join(f"{words.get(text, text)} {cosine(r.clip.encode_image(x), u[k]).item():.2f}"
                          for text, u in r.texts.items()) for x in shown]
        whole, kept, dropped = (as_picture(x[0]) for x in shown)
        rows.append([whole, GREY(M[0, 0]), kept, dropped])
        texts.append([told[0], "", *told[1:]])
    grid(out / "2_regions.png", rows, ("X", "mask M", "X^f = M X", "X^b = (1 - M) X"),
         r.phases.values(), texts)
    return {}


# ---- 3. L_match as a curve -----------------------------------------------------------------------

@torch.no_grad()
def growing(r, out):
    """ANALYSIS: cosines and losses of growing masks: hard ones, and soft ones as S makes them, by
    region_masks of a coarse map. Soft ones end before 2: a constant map has no mask."""
    voc, photos, S = recipe_of("voc", "refine", {}), with_one_class(r, 24), len(SHARES)
    kinds = [(f"kept, {text}", text) for text in r.texts] + [("dropped, class text", "class text")]
    names = ("first term", "L_match", "L_refine", "L_total", "L_total, VOC's weights")
    cosines, losses = np.zeros((len(kinds), S)), np.zeros((2, len(names), S))
    grid_side = r.recipe["crop"] // r.generators["match"].backbone.patch
    for name, k in photos:
        hard = growing_masks(torch.from_numpy(truth(r, name, k, (r.clip.resolution,) * 2)))
        soft = F.adaptive_avg_pool2d(hard, grid_side)[:, 0]                      # (S, h, w)
        masks = torch.cat([hard, region_masks(soft, hard.shape[2:], r.recipe["eps"])])
        X = view(r, name).expand(len(masks), -1, -1, -1)                         # (2 S, 3, R, R)
        v_f, v_b = embed_masked(r.clip, X, masks)                                # (2 S, E) twice
        u = {text: u[k][None] for text, u in r.texts.items()}
        if name == photos[0][0]:
            kept = [as_picture(x) for x in X * masks]
        for row, (title, text) in zip(cosines, kinds):
            v = v_f if "kept" in title else v_b
            row += cosine(v[:S], u[text]).numpy() / len(photos)
        for i in range(2 * S):
            f, b = v_f[i:i + 1], v_b[i:i + 1]
            first, own, published = (match_loss(f, b, u["class text"], weight)
                                     for weight in (0, r.recipe["lambda_b"], voc["lambda_b"]))
            refine = refine_loss(f, u["prompt"])
            terms = (first, own, refine, own + r.recipe["lambda_r"] * refine,
                     published + voc["lambda_r"] * refine)
            losses[i // S, :, i % S] += np.array(terms) / len(photos)
    losses[1, :, -1] = np.nan
    shown = [SHARES.index(share) for share in (0.25, 0.5, 1, 1.25, 1.5, 2)]
    grid(out / "3_masks.png", [[kept[i] for i in shown], [kept[S + i] for i in shown[:-1]]],
         [f"kept: {SHARES[i]:g}" for i in shown], ("hard masks", "soft masks"))
    cosines = {title: row for (title, _), row in zip(kinds, cosines)}
    hard, soft = (dict(zip(names, rows)) for rows in losses)
    for file, y, panels in (
            ("3_growing.png", "cosine", {"hard masks": cosines}),
            ("3_losses.png", "loss", {"hard masks": hard, "soft masks": soft})):
        plot(out / file, {title: {name: (SHARES, row) for name, row in rows.items()}
                          for title, rows in panels.items()},
             "kept: 1 = the object, 2 = the whole photo", y, xticks=(0.1, 0.5, 1, 1.5, 2),
             ylim=(0, 1 if y == "cosine" else 1.05 * np.nanmax(losses)))
    at = {f"{share:g}": SHARES.index(share) for share in (0.5, 1, 1.5, 2)}
    return {f"growing, {title}": {name: {x: None if np.isnan(row[i]) else round(row[i], 2)
                                         for x, i in at.items()} for name, row in rows.items()}
            for title, rows in (("cosines", cosines), ("hard", hard), ("soft", soft))}


# ---- 4. What the prompts learn -------------------------------------------------------------------

def prompts(r, out):
    """What the phase has logged, and the nouns nearest to the learned prompts"""
    rows = log_of(r.cam / "prompts.jsonl")
    curves = {f"{key}{what}": ([row["epoch"] for row in rows], [row[key] for row in rows])
              for key, what in (("sim(v_b, u_b)", ", pulled up"), ("sim(v_f, u_b)", ""),
                                ("sim(u_f, u_b)", ", pushed down a little"))}
    plot(out / "4_prompts.png", {"": curves}, "epoch", "cosine", ylim=(0, 1))
    lines = (r.cam / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return {"nouns nearest to the prompt": dict(line.split(": ") for line in lines)}


# ---- 5. What refinement changes ------------------------------------------------------------------

def changes(r, out):
    """For each class the photo, of the first 300 with one class, whose CAM refinement changes most
    (mean squared difference); of a run without exports, the chosen ones"""
    found, exported = {}, {"match", "refine"} <= r.cams.keys() and r.true
    for name, k in with_one_class(r, 300) if exported else r.chosen:
        n = r.split.labels[name][:k].sum()
        before, after = (cams[n:n + 1] for cams in cams_of(r, name, "match", "refine"))
        change = (after - before).square().mean().item()
        if change > found.get(k, (-1,))[0]:
            found[k] = change, r.split.image(name), before, after
    rows = [[photo, heat(photo, before), heat(photo, after),
             SIGNED(((after - before)[0] + 0.3) / 0.6)]  # -0.3 is blue, 0.3 is red
            for _, (_, photo, before, after) in sorted(found.items())]
    grid(out / "5_changes.png", rows, ("photo", "matching", "refinement", "difference"),
         bars=[(slice(1, 3), CAM_BAR), (slice(3, 4), (SIGNED, -0.3, 0.3, "difference"))])
    return {}


def gains(r, out):
    """ANALYSIS: refined minus matching CAM; mIoU of both, and of matching's labels with only what
    refinement removes, with only what it adds"""
    differences, counts = defaultdict(list), defaultdict(int)
    for name, k in with_one_class(r, 100):
        before, after = (cam[0].numpy() for cam in cams_of(r, name, "match", "refine"))
        there = truth(r, name, k)
        for kind in ("all", r.split.classes[k]):
            differences[kind].append([(after - before)[at].mean() for at in (there, ~there)])
    for name in r.true:
        match, refine = (score_labels(cams, r.split.present(name), BACKGROUND_SCORE)
                         for cams in cams_of(r, name, "match", "refine"))
        for key, labels in (("matching", match), ("refinement", refine),
                            ("only removed", np.where(refine == 0, 0, match)),
                            ("only added", np.where(match == 0, refine, match))):
            counts[key] += confusion_matrix(labels, labels_of(r, name), 1 + len(r.split.classes))
    return {"refined minus matching CAM, on the object, beside it": {
                kind: rounded(np.mean(pairs, axis=0), 3) for kind, pairs in differences.items()},
            "mIoU": {key: round(100 * float(np.nanmean(iou(matrix))), 1)
                     for key, matrix in counts.items()}}


# ---- 6. From CAM to mask -------------------------------------------------------------------------

def crf(r, out):
    rows, preset, steps = [], PRESETS["voc"], (0, 1, 3, 10)
    for name, _ in r.chosen[::2]:
        present, photo = r.split.present(name), r.split.image(name)
        photo.thumbnail((256, 256))  # a large photo takes long
        cams = F.interpolate(cams_of(r, name, "refine")[0][None], size=photo.size[::-1],
                             mode="bilinear")[0]
        prob = hard_unary(with_background(cams, BACKGROUND_SCORE).argmax(0), 1 + len(present))
        rows.append([photo])
        for n in steps:
            Q = dense_crf(torch.from_numpy(np.array(photo)), prob, preset["gaussian"],
                          preset["bilateral"], iterations=n)
            labels = np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).numpy()]
            rows[-1].append(coloured(labels))
        if name in r.true:
            rows[-1].append(coloured(labels_of(r, name)))
    grid(out / "6_crf.png", rows, ("photo", *(f"{n} steps" for n in steps), "truth"))
    return {}


# ---- 7. From masks to a model --------------------------------------------------------------------

def model(r, out):
    """Pseudo mask and prediction. ANALYSIS, on the toy world: of the first 24 photos, the three
    where the model is better than its pseudo mask by most, and the worst; else the first four"""
    segmenter, recipe, side, _ = load_segmenter(r.seg)
    test, found = TEST[recipe] | {"side": side}, []
    for name in r.split.names[:24 if r.words else 4]:
        photo, teacher = r.split.image(name), labels_of(r, name, "masks")
        predicted = predict_labels(segmenter, photo, test, True, torch.device("cpu"))
        cells, texts, gain = [photo, coloured(teacher), coloured(predicted)], [""], 0
        if r.words:
            true = labels_of(r, name)
            right = [float((labels == true).mean()) for labels in (teacher, predicted)]
            cells, gain = [*cells, coloured(true)], right[1] - right[0]
            texts = ["", *(f"{share:.0%} right" for share in right), ""]
        found.append((gain, name, cells, texts))
    better = f"{sum(gain > 0 for gain, *_ in found)} of {len(found)}"
    if r.words:
        found.sort(key=lambda row: row[:2])
        found = [*found[:-4:-1], found[0]]
    *_, rows, texts = zip(*found)
    grid(out / "7_model.png", rows, ("photo", "pseudo mask", "prediction", "truth"), texts=texts)
    return {"model better than its pseudo mask": better} if r.words else {}


# ---- Curves of the trainings, and the page -------------------------------------------------------

def trainings(r, out):
    """What each training logs"""
    panels = {}
    for path in sorted([*r.folder.glob("*.jsonl"), *r.folder.glob("*/*.jsonl")]):
        rows, steps = log_of(path), [row["step"] for row in log_of(path)]
        keys = list(rows[0])[list(rows[0]).index("epoch") + 1:list(rows[0]).index("lr")]
        panels[path.relative_to(r.folder).as_posix()] = {
            key: (steps, [row[key] for row in rows]) for key in keys}
    plot(out / "8_trainings.png", panels, "step", "")
    return {}


SECTIONS = {  # what draws: what it needs
    strip: "", inside: "vit", shares: "true masks,classify,match,refine", regions: "",
    growing: "match,prompt,true masks", prompts: "log", changes: "match,refine",
    gains: "true masks,cams of match,cams of refine", crf: "cams of refine",
    model: "seg,pseudo masks"}
CAPTIONS = {  # picture: heading, or "" where it goes with the one before; what it shows
    "1_inside.png": ("Inside the mask generator", "Of one photo: the coarse map, the attention of "
                     "the class token and of the marked patch, the fine map."),
    "2_regions.png": ("The regions CLIP is shown", "Mask, kept and dropped region of a photo, "
                      "cosines to texts. A true background word is analysis."),
    "3_masks.png": ("L_match as a curve", "A mask grows from the middle of the true object (1: its "
                    "border) to the whole photo (2): hard, soft as in training (analysis only)."),
    "3_growing.png": ("", "Cosines of these masks, means of 24 photos (analysis only)."),
    "3_losses.png": ("", "The losses of these masks (analysis only)."),
    "4_prompts.png": ("What the prompts learn", "Cosines during prompt learning, from its log."),
    "5_changes.png": ("What refinement changes", "For each class the photo that refinement changes "
                      "most. Difference: refined minus matching; red is raised, blue lowered."),
    "6_crf.png": ("From CAM to mask", "The dense CRF after 0, 1, 3 and 10 steps; truth, if known "
                  "(analysis)."),
    "7_model.png": ("From masks to a model", "Pseudo mask and prediction; with truth, the three "
                    "largest gains over the pseudo mask, then the largest loss (analysis)."),
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
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(cell))}</td></tr>"
                       for name, cell in rows.items())
        return f'<p>{title}:</p><div class="table"><table>{rows}</table></div>'

    body = ["<h1>SemPLeS, a run</h1>", "<p>The method, section by section, with these pictures on "
            "the toy world: docs/method.md.</p>"]
    if "demo" in r.has:
        scores = json.loads((r.folder / "table.json").read_text())
        body.append(table("mIoU in percent", {title: f"{scores[key]:.1f}"
                                              for key, title in TABLE.items()}))
    body.append(figure("strip.png", "Photo; CAM after each phase; pseudo mask; truth, if known "
                       "(analysis)."))
    for file, (heading, text) in CAPTIONS.items():
        if (r.folder / "companion" / file).is_file():
            body += [f"<h2>{heading}</h2>"] * bool(heading) + [figure(f"companion/{file}", text)]
        if file == "4_prompts.png" and (found := tables.get("nouns nearest to the prompt")):
            body.append(table("The nouns nearest to each class's prompt", found))
        if file == "5_changes.png" and (found := tables.get("mIoU")):
            body.append(table("mIoU in percent of labels of matching, of refinement; of matching "
                              "with only what refinement removes, adds (analysis)", found))
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
    for path in (args.run / "strip.png", args.run / "index.html"):
        if path.exists() and not (out / "made_of.json").is_file():
            raise InputError(f"{path}: no run of ours made it, as companion/made_of.json is not "
                             "there; move it away")
    claim(out, CAPTIONS, {"companion": r.split.digest}, reads=r.split.folders)
    for section, needs in SECTIONS.items():
        if {need for need in needs.split(",") if need} <= r.has:
            tables |= section(r, out)
            print(f"{section.__name__}: done", flush=True)
    logs = trainings(r, out)
    with writing(out / "tables.json") as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n")
    page(r, tables, logs)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for path in (out / "tables.json", *(out / name for name in CAPTIONS)):
            if path.is_file():
                shutil.copy(path, args.figures)
    print(f"{args.run / 'index.html'}: its pictures and tables.json are in {out}")


if __name__ == "__main__":
    run(main, parse_args())
