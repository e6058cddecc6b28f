"""A run of demo.py or of the README's command lines: what it holds, and what companion.py computes
from it."""
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import toy  # noqa: E402
from clip_model import class_texts, load_clip  # noqa: E402
from common import (  # noqa: E402
    IMAGENET_MEAN, IMAGENET_STD, InputError, Split, read_checkpoint, read_labels)
from make_pseudo import read_cams  # noqa: E402
from mask_generator import load_generator, photo_cams, scaled_input  # noqa: E402
from train_cam import clip_view, load_prompts, recipe_of, region_masks  # noqa: E402

PHASES = {"classify": "classification", "match": "matching", "refine": "refinement"}  # with CAMs


def open_run(args):
    """-> Namespace
    has: names of what is there: phases, texts, "cams of PHASE", and those listed at the end
    generators {phase: S}; phases {phase: title}; recipe: of the last phase with CAMs
    texts {title: (K, E)}: of classes, prompts and, for ANALYSIS, each class's true background word
    words: those true words, or None; true: the photos with a true mask, for ANALYSIS
    cams {phase: folder}, as exported; chosen [(name, k)]: a photo of each of the first classes"""
    folder, split = args.run, Split(args.data or args.run / "data", args.split)
    cam = folder / "cam" if (folder / "cam").is_dir() else folder
    found = [phase for phase in PHASES if (cam / f"{phase}.pt").is_file()]
    if not found:
        raise InputError(f"{cam}: no {', '.join(PHASES)}.pt; expected the --out of train_cam.py or "
                         "of demo.py; run make demo first")
    own_clip = folder / "clip.pt"
    clip = load_clip(args.clip or (own_clip if own_clip.is_file() else "ViT-B/32"))
    texts, words = {"class text": class_texts(clip, split.words)}, None
    if (cam / "prompts.pt").is_file():
        texts["prompt"] = load_prompts(cam / "prompts.pt", split, clip)
    demo = folder / "demo.json"
    begun = json.loads(demo.read_text()) if demo.is_file() else {"voc": True}
    if not begun.get("voc"):  # the toy world
        world = begun["world"]
        pairs = toy.read_pairs(toy.parse_args(world.split()).pairs)
        words = [pairs[name] for name in split.classes]
        texts["true word"] = class_texts(clip, words)
    generators = {phase: load_generator(cam / f"{phase}.pt", split).eval() for phase in found}
    record = read_checkpoint(cam / f"{found[-1]}.pt", "generator", "run make demo first")["record"]
    places = [(phase, folder / f"cams_{phase}") for phase in found] + [("refine", cam / "cams")]
    cams = {phase: path for phase, path in places if (path / "made_of.json").is_file()}
    true = [name for name in split.names if (split.root / f"masks/{name}.png").is_file()]
    photos = [[name for name in split.names if split.labels[name][k]]
              for k in range(len(split.classes))]
    seg = next((path for path in (folder / "seg/seg.pt", folder / "seg.pt") if path.is_file()), "")
    there = {"demo": (folder / "table.json").is_file(), "true masks": true, "seg": seg,
             "pseudo masks": (folder / "masks").is_dir(), "log": (cam / "prompts.jsonl").is_file(),
             "vit": generators[found[0]].kind == "vit"}
    chosen = [(min(shown, key=lambda name: split.labels[name].sum()), k)
              for k, shown in enumerate(photos) if shown]
    return Namespace(
        folder=folder, cam=cam, seg=seg, split=split, clip=clip, texts=texts, words=words,
        generators=generators, cams=cams, true=true, chosen=chosen[:6],
        has={*found, *texts, *(f"cams of {phase}" for phase in cams),
             *(name for name, found in there.items() if found)},
        recipe=recipe_of("toy", "refine", {}) | record,
        phases={phase: PHASES[phase] for phase in found})


def with_one_class(r, names, count):
    """The first of these photos that show one class: [(name, k)]"""
    found = [(name, r.split.present(name)) for name in names]
    return [(name, int(k[0])) for name, k in found if len(k) == 1][:count]


def view(r, name):
    """A photo as CLIP sees it: X (1, 3, R, R)"""
    photo = v2.functional.pil_to_tensor(r.split.image(name)).float() / 255
    photo = v2.functional.normalize(photo, IMAGENET_MEAN, IMAGENET_STD)
    return clip_view(r.clip, photo[None])


def forward(r, phase, name):
    """CAM (1, K, h, w) and logits of a whole photo"""
    generator = r.generators[phase]
    return generator(scaled_input(r.split.image(name), 1, generator.backbone.patch, 2500))


def cams_of(r, name, *phases):
    """The CAMs of each phase, of the export where there is one: a list of (n, H, W), of the photo's
    size"""
    photo, present, found = r.split.image(name), r.split.present(name), []
    size = photo.size[::-1]
    for phase in phases:
        if phase in r.cams:
            found.append(read_cams(r.cams[phase], name, present, size))
        else:
            maps = photo_cams(r.generators[phase], photo, torch.from_numpy(present),
                              recipe_of("voc", "export", {})["scales"])
            found.append(region_masks(maps, size, eps=1e-12)[:, 0])
    return found


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


SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2)


def growing_masks(inside):
    """ANALYSIS: a true mask (R, R) -> masks (S, 1, R, R) that grow from the middle of the object to
    its border (share 1), then over the background (2)."""
    R, n = len(inside), inside.sum().item()
    at = torch.arange(R).double()
    blur = torch.exp(-(at[:, None] - at).square() / (R * R / 32))  # a Gaussian, deviation R / 8
    depth = blur @ inside.double() @ blur                                        # (R, R)
    order = (inside + depth / depth.max()).flatten().argsort(descending=True, stable=True)
    kept = [min(share, 1) * n + max(share - 1, 0) * (R * R - n) for share in SHARES]
    return torch.stack([order.argsort().view(R, R) < pixels for pixels in kept]).float()[:, None]
