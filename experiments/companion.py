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
import os
import shutil
import sys
from collections import defaultdict
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from a_run import (  # noqa: E402
    PHASES, REAL_TIES, SHARES, cams_of, changes, forward, growing_masks, labels_of, open_run, ties,
    truth, view, with_one_class)
from common import PALETTE, InputError, read_record, run, writing  # noqa: E402
from demo import TOY, VOC  # noqa: E402
from drawing import HEAT, SIGNED, as_picture, coloured, grid, heat, plot, scatter  # noqa: E402
from eval import TEST, confusion_matrix, iou, predict_labels  # noqa: E402
from make_pseudo import (  # noqa: E402
    PRESETS, RECIPES, dense_crf, hard_unary, score_labels)
from train_cam import (  # noqa: E402
    cosine, embed_masked, match_loss, recipe_of, refine_loss, region_masks)
from train_seg import load_segmenter  # noqa: E402

# ---- The sections of docs/method.md --------------------------------------------------------------

def on_and_beside(r):
    """ANALYSIS: refined minus matching CAM, on the object and beside it, means of the first 100
    photos with one class -> {"all", class: (on, beside)}"""
    found = defaultdict(list)
    for name, k in with_one_class(r, r.true, 100):
        there, (before, after) = truth(r, name, k), cams_of(r, name, "match", "refine")
        change = (after - before)[0].numpy()                                     # (H, W)
        for kind in ("all", r.split.classes[k]):
            found[kind].append([change[there].mean(), change[~there].mean()])
    return {kind: np.mean(pairs, axis=0, dtype=float).round(3).tolist()
            for kind, pairs in found.items()}


def photo_miou(r, name, labels):
    """ANALYSIS: mIoU of one photo in percent, over the classes in its labels or in the truth"""
    matrix = confusion_matrix(labels, labels_of(r, name), 1 + len(r.split.classes))
    return 100 * np.nanmean(iou(matrix))


@torch.no_grad()
def strip(r, out):
    """1. Photo, CAM after each phase, pseudo mask, truth, as far as there are any; above them the
    mIoU of all photos"""
    rows, left, first = [], [], next(iter(r.phases))
    labels = {"masks": "mask"} if "pseudo masks" in r.has else {}
    if all(name in r.true for name, _ in r.chosen):
        labels[None] = "truth"
    for name, k in r.chosen:
        photo, at = r.split.image(name), r.split.present(name).tolist().index(k)
        rows.append([photo, *(heat(photo, cams[[at]]) for cams in cams_of(r, name, *r.phases)),
                     *(coloured(labels_of(r, name, folder)) for folder in labels)])
        logits = torch.stack([*forward(r, first, name)[1].values()]).mean(dim=0)     # (1, K)
        left.append(f"{r.split.classes[k]}\n{logits[0, k].sigmoid():.2f}")
    columns = {"": "photo", **{phase: phase for phase in r.phases}, **labels}
    head = [f"{title}\nmIoU {r.scores[key]['miou']:.1f}" if key in r.scores else title
            for key, title in columns.items()]
    caption = f"CAM of the class. Left: its probability after {r.phases[first]}"
    grid(r.folder / "strip.png", rows, head, left,
         bars=[(slice(1, 1 + len(r.phases)), (HEAT, 0, 1, caption))])


@torch.no_grad()
def parts_of(r, phase, name, k):
    """Of S, for class k -> {"coarse", "A_c2p" if S uses it, "A_p2p", "fine": (h, w)}, and the patch
    where fine is greatest, whose row A_p2p is"""
    generator, caught = r.generators[phase], {}
    hooks = [module.register_forward_hook(lambda module, _, result, key=key:
                                          caught.update({key: result[0]}))
             for key, module in (("coarse", generator.head), ("A", generator.fusion))]
    fine = forward(r, phase, name)[0][0, k]                                      # (h, w)
    for hook in hooks:
        hook.remove()
    patch, K, A = int(fine.argmax()), len(r.split.classes), caught["A"]          # A (T, T)
    maps = {"coarse": caught["coarse"][k].relu(), "A_c2p": A[k, K:].view_as(fine),
            "A_p2p": A[K + patch, K:].view_as(fine), "fine": fine}
    if not generator.options["class_attention"]:
        del maps["A_c2p"]  # it is not used
    return maps, patch


def inside(r, out):
    """1. The maps of S, and the patch with the highest fine value; A_c2p only where S uses it"""
    (name, k), rows = r.chosen[0], []
    for phase in r.phases:
        maps, patch = parts_of(r, phase, name, k)
        h, w = maps["fine"].shape
        photo = np.array(r.split.image(name).resize((8 * w, 8 * h), Image.BICUBIC))
        square = photo[8 * (patch // w):, 8 * (patch % w):][:8, :8]
        square[[0, 1, -2, -1]] = square[:, [0, 1, -2, -1]] = (255, 0, 0)
        rows.append([photo, *((m / m.max()).numpy() for m in maps.values())])
    grid(out / "1_inside.png", rows, ("a patch", *maps), [*r.phases],
         bars=[(slice(1, None), (HEAT, 0, 1, "share of each map's maximum"))])


def shares(r, out):
    """1, 5. ANALYSIS: how much of the photo, and of the CAM after each phase, lies on the object;
    refined minus matching CAM on the object and beside it"""
    found = []
    for name, k in with_one_class(r, r.true, 100):
        there, cams = truth(r, name, k), [cam[0].numpy() for cam in cams_of(r, name, *PHASES)]
        found.append([there.mean(), *(cam[there].sum() / max(cam.sum(), 1e-9) for cam in cams)])
    return {"share on the object, of pixels and of the CAM's mass":
            dict(zip(("pixels", *PHASES), np.mean(found, axis=0, dtype=float).round(3).tolist())),
            "refined minus matching CAM, on the object, beside it": on_and_beside(r)}


@torch.no_grad()
def regions(r, out):
    """2. What CLIP is shown, and its cosines to the class text and to the prompt"""
    (name, k), rows, texts = r.chosen[0], [], []
    X = view(r, name)                                                            # (1, 3, R, R)
    for phase in r.phases:
        cam, _ = forward(r, phase, name)
        M = region_masks(cam[:, k], X.shape[2:], r.recipe["eps"])               # (1, 1, R, R)
        photo, *regions = X, M * X, (1 - M) * X
        below = [[f"{text.split()[0]} {cosine(r.clip.encode_image(x), u[k]).item():.2f}"
                  for text, u in r.texts.items() if text != "true word"] for x in (photo, *regions)]
        if phase != "classify":  # these two tell: the kept region and the prompt
            below[1][1:] = [rf"$\bf{{{text}}}$".replace(" ", r"\ ") for text in below[1][1:]]
        texts.append(["\n".join(lines) for lines in (below[0][:2 * (not rows)], [], *below[1:])])
        rows.append([None if rows else as_picture(X[0]), M[0, 0].numpy(),
                     *(as_picture(x[0]) for x in regions)])
    grid(out / "2_regions.png", rows, ("$X$", "$M$", "$X^f = M X$", "$X^b = (1 - M) X$"),
         [*r.phases], texts, bars=[(slice(1, 2), (HEAT, 0, 1, "mask"))])


def judged(r, v_f, v_b, k):
    """3. Cosines and losses of a kept and a dropped region, features (1, E), for class k"""
    own, voc = r.recipe, recipe_of("voc", "refine", {})
    u = {text: features[k] for text, features in r.texts.items()}
    values = {f"kept, {text}": cosine(v_f, u[text]) for text in u}
    first, L_match, published = (match_loss(v_f, v_b, u["class text"], weight)
                                 for weight in (0, own["lambda_b"], voc["lambda_b"]))
    L_refine = refine_loss(v_f, u["prompt"])
    values |= {"dropped, class text": cosine(v_b, u["class text"]), "first term": first,
               "second term": L_match - first, "L_match": L_match, "L_refine": L_refine,
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
    grid(out / "3_masks.png", pictures, [f"{x:g}" for x in shown],
         [kind.replace(" ", "\n") for kind in kept])
    losses = {kind: {key: ys - ys[SHARES.index(1)] for key, ys in [*found.items()][-6:]}
              for kind, found in curves.items()}  # less their values at the border
    pairs = {}
    if r.words:
        for pair, tie in ties(r.clip, dict(zip(r.split.classes, r.words)), r.split.nouns).items():
            real = {"real CLIP": REAL_TIES[pair]} if pair in REAL_TIES else {}
            pairs[", ".join(pair)] = {"this CLIP": round(tie, 2)} | real
    x = "kept: 1 object, 2 photo"
    plot(out / "3_growing.png", {"cosines, hard masks": dict([*curves["hard masks"].items()][:-6])},
         4 * ["o-"], SHARES, x, "cosine", pairs)
    plot(out / "3_losses.png", losses, ("C0:", "C9:", "C0o-", "C3o-", "C1o-", "C7--"), SHARES, x,
         "loss, less that at 1")
    return {f"growing, {kind}": {key: {f"{share:g}": round(y, 2) for share, y in zip(SHARES, ys)}
                                 for key, ys in found.items()} for kind, found in curves.items()
            } | {"ties of class texts": pairs}


def prompts(r, out):
    """4. What the phase has logged"""
    rows = [json.loads(line) for line in r.files["log"].read_text("utf-8").splitlines()]
    curves = {key + what: [row[key] for row in rows]
              for key, what in (("sim(v_b, u_b)", ", in L_I"), ("sim(u_f, u_b)", ", in L_T"),
                                ("sim(v_f, u_b)", ", in neither"))}
    plot(out / "4_prompts.png", {"": curves}, ("-", "-", ":"), [row["epoch"] for row in rows],
         "epoch", "cosine")


def removes(r, out):
    """5. For each class the photo that refinement changes most; ANALYSIS: beside it what it does to
    the CAM on the object and on the rest, means of the class"""
    pairs = on_and_beside(r) if "true masks of one class" in r.has else {}
    rows, left = [], []
    for k, found in changes(r).items():
        (change, name), title = found[-1], r.split.classes[k]
        if change:
            before, after = (cams[0] for cams in cams_of(r, name, "match", "refine"))    # (H, W)
            photo, shade = r.split.image(name), 0.5 + (after - before).numpy() / 0.6
            rows.append([photo, heat(photo, before[None]), heat(photo, after[None]), SIGNED(shade)])
            left.append("\n".join([title, *(f"{where} {x:+.2f}" for where, x in
                                            zip(("on", "rest"), pairs.get(title, ())))]))
    grid(out / "5_removes.png", rows, ("photo", "match", "refine", "difference"), left,
         bars=[(slice(1, 3), (HEAT, 0, 1, "CAM")), (slice(3, 4), (SIGNED, -0.3, 0.3, "change"))])


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
    """6. From CAM to mask, at the photo's size. ANALYSIS: the photo of median gain"""
    name, preset, told = r.chosen[0][0], PRESETS["voc"], {}

    def labels_before(name):
        return score_labels(cams_of(r, name, "refine")[0], r.split.present(name), RECIPES["toy"][0])

    if {"pseudo masks", "true masks"} <= r.has:
        scores = [(photo_miou(r, name, labels_of(r, name, "masks")),
                   photo_miou(r, name, labels_before(name)), name) for name in r.true[:100]]
        scores.sort(key=lambda row: row[0] - row[1])
        after, before, name = scores[len(scores) // 2]
        told = {"mask better than the CAM's labels":
                f"{sum(row[0] > row[1] for row in scores)} of {len(scores)} photos; median photo "
                f"{before:.1f} to {after:.1f}"}
    present, photo = r.split.present(name), r.split.image(name)
    unary, shown = np.searchsorted([0, *(1 + present)], labels_before(name)), {}     # (H, W)
    prob = hard_unary(torch.from_numpy(unary), 1 + len(present))
    for n in (0, 1, 3, 10):
        Q = dense_crf(torch.from_numpy(np.array(photo)), prob, preset["gaussian"],
                      preset["bilateral"], iterations=n)
        labels = np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).numpy()]
        shown["1 step" if n == 1 else f"{n} steps"] = labels
    texts = len(shown) * [""]
    if name in r.true:
        texts = [f"mIoU {photo_miou(r, name, labels):.1f}" for labels in shown.values()]
        shown["truth"] = labels_of(r, name)
    grid(out / "6_crf.png", [[photo, *map(coloured, shown.values())]], ("photo", *shown),
         texts=[["", *texts, ""]])
    return told


def model(r, out):
    """7. Pseudo mask and prediction of the first photos. ANALYSIS, with true masks: the mIoU of
    each; the photos of the median gain and of the largest loss"""
    segmenter, recipe, side, _ = load_segmenter(r.files["seg"])
    test, rows = TEST[recipe] | {"side": side}, []
    names = r.split.names[:24 if r.words else 4]
    known = {*names} <= {*r.true}
    for name in names:
        photo, labels = r.split.image(name), [labels_of(r, name, "masks")]
        labels.append(predict_labels(segmenter, photo, test, True, torch.device("cpu")))
        scores = [photo_miou(r, name, each) for each in labels] if known else [0, 0]
        labels += [labels_of(r, name)] if known else []
        rows.append((scores, [photo, *map(coloured, labels)]))
    if known:
        scores = np.array([pair for pair, _ in rows])                            # (photos, 2)
        rows.sort(key=lambda row: row[0][0] - row[0][1])
        scatter(out / "7_photos.png", scores, "pseudo mask", "prediction")
        rows = [rows[len(rows) // 2], rows[-1]]
    texts = [["", *(f"mIoU {x:.1f}" for x in pair), ""] for pair, _ in rows] if known else ()
    head = ["photo", "pseudo mask", "prediction", "truth"]
    grid(out / "7_model.png", [row for _, row in rows], head[:3 + known], texts=texts)
    return {"model better than its pseudo mask":
            f"{(scores[:, 1] > scores[:, 0]).sum()} of {len(scores)}"} if known else {}


# ---- The page ------------------------------------------------------------------------------------

SECTIONS = {  # what draws: what it needs
    strip: {"labels"}, inside: {"vit", "labels"}, shares: {"true masks of one class", *PHASES},
    regions: {"labels"}, growing: {"match", "prompt", "true masks of one class"}, prompts: {"log"},
    removes: {"cams of match", "cams of refine"},
    gains: {"true masks", "cams of match", "cams of refine"},
    crf: {"cams of refine", "labels"}, model: {"seg", "pseudo masks"}}
CAPTIONS = {  # file: what it shows | what else, where all photos have a true mask
    "1_inside.png": "S inside: coarse map, attention of the marked patch, fine map",
    "2_regions.png": "Mask, kept and dropped region, their cosines to class text and prompt",
    "3_masks.png": "A mask grows from the middle of the object (1: all) to the photo (2): analysis",
    "3_growing.png": "Cosines of such masks, means over photos (analysis)",
    "3_losses.png": "Losses of such masks, less their values at the border (analysis)",
    "4_prompts.png": "Cosines during prompt learning, from its log",
    "5_removes.png": "For each class the photo that refinement changes most; red is raised|. Left: "
                     "the change on the object and beside it, means of the class (analysis)",
    "6_crf.png": "The dense CRF|; truth (analysis)",
    "7_photos.png": "mIoU of single photos (analysis)",
    "7_model.png": "Pseudo mask and prediction|, on the photos of median gain and of the largest "
                   "loss; truth (analysis)"}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>SemPLeS</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem }}
figure {{ margin: 2rem 0 }} img {{ max-width: 100%; height: auto }}
td {{ padding: 0 1rem 0 0; vertical-align: top }} b {{ padding: 0 .6rem; margin-right: .3rem }}
span {{ display: inline-block; margin-right: 1rem }}
</style></head><body>
<h1>SemPLeS, a run</h1>
<p><a href="{}">docs/method.md</a> explains the pictures, on the toy world.</p>
{}
</body></html>
"""


def page(r):
    """RUN/index.html: plain HTML, pictures beside it, no scripts, nothing from the network. First
    the scores and settings of the run, and the colours of its classes."""
    titles = {name: row[1] for name, row in (VOC | TOY).items()}
    known = len(r.true) == len(r.split.names)
    cells = [(titles[name], f"{row['miou']:.1f} % mIoU, {row['images']} photos of {row['list']}")
             for name, row in r.scores.items()]
    cells += [("photos", f"{len(r.split.names)} of {r.split.split}"),
              ("S", r.generators[[*r.phases][0]].kind)]
    cells += [(phase, ", ".join(f"{key} {x}" for key, x in record.items()
                                if key != "phase" and not (isinstance(x, str) and len(x) == 64)))
              for phase, record in r.records.items()]
    body = ["<table>", *(f"<tr><td>{a}</td><td>{b}</td></tr>" for a, b in cells), "</table>", "<p>"]
    for i, name in enumerate(["background", *r.split.classes]):
        colour = ",".join(map(str, PALETTE[3 * i:3 * i + 3]))
        body.append(f'<span><b style="background: rgb({colour})"></b>{escape(name)}</span>')
    body.append("</p>")
    pictures = {"strip.png": "Photos, their CAMs, their masks|; truth (analysis)"}
    pictures |= {f"companion/{file}": text for file, text in CAPTIONS.items()}
    for file, text in pictures.items():
        if (r.folder / file).is_file():
            text = text.replace("|", "") if known else text.partition("|")[0]
            body.append(f'<figure><img src="{file}" alt="{text}"><figcaption>{text}</figcaption>'
                        "</figure>")
    guide = os.path.relpath(ROOT / "docs/method.md", r.folder).replace(os.sep, "/")
    with writing(r.folder / "index.html") as temporary:
        temporary.write_text(PAGE.format(guide, "\n".join(body)), encoding="utf-8")


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
