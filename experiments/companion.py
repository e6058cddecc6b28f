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
from common import InputError, label_picture, read_record, run, writing  # noqa: E402
from eval import TEST, confusion_matrix, iou, predict_labels  # noqa: E402
from make_pseudo import (  # noqa: E402
    PRESETS, RECIPES, dense_crf, hard_unary, score_labels, with_background)
from train_cam import (  # noqa: E402
    cosine, embed_masked, match_loss, recipe_of, refine_loss, region_masks)
from train_seg import load_segmenter  # noqa: E402

HEAT, SIGNED = colormaps["turbo"], colormaps["RdBu_r"]  # of values from 0 to 1


# ---- Drawing -------------------------------------------------------------------------------------

def save(figure, path):
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, bbox_inches="tight", metadata={"Software": None})


def grid(path, rows, head, left=(), texts=(), bars=()):
    """Rows of pictures (PIL, colours (H, W, 3), or values (H, W) from 0 to 1) -> a PNG of at most
    about 800 pixels, none without rows. head: above the columns; left: beside the rows; texts: rows
    of what stands below each picture; bars: (columns, (colours, lowest, highest value, label))"""
    if not rows:
        return
    height, width = len(rows), max(map(len, rows))
    figure = Figure((min(8, 1 + 1.35 * width), 2.5 * height), layout="compressed")
    axes = figure.subplots(height, width, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for y, row in enumerate(rows):
        for ax, picture in zip(axes[y], row):
            ax.imshow(picture, HEAT, vmin=0, vmax=1)
        for ax, text in zip(axes[y], texts[y] if texts else ()):
            ax.set_xlabel(text, fontsize=11)
    for ax, text in zip(axes[0], head):
        ax.set_title(text, fontsize=12)
    for ax, text in zip(axes[:, 0], left):
        ax.set_ylabel(text, fontsize=11, rotation=0, ha="right", va="center", ma="left")
    for columns, (colours, low, high, label) in bars:
        figure.colorbar(ScalarMappable(Normalize(low, high), colours), ax=axes[:, columns],
                        location="bottom", aspect=30, fraction=0.1 / height,
                        pad=0.05 / height).set_label(label, fontsize=11)
    save(figure, path)


def plot(path, panels, xs, x, y):
    """panels {title: {name: values at the first xs}} side by side, with the same axes -> a PNG"""
    figure = Figure((2 + 3 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items()):
        for name, ys in curves.items():
            ax.plot(xs[:len(ys)], ys, "o-", ms=3, label=name)
        ax.set(title=title, xlabel=x)
        ax.grid(color="0.9")
    axes[0].set_ylabel(y)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=1 + len(panels))
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


# ---- The sections of docs/method.md --------------------------------------------------------------

@torch.no_grad()
def strip(r, out):
    """1. A row per class: photo, CAM after each phase, pseudo mask, truth, as far as there are any;
    beside it what the classifier says"""
    rows, left, first = [], [], next(iter(r.phases))
    labels = {"masks": "pseudo mask"} if "pseudo masks" in r.has else {}
    if all(name in r.true for name, _ in r.chosen):
        labels[None] = "truth"
    for name, _ in r.chosen:
        photo = r.split.image(name)
        rows.append([photo, *(heat(photo, cams) for cams in cams_of(r, name, *r.phases)),
                     *(coloured(labels_of(r, name, folder)) for folder in labels)])
        logits = forward(r, first, name)[1]
        p = torch.stack(list(logits.values())).mean(dim=0)[0].sigmoid()          # (K,)
        left.append("\n".join(f"{r.split.classes[i]} {p[i]:.2f}"
                              for i in p.argsort(descending=True)[:3].tolist()))
    caption = f"CAM, over the photo. Left: the most probable classes after {r.phases[first]}"
    grid(r.folder / "strip.png", rows, ("photo", *r.phases.values(), *labels.values()), left,
         bars=[(slice(1, 1 + len(r.phases)), (HEAT, 0, 1, caption))])


def inside(r, out):
    """1. The maps of S, and the patch with the highest fine value"""
    (name, k), rows = r.chosen[0], []
    for phase in r.phases:
        maps, patch = parts_of(r, phase, name, k)
        h, w = maps["fine"].shape
        photo = np.array(r.split.image(name).resize((8 * w, 8 * h), Image.BICUBIC))
        square = photo[8 * (patch // w):, 8 * (patch % w):][:8, :8]
        square[[0, 1, -2, -1]] = square[:, [0, 1, -2, -1]] = (255, 0, 0)
        rows.append([photo, *((m / m.max()).numpy() for m in maps.values())])
    head = ("a patch", "coarse [W1]", "A_c2p [W2]", "A_p2p [W2]", "fine [W3]")
    grid(out / "1_inside.png", rows, head, r.phases.values(),
         bars=[(slice(1, 5), (HEAT, 0, 1, "share of each map's maximum"))])


def shares(r, out):
    """1, 5. ANALYSIS: how much of the photo, and of the CAM after each phase, lies on the object;
    refined minus matching CAM on the object and beside it"""
    found, differences = [], defaultdict(list)
    for name, k in with_one_class(r, r.true, 100):
        there, cams = truth(r, name, k), [cam[0].numpy() for cam in cams_of(r, name, *PHASES)]
        found.append([there.mean(), *(cam[there].sum() / max(cam.sum(), 1e-9) for cam in cams)])
        change = cams[2] - cams[1]
        for kind in ("all", r.split.classes[k]):
            differences[kind].append([change[there].mean(), change[~there].mean()])
    return {"share on the object, of pixels and of the CAM's mass":
            dict(zip(("pixels", *PHASES), means(found))),
            "refined minus matching CAM, on the object, beside it":
            {kind: means(pairs) for kind, pairs in differences.items()}}


@torch.no_grad()
def regions(r, out):
    """2. What CLIP is shown"""
    (name, k), rows, texts = r.chosen[0], [], []
    words = {"class text": r.split.classes[k], "true word": r.words and r.words[k]}
    X = view(r, name)                                                            # (1, 3, R, R)
    for phase in r.phases:
        cam, _ = forward(r, phase, name)
        M = region_masks(cam[:, k], X.shape[2:], r.recipe["eps"])               # (1, 1, R, R)
        regions = X, M * X, (1 - M) * X
        photo, kept, dropped = (as_picture(x[0]) for x in regions)
        rows.append([photo, M[0, 0].numpy(), kept, dropped])
        below = [[f"{words.get(text, text)} {cosine(r.clip.encode_image(x), u[k]).item():.2f}"
                  for text, u in r.texts.items()] for x in regions]
        texts.append(["\n".join(lines) for lines in (below[0], [], *below[1:])])
    grid(out / "2_regions.png", rows, ("$X$", "$M$", "$X^f = M X$", "$X^b = (1 - M) X$"),
         r.phases.values(), texts, [(slice(1, 2), (HEAT, 0, 1, "mask"))])


def judged(r, v_f, v_b, k):
    """3. Cosines and five losses of a kept and a dropped region, features (1, E), for class k"""
    own, voc = r.recipe, recipe_of("voc", "refine", {})
    u = {text: features[k] for text, features in r.texts.items()}
    values = {f"kept, {text}": cosine(v_f, u[text]) for text in u}
    first, L_match, published = (match_loss(v_f, v_b, u["class text"], weight)
                                 for weight in (0, own["lambda_b"], voc["lambda_b"]))
    L_refine = refine_loss(v_f, u["prompt"])
    values |= {"dropped, class text": cosine(v_b, u["class text"]), "first term": first,
               "L_match": L_match, "L_refine": L_refine,
               "L_total": L_match + own["lambda_r"] * L_refine,
               "L_total, VOC's weights": published + voc["lambda_r"] * L_refine}
    return {key: x.item() for key, x in values.items()}


@torch.no_grad()
def growing(r, out):
    """3. ANALYSIS: cosines and losses of growing masks: hard ones, and soft ones as S makes them,
    by region_masks of a coarse map. Soft ones end before 2: a constant map has no mask."""
    kept, found = {}, {"hard masks": [], "soft masks": []}
    cells = r.recipe["crop"] // r.generators["match"].backbone.patch
    for name, k in with_one_class(r, r.true, 24):
        hard = growing_masks(torch.from_numpy(truth(r, name, k, (r.clip.resolution,) * 2)))
        soft = F.adaptive_avg_pool2d(hard, cells)[:-1, 0]                        # (n - 1, h, w)
        soft = region_masks(soft, hard.shape[2:], r.recipe["eps"])
        for kind, masks in zip(found, (hard, soft)):
            X = view(r, name).expand(len(masks), -1, -1, -1)                     # (n, 3, R, R)
            kept.setdefault(kind, dict(zip(SHARES, map(as_picture, X * masks))))
            rows = [judged(r, v_f[None], v_b[None], k)
                    for v_f, v_b in zip(*embed_masked(r.clip, X, masks))]
            found[kind].append([[*row.values()] for row in rows])                # (n, keys)
    curves = {kind: dict(zip(rows[0], np.mean(photos, axis=0).T)) for kind, photos in found.items()}
    shown = (0.25, 0.5, 1, 1.25, 1.5, 2)
    pictures = [[regions[x] for x in shown if x in regions] for regions in kept.values()]
    grid(out / "3_masks.png", pictures, [f"kept: {x:g}" for x in shown], kept)
    cosines = {"hard masks": dict([*curves["hard masks"].items()][:-5])}
    losses = {kind: dict([*found.items()][-5:]) for kind, found in curves.items()}
    for file, panels, y in (("3_growing.png", cosines, "cosine"), ("3_losses.png", losses, "loss")):
        plot(out / file, panels, SHARES, "kept: 1 = the object, 2 = the whole photo", y)
    at = [SHARES.index(share) for share in (0.5, 1, 1.5, 2)]
    return {f"growing, {kind}": {key: {f"{SHARES[i]:g}": round(ys[i], 2) for i in at if i < len(ys)}
                                 for key, ys in found.items()} for kind, found in curves.items()}


def prompts(r, out):
    """4. What the phase has logged"""
    rows = [json.loads(line) for line in r.files["log"].read_text("utf-8").splitlines()]
    curves = {key + what: [row[key] for row in rows]
              for key, what in (("sim(v_b, u_b)", ", in L_I"), ("sim(u_f, u_b)", ", in L_T"),
                                ("sim(v_f, u_b)", ", in neither"))}
    plot(out / "4_prompts.png", {"": curves}, [row["epoch"] for row in rows], "epoch", "cosine")


def removes(r, out):
    """5. For each class the photo, of the first 300 with one class, whose CAM refinement changes
    most (mean squared difference)"""
    most, shown = defaultdict(float), {}
    for name, k in with_one_class(r, r.split.names, 300):
        before, after = cams_of(r, name, "match", "refine")                      # (1, H, W) twice
        change = (after - before).square().mean().item()
        if change > most[k]:
            photo, shade = r.split.image(name), 0.5 + (after - before)[0].numpy() / 0.6
            most[k] = change
            shown[k] = [photo, heat(photo, before), heat(photo, after), SIGNED(shade)]
    rows = [shown[k] for k in sorted(shown)]
    grid(out / "5_removes.png", rows, ("photo", "matching", "refinement", "difference"),
         bars=[(slice(1, 3), (HEAT, 0, 1, "CAM, over the photo")),
               (slice(3, 4), (SIGNED, -0.3, 0.3, "refined - matching"))])


def gains(r, out):
    """5. ANALYSIS: mIoU of the labels of both phases, and of matching's labels with only what
    refinement removes, with only what it adds"""
    counts = defaultdict(int)
    for name in r.true:
        match, refine = (score_labels(cams, r.split.present(name), RECIPES["toy"][0])
                         for cams in cams_of(r, name, "match", "refine"))
        for key, labels in (("matching", match), ("refinement", refine),
                            ("only what it removes", match * (refine > 0)),
                            ("only what it adds", np.where(match, match, refine))):
            counts[key] += confusion_matrix(labels, labels_of(r, name), 1 + len(r.split.classes))
    return {"mIoU of labels": {key: round(100 * np.nanmean(iou(matrix)), 1)
                               for key, matrix in counts.items()}}


def crf(r, out):
    """6. From CAM to mask"""
    rows, preset, steps = [], PRESETS["voc"], (0, 1, 3, 10)
    for name, _ in r.chosen[::2]:
        present, photo = r.split.present(name), r.split.image(name)
        photo.thumbnail((256, 256))  # a large photo takes long
        cams = F.interpolate(cams_of(r, name, "refine")[0][None], size=photo.size[::-1],
                             mode="bilinear")[0]
        prob = hard_unary(with_background(cams, RECIPES["toy"][0]).argmax(0), 1 + len(present))
        rows.append([photo])
        for n in steps:
            Q = dense_crf(torch.from_numpy(np.array(photo)), prob, preset["gaussian"],
                          preset["bilateral"], iterations=n)
            labels = np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).numpy()]
            rows[-1].append(coloured(labels))
        if name in r.true:
            rows[-1].append(coloured(labels_of(r, name)))
    grid(out / "6_crf.png", rows, ("photo", *(f"{n} steps" for n in steps), "truth"))


def model(r, out):
    """7. Pseudo mask and prediction. ANALYSIS, on the toy world: of the first 24 photos, the three
    where the model is better than its pseudo mask by most, and the worst; else the first four"""
    segmenter, recipe, side, _ = load_segmenter(r.files["seg"])
    test, rows = TEST[recipe] | {"side": side}, []
    for name in r.split.names[:24 if r.words else 4]:
        photo, labels = r.split.image(name), [labels_of(r, name, "masks")]
        labels.append(predict_labels(segmenter, photo, test, True, torch.device("cpu")))
        if r.words:
            labels.append(labels_of(r, name))
        pseudo, predicted = ((x == labels[-1]).mean() for x in labels[:2])
        rows.append((predicted - pseudo, [photo, *map(coloured, labels)],
                     ["", f"{pseudo:.0%} right", f"{predicted:.0%} right"]))
    better, texts = f"{sum(gain > 0 for gain, *_ in rows)} of {len(rows)}", ()
    if r.words:
        rows.sort(key=lambda row: -row[0])
        rows = [*rows[:3], rows[-1]]
        texts = [below for *_, below in rows]
    grid(out / "7_model.png", [pictures for _, pictures, _ in rows],
         ("photo", "pseudo mask", "prediction", "truth"), texts=texts)
    return {"model better than its pseudo mask": better} if r.words else {}


# ---- The page ------------------------------------------------------------------------------------

SECTIONS = {  # what draws: what it needs
    strip: {"labels"}, inside: {"vit", "labels"}, shares: {"true masks of one class", *PHASES},
    regions: {"labels"}, growing: {"match", "prompt", "true masks of one class"}, prompts: {"log"},
    removes: {"cams of match", "cams of refine"},
    gains: {"true masks", "cams of match", "cams of refine"},
    crf: {"cams of refine", "labels"}, model: {"seg", "pseudo masks"}}
CAPTIONS = {
    "1_inside.png": "Inside S: coarse map, attention of class token and marked patch, fine map",
    "2_regions.png": "Mask, kept and dropped region, cosines to texts; a true word is analysis",
    "3_masks.png": "A mask grows from the middle of the object (1: all) to the photo (2): analysis",
    "3_growing.png": "Cosines of these masks, means of 24 photos (analysis)",
    "3_losses.png": "The losses of these masks (analysis)",
    "4_prompts.png": "Cosines during prompt learning, from its log",
    "5_removes.png": "For each class the photo that refinement changes most; red is raised",
    "6_crf.png": "The dense CRF after 0, 1, 3 and 10 steps; truth, if known (analysis)",
    "7_model.png": "Pseudo mask and prediction; with truth, the three largest gains over the "
                   "pseudo mask, then the largest loss (analysis)"}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>SemPLeS</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem }}
figure {{ margin: 2rem 0 }} img {{ max-width: 100%; height: auto }}</style></head><body>
<h1>SemPLeS, a run</h1>
<p>docs/method.md explains the pictures, on the toy world.</p>
{}
</body></html>
"""


def page(r):
    """RUN/index.html: plain HTML, pictures beside it, no scripts, nothing from the network"""
    pictures = {"strip.png": "Photo; CAM after each phase; pseudo mask; truth (analysis)"}
    pictures |= {f"companion/{file}": text for file, text in CAPTIONS.items()}
    body = [f'<figure><img src="{file}" alt="{text}"><figcaption>{text}</figcaption></figure>'
            for file, text in pictures.items() if (r.folder / file).is_file()]
    with writing(r.folder / "index.html") as temporary:
        temporary.write_text(PAGE.format("\n".join(body)), encoding="utf-8")


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
    out, tables = args.run / "companion", {}
    files = [args.run / "strip.png", args.run / "index.html", *(
        out / file for file in ("made_of.json", "tables.json", *CAPTIONS))]
    drawn_here = (read_record(out) or {}).get("script") == "companion.py"
    if there := [path for path in files if path.exists() and not drawn_here]:
        raise InputError(f"{there[0]}: is there already, and no companion/made_of.json says that "
                         "companion.py drew it; move it away")
    r = open_run(args)
    with writing(out / "made_of.json") as temporary:
        temporary.write_text(json.dumps({"script": "companion.py", "photos": r.split.digest}))
    for section, needs in SECTIONS.items():
        if needs <= r.has:
            tables |= section(r, out) or {}
            print(f"{section.__name__}: done", flush=True)
    with writing(out / "tables.json") as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n")
    page(r)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name in ("tables.json", *CAPTIONS):
            if (out / name).is_file():
                shutil.copy(out / name, args.figures)
    return f"{args.run / 'index.html'}: its pictures and tables.json are in {out}"


if __name__ == "__main__":
    run(main, parse_args())
