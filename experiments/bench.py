"""Speed and memory against other implementations, as ratios; below 1 ours is faster or smaller.

  clip   CLIP against clip-anytorch, a copy of OpenAI's code
  crf    the dense CRF against pydensecrf2 in a Python of its own (--peer); without one, on a GPU
         against itself on the CPU, on a CPU, for tiny pictures, against dense_crf_slow
  eval   scoring label PNGs against decoding the same files; the scores against torchmetrics'
  step   a step of every phase, the segmentation's, and the export of a photo, against the official
         formulation; and the memory that a GPU needs for VOC, computed from the memory per image

Both sides take turns; ratios are medians over the rounds. Memory is the peak of a fresh process
above what it held before, on a GPU torch's count. Weights are random. Time on an idle machine.

  OMP_NUM_THREADS=2 python experiments/bench.py step --classes 80
  python experiments/bench.py eval --toy            # small sizes, to see that the bench itself runs
  python3.11 -m venv ENV; ENV/bin/pip install "cython<3" "numpy<2" "setuptools<80" wheel
  ENV/bin/pip install --no-build-isolation pydensecrf2                      # takes a C++ compiler
  python experiments/bench.py crf --peer ENV/bin/python --photos DIR     # three .jpg of DIR too
"""
import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval  # noqa: E402
import train_cam  # noqa: E402
import train_seg  # noqa: E402
from clip_model import CLIP, tokenize  # noqa: E402
from common import autocast, write_labels  # noqa: E402
from make_pseudo import PRESETS, dense_crf, dense_crf_slow, hard_unary  # noqa: E402
from mask_generator import (  # noqa: E402
    AttentionFusion, MaskGenerator, ViT, photo_cams, scaled_input)

CLIP_SIZES = {False: {}, True: dict(resolution=64, patch=16, width=64, layers=2, text_width=64,
                                    text_layers=2, embed_dim=64)}  # of --toy


# ---- Time and memory -----------------------------------------------------------------------------

def seconds(call):
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(ours, theirs, args, clock=seconds):
    """Two calls take turns; median milliseconds of each, median ratio. The first round warms up."""
    rows = [(seconds(ours), clock(theirs)) for _ in range(args.rounds + 1)][1:]
    a, b = (1e3 * median(column) for column in zip(*rows))
    return a, b, median(a / b for a, b in rows)


def show(title, *cells):
    cells = (x if isinstance(x, str) else f"{x:.3g}" for x in cells)
    print(f"{title:<44}" + "".join(f"{x:>10}" for x in cells), flush=True)


def peak_here(call, args):
    """Peak memory in MiB of two calls above what this process held before (on a CPU: Linux)"""
    def resident(key):  # KiB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(), call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    before = resident("VmRSS")
    call(), call()
    return (resident("VmHWM") - before) / 1024


def peak_of(args, measure):
    """MiB that a fresh process prints: the same bench with --measure"""
    flags = [f"--{key}={value}" for key, value in {**vars(args), "measure": measure}.items()
             if value and key not in ("what", "toy")] + ["--toy"] * args.toy
    done = subprocess.run([sys.executable, __file__, args.what, *flags], check=True,
                          capture_output=True)
    return float(done.stdout)


# ---- clip ----------------------------------------------------------------------------------------

def reference(ours):
    """clip-anytorch's model with our weights, trainable as its loader leaves them"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources
        from clip.model import build_model
    theirs = build_model(ours.state_dict()).float()
    theirs.load_state_dict(ours.state_dict())  # again: build_model rounds to float16
    return theirs.to(ours.text_projection.device)


def backward(model, x):
    """The gradient of the features for the pixels; gradients of weights are dropped"""
    model.encode_image(x.clone().requires_grad_()).square().sum().backward()
    model.zero_grad(set_to_none=True)


def bench_clip(args):
    torch.manual_seed(0)
    ours = CLIP(**CLIP_SIZES[args.toy]).to(args.device).eval().requires_grad_(False)
    x = torch.randn(args.batch, 3, ours.resolution, ours.resolution, device=args.device)
    if args.measure == "ours":
        return print(peak_here(lambda: backward(ours, x), args))
    theirs = reference(ours).requires_grad_(args.measure != "frozen")
    if args.measure:
        return print(peak_here(lambda: backward(theirs, x), args))
    short, long = (tokenize([f"a photo of {'class ' * n}{k}." for k in range(20)]).to(args.device)
                   for n in (1, 29))  # a learned prompt is 30 long
    image, text, text_long = (torch.no_grad()(call) for call in (
        lambda m: m.encode_image(x), lambda m: m.encode_text(short), lambda m: m.encode_text(long)))
    for name, call in (("image", image), ("text", text_long)):
        a, b = call(ours), call(theirs)
        show(f"relative error of features, {name}", (a - b).abs().max() / b.abs().max())
    show(f"milliseconds, batch {args.batch}, {args.device}", "ours", "theirs", "ratio")
    for title, call in (("image forward", image), ("text forward, 20 sentences", text),
                        ("the same of 36 tokens", text_long),
                        ("image forward + backward", lambda m: backward(m, x)),
                        ("the same, theirs frozen too", lambda m: backward(m, x))):
        theirs.requires_grad_("frozen" not in title)
        with autocast(torch.device(args.device), "auto"):
            show(title, *race(lambda: call(ours), lambda: call(theirs), args))
    show("MiB, image forward + backward", *(peak_of(args, side) for side in ("ours", "theirs")))
    show("the same, theirs frozen too", "", peak_of(args, "frozen"))


# ---- crf -----------------------------------------------------------------------------------------

PEER = """
import sys, time
import numpy as np
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_softmax
job = np.load(sys.argv[1])
image, weights, (C, H, W) = job["image"], job["weights"].tolist(), job["prob"].shape
unary = np.ascontiguousarray(unary_from_softmax(job["prob"]))
start = time.perf_counter()
crf = DenseCRF2D(W, H, C)
crf.setUnaryEnergy(unary)
crf.addPairwiseGaussian(sxy=weights[0], compat=weights[1])
crf.addPairwiseBilateral(sxy=weights[2], srgb=weights[3], rgbim=image, compat=weights[4])
Q = crf.inference(10)
print(time.perf_counter() - start)
np.save(sys.argv[2], np.array(Q).reshape(C, H, W))
"""


def other_crf(args, image, prob, gaussian, bilateral):
    """image uint8 (H, W, 3), prob (C, H, W) -> Q (C, H, W), the seconds that it says or None"""
    peer = args.peer
    if not peer:
        return (dense_crf if args.device == "cuda" else dense_crf_slow)(
            image, prob, gaussian, bilateral), None
    with tempfile.TemporaryDirectory() as folder:
        job, Q = f"{folder}/job.npz", f"{folder}/Q.npy"
        np.savez(job, image=image.numpy(), prob=prob.numpy(), weights=[*gaussian, *bilateral])
        done = subprocess.run([peer, "-c", PEER, job, Q], check=True, capture_output=True)
        return torch.from_numpy(np.load(Q)), float(done.stdout)


def smooth(rng, count, cells, height, width):
    """Random maps (count, height, width), as coarse as a CAM, of mean 0 and deviation about 1"""
    maps = [Image.fromarray(rng.normal(size=cells).astype(np.float32)) for _ in range(count)]
    return np.stack([np.asarray(x.resize((width, height), Image.BICUBIC)) for x in maps])


def bench_crf(args):
    rng, images = np.random.default_rng(0), {}
    for H, W in [(375, 500), (64, 64)] if args.peer or args.device == "cuda" else [(24, 32)]:
        photo = 128 + 50 * smooth(rng, 3, (6, 8), H, W) + rng.normal(0, 4, (3, H, W))
        photo = photo.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()
        images[f"drawn {W}x{H}"] = torch.from_numpy(photo)
    for path in sorted(args.photos.glob("*.jpg"))[:3] if args.photos else ():
        photo = Image.open(path).convert("RGB").resize((500, 375))
        images[path.name] = torch.from_numpy(np.array(photo))
    if args.measure:
        image = next(iter(images.values()))
        prob = torch.full((3, *image.shape[:2]), 1 / 3)
        return print(peak_here(lambda: dense_crf(image, prob), args))
    show("milliseconds", "ours", "theirs", "ratio", "agree", "mean |dQ|")
    for (title, image), C, name in product(images.items(), (3, 21), ("voc", "irn", "prob")):
        unary, *weights = PRESETS[name].values()
        prob = (2 * torch.from_numpy(smooth(rng, C, (12, 16), *image.shape[:2]))).softmax(0)
        prob = hard_unary(prob.argmax(0), C) if unary == "hard" else prob
        theirs = partial(other_crf, args, image, prob, *weights)

        def ours():
            return dense_crf(image, prob.to(args.device), *weights).cpu()
        times = race(ours, theirs, args, (lambda call: call()[1]) if args.peer else seconds)
        Q, (other, _) = ours(), theirs()
        agree = (Q.argmax(0) == other.argmax(0)).float().mean().item()
        show(f"{title}, {C} labels, {name}", *times, f"{agree:.4%}", (Q - other).abs().mean())
    show("MiB, the first picture, 3 labels", peak_of(args, "ours"))


# ---- eval ----------------------------------------------------------------------------------------

def bench_eval(args):
    from torchmetrics import JaccardIndex
    count, H, W = (12, 30, 40) if args.toy else (2000, 375, 500)
    metric = JaccardIndex(task="multiclass", num_classes=21, average="none", ignore_index=255)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for i in range(count):  # three classes in smooth regions; 255 around the true ones
            labels, scores = rng.permutation(21)[:4].astype(np.uint8), smooth(rng, 4, (4, 5), H, W)
            second, first = np.sort(scores, axis=0)[-2:]
            truth = np.where(first - second < 0.05, 255, labels[scores.argmax(0)]).astype(np.uint8)
            pred = labels[(scores + 0.2 * smooth(rng, 4, (24, 32), H, W)).argmax(0)]
            Image.new("RGB", (W, H)).save(root / f"images/{i}.jpg")
            write_labels(root / f"masks/{i}.png", truth)
            write_labels(root / f"pred/{i}.png", pred)
            metric.update(torch.from_numpy(pred)[None], torch.from_numpy(truth)[None])
        (root / "classes.txt").write_text("\n".join(map(str, range(1, 21))))
        (root / "val.csv").write_text("".join(f"images/{i}.jpg,\n" for i in range(count)))
        words = ["--data", folder, "--pred", f"{folder}/pred", "--json", f"{folder}/scores.json",
                 "--device", "cpu"]
        files = [path for name in ("images", "masks", "pred") for path in (root / name).iterdir()]

        def decode():
            with ThreadPoolExecutor(4) as pool:  # as many as in eval.py
                list(pool.map(lambda path: np.array(Image.open(path)), files))
        with contextlib.redirect_stdout(io.StringIO()):
            times = race(lambda: eval.main(eval.parse_args(words)), decode, args)
        show(f"milliseconds for {count} of {W}x{H}", "scoring", "decoding", "ratio")
        show("", *times)
        ours = json.loads((root / "scores.json").read_text())["iou"].values()
    worst = max(abs(x / 100 - y) for x, y in zip(ours, metric.compute().tolist()) if x is not None)
    print(f"no class's IoU differs from torchmetrics' by more than {worst:.1e}")
    assert worst < 1e-6


# ---- step ----------------------------------------------------------------------------------------

STEPS = {"classify": 64, "match": 64, "prompts": 128, "refine": 64, "segmentation": 4, "export": 1}


def plain_attention(q, k, v):
    """What torch's fused function computes, with maps that are kept for the gradient"""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class PlainFusion(AttentionFusion):
    """The same, of the maps of all layers at once"""

    def forward(self, maps, features):
        w = self.excite(self.pool(torch.cat(features, dim=1)).squeeze(-1))
        return (w[:, :, None, None] * torch.cat(maps, dim=1)).mean(dim=1)


def build_side(args, official):
    """The models of one side, and a batch with 1.5 classes an image, as in VOC"""
    torch.manual_seed(0)
    K, side, crop = args.classes, *((64, 64) if args.toy else (224, 480))
    sizes = dict(width=64, layers=2, grid=(4, 4)) if args.toy else {}
    clip = CLIP(**CLIP_SIZES[args.toy]).to(args.device).eval().requires_grad_(official)
    m = Namespace(clip=clip, generator=MaskGenerator(ViT(**sizes), K).to(args.device),
                  prompts=train_cam.Prompts(clip, K, 30).to(args.device), official=official,
                  segmenter=train_seg.Segmenter(ViT(**sizes), K + 1).to(args.device),
                  image=torch.randn(args.batch, 3, side, side).to(args.device),
                  labels=torch.zeros(args.batch, K), device=torch.device(args.device),
                  large=torch.randn(4, 3, crop, crop).to(args.device),
                  masks=torch.randint(K + 1, (4, crop, crop)), precision=args.precision,
                  texts=tokenize([f"a photo of class {k}." for k in range(K)]).to(args.device),
                  photo=Image.new("RGB", (96, 64) if args.toy else (500, 375)))
    for model in (clip, m.generator, m.segmenter) if official else ():
        for part in model.modules():
            if isinstance(part, AttentionFusion):
                part.__class__ = PlainFusion
    for b in range(args.batch):
        m.labels[b, torch.randperm(K)[:1 + b % 2]] = 1
    with torch.no_grad():
        m.u_f, m.u_b = clip.encode_text(m.texts), clip.encode_prompts(m.prompts.vectors)
    return m


def models_of(m, phase):
    """What trains, and what it is given"""
    return {"classify": (m.generator,), "match": (m.generator, m.clip),
            "prompts": (m.prompts, m.generator, m.clip), "refine": (m.generator, m.clip),
            "segmentation": (m.segmenter,), "export": (m.generator,)}[phase]


def our_loss(m, phase, recipe):
    if phase == "segmentation":
        recipe = {"clip_start": 1.2, "clip_patch": 120}
        return train_seg.segmentation_step(m.segmenter, m.large, m.masks, recipe)[0]["loss"]
    step, others = {"classify": (train_cam.classification_step, ()),
                    "match": (train_cam.match_step, (m.u_f,)),
                    "prompts": (train_cam.prompt_step, (m.u_f,)),
                    "refine": (train_cam.refine_step, (m.u_f, m.u_b))}[phase]
    model, *frozen = models_of(m, phase)
    return step(model, m.image, m.labels, recipe, *frozen, *others)[0]["loss"]


def official_loss(m, phase, recipe):
    """That of a plain reading of the paper: the maps of all K classes are up-sampled, normalised;
    every pair's kept and dropped region is a call of CLIP's own; the class text and the prompt of
    every pair are encoded anew at each step, over all 77 tokens; CLIP's weights are trainable, so
    their gradients are computed and dropped; linear layers are torch's; the maps of all layers are
    fused at once, and the segmentation model's attention is written out."""
    if phase in ("classify", "segmentation"):
        with mock.patch.object(F, "scaled_dot_product_attention", plain_attention):
            return our_loss(m, phase, recipe)
    clip, pairs = m.clip, m.labels.nonzero().tolist()
    with torch.set_grad_enabled(phase != "prompts"):
        cam, _ = m.generator(m.image)
        maps = F.interpolate(cam.float(), size=(clip.resolution,) * 2, mode="bilinear")
        low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
        M, X = (maps - low) / (high - low + recipe["eps"]), train_cam.clip_view(clip, m.image)
        v_f = torch.cat([clip.encode_image((M[b, k] * X[b])[None]) for b, k in pairs])
        v_b = torch.cat([clip.encode_image(((1 - M[b, k]) * X[b])[None]) for b, k in pairs])
        texts = [m.texts[[k]] for _, k in pairs]
        u_f = torch.cat([clip.read_text(clip.token_embedding(t), t.argmax(1)) for t in texts])
    if phase == "match":
        return train_cam.match_loss(v_f, v_b, u_f, recipe["lambda_b"])
    u_b = torch.cat([clip.encode_prompts(m.prompts.vectors[[k]]) for _, k in pairs])
    if phase == "prompts":
        return train_cam.prompt_loss(v_b, u_b, u_f, recipe["lambda_t"])
    L_match = train_cam.match_loss(v_f, v_b, u_f, recipe["lambda_b"])
    return L_match + recipe["lambda_r"] * train_cam.refine_loss(v_f, u_b)


@torch.no_grad()
def export(m):
    """CAMs of a photo at two scales, mirrored too; theirs up-samples all K maps to its size."""
    if not m.official:
        present = torch.tensor([0, 3], device=m.device)
        return photo_cams(m.generator, m.photo, present, (1, 1.2))
    total = 0
    for scale in (1, 1.2):
        x = scaled_input(m.photo, scale, 16, 2500).to(m.device)
        for view in (x, x.flip(3)):
            cam, _ = m.generator(view)
            total = total + F.interpolate(cam, size=m.photo.size[::-1], mode="bilinear")


def one_step(m, phase):
    """Loss, gradients and update; or an export"""
    if phase == "export":
        return export(m)
    m.generator.requires_grad_(phase == "classify")
    if phase in ("match", "refine"):
        m.generator.train_through_clip()
    model = models_of(m, phase)[0]
    with autocast(m.device, m.precision):
        value = (official_loss if m.official else our_loss)(
            m, phase, train_cam.recipe_of("voc", phase, {}))
    value.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5).step()
    model.zero_grad(set_to_none=True)
    m.clip.zero_grad(set_to_none=True)


def peak_step(args, m, phase):
    """MiB of a step above the weights; on a CPU in a fresh process, for no memory is left over"""
    if args.device == "cuda":
        return peak_here(lambda: one_step(m, phase), args)
    side = "official" if m.official else "ours"
    return peak_of(Namespace(**{**vars(args), "batch": len(m.image)}), f"{side} {phase}")


def bench_step(args):
    if args.measure:
        side, phase = args.measure.split()
        m = build_side(args, side == "official")
        return print(peak_here(lambda: one_step(m, phase), args))
    ours, theirs = build_side(args, False), build_side(args, True)
    half = Namespace(**{**vars(ours), "image": ours.image[::2], "labels": ours.labels[::2]})
    show(f"K {args.classes}, batch {args.batch}, {args.device}, {args.precision}", "ms", "official",
         "ratio", "MiB", "official", "ratio", "MiB/image", "GiB, VOC")
    for phase, batch in STEPS.items():
        times = race(lambda: one_step(ours, phase), lambda: one_step(theirs, phase), args)
        peak, official = (peak_step(args, m, phase) for m in (ours, theirs))
        held = sum(p.nbytes for model in models_of(ours, phase) for p in model.parameters()) / 2**20
        an_image, gib = "", (held + peak) / 1024  # segmentation and export: VOC's batch as it is
        if phase in ("classify", "match", "refine"):
            an_image = (peak - peak_step(args, half, phase)) / (len(ours.image) - len(half.image))
            gib += (batch - args.batch) * an_image / 1024
        if phase == "prompts":  # at small batches the texts have the peak, at large ones the images
            gib = ""
        show(phase, *times, peak, official, peak / official, an_image, gib)
    print("MiB: peak above the weights. GiB: with them, in VOC's batch (" + ", ".join(
        f"{phase} {batch}" for phase, batch in STEPS.items()) + "), computed with MiB/image")


# -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Speed and memory against other implementations.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("what", choices=["clip", "crf", "eval", "step"])
    add("--rounds", type=int, default=5, help="timed turns of each side")
    add("--batch", type=int, default=64 if cuda else 8, help="clip, step: images")
    add("--classes", type=int, default=20, help="step: K")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="of ours")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="step: of matrix products, as in train_cam.py")
    add("--peer", metavar="PYTHON", help="crf: one that has pydensecrf2")
    add("--photos", type=Path, metavar="DIR", help="crf: three .jpg of it too, at 500x375")
    add("--toy", action="store_true", help="small sizes, to see that the bench itself runs")
    add("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(args):
    {"clip": bench_clip, "crf": bench_crf, "eval": bench_eval, "step": bench_step}[args.what](args)


if __name__ == "__main__":
    main(parse_args())
