"""Speed and memory against other implementations, as ratios; below 1 ours is faster or smaller.

  clip   CLIP against clip-anytorch, a copy of OpenAI's code
  crf    the dense CRF against pydensecrf2 in a Python of its own (--peer); without one, against
         itself on the CPU
  step   a step of every phase, the segmentation's, and the export of a photo, against the same as
         the official code computes it

Both sides take turns; ratios are medians over the rounds. Memory is the peak of a fresh process
above what it held before, on a GPU torch's count; of a step, without the weights. Weights are
random. The segmentation has a batch of 4, the export 1 photo. Time on an idle machine.

  OMP_NUM_THREADS=2 python experiments/bench.py step --rounds 3
  python experiments/bench.py step --batch 64 --measure "ours match"   # MiB at VOC's batch
  python experiments/bench.py crf --peer crf/bin/python --photos runs/toy/data/images
      # tests/make_crf_golden.py says how to make crf/; the drawn picture and three .jpg of --photos
"""
import argparse
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import ExitStack, suppress
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
import train_cam  # noqa: E402
import train_seg  # noqa: E402
from clip_model import CLIP, tokenize  # noqa: E402
from common import InputError, mixed_precision, run  # noqa: E402
from make_pseudo import PRESETS, dense_crf, hard_unary  # noqa: E402
from mask_generator import (  # noqa: E402
    AttentionFusion, MaskGenerator, ViT, photo_cams, scaled_input)

SIDE, CROP = 224, 480  # pixels: of the CAMs' training images, of the segmentation's


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
    """Print the peak memory in MiB of two calls above what this process held (on a CPU: Linux)"""
    def resident(key):  # KiB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(), call()
        return print((torch.cuda.max_memory_allocated() - before) / 2**20)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    before = resident("VmRSS")
    call(), call()
    print((resident("VmHWM") - before) / 1024)


def peak_of(args, measure):
    """MiB that a fresh process prints: the same bench with --measure"""
    flags = ["--measure", measure, "--batch", str(args.batch), "--device", args.device]
    return float(subprocess.check_output([sys.executable, __file__, args.what, *flags]))


# ---- clip ----------------------------------------------------------------------------------------

def backward(model, x):
    """The gradient of the features for the pixels; gradients of weights are dropped"""
    model.encode_image(x.clone().requires_grad_()).square().sum().backward()
    model.zero_grad(set_to_none=True)


def bench_clip(args):
    torch.manual_seed(0)
    ours = CLIP().to(args.device).eval().requires_grad_(False)
    x = torch.randn(args.batch, 3, ours.resolution, ours.resolution, device=args.device)
    if args.measure == "ours":
        return peak_here(lambda: backward(ours, x), args)
    try:
        from clip.model import build_model
    except ImportError:
        raise InputError("no clip-anytorch; pip install -r tests/requirements.txt") from None
    theirs = build_model(ours.state_dict()).float()  # trainable, as its loader leaves it
    theirs.load_state_dict(ours.state_dict())  # again: build_model rounds to float16
    theirs.to(args.device)
    if args.measure:
        return peak_here(lambda: backward(theirs, x), args)
    tokens = tokenize([f"a photo of {k}." for k in range(20)]).to(args.device)
    image, text = (torch.no_grad()(call) for call in (
        lambda m: m.encode_image(x), lambda m: m.encode_text(tokens)))
    for name, call in (("image", image), ("text", text)):
        a, b = call(ours), call(theirs)
        show(f"relative error of features, {name}", (a - b).abs().max() / b.abs().max())
    show(f"milliseconds, batch {args.batch}, {args.device}", "ours", "theirs", "ratio")
    for title, call in (("image forward", image), ("text forward, 20 sentences", text),
                        ("image forward + backward", lambda m: backward(m, x))):
        with mixed_precision(torch.device(args.device), "auto")[0]:
            show(title, *race(lambda: call(ours), lambda: call(theirs), args))
    show("MiB, image forward + backward", *(peak_of(args, side) for side in ("ours", "theirs")))


# ---- crf -----------------------------------------------------------------------------------------

PEER = """
import sys, time
import numpy as np
sys.path.insert(0, "tests")
from make_crf_golden import inference
job = np.load(sys.argv[1])
start = time.perf_counter()
Q = inference(job["image"], job["prob"], "prob", *job["weights"].tolist())
print(time.perf_counter() - start)
np.save(sys.argv[2], Q)
"""


def peer_crf(peer, image, prob, gaussian, bilateral):
    """image uint8 (H, W, 3), prob (C, H, W) -> Q (C, H, W), the seconds that it says"""
    with tempfile.TemporaryDirectory() as folder:
        job, Q = f"{folder}/job.npz", f"{folder}/Q.npy"
        np.savez(job, image=image.numpy(), prob=prob.numpy(), weights=[*gaussian, *bilateral])
        said = subprocess.check_output([peer, "-c", PEER, job, Q], cwd=ROOT)
        return torch.from_numpy(np.load(Q)), float(said)


def smooth(count, cells, height, width):
    """Random maps (count, height, width), as coarse as a CAM, of mean 0 and deviation about 1"""
    return F.interpolate(torch.randn(1, count, *cells), (height, width), mode="bicubic")[0]


def bench_crf(args):
    torch.manual_seed(0)
    photo = 128 + 50 * smooth(3, (6, 8), 375, 500) + 4 * torch.randn(3, 375, 500)
    images = {"drawn": photo.clamp(0, 255).byte().movedim(0, 2).contiguous()}
    for path in sorted(args.photos.glob("*.jpg"))[:3] if args.photos else ():
        photo = Image.open(path).convert("RGB").resize((500, 375))
        images[path.name] = torch.from_numpy(np.array(photo))
    if args.measure:
        return peak_here(lambda: dense_crf(images["drawn"], torch.full((3, 375, 500), 1 / 3)), args)
    how = "tests/make_crf_golden.py says how to make one"
    if not args.peer:
        print(f"no --peer, so theirs is ours on the CPU; {how}")
    elif subprocess.run([args.peer, "-c", "import pydensecrf"], capture_output=True).returncode:
        raise InputError(f"--peer {args.peer}: has no pydensecrf2; {how}")
    show("milliseconds, 500x375", "ours", "theirs", "ratio", "agree", "mean |dQ|")
    for (title, image), C, name in product(images.items(), (3, 21), ("voc", "irn", "clip-es")):
        unary, *weights = PRESETS[name].values()
        prob = (2 * smooth(C, (12, 16), 375, 500)).softmax(0)
        prob = hard_unary(prob.argmax(0), C) if unary == "hard" else prob
        ours = partial(dense_crf, image, prob.to(args.device), *weights)
        theirs = partial(dense_crf, image, prob, *weights)
        if args.peer:
            theirs = partial(peer_crf, args.peer, image, prob, *weights)
        times = race(ours, theirs, args, (lambda call: call()[1]) if args.peer else seconds)
        Q, other = ours().cpu(), theirs()[0] if args.peer else theirs()
        agree = (Q.argmax(0) == other.argmax(0)).float().mean().item()
        show(f"{title}, {C} labels, {name}", *times, f"{agree:.4%}", (Q - other).abs().mean())
    show("MiB, the drawn picture, 3 labels", peak_of(args, "ours"))


# ---- step ----------------------------------------------------------------------------------------

STEPS = ("classify", "match", "prompts", "refine", "segmentation", "export")


def plain_attention(q, k, v):
    """What torch's fused function computes, with maps that are kept for the gradient"""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class PlainFusion(AttentionFusion):
    """The same, of the maps of all layers at once"""

    def forward(self, maps, features):
        w = self.excite(self.pool(torch.cat(features, dim=1)).squeeze(-1))
        return (w[:, :, None, None] * torch.cat(maps, dim=1)).mean(dim=1)


class OneStep:
    """common.Training with one batch, behind which the phase is left"""

    class Left(Exception):
        pass

    def __init__(self, model, batch, device):
        self.model, self.batch, self.autocast = model, batch, mixed_precision(device, "auto")[0]

    def batches(self):
        yield self.batch
        raise self.Left

    def step(self, losses, n):
        losses["loss"].backward()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.optim.AdamW(parameters, 1e-5).step()
        self.model.zero_grad(set_to_none=True)


def build_side(args, official):
    """The models of one side, and a batch with 1.5 classes an image, as in VOC"""
    torch.manual_seed(0)
    K, clip = 20, CLIP().to(args.device).eval().requires_grad_(official)
    labels, device = torch.zeros(args.batch, K), torch.device(args.device)
    for b in range(args.batch):
        labels[b, torch.randperm(K)[:1 + b % 2]] = 1
    m = Namespace(clip=clip, official=official, device=device,
                  generator=MaskGenerator(ViT(), K).to(device),
                  segmenter=train_seg.Segmenter(ViT(), K + 1).to(device),
                  prompts=train_cam.Prompts(clip, K, 30).to(device),
                  batch=(torch.randn(args.batch, 3, SIDE, SIDE).to(device), labels),
                  large=(torch.randn(4, 3, CROP, CROP).to(device),
                         torch.randint(K + 1, (4, CROP, CROP))),
                  photo=Image.new("RGB", (500, 375)), split=Namespace(classes=range(K)))
    if official:
        m.generator.fusion.__class__ = PlainFusion
    with torch.no_grad():
        texts = tokenize([f"a photo of class {k}." for k in range(K)]).to(device)
        m.u_f, m.u_b = clip.encode_text(texts), m.prompts()
    return m


def official_regions(clip, image, cam, labels, eps):
    """train_cam.embed_regions as the official code computes it: the maps of all K classes are
    up-sampled and normalised; CLIP is called once for all kept, once for all dropped regions."""
    b, k = labels.nonzero().T.to(image.device)                                   # (N,), (N,)
    maps = F.interpolate(cam.float(), size=(clip.resolution,) * 2, mode="bilinear")
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    M = ((maps - low) / (high - low + eps))[b, k][:, None]                       # (N, 1, R, R)
    X = train_cam.clip_view(clip, image)[b]                                      # (N, 3, R, R)
    return clip.encode_image(M * X), clip.encode_image((1 - M) * X), k           # (N, E) twice


def run_phase(m, phase):
    """One step of a phase, with these models in the place of those that it builds or loads"""
    args = Namespace(out=Path(), vit="", labels="", recipe="voc", seed=0, generator="vit")
    if phase == "segmentation":
        function, script, batch, models = train_seg.segmentation, train_seg, m.large, {
            "Segmenter": m.segmenter, "load_backbone": None, "Labelled": None}
        recipe, given = {key: row[0] for key, row in train_seg.TABLE.items()}, ()
    else:
        function, script, batch, models = train_cam.PHASES[phase], train_cam, m.batch, {
            "MaskGenerator": m.generator, "load_generator": m.generator, "load_vit": None,
            "Prompts": m.prompts, "load_prompts": m.u_b}
        recipe = train_cam.recipe_of("voc", phase, {})
        given = (m.clip, m.u_f)[:0 if phase == "classify" else 2]
    model = {"prompts": m.prompts, "segmentation": m.segmenter}.get(phase, m.generator)
    loop = {"Training" if phase == "segmentation" else "training": OneStep(model, batch, m.device)}
    with ExitStack() as patches, suppress(OneStep.Left):
        for name, found in (models | loop).items():
            patches.enter_context(mock.patch.object(script, name, return_value=found))
        function(args, recipe, {}, m.split, m.device, *given)


def run_official(m, phase):
    """The same, but CLIP's weights are trainable, so their gradients are computed and dropped; the
    K prompts are encoded in each step; the maps of all layers are kept and fused at once"""
    if phase in ("classify", "segmentation"):
        with mock.patch.object(F, "scaled_dot_product_attention", plain_attention):
            return run_phase(m, phase)
    if phase == "refine":
        with torch.no_grad(), mixed_precision(m.device, "auto")[0]:
            m.u_b = m.prompts()                                                  # (K, E)
    with mock.patch.object(train_cam, "embed_regions", official_regions):
        run_phase(m, phase)
    m.clip.zero_grad(set_to_none=True)


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
    """A step, or an export"""
    if phase == "export":
        return export(m)
    m.generator.requires_grad_(phase == "classify")
    (run_official if m.official else run_phase)(m, phase)


def bench_step(args):
    if args.measure:
        side, phase = args.measure.split()
        m = build_side(args, side == "official")
        return peak_here(lambda: one_step(m, phase), args)
    ours, theirs = build_side(args, False), build_side(args, True)
    show(f"K 20, batch {args.batch}, {args.device}", "ms", "official", "ratio", "MiB", "official",
         "ratio")
    for phase in STEPS:
        times = race(lambda: one_step(ours, phase), lambda: one_step(theirs, phase), args)
        peak, official = (peak_of(args, f"{side} {phase}") for side in ("ours", "official"))
        show(phase, *times, peak, official, peak / official)


# -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Speed and memory against other implementations.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("what", choices=["clip", "crf", "step"])
    add("--rounds", type=int, default=5, help="timed turns of each side")
    add("--batch", type=int, default=64 if cuda else 8, help="clip, step: images")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="of ours")
    add("--peer", metavar="PYTHON", help="crf: one that has pydensecrf2")
    add("--photos", type=Path, metavar="DIR", help="crf: three .jpg of it too, at 500x375")
    add("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(args):
    {"clip": bench_clip, "crf": bench_crf, "step": bench_step}[args.what](args)


if __name__ == "__main__":
    run(main, parse_args())
