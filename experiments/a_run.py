"""A run of demo.py or of the README's command lines: what it holds, and what companion.py and
explore.py compute from it."""
import json
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import toy  # noqa: E402
from clip_model import class_texts, load_clip  # noqa: E402
from common import InputError, Split, read_checkpoint, read_labels  # noqa: E402
from demo import TOY, VOC  # noqa: E402
from make_pseudo import read_cams  # noqa: E402
from mask_generator import load_generator, photo_cams, scaled_input  # noqa: E402
from train_cam import clip_view, load_prompts, recipe_of, region_masks  # noqa: E402

PHASES = {"classify": "classification", "match": "matching", "refine": "refinement"}  # with CAMs
# `ties` of the real CLIP (ViT-B/16) among the 171 names of COCO-Stuff, whose railroad and sea are
# our rails and water; of the text features published with ZegCLIP
REAL_TIES = {
    ("boat", "water"): 0.29, ("train", "rails"): 1.08, ("bird", "sky"): 0.10,
    ("cow", "grass"): 0.11, ("car", "road"): 0.31, ("bottle", "table"): 0.02}
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2)  # see growing_masks


def find(folder, name):
    """A file of a run, made by demo.py or by the README's command lines, or None"""
    paths = folder / "cam" / name, folder / "seg" / name, folder / name
    return next((path for path in paths if path.is_file()), None)


def find_run(args):
    """What needs no CLIP -> Namespace
    phases {phase: title}, paths {phase: file} and generators {phase: S} of the phases that it has;
    recipe: of the last; records {phase: record of its checkpoint}
    true: the photos with a true mask, for ANALYSIS
    cams {phase: folder}, as exported; files {name: path}: what else there is
    scores {name: what eval.py wrote as RUN/NAME.json}
    chosen [(name, k)]: a photo of each of the first six classes, each photo once"""
    folder, split = args.run, Split(args.data or args.run / "data", args.split)
    paths = {phase: path for phase in PHASES if (path := find(folder, f"{phase}.pt"))}
    if not paths:
        raise InputError(f"{folder}: no {', '.join(PHASES)}.pt; expected the --out of train_cam.py "
                         "or of demo.py; run make demo first")
    records = {phase: read_checkpoint(path, "record", "run make demo first")["record"]
               for phase in ("classify", "match", "prompts", "refine", "seg")
               if (path := find(folder, f"{phase}.pt"))}
    scores = {name: json.loads(path.read_text()) for name in VOC | TOY
              if (path := find(folder, f"{name}.json"))}
    exports = {phase: find(folder, f"cams_{phase}/made_of.json") for phase in paths}
    exports["refine"] = find(folder, "cams/made_of.json") or exports.get("refine")
    names = {"pseudo masks": "masks/made_of.json", "seg": "seg.pt", "log": "prompts.jsonl"}
    chosen = {}  # {name: k}
    for k in range(len(split.classes)):
        if shown := [name for name in split.names if split.labels[name][k] and name not in chosen]:
            chosen[min(shown, key=lambda name: split.labels[name].sum())] = k
    return Namespace(
        folder=folder, split=split, paths=paths, phases={phase: PHASES[phase] for phase in paths},
        generators={phase: load_generator(path, split).eval() for phase, path in paths.items()},
        recipe=recipe_of("toy", "refine", {}) | records[[*paths][-1]], records=records,
        scores={name: row for name, row in scores.items() if "miou" in row},
        true=[name for name in split.names if (split.root / f"masks/{name}.png").is_file()],
        cams={phase: path.parent for phase, path in exports.items() if path},
        files={key: path for key, name in names.items() if (path := find(folder, name))},
        chosen=[*chosen.items()][:6])


def open_run(args):
    """The same, and -> Namespace
    texts {title: (K, E)}: of classes, prompts and, for ANALYSIS, each class's true background word
    words: those true words, or None
    chosen [(name, k)]: of the four classes that refinement changes most the photo of median change,
    most first; without CAMs of both phases four of the six
    has: the names of all that is there, for companion.SECTIONS"""
    r = find_run(args)
    r.clip = load_clip(args.clip or find(r.folder, "clip.pt") or "ViT-B/32")
    r.texts, r.words = {"class text": class_texts(r.clip, r.split.words)}, None
    if path := find(r.folder, "prompts.pt"):
        r.texts["prompt"] = load_prompts(path, r.split, r.clip)
    path = find(r.folder, "demo.json")
    demo = json.loads(path.read_text()) if path else {"voc": True}
    if not demo.get("voc"):  # the toy world
        pairs = toy.read_pairs(toy.parse_args(demo["world"].split()).pairs)
        r.words = [pairs[name] for name in r.split.classes]
        r.texts["true word"] = class_texts(r.clip, r.words)
    r.chosen = r.chosen[:4]
    if {"match", "refine"} <= r.cams.keys() and (found := changes(r)):
        medians = [(*names[len(names) // 2], k) for k, names in found.items()]
        r.chosen = [(name, k) for _, name, k in sorted(medians, reverse=True)[:4]]
    r.has = {*r.phases, *r.texts, *r.files, *(f"cams of {phase}" for phase in r.cams)}
    r.has |= {next(iter(r.generators.values())).kind, "labels" if r.chosen else "no labels"}
    r.has |= {"true masks"} if r.true else set()
    r.has |= {"true masks of one class" for name in r.true if r.split.labels[name].sum() == 1}
    return r


def with_one_class(r, names, count):
    """The first of these photos that show one class: [(name, k)]"""
    found = [(name, r.split.present(name)) for name in names]
    return [(name, int(k[0])) for name, k in found if len(k) == 1][:count]


def view(r, name):
    """A photo as CLIP sees it: X (1, 3, R, R)"""
    return clip_view(r.clip, scaled_input(r.split.image(name), 1, 1, 10 ** 9))


def forward(r, phase, name):
    """CAM (1, K, h, w) and logits of a whole photo"""
    generator = r.generators[phase]
    return generator(scaled_input(r.split.image(name), 1, generator.backbone.patch, 2500))


def cams_of(r, name, *phases, size=None):
    """The CAMs of each phase, of the export where there is one: a list of (n, H, W), of the photo's
    size or of another"""
    size, found = size or r.split.size(name), []
    for phase in phases:
        if phase in r.cams:
            found.append(read_cams(r.cams[phase], name, r.split.present(name), size))
        else:
            found.append(cams_by(r, r.generators[phase], name, size))
    return found


def cams_by(r, generator, name, size, scales=None):
    """CAMs (n, H, W) that are not exported, as the export makes them; scales: by default VOC's"""
    maps = photo_cams(generator, r.split.image(name), torch.from_numpy(r.split.present(name)),
                      scales or recipe_of("voc", "export", {})["scales"])
    return region_masks(maps, size, eps=1e-12)[:, 0]


def labels_of(r, name, folder=None):
    """A label picture of the run's folder, by default the true mask: uint8 (H, W)"""
    root = r.split.root if folder is None else r.folder
    return read_labels(root / (folder or "masks") / f"{name}.png", None, len(r.split.classes) + 1)


def truth(r, name, k, size=None):
    """Where a true mask has class k: bool (H, W)"""
    labels = Image.fromarray(labels_of(r, name))
    return np.array(labels.resize(size or labels.size, Image.NEAREST)) == 1 + k


def changes(r):
    """{k: [(change, name), ...]}, sorted, of the first 300 photos with one class: the mean squared
    difference of their CAMs after matching and refinement"""
    found = defaultdict(list)
    for name, k in with_one_class(r, r.split.names, 300):
        before, after = cams_of(r, name, "match", "refine")                      # (1, H, W) twice
        found[k].append(((after - before).square().mean().item(), name))
    return {k: sorted(found[k]) for k in sorted(found)}


def growing_masks(inside):
    """ANALYSIS: a true mask (R, R) -> masks (n, 1, R, R) that grow from the middle of the object to
    its border (share 1), then over the background (2)."""
    R, pixels = len(inside), inside.sum().item()
    at = torch.arange(R).double()
    blur = torch.exp(-(at[:, None] - at).square() / (R * R / 32))  # a Gaussian, deviation R / 8
    depth = blur @ inside.double() @ blur                                        # (R, R)
    order = (inside + depth / depth.max()).flatten().argsort(descending=True, stable=True)
    kept = [min(share, 1) * pixels + max(share - 1, 0) * (R * R - pixels) for share in SHARES]
    return torch.stack([order.argsort().view(R, R) < count for count in kept]).float()[:, None]


def ties(clip, pairs, words):
    """How much of its background's direction an object's text has, less the mean of all words:
    along that direction over across it. pairs {object: background}, all in words -> {pair: tie}"""
    u = F.normalize(class_texts(clip, words), dim=1)
    u = u - u.mean(dim=0)                                                        # (words, E)
    found = {}
    for pair in pairs.items():
        t_o, t_b = (u[words.index(word)] for word in pair)                       # (E,) twice
        b = t_b / t_b.norm()
        along = t_o @ b
        found[pair] = (along / (t_o - along * b).norm()).item()
    return found
