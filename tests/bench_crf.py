"""The dense CRF against pydensecrf2: time, labels, memory; and the picture in docs/crf.md.

    python tests/bench.py crf                               # drawn scenes of 500x375 and 64x64
    python tests/bench.py crf --photos DIR --limit 3        # the first photos of a folder too, at 500x375
    python tests/bench.py crf --large                       # and the peak memory of 4000x3000, a minute or more
    python tests/bench.py crf --picture crf.png [--image photo.jpg --labels labels.png]

pydensecrf2 needs a C++ compiler, cython < 3 and numpy < 2. It gets an environment of its own and runs as a second
process, one timed call at a time, in turns with ours. Times include building the lattices. A ratio below 1 means that
ours is faster; ratios are medians over the rounds. Time on an idle machine: where other programs want the same cores,
our threads wait for each other at every step, and the ratio says nothing.
"""
import argparse
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "prepare")]
from make_pseudo import PRESETS, dense_crf, hard_unary  # noqa: E402

PEER = """
import sys, time
import numpy as np
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_labels, unary_from_softmax
for line in sys.stdin:
    source, target = line.split()
    job = np.load(source)
    image, sxy_g, w_g, sxy_b, srgb, w_b = np.ascontiguousarray(job["image"]), *(float(x) for x in job["weights"])
    H, W = image.shape[:2]
    if "labels" in job:
        C = int(job["num_labels"])
        unary = unary_from_labels(job["labels"], C, gt_prob=0.7, zero_unsure=False)
    else:
        C = len(job["prob"])
        unary = np.ascontiguousarray(unary_from_softmax(job["prob"]))
    start = time.perf_counter()
    crf = DenseCRF2D(W, H, C)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=sxy_g, compat=w_g)
    crf.addPairwiseBilateral(sxy=sxy_b, srgb=srgb, rgbim=image, compat=w_b)
    Q = crf.inference(int(job["iterations"]))
    seconds = time.perf_counter() - start
    np.save(target, np.array(Q).reshape(C, H, W))
    print(seconds, flush=True)
"""


class Peer:
    """pydensecrf2 in a process of its own"""

    def __init__(self, env):
        python = Path(env) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        if not python.exists() or subprocess.run([python, "-c", "import pydensecrf"], capture_output=True).returncode:
            venv.create(env, with_pip=True)
            install = [python, "-m", "pip", "install", "--quiet"]
            subprocess.run([*install, "cython<3", "numpy<2", "setuptools<80", "wheel"], check=True)
            subprocess.run([*install, "--no-build-isolation", "pydensecrf2"], check=True)
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen([python, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, image, unary, preset, iterations=10):
        """image uint8 (H, W, 3); unary {"prob": (C, H, W)} or {"labels": (H, W), "num_labels": C}  -> Q, seconds"""
        source, target = Path(self.folder.name) / "job.npz", Path(self.folder.name) / "Q.npy"
        unary = {name: np.asarray(value) for name, value in unary.items()}
        np.savez(source, image=image.numpy(), weights=[*preset["gaussian"], *preset["bilateral"]], iterations=iterations,
                 **unary)
        print(source, target, file=self.process.stdin, flush=True)
        seconds = float(self.process.stdout.readline())
        return torch.from_numpy(np.load(target)), seconds

    def close(self):
        self.process.communicate()
        self.folder.cleanup()


def draw_scene(height, width, seed=0, grain=4):
    """A drawn photo: sky, ground, two or three things, uneven light and grain (grey levels of noise; 0: flat colours
    without light). -> uint8 (H, W, 3), labels (H, W) in 0..2"""
    rng = np.random.default_rng(seed)
    H, W = 2 * height, 2 * width  # drawn at twice the size: soft edges
    rows = np.linspace(0, 1, H)[:, None, None]
    horizon = rng.uniform(0.4, 0.7)
    sky, ground = rng.integers(90, 250, 3), rng.integers(30, 160, 3)
    shade = rows if grain else 0.5
    canvas = np.where(rows < horizon, sky * (1 - 0.3 * shade), ground * (0.6 + 0.5 * shade)) + np.zeros((1, W, 1))
    picture, labels = Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), Image.new("L", (W, H))
    for i in range(rng.integers(2, 4)):
        x, y = rng.uniform(0.2, 0.8) * W, rng.uniform(0.3, 0.8) * H
        r, colour, label = rng.uniform(0.12, 0.22) * H, rng.integers(20, 255, 3), 1 + i % 2
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        outline = [(x + 1.4 * r * np.cos(a), y + r * np.sin(a) * rng.uniform(0.7, 1.2)) for a in angle]
        ImageDraw.Draw(picture).polygon(outline, tuple(int(c) for c in colour))
        ImageDraw.Draw(labels).polygon(outline, label)
    light = Image.fromarray(rng.uniform(0.9, 1.1, (8, 8)).astype(np.float32) if grain else np.ones((1, 1), np.float32))
    light = np.array(light.resize((width, height), Image.BICUBIC))[..., None]
    image = np.array(picture.resize((width, height), Image.BOX)) * light + rng.normal(0, grain, (height, width, 3))
    labels = np.array(labels.resize((width, height), Image.NEAREST))
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels.astype(np.int64))


def random_prob(height, width, num_labels, seed=0):
    """Smooth random probabilities (C, H, W), as coarse as a CAM"""
    coarse = torch.randn(1, num_labels, 12, 16, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(2 * coarse, size=(height, width), mode="bilinear")[0].softmax(0)


def coarse_prob(labels, cell=24, sharpness=4):
    """Labels (H, W) -> probabilities (C, H, W) that saw them through cells of so many pixels, as a CAM would"""
    onehot = F.one_hot(labels).permute(2, 0, 1)[None].float()  # (1, C, H, W)
    small = F.interpolate(onehot, scale_factor=1 / cell, mode="area")
    return (sharpness * F.interpolate(small, size=labels.shape, mode="bilinear")[0]).softmax(0)


def table(images, num_labels, presets, peer, rounds):
    """Prints a line for each image, preset and number of labels. -> worst agreement, worst mean |dQ|"""
    print(f"{'image':24}{'size':>9}{'labels':>7}  {'preset':6}{'ours s':>8}{'theirs s':>9}{'ratio':>7}{'agree %':>10}"
          f"{'mean |dQ|':>11}{'max |dQ|':>10}", flush=True)
    ratios, worst_agreement, worst_difference = {}, 1, 0
    for name, image in images:
        H, W, _ = image.shape
        for C in num_labels:
            for preset_name in presets:
                preset = PRESETS[preset_name]
                prob = random_prob(H, W, C)
                unary = {"prob": prob}
                if preset["unary"] == "hard":
                    unary = {"labels": prob.argmax(0), "num_labels": C}
                    prob = hard_unary(prob.argmax(0), C)
                weights = preset["gaussian"], preset["bilateral"]
                Q = dense_crf(image, prob, *weights)  # warm-up
                ours, theirs = [], []
                for _ in range(rounds):
                    start = time.perf_counter()
                    dense_crf(image, prob, *weights)
                    ours.append(time.perf_counter() - start)
                    peer_Q, seconds = peer(image, unary, preset)
                    theirs.append(seconds)
                ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
                agreement = (Q.argmax(0) == peer_Q.argmax(0)).float().mean().item()
                difference = (Q - peer_Q).abs()
                print(f"{name[:23]:24}{f'{W}x{H}':>9}{C:7}  {preset_name:6}{median(ours):8.3f}{median(theirs):9.3f}"
                      f"{ratio:7.2f}{100 * agreement:10.4f}{difference.mean():11.1e}{difference.max():10.1e}", flush=True)
                ratios.setdefault((f"{W}x{H}", C), []).append(ratio)
                worst_agreement = min(worst_agreement, agreement)
                worst_difference = max(worst_difference, difference.mean().item())
    for (size, C), values in ratios.items():
        print(f"ours / theirs, {size}, {C} labels: median {median(values):.2f} of {len(values)} lines, "
              f"{min(values):.2f} to {max(values):.2f}")
    print(f"worst line: labels agree on {100 * worst_agreement:.4f} % of pixels, mean |dQ| {worst_difference:.1e}")


def peak_memory(height, width, num_labels):
    """Peak resident memory in GB of a fresh process that does one image, Python and torch included (Linux)"""
    program = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import bench_crf as b; "
               f"b.dense_crf(b.draw_scene({height}, {width})[0], b.random_prob({height}, {width}, {num_labels})); "
               "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])")
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024 / 1e9


def draw_farm(height=180, width=240, seed=0):
    """Two things of the toy world on a meadow, larger than there: cow 1, bird 2 -> image, labels as of draw_scene"""
    from toy import PAINTERS, smooth_noise
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 1, height)[:, None, None]
    sky, meadow = np.array([120, 170, 215]) + 50 * rows, np.array([95, 160, 75]) - 45 * rows
    canvas = np.where(rows < 0.45, sky, meadow + 35 * smooth_noise(rng, 30, width)[:height, :, None])
    picture = Image.fromarray(canvas.astype(np.uint8)).resize((4 * width, 4 * height), Image.BICUBIC)
    labels = Image.new("L", picture.size)
    for label, name, size, x, y in [(1, "cow", 0.32, 0.38, 0.62), (2, "bird", 0.2, 0.76, 0.27)]:
        for polygon, colour in PAINTERS[name](rng):
            points = [(4 * (x * width + size * height * u), 4 * (y * height + size * height * v)) for u, v in polygon]
            ImageDraw.Draw(picture).polygon(points, colour)
            ImageDraw.Draw(labels).polygon(points, label)
    image = np.array(picture.resize((width, height), Image.BOX)) + rng.normal(0, 3, (height, width, 3))
    labels = np.array(labels.resize((width, height), Image.NEAREST))
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels.astype(np.int64))


def picture(file, image, labels):
    """Image, coarse and noisy unary, and the CRF (irn) after 1, 3 and 10 steps, side by side with captions"""
    colours = torch.tensor([[255, 255, 255], [215, 60, 60], [50, 100, 225], [60, 160, 60], [220, 160, 30], [150, 80, 190]])
    cell = max(4, min(labels.shape) // 11)
    prob = coarse_prob(torch.unique(labels, return_inverse=True)[1], cell, sharpness=5)
    specks = torch.randn(1, len(prob), *(4 * side // cell for side in labels.shape), generator=torch.Generator().manual_seed(0))
    prob = (prob.log() + 1.2 * F.interpolate(specks, size=labels.shape)[0]).softmax(0)
    grey = image.float().mean(2, keepdim=True)
    tiles = [("image", image)]
    for steps in (0, 1, 3, 10):
        Q = dense_crf(image, prob, *list(PRESETS["irn"].values())[1:], iterations=steps)
        tint = torch.einsum("chw,cx->hwx", Q, colours[torch.arange(len(Q)) % len(colours)].float())
        caption = "unary" if steps == 0 else f"after {steps} step{'s' * (steps > 1)}"
        tiles.append((caption, (0.3 * grey + 0.7 * tint).byte()))
    H, W, _ = image.shape
    strip = Image.new("RGB", (len(tiles) * (W + 4) - 4, H + 16), "white")
    for i, (caption, tile) in enumerate(tiles):
        strip.paste(Image.fromarray(tile.numpy()), (i * (W + 4), 16))
        ImageDraw.Draw(strip).text((i * (W + 4) + 2, 2), caption, "black")
    strip.save(file)


def read_image(path, size=None):
    image = Image.open(path).convert("RGB")
    return torch.from_numpy(np.array(image if size is None else image.resize(size)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of .jpg files to compare on")
    parser.add_argument("--limit", type=int, default=3, help="how many of them (default %(default)s)")
    parser.add_argument("--resize", action=argparse.BooleanOptionalAction, default=True, help="photos to 500x375")
    parser.add_argument("--num-labels", type=int, nargs="+", default=[2, 3, 5, 21], help="default 2 3 5 21")
    parser.add_argument("--presets", nargs="+", default=["voc", "irn", "prob"], help="default voc irn prob")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="ours; pydensecrf uses one (default %(default)s)")
    parser.add_argument("--env", type=Path, default=HERE.parent / "runs" / "pydensecrf-env",
                        help="where pydensecrf2 is installed (default runs/pydensecrf-env)")
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=False, help="memory of 4000x3000 too")
    parser.add_argument("--picture", type=Path, help="draw this picture instead")
    parser.add_argument("--image", type=Path, help="of this image instead of a drawn scene")
    parser.add_argument("--labels", type=Path, help="and this label map of it (PNG), which the unary sees coarsely")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    if args.picture:
        image, labels = draw_farm()
        if args.image:
            image, labels = read_image(args.image), torch.from_numpy(np.array(Image.open(args.labels))).long()
        return picture(args.picture, image, labels)

    images = [("drawn scene", draw_scene(375, 500)[0]), ("drawn scene", draw_scene(64, 64, seed=1)[0])]
    if args.photos:
        images += [(path.name, read_image(path, (500, 375) if args.resize else None))
                   for path in sorted(args.photos.glob("*.jpg"))[:args.limit]]
    peer = Peer(args.env)
    table(images, args.num_labels, args.presets, peer, args.rounds)
    peer.close()
    for H, W, C in [(375, 500, 3), (375, 500, 21)] + [(3000, 4000, 3)] * args.large:
        print(f"peak memory, {W}x{H}, {C} labels: {peak_memory(H, W, C):.2f} GB", flush=True)


if __name__ == "__main__":
    main()
