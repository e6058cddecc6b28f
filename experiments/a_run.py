"""A run of demo.py or of the README's command lines: what it holds, and what companion.py and
explore.py compute from it."""
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import toy  # noqa: E402
from clip_model import class_texts, load_clip  # noqa: E402
from common import InputError, Split, read_checkpoint, read_labels  # noqa: E402
from make_pseudo import read_cams  # noqa: E402
from mask_generator import load_generator, photo_cams, scaled_input  # noqa: E402
from train_cam import clip_view, load_prompts, recipe_of, region_masks  # noqa: E402

PHASES = {"classify": "classification", "match": "matching", "refine": "refinement"}  # with CAMs
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2)  # see growing_masks


def find(folder, name):
    """A file of a run, made by demo.py or by the README's command lines, or None"""
    paths = folder / "cam" / name, folder / "seg" / name, folder / name
    return next((path for path in paths if path.is_file()), None)


def find_run(args):
    """What needs no CLIP -> Namespace
    phases {phase: title}, paths {phase: file} and generators {phase: S} of the phases that it has;
    recipe: of the last
    true: the photos with a true mask, for ANALYSIS
    cams {phase: folder}, as exported; files {name: path}: what else there is
    chosen [(name, k)]: a photo of each of the first classes"""
    folder, split = args.run, Split(args.data or args.run / "data", args.split)
    paths = {phase: path for phase in PHASES if (path := find(folder, f"{phase}.pt"))}
    if not paths:
        raise InputError(f"{folder}: no {', '.join(PHASES)}.pt; expected the --out of train_cam.py "
                         "or of demo.py; run make demo first")
    generators = {phase: load_generator(path, split).eval() for phase, path in paths.items()}
    record = read_checkpoint([*paths.values()][-1], "record", "run make demo first")["record"]
    exports = {phase: find(folder, f"cams_{phase}/made_of.json") for phase in paths}
    exports["refine"] = find(folder, "cams/made_of.json") or exports.get("refine")
    names = {"pseudo masks": "masks/made_of.json", "seg": "seg.pt", "log": "prompts.jsonl"}
    photos = [[name for name in split.names if split.labels[name][k]]
              for k in range(len(split.classes))]
    chosen = [(min(shown, key=lambda name: split.labels[name].sum()), k)
              for k, shown in enumerate(photos) if shown]
    return Namespace(
        folder=folder, split=split, paths=paths, phases={phase: PHASES[phase] for phase in paths},
        generators=generators, recipe=recipe_of("toy", "refine", {}) | record,
        true=[name for name in split.names if (split.root / f"masks/{name}.png").is_file()],
        cams={phase: path.parent for phase, path in exports.items() if path},
        files={key: path for key, name in names.items() if (path := find(folder, name))},
        chosen=chosen[:6])


def open_run(args):
    """The same, and -> Namespace
    texts {title: (K, E)}: of classes, prompts and, for ANALYSIS, each class's true background word
    words: those true words, or None
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


@torch.no_grad()
def parts_of(r, phase, name, k):
    """Of S, for class k -> {"coarse", "A_c2p", "A_p2p", "fine": (h, w)}, and the patch where fine
    is greatest, whose row A_p2p is"""
    generator, caught = r.generators[phase], {}
    hooks = [module.register_forward_hook(lambda module, _, result, key=key:
                                          caught.update({key: result[0]}))
             for key, module in (("coarse", generator.head), ("A", generator.fusion))]
    fine = forward(r, phase, name)[0][0, k]                                      # (h, w)
    for hook in hooks:
        hook.remove()
    patch, K, A = int(fine.argmax()), len(r.split.classes), caught["A"]          # A (T, T)
    return {"coarse": caught["coarse"][k].relu(), "A_c2p": A[k, K:].view_as(fine),
            "A_p2p": A[K + patch, K:].view_as(fine), "fine": fine}, patch


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
