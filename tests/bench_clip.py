"""clip_model.py against the reference (clip-anytorch, a copy of OpenAI's code): time, and peak memory of the backward.

    python tests/bench.py clip                 # CPU, ViT-B/32 size, random weights; on a GPU also images a second
    python tests/bench.py clip --model ViT-B/16 --batch 4 --rounds 5

The two take turns within one process; a ratio is the median over the rounds of ours / theirs, so that whatever else the
machine is doing weighs on both. Memory is the resident peak of a fresh process above what it held before.
"""
import argparse
import gc
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from clip_model import CLIP, linear, tokenize  # noqa: E402

# resolution, patch, width, layers, text width, text layers, embed_dim
SIZES = {"ViT-B/32": (224, 32, 768, 12, 512, 12, 512), "ViT-B/16": (224, 16, 768, 12, 512, 12, 512),
         "ViT-L/14": (224, 14, 1024, 24, 768, 12, 768), "toy": (64, 8, 128, 4, 128, 2, 64)}
WORDS = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog", "horse",
         "motorbike", "player", "plant", "sheep", "sofa", "train", "screen"]
NAMES = ["ours", "theirs", "theirs, frozen"]  # as its loader returns it, the reference computes every weight's gradient
LIMITS = {"image forward": 0.95, "text forward, 20 sentences": 0.95, "image forward + backward to the pixels": 0.7}


def build(name, size, seed=0):
    resolution, patch, width, layers, text_width, text_layers, embed_dim = size
    torch.manual_seed(seed)
    if name == "ours":
        return CLIP(*size).eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference imports pkg_resources
        from clip.model import CLIP as Reference
    model = Reference(embed_dim, resolution, layers, width, patch, 77, 49408, text_width, text_width // 64, text_layers)
    return model.eval().requires_grad_(name == "theirs")


def backward(model, x):
    """The gradient of the features with respect to the pixels, and the weight gradients dropped."""
    x = x.clone().requires_grad_()
    model.encode_image(x).square().sum().backward()
    for p in model.parameters():
        p.grad = None
    return x.grad


def race(ours, theirs, rounds, wait=lambda: None):
    """(median seconds of ours, of theirs, median ratio), the two taking turns."""
    times = []
    for i in range(rounds + 2):
        pair = []
        for call in (ours, theirs) if i % 2 else (theirs, ours):
            wait()
            start = time.perf_counter()
            call()
            wait()
            pair.append(time.perf_counter() - start)
        if i >= 2:  # the first two warm up
            times.append(pair if i % 2 else pair[::-1])
    mine, yours = zip(*times, strict=True)
    return statistics.median(mine), statistics.median(yours), statistics.median(a / b for a, b in times)


def resident(key):
    """MiB of this process, VmRSS now or VmHWM at most."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024


def measure_memory(args):
    """In a fresh process: print the peak of the backward above the resident memory before it."""
    model = build(args.memory_of, SIZES[args.model])
    x = torch.randn(args.batch, 3, SIZES[args.model][0], SIZES[args.model][0])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak afresh
    before = resident("VmRSS")
    for _ in range(3):
        backward(model, x)
    print(resident("VmHWM") - before)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="bench.py clip", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B/32", choices=SIZES, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="more of them on a busy machine (default: %(default)s)")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return measure_memory(args)

    size = SIZES[args.model]
    ours, theirs = build("ours", size), build("theirs", size)
    with torch.no_grad():
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(args.batch, 3, size[0], size[0])
    tokens = tokenize([f"a photo of {word}." for word in WORDS])
    full = tokenize(["a photo of " + f"{word} " * 30 + "." for word in WORDS])  # as long as a learned prompt of 30

    with torch.no_grad():
        errors = [((f(ours) - f(theirs)).abs().max() / f(theirs).abs().max()).item()
                  for f in (lambda m: m.encode_image(x), lambda m: m.encode_text(full))]
    print(f"{args.model}, batch {args.batch}, {args.threads} threads, torch {torch.__version__}, random weights; "
          f"relative error of the features {max(errors):.1e}\n")

    print(f"{'CPU, float32, milliseconds':<56}{'ours':>9}{'theirs':>9}{'ratio':>8}{'at most':>9}")
    missed = []
    for name, call, frozen in [
            ("image forward", torch.no_grad()(lambda m: m.encode_image(x)), False),
            ("text forward, 20 sentences", torch.no_grad()(lambda m: m.encode_text(tokens)), False),
            ("text forward, 20 sentences of 36 tokens", torch.no_grad()(lambda m: m.encode_text(full)), False),
            ("image forward + backward to the pixels", lambda m: backward(m, x), False),
            ("  the same, the reference's weights frozen too", lambda m: backward(m, x), True)]:
        theirs.requires_grad_(not frozen)
        mine, yours, ratio = race(lambda call=call: call(ours), lambda call=call: call(theirs), args.rounds)
        limit = LIMITS.get(name)
        print(f"{name:<56}{1e3 * mine:9.0f}{1e3 * yours:9.0f}{ratio:8.2f}{limit or '':>9}", flush=True)
        missed += [name] * bool(limit and ratio > limit)

    number = args.batch * ((size[0] // size[1]) ** 2 + 1)
    a, w, b = torch.randn(number, size[2]), torch.randn(4 * size[2], size[2]), torch.randn(4 * size[2])
    with torch.no_grad():
        mine, yours, ratio = race(lambda: linear(a, w, b), lambda: torch.nn.functional.linear(a, w, b), 4 * args.rounds)
    print(f"{f'linear() and F.linear, {number} x {size[2]} -> {4 * size[2]}':<56}{1e3 * mine:9.1f}{1e3 * yours:9.1f}{ratio:8.2f}")

    if torch.cuda.is_available():
        gpu(args, ours, theirs)
    if Path("/proc/self/clear_refs").exists():
        print(f"\n{'peak memory of forward + backward':<56}{'MiB':>9}{'ratio':>17}")
        flags = ["--model", args.model, "--batch", str(args.batch), "--threads", str(args.threads), "--memory-of"]
        peak = {name: float(subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "clip", *flags, name],
                                           check=True, capture_output=True, text=True).stdout) for name in NAMES}
        for name, value in peak.items():
            print(f"{name:<56}{value:9.0f}{peak['ours'] / value:17.2f}")
        missed += ["memory"] * (peak["ours"] > peak["theirs"])
    print("\nmissed: " + ", ".join(missed) if missed else "\nall within their limits")


def gpu(args, ours, theirs):
    """Images a second at batch 64, weights frozen in both, with autocast to bfloat16 and without."""
    name = torch.cuda.get_device_name()
    print(f"\n{name + ', batch 64, images a second':<56}{'ours':>9}{'theirs':>9}{'time ratio':>12}")
    x = torch.randn(64, 3, ours.resolution, ours.resolution, device="cuda")
    ours.cuda()
    theirs.cuda().requires_grad_(False)
    for autocast in (False, True):
        for task, call in [("forward", torch.no_grad()(lambda m: m.encode_image(x))),
                           ("forward + backward", lambda m: backward(m, x))]:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                mine, yours, ratio = race(lambda call=call: call(ours), lambda call=call: call(theirs), 4 * args.rounds,
                                          torch.cuda.synchronize)
            print(f"{task + (', autocast bfloat16' if autocast else ', float32'):<56}{64 / mine:9.0f}{64 / yours:9.0f}"
                  f"{ratio:12.2f}")


if __name__ == "__main__":
    main()
