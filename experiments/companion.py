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
    PHASES, SHARES, cams_of, forward, growing_masks, labels_of, open_run, parts_of, truth, view,
    with_one_class)
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
STRIP = "Photo; CAM after each phase; pseudo mask; truth, if known (analysis)."
GAINS = "mIoU of labels of matching, refinement; of matching with only what refinement changes"


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
    """panels {title: {name: (xs, ys)}} side by side, with the same axes -> a PNG"""
    figure = Figure((5.2 * len(panels), 3.3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items()):
        for name, (xs, ys) in curves.items():
            ax.plot(xs, ys, "o-" if len(xs) < 25 else "-", ms=4, label=name)
        ax.set(title=title, xlabel=x, ylabel=y, **axis)
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
    return (X.permute(1, 2, 0).numpy() * CLIP_STD + CLIP_MEAN).clip(0, 1)


def means(rows):
    return np.mean(rows, axis=0, dtype=float).round(3).tolist()


# ---- 1. What a classifier looks at ---------------------------------------------------------------

@torch.no_grad()
def strip(r, out):
    """A row per class: photo, CAM after each phase, pseudo mask, truth, as far as there are any;
    beside it what the classifier says"""
    rows, left, more = [], [], {"masks": "pseudo mask"} if "pseudo masks" in r.has else {}
    if all(name in r.true for name, _ in r.chosen):
        more[None] = "truth"
    for name, _ in r.chosen:
        photo = r.split.image(name)
        rows.append([photo, *(heat(photo, cams) for cams in cams_of(r, name, *r.phases)),
                     *(coloured(labels_of(r, name, folder)) for folder in more)])
        logits = forward(r, next(iter(r.phases)), name)[1]
        p = torch.stack(list(logits.values())).mean(dim=0)[0].sigmoid()          # (K,)
        left.append("\n".join(f"{r.split.classes[i]} {p[i]:.2f}"
                              for i in p.argsort(descending=True)[:3].tolist()))
    grid(r.folder / "strip.png", rows, ("photo", *r.phases.values(), *more.values()), left,
         bars=[(slice(1, 1 + len(r.phases)), (HEAT, 0, 1, "CAM, over the photo"))],
         caption="Left: the classes that S finds most probable after " + [*r.phases.values()][0])


def inside(r, out):
    (name, k), rows, texts = r.chosen[0], [], []
    for phase in r.phases:
        maps, patch = parts_of(r, phase, name, k)
        h, w = maps["fine"].shape
        photo = np.array(r.split.image(name).resize((8 * w, 8 * h), Image.BICUBIC))
        square = photo[8 * (patch // w):, 8 * (patch % w):][:8, :8]
        square[[0, 1, -2, -1]] = square[:, [0, 1, -2, -1]] = (255, 0, 0)
        rows.append([photo, *(HEAT((m / m.max()).numpy()) for m in maps.values())])
        texts.append(["", *(f"0 to {m.max():.2g}" for m in maps.values())])
    grid(out / "1_inside.png", rows, ("a patch", "coarse [W1]", "A_c2p [W2]", "A_p2p [W2]",
                                      "fine [W3]"), r.phases.values(), texts,
         bars=[(slice(1, 5), (HEAT, 0, 1, "share of each map's maximum"))])


def shares(r, out):
    """ANALYSIS: how much of the photo, and of the CAM after each phase, lies on the object; refined
    minus matching CAM on the object and beside it"""
    found, differences = [], defaultdict(list)
    for name, k in with_one_class(r, r.true, 100):
        there, cams = truth(r, name, k), [cam[0].numpy() for cam in cams_of(r, name, *PHASES)]
        found.append([there.mean(), *(cam[there].sum() / max(cam.sum(), 1e-9) for cam in cams)])
        for kind in ("all", r.split.classes[k]):
            change = cams[2] - cams[1]
            differences[kind].append([change[there].mean(), change[~there].mean()])
    return {"share on the object, of pixels and of the CAM's mass":
            dict(zip(("pixels", *PHASES), means(found))),
            "refined minus matching CAM, on the object, beside it":
            {kind: means(pairs) for kind, pairs in differences.items()}}


# ---- 2. The regions CLIP is shown ----------------------------------------------------------------

@torch.no_grad()
def regions(r, out):
    (name, k), rows, texts = r.chosen[0], [], []
    words = {"class text": r.split.classes[k], "true word": r.words and r.words[k]}
    X = view(r, name)
    for phase in r.phases:
        cam, _ = forward(r, phase, name)
        M = region_masks(cam[:, k], X.shape[2:], r.recipe["eps"])               # (1, 1, R, R)
        shown = X, M * X, (1 - M) * X
        rows.append([as_picture(x[0]) for x in shown])
        texts.append(["\n".join(
            f"{words.get(text, text)} {cosine(r.clip.encode_image(x), u[k]).item():.2f}"
            for text, u in r.texts.items()) for x in shown])
        rows[-1].insert(1, GREY(M[0, 0].numpy()))
        texts[-1].insert(1, "")
    grid(out / "2_regions.png", rows, ("X", "mask M", "X^f = M X", "X^b = (1 - M) X"),
         r.phases.values(), texts)


# ---- 3. L_match as a curve -----------------------------------------------------------------------

@torch.no_grad()
def growing(r, out):
    """ANALYSIS: cosines and losses of growing masks: hard ones, and soft ones as S makes them, by
    region_masks of a coarse map. Soft ones end before 2: a constant map has no mask."""
    own, voc = r.recipe, recipe_of("voc", "refine", {})
    photos, S = with_one_class(r, r.true, 24), len(SHARES)
    cosines = [*(f"kept, {text}" for text in r.texts), "dropped, class text"]
    losses = ["first term", "L_match", "L_refine", "L_total", "L_total, VOC's weights"]
    values = np.zeros((2, S, len(cosines + losses)))
    places = own["crop"] // r.generators["match"].backbone.patch
    for name, k in photos:
        hard = growing_masks(torch.from_numpy(truth(r, name, k, (r.clip.resolution,) * 2)))
        soft = F.adaptive_avg_pool2d(hard, places)[:, 0]                         # (S, h, w)
        masks = torch.cat([hard, region_masks(soft, hard.shape[2:], own["eps"])])
        X = view(r, name).expand(len(masks), -1, -1, -1)                         # (2 S, 3, R, R)
        u = {text: u[k][None] for text, u in r.texts.items()}
        if name == photos[0][0]:
            kept = [as_picture(x) for x in X * masks]
        for i, (v_f, v_b) in enumerate(zip(*embed_masked(r.clip, X, masks))):    # (E,) twice
            v_f, v_b, u_f = v_f[None], v_b[None], u["class text"]
            first, L_match, published = (match_loss(v_f, v_b, u_f, weight)
                                         for weight in (0, own["lambda_b"], voc["lambda_b"]))
            L_refine = refine_loss(v_f, u["prompt"])
            values[i // S, i % S] += [x.item() / len(photos) for x in (
                *(cosine(v_f, text) for text in u.values()), cosine(v_b, u_f), first, L_match,
                L_refine, L_match + own["lambda_r"] * L_refine,
                published + voc["lambda_r"] * L_refine)]
    values[1, -1] = np.nan
    shown = [SHARES.index(share) for share in (0.25, 0.5, 1, 1.25, 1.5, 2)]
    grid(out / "3_masks.png", [[kept[i] for i in shown], [kept[S + i] for i in shown[:-1]]],
         [f"kept: {SHARES[i]:g}" for i in shown], ("hard masks", "soft masks"))
    hard, soft = (dict(zip(cosines + losses, rows.T)) for rows in values)
    axis = {"x": "kept: 1 = the object, 2 = the whole photo", "xticks": (0.1, 0.5, 1, 1.5, 2)}
    plot(out / "3_growing.png", {"hard masks": {key: (SHARES, hard[key]) for key in cosines}},
         y="cosine", ylim=(0, 1), **axis)
    plot(out / "3_losses.png", {title: {key: (SHARES, rows[key]) for key in losses}
                                for title, rows in (("hard masks", hard), ("soft masks", soft))},
         y="loss", ylim=(0, 1.05 * np.nanmax(values)), **axis)
    at = {f"{share:g}": SHARES.index(share) for share in (0.5, 1, 1.5, 2)}
    return {title: {key: {share: None if np.isnan(row[i]) else round(row[i], 2)
                          for share, i in at.items()} for key, row in rows.items()}
            for title, rows in (("growing, hard masks", hard), ("growing, soft masks", soft))}


# ---- 4. What the prompts learn -------------------------------------------------------------------

def prompts(r, out):
    """What the phase has logged, and the nouns nearest to the learned prompts"""
    log = (r.cam / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in log]
    curves = {f"{key}{what}": ([row["epoch"] for row in rows], [row[key] for row in rows])
              for key, what in (("sim(v_b, u_b)", ", pulled up"), ("sim(v_f, u_b)", ""),
                                ("sim(u_f, u_b)", ", pushed down a little"))}
    plot(out / "4_prompts.png", {"": curves}, "epoch", "cosine", ylim=(0, 1))
    lines = (r.cam / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return {"nouns nearest to the prompt": dict(line.split(": ") for line in lines)}


# ---- 5. What refinement removes ------------------------------------------------------------------

def removes(r, out):
    """For each class the photo, of the first 300 with one class, whose CAM refinement changes most
    (mean squared difference)"""
    found = {}
    for name, k in with_one_class(r, r.split.names, 300):
        before, after = cams_of(r, name, "match", "refine")                      # (1, H, W) twice
        change = (after - before).square().mean().item()
        if change > found.get(k, (-1,))[0]:
            found[k] = change, r.split.image(name), before, after
    rows = [[photo, heat(photo, before), heat(photo, after),
             SIGNED((0.5 + (after - before)[0] / 0.6).numpy())]
            for _, (_, photo, before, after) in sorted(found.items())]
    grid(out / "5_removes.png", rows, ("photo", "matching", "refinement", "difference"),
         bars=[(slice(1, 3), (HEAT, 0, 1, "CAM")), (slice(3, 4), (SIGNED, -0.3, 0.3, ""))])


def gains(r, out):
    """ANALYSIS: mIoU of the labels of both phases, and of matching's labels with only what
    refinement removes, with only what it adds"""
    counts = defaultdict(int)
    for name in r.true:
        match, refine = (score_labels(cams, r.split.present(name), BACKGROUND_SCORE)
                         for cams in cams_of(r, name, "match", "refine"))
        for key, labels in (("matching", match), ("refinement", refine),
                            ("only removed", np.where(refine == 0, 0, match)),
                            ("only added", np.where(match == 0, refine, match))):
            counts[key] += confusion_matrix(labels, labels_of(r, name), 1 + len(r.split.classes))
    return {GAINS: {key: round(100 * np.nanmean(iou(matrix)), 1) for key, matrix in counts.items()}}


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


# ---- 7. From masks to a model --------------------------------------------------------------------

def model(r, out):
    """Pseudo mask and prediction. ANALYSIS, on the toy world: of the first 24 photos, the three
    where the model is better than its pseudo mask by most, and the worst; else the first four"""
    segmenter, recipe, side, _ = load_segmenter(r.seg)
    test, found = TEST[recipe] | {"side": side}, []
    for name in r.split.names[:24 if r.words else 4]:
        photo, teacher = r.split.image(name), labels_of(r, name, "masks")
        predicted = predict_labels(segmenter, photo, test, True, torch.device("cpu"))
        cells, texts, gain = [photo, coloured(teacher), coloured(predicted)], [], 0
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


# ---- The page ------------------------------------------------------------------------------------

SECTIONS = {  # what draws: what it needs
    strip: "", inside: "vit", shares: "true masks,classify,match,refine", regions: "",
    growing: "match,prompt,true masks", prompts: "log", removes: "cams of match,cams of refine",
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
    "5_removes.png": ("What refinement removes", "For each class the photo that refinement changes "
                      "most. Difference: refined minus matching; red is raised, blue lowered."),
    "6_crf.png": ("From CAM to mask", "The dense CRF after 0, 1, 3 and 10 steps; truth, if known "
                  "(analysis)."),
    "7_model.png": ("From masks to a model", "Pseudo mask and prediction; with truth, the three "
                    "largest gains over the pseudo mask, then the largest loss (analysis)."),
}
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem }
figure { margin: 1rem 0 } figcaption { color: #444 } img { max-width: 100%; height: auto }
td { padding: 0.1rem 0.8rem 0.1rem 0 }"""


def page(r, tables):
    """RUN/index.html: plain HTML, pictures beside it, no scripts, nothing from the network"""
    def figure(file, text):
        return (f'<figure><img src="{file}" alt="{html.escape(text)}">'
                f"<figcaption>{html.escape(text)}</figcaption></figure>")

    def table(title, rows):
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(cell))}</td></tr>"
                       for name, cell in rows.items())
        return f"<p>{title}:</p><table>{rows}</table>"

    body = ["<h1>SemPLeS, a run</h1>", "<p>The method, section by section, with these pictures on "
            "the toy world: docs/method.md.</p>"]
    if "demo" in r.has:
        scores = json.loads((r.folder / "table.json").read_text())
        body.append(table("mIoU in percent", {title: f"{scores[key]:.1f}"
                                              for key, title in TABLE.items()}))
    body.append(figure("strip.png", STRIP))
    below = {"4_prompts.png": "nouns nearest to the prompt", "5_removes.png": GAINS}
    for file, (heading, text) in CAPTIONS.items():
        if (r.folder / "companion" / file).is_file():
            body += [f"<h2>{heading}</h2>"] * bool(heading) + [figure(f"companion/{file}", text)]
            if found := tables.get(below.get(file)):
                body.append(table(below[file], found))
    with writing(r.folder / "index.html") as temporary:
        temporary.write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>SemPLeS</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n",
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
            tables |= section(r, out) or {}
            print(f"{section.__name__}: done", flush=True)
    with writing(out / "tables.json") as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n")
    page(r, tables)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name in ("tables.json", *CAPTIONS):
            shutil.copy(out / name, args.figures)
    print(f"{args.run / 'index.html'}: its pictures and tables.json are in {out}")


if __name__ == "__main__":
    run(main, parse_args())
