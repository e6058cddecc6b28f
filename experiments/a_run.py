"""A run of demo.py or of the README's command lines: what it holds, and what companion.py computes
from it. The longer computations are at the end."""
import io
import json
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "prepare")]
import toy  # noqa: E402
import train_cam  # noqa: E402
from clip_model import CLIP, class_texts, load_clip  # noqa: E402
from common import (  # noqa: E402
    IMAGENET_MEAN, IMAGENET_STD, InputError, Split, read_cams, read_labels)
from mask_generator import (  # noqa: E402
    AttentionFusion, load_generator, photo_cams, scaled_input)
from train_cam import (  # noqa: E402
    clip_view, embed_masked, load_prompts, match_loss, recipe_of, refine_loss, region_masks)

CPU = torch.device("cpu")
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
    generators = {phase: load_generator(cam / f"{phase}.pt", split).eval() for phase in found}
    record = torch.load(cam / f"{found[-1]}.pt", weights_only=True)["record"]
    if (cam / "prompts.pt").is_file():
        texts["prompt"] = load_prompts(cam / "prompts.pt", split, clip)
    if (folder / "demo.json").is_file():
        world = json.loads((folder / "demo.json").read_text())["world"]
        pairs = toy.read_pairs(toy.parse_args(world.split()).pairs)
        words = [pairs[name] for name in split.classes]
        texts["true word"] = class_texts(clip, words)
    places = [(phase, folder / f"cams_{phase}") for phase in found] + [("refine", cam / "cams")]
    cams = {phase: path for phase, path in places if (path / "made_of.json").is_file()}
    true = [name for name in split.names if (split.root / f"masks/{name}.png").is_file()]
    first = [sorted((name for name in split.names if split.labels[name][k]),
                    key=lambda name: split.labels[name].sum())[:1]
            for k in range(len(split.classes))]
    seg = next((path for path in (folder / "seg/seg.pt", folder / "seg.pt") if path.is_file()), "")
    has = {*found, *texts, *(f"cams of {phase}" for phase in cams)}
    has |= {name for name, there in (
        ("demo", (folder / "table.json").is_file()), ("true masks", true), ("seg", seg),
        ("pseudo masks", (folder / "masks").is_dir()), ("log", (cam / "prompts.jsonl").is_file()),
        ("vit", generators[found[0]].kind == "vit")) if there}
    return Namespace(
        folder=folder, cam=cam, seg=seg, split=split, clip=clip, texts=texts,
        words=words, generators=generators, cams=cams, true=true, has=has,
        recipe=recipe_of("toy", "refine", {}) | record,
        phases={phase: PHASES[phase] for phase in found},
        chosen=[(name, k) for k, names in enumerate(first) for name in names][:6])


def with_one_class(r, count):
    """The first photos with a true mask that show one class: [(name, k)]"""
    found = [(name, r.split.labels[name].nonzero()[0]) for name in r.true]
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


def mask_of(r, phase, name, k):
    """M (1, 1, R, R) that a generator makes of a photo for class k, as in the losses"""
    cam, _ = forward(r, phase, name)
    return region_masks(cam[:, k], (r.clip.resolution,) * 2, r.recipe["eps"])


def cams_of(r, name, *phases):
    """The CAMs of each phase, of the export where there is one: a list of (n, H, W), of the photo's
    size"""
    photo, present, found = r.split.image(name), r.split.labels[name].nonzero()[0], []
    for phase in phases:
        if phase in r.cams:
            found.append(read_cams(r.cams[phase], name, present, photo.size[::-1]))
        else:
            maps = photo_cams(r.generators[phase], photo, torch.from_numpy(present),
                              recipe_of("voc", "export", {})["scales"])
            maps = region_masks(maps, maps.shape[1:], eps=1e-12)[:, 0]
            found.append(F.interpolate(maps[None], size=photo.size[::-1], mode="bilinear")[0])
    return found


def labels_of(r, name, folder=None):
    """A label picture of the run's folder, by default the true mask: uint8 (H, W)"""
    root = r.split.root if folder is None else r.folder
    return read_labels(root / (folder or "masks") / f"{name}.png", None, len(r.split.classes) + 1)


def truth(r, name, k, size=None):
    """Where a true mask has class k: bool (H, W)"""
    labels = Image.fromarray(labels_of(r, name))
    return np.array(labels.resize(size or labels.size, Image.NEAREST)) == 1 + k


# ---- What is computed from it --------------------------------------------------------------------

def shapes(value):
    """What a function returns -> its sizes as text; plain numbers are left out"""
    if isinstance(value, Image.Image):
        return f"{value.height} x {value.width}"
    if torch.is_tensor(value):
        return " x ".join(map(str, value.shape)) or "scalar"
    parts = value.values() if isinstance(value, dict) else value
    return "; ".join(shapes(part) for part in parts if not isinstance(part, int))


def one_batch(r):
    """A step of matching from classify.pt, thrown away: what the functions return, in the order in
    which they return first"""
    found, generator = {}, load_generator(r.cam / "classify.pt", r.split)
    generator.train_through_clip()
    before = {name: p.clone() for name, p in generator.named_parameters()}

    def watched(owner, name):
        original, of = getattr(owner, name), "" if owner is train_cam else f"{owner.__name__}."

        def watching(*values, **options):
            result = original(*values, **options)
            found.setdefault(of + name, shapes(result))
            return result
        return mock.patch.object(owner, name, watching)

    def step(generator, image, labels, recipe, **frozen):
        found["load_batches"] = shapes((image, labels))
        return train_cam.match_step(generator, image, labels, recipe, **frozen)

    recipe = r.recipe | {"phase": "match", "seed": 0, "steps": 1,
                         "batch": min(16, r.recipe["batch"])}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        args = Namespace(precision="float32", resume=False, workers=0, out=Path(folder), phase="")
        for owner, *names in ((Split, "image"), (train_cam.Crops, "__getitem__"),
                              (AttentionFusion, "forward"), (type(generator), "forward"),
                              (CLIP, "encode_image"), (train_cam, "clip_view", "region_masks",
                                                       "embed_masked", "match_loss")):
            for name in names:
                stack.enter_context(watched(owner, name))
        stack.enter_context(redirect_stdout(io.StringIO()))
        train_cam.train(generator, step, r.split, recipe, args, CPU, clip=r.clip,
                        u_f=r.texts["class text"])
    moved = sum(p.numel() for name, p in generator.named_parameters()
                if not torch.equal(p, before[name]))
    found["AdamW.step"] = f"{moved:,} of {sum(p.numel() for p in before.values()):,} weights"
    return found


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


def mask_gradients(r, name, k):
    """M (R, R) of matching; the gradients on it (h, w) of L_match, of lambda_R L_refine and of
    their sum: means over the places of the CAM"""
    with torch.no_grad():
        X, M, (cam, _) = view(r, name), mask_of(r, "match", name, k), forward(r, "match", name)
    M.requires_grad_(True)
    v_f, v_b = embed_masked(r.clip, X, M)
    losses = (match_loss(v_f, v_b, r.texts["class text"][k][None], r.recipe["lambda_b"]),
              r.recipe["lambda_r"] * refine_loss(v_f, r.texts["prompt"][k][None]))
    match, refine = (F.adaptive_avg_pool2d(torch.autograd.grad(
        loss, M, retain_graph=True)[0], cam.shape[2:])[0, 0] for loss in losses)
    return M.detach()[0, 0], match, refine, match + refine
