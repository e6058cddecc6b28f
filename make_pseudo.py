"""Pseudo masks: the class activation maps of a photo become one label picture (paper, section 4.1).

A pixel i takes the class whose map M is highest there, or background, label 0, where none exceeds
the background score:

  x_i = argmax (background score, M_1(i), .., M_n(i)),  over the n classes shown          [eq. P1]

With --segments, class-agnostic segments (SAM's, say) take one label each, by the mean of M inside:

  M_k(i) := mean of M_k(j) over the pixels j of s(i),  s(i) the segment that holds i      [eq. P2]

The dense CRF (Krähenbühl and Koltun, NIPS 2011) moves these labels to the edges of the photo. It
ties every pixel to every other one by two Gaussian kernels over position p and colour I:

  E(x)   = Σ_i ψ(x_i) + Σ_i<j [x_i ≠ x_j] k_ij,    ψ(x_i) = -log prob_i(x_i)              [eq. C1]
  k_ij   = w_g exp(-|p_i-p_j|²/2s_g²) + w_b exp(-|p_i-p_j|²/2s_b² - |I_i-I_j|²/2s_rgb²)   [eq. C2]
  Q_i(l) ∝ exp( -ψ_i(l) + Σ_j k_ij Q_j(l) ),       Q_i(l) ∝ exp(-ψ_i(l)) to begin with    [eq. C3]

C3 is repeated ten times: it is the mean field of C1, which treats pixels as independent. The sum
over j is a Gaussian blur of Q in 2 and in 5 dimensions. `dense_crf_slow` adds up all pairs of
pixels; `dense_crf` blurs on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), as
the reference implementation pydensecrf does.
  [detail C1] The paper leaves j = i out of C3; pydensecrf does not, and neither does this file.
  [detail C2] Each kernel g is normalised by itself, g_ij / sqrt(n_i n_j) with n_i = Σ_j g_ij.
  [detail C3] Probabilities are raised to 1e-5 at least. Both as pydensecrf's defaults.

Reads photos, image-level labels and CAMs; writes OUT/NAME.png, in VOC's palette. CAMs and segments
of other programs become ours with prepare/foreign.py.

  python make_pseudo.py --data runs/toy/data --cams runs/toy/cam/cams --out runs/toy/masks
  torchrun --nproc-per-node 4 make_pseudo.py ... the same ...      # processes share the photos
"""
import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import (
    RANK, UNREADABLE, WORLD, InputError, Split, claim, end_processes, folder_digest, load_photos,
    open_image, read_record, run, start_processes, write_labels)

# n classes that a photo shows, H W pixels, C labels of a CRF, V = H*W, M lattice points,
# d features of a pixel (2: x y, or 5: x y r g b)

PRESETS = {  # --crf: what the unary is made of, (sxy, weight), (sxy, srgb, weight)
    # of CLIP-ES the kernels alone: its unary is another (1 - max CAM)
    "voc": dict(unary="hard", gaussian=(4, 3), bilateral=(83, 5, 3)),  # WeakTr's, VOC
    "irn": dict(unary="hard", gaussian=(3, 3), bilateral=(50, 5, 10)),  # IRNet's, and COCO
    "clip-es": dict(unary="prob", gaussian=(1, 3), bilateral=(67, 3, 4)),  # and COCO's test
    "weaktr-test": dict(unary="prob", gaussian=(3, 3), bilateral=(83, 5, 3)),  # VOC's test
    "none": None,
}
RECIPES = {  # --recipe: background score and CRF. WeakTr found both scores with training masks
    "voc": (0.43, "voc"), "coco": (0.42, "irn"), "toy": (0.43, "voc")}


# ---- CAMs -> pseudo mask ------------------------------------------------------------------------

def with_background(cams, background_score):
    """(background score, M_1, .., M_n): cams (n, H, W) -> (1 + n, H, W)"""
    return torch.cat([cams.new_full((1, *cams.shape[1:]), background_score), cams])


def score_labels(cams, present, background_score):
    """x_i = argmax (background score, M_1(i), .., M_n(i)) [eq. P1]: cams (n, H, W), classes present
    (n,) -> labels uint8 (H, W), 0 or 1 + class"""
    winner = with_background(cams, background_score).argmax(0)                   # (H, W)
    return np.array([0, *(1 + present)], np.uint8)[winner.numpy()]


def average_in_segments(cams, segments):
    """M_k(i) := mean of M_k over s(i) [eq. P2]: cams (n, H, W), segments int64 (H, W) -> (n, H, W).
    Pixels of segment 0, which are in none, keep their own M. Sums are in float64."""
    maps, s = cams.flatten(1), segments.flatten()                                # (n, V), (V,)
    sums = maps.new_zeros(len(maps), int(s.max()) + 1, dtype=torch.float64)
    means = sums.index_add_(1, s, maps.double()) / s.bincount().clamp(min=1)     # (n, segments)
    return torch.where(s > 0, means[:, s].float(), maps).view(cams.shape)


def pseudo_mask(photo, cams, present, background_score, preset, device):
    """photo uint8 (H, W, 3), cams (n, H, W) -> labels uint8 (H, W), after the preset's dense CRF"""
    if PRESETS[preset] is None or len(present) == 0:
        return score_labels(cams, present, background_score)
    scores, kernels = with_background(cams, background_score), PRESETS[preset]   # (1 + n, H, W)
    prob = scores / scores.sum(0)
    if kernels["unary"] == "hard":
        prob = hard_unary(scores.argmax(0), len(scores))
    Q = dense_crf(torch.from_numpy(photo), prob.to(device), kernels["gaussian"],
                  kernels["bilateral"])                                          # (1 + n, H, W)
    return np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).cpu().numpy()]


# ---- Dense CRF: the definition ------------------------------------------------------------------

MIN_PROB = 1e-5  # [detail C3]  -log 0 would forbid a label for good


def hard_unary(labels, num_labels, gt_prob=0.7):
    """Labels (H, W) in 0..C-1 -> probabilities (C, H, W): gt_prob for the given label, the rest
    shared by the others. -log of it is pydensecrf's unary_from_labels(..., zero_unsure=False)."""
    given = labels == torch.arange(num_labels, device=labels.device)[:, None, None]  # (C, H, W)
    return torch.where(given, gt_prob, (1 - gt_prob) / max(num_labels - 1, 1))


def check_crf_input(image, prob):
    if image.dtype != torch.uint8 or (*image.shape[:2], 3) != image.shape or \
            prob.shape[1:] != image.shape[:2] or prob.numel() == 0:
        raise ValueError(f"expected image uint8 (H, W, 3) and prob (C, H, W), not {image.dtype} "
                         f"{tuple(image.shape)} and {tuple(prob.shape)}")
    if not (prob.min() >= 0 and prob.max() <= 1.001):  # NaN fails every comparison
        raise ValueError(f"prob must lie in [0, 1], not {prob.min():.3g}..{prob.max():.3g}")


def crf_features(image, sxy, srgb=None):
    """uint8 (H, W, 3) -> f (d, V) such that exp(-|f_i - f_j|²/2) is a kernel of [eq. C2]:
    f_i = p_i / sxy, or with srgb f_i = (p_i / sxy, I_i / srgb)"""
    H, W, _ = image.shape
    y, x = torch.meshgrid(torch.arange(H, device=image.device),
                          torch.arange(W, device=image.device), indexing="ij")
    f = torch.stack([x, y]).flatten(1).float()                                   # (2, V)
    f = f / f.new_tensor(sxy)  # by a tensor: a GPU would multiply by a number's rounded inverse
    if srgb is not None:
        colour = image.flatten(0, 1).t().float()                                 # (3, V)
        f = torch.cat([f, colour / colour.new_tensor(srgb)])                     # (5, V)
    if not f.max() < 2**16:  # not (..): NaN too
        raise ValueError(f"sxy {sxy}, srgb {srgb}: expected positive numbers, not so small")
    return f


@torch.no_grad()
def dense_crf_slow(image, prob, gaussian=(3, 3), bilateral=(50, 5, 10), iterations=10):
    """What `dense_crf` approximates: Q_i(l) ∝ exp(-ψ_i(l) + Σ_j k_ij Q_j(l)) [eq. C3], all pairs of
    pixels added up. For small images: it takes V² numbers."""
    check_crf_input(image, prob)
    k = 0
    for sxy, *srgb, weight in filter(None, (gaussian, bilateral)):
        f = crf_features(image, sxy, *srgb).t()                                  # (V, d)
        kernel = torch.exp(-0.5 * (f[:, None] - f).square().sum(2))              # (V, V) [eq. C2]
        n = kernel.sum(1)
        k = k + weight * kernel / (n[:, None] * n).sqrt()                        # [detail C2]
    log_prob = prob.flatten(1).float().clamp(MIN_PROB, 1).log()                  # (C, V) -ψ
    Q = log_prob.softmax(0)
    for _ in range(iterations):
        Q = (log_prob + Q @ k).softmax(0)                                        # [eq. C3]
    return Q.view(prob.shape)


# ---- Dense CRF: a Gaussian blur on the permutohedral lattice -------------------------------------
#
# The lattice cuts the d-dimensional space of features into simplices. A pixel hands its value to
# the d+1 corners around it (splat), the corners blur among neighbours along d+1 axes, and the pixel
# takes its value back (slice).

class Lattice(NamedTuple):
    """Three kinds of sparse matrix. A row is a bag of `embedding_bag`: indices, and the weights to
    add them up by. The last point, number M, means "no neighbour" and always holds 0."""
    splat_pixel: torch.Tensor  # (V*(d+1),) int32: the pixels around point 0, around point 1, ...
    splat_weight: torch.Tensor  # (V*(d+1),)
    splat_start: torch.Tensor  # (M+1,) int32: where the pixels of each point begin
    blur_point: list  # d+1 times (M+1, 3) int32: a point and its two neighbours along one axis
    blur_weight: torch.Tensor  # (M+1, 3): 1, ½, ½
    slice_point: torch.Tensor  # (V, d+1) int32: the points around each pixel
    slice_weight: torch.Tensor  # (V, d+1)


def enclosing_simplex(f):
    """Features (d, V) -> for each pixel, the lattice simplex that it lies in.

    Lattice points live in the plane Σ_i x_i = 0 of d+1 dimensions; their coordinates are integers,
    all alike mod d+1.
    origin: the corner with coordinates 0 mod d+1, divided by d+1; float (V, d+1)
    axis: the way to the other d corners; int64 (V, d+1). From corner r-1 to corner r one adds 1 to
        all coordinates and subtracts d+1 from coordinate axis[:, d+1-r]
    weight: how near the pixel is to each corner, from 0 to 1, sum 1; float (V, d+1)"""
    d, V = f.shape
    elevated = f.new_empty(V, d + 1)
    total = f.new_zeros(V)
    # f in the basis (1, .., 1, -j, 0, .., 0) / sqrt(j(j+1)) of the plane, scaled so that the blur
    # has variance 1
    for j in range(d, 0, -1):
        along = f[j - 1] * ((d + 1) * math.sqrt(2 / 3) / math.sqrt(j * (j + 1)))
        elevated[:, j] = total - j * along
        total = total + along
    elevated[:, 0] = total

    # The nearest multiples of d+1 are a lattice point only if their sum is 0. If it is `excess`
    # times d+1, lower those that were rounded up most (raise, for a negative one): in the order of
    # residuals, that is a rotation.
    origin = (elevated * (1 / (d + 1))).round()
    residual, axis = torch.sort(elevated - origin * (d + 1), dim=1, descending=True, stable=True)
    excess = origin.sum(1, keepdim=True)                                         # (V, 1)
    place = torch.arange(d + 1, device=f.device) - excess.long()  # old places   # (V, d+1)
    turn = (place > d).long() - (place < 0).long()
    place = place - turn * (d + 1)
    residual = residual.gather(1, place) - turn * (d + 1)
    axis = axis.gather(1, place)
    origin = origin.scatter(1, axis, origin.gather(1, axis) + turn)

    inner = (residual[:, :-1] - residual[:, 1:]).flip(1) / (d + 1)               # (V, d)
    outer = 1 - (residual[:, :1] - residual[:, -1:]) / (d + 1)                   # (V, 1)
    return origin, axis, torch.cat([outer, inner], 1)


def build_lattice(f):
    """Features (d, V) -> Lattice"""
    d, V = f.shape
    origin, axis, weight = enclosing_simplex(f)

    # One int64 names a point: its digits are the first d coordinates, their sum tells the last.
    # Corners and their neighbours fit into a digit, and never carry.
    low, high = origin.aminmax(dim=0)                                            # (d+1,)
    base = [(int(extent) + 5) * (d + 1) for extent in high - low]
    if math.prod(base[:d]) >= 2**62:
        raise ValueError("more lattice points than int64 can number: use larger sxy and srgb")
    step = torch.tensor([*(math.prod(base[:i]) for i in range(d)), 0], device=f.device)  # (d+1,)
    one_up = step.sum()  # +1 in all coordinates
    key = [((origin - low).long() * step).sum(1) * (d + 1)]  # of corner 0       # (V,)
    for r in range(1, d + 1):
        key.append(key[r - 1] + one_up - step[axis[:, d + 1 - r]] * (d + 1))
    del origin, axis  # memory
    key, corner = torch.sort(torch.stack(key, 1).flatten(), stable=True)         # (V*(d+1),)
    key, point, count = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    slice_point = torch.empty_like(corner, dtype=torch.int32)
    slice_point = slice_point.scatter_(0, corner, point.int()).view(V, d + 1)

    M = len(key)
    itself = torch.arange(M, dtype=torch.int32, device=f.device)
    blur_point = []
    for j in range(d + 1):
        wanted = key + one_up - step[j] * (d + 1)  # +1 everywhere, and -d along axis j
        place = torch.searchsorted(key, wanted).clamp(max=M - 1)
        place = torch.where(key[place] == wanted, place, M)
        neighbours = torch.full((M + 1, 3), M, dtype=torch.int32, device=f.device)
        neighbours[:M, 0] = itself
        neighbours[:M, 1] = place
        neighbours[:, 2].scatter_(0, place, itself)  # my neighbour's other neighbour is me
        neighbours[M] = M
        blur_point.append(neighbours)
    return Lattice((corner // (d + 1)).int(), weight.flatten()[corner],
                   F.pad(count.cumsum(0), (1, 0)).int(), blur_point,
                   weight.new_tensor([1, 0.5, 0.5]).repeat(M + 1, 1), slice_point, weight)


def blur(lattice, values):
    """Σ_j exp(-|f_i - f_j|²/2) values_j for every pixel i, up to a constant: (V, C) -> (V, C)"""
    points = F.embedding_bag(lattice.splat_pixel, values, lattice.splat_start, mode="sum",
                             per_sample_weights=lattice.splat_weight)            # (M+1, C)
    for neighbours in lattice.blur_point:
        points = F.embedding_bag(neighbours, points, mode="sum",
                                 per_sample_weights=lattice.blur_weight)         # (M+1, C)
    return F.embedding_bag(lattice.slice_point, points, mode="sum",
                           per_sample_weights=lattice.slice_weight)              # (V, C)


def crf_kernel(f, weight):
    """A Lattice whose blur is a kernel of [eq. C2], weight exp(-|f_i - f_j|²/2) / sqrt(n_i n_j)"""
    lattice = build_lattice(f)
    n = blur(lattice, f.new_ones(f.shape[1], 1)).squeeze(1)                      # (V,)
    scale = (n + 1e-20).rsqrt()                                                  # [detail C2]
    return lattice._replace(splat_weight=lattice.splat_weight * scale[lattice.splat_pixel],
                            slice_weight=lattice.slice_weight * scale[:, None] * weight)


# ---- Dense CRF: mean field ----------------------------------------------------------------------

def softmax(x):
    """Over the labels of x (V, C); for few labels torch's takes four times as long on a CPU"""
    e = (x - x.amax(1, keepdim=True)).exp_()
    return e.div_(e.sum(1, keepdim=True))


@torch.no_grad()
def dense_crf(image, prob, gaussian=(3, 3), bilateral=(50, 5, 10), iterations=10):
    """Sharpen label probabilities along the edges of an image; pydensecrf's labels, on CPU or GPU.

    image: uint8 (H, W, 3), RGB
    prob: float (C, H, W) in [0, 1], on the device that computes. Pass only labels that can occur:
        the cost grows with C. For labels instead of probabilities see `hard_unary`
    gaussian: (sxy, weight), the kernel that removes specks. sxy is its standard deviation in
        pixels; about `weight` is added to the log-probability of a label that all neighbours agree
        on. None leaves the kernel out
    bilateral: (sxy, srgb, weight), the kernel that follows edges. srgb is the standard deviation in
        grey levels 0..255 of each channel: pixels within sxy and srgb want the same label
    iterations: mean-field steps [eq. C3]. Most labels settle in 5
    Returns Q float (C, H, W), sum 1 over C; Q.argmax(0) are the labels. Deterministic. Raises
    ValueError for wrong shapes, NaN, or probabilities outside [0, 1]. Equals, in pydensecrf:

        crf = DenseCRF2D(W, H, C)
        crf.setUnaryEnergy(unary_from_softmax(prob))            # -log(prob), clipped at 1e-5
        crf.addPairwiseGaussian(sxy=sxy, compat=weight)
        crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=image, compat=weight)
        Q = np.reshape(crf.inference(iterations), (C, H, W))

    To use it elsewhere, copy the dense CRF sections and imports of math, NamedTuple, torch, F."""
    check_crf_input(image, prob)
    image = image.to(prob.device)
    log_prob = prob.flatten(1).t().float().clamp(MIN_PROB, 1).log().contiguous()  # (V, C) -ψ
    kernels = [crf_kernel(crf_features(image, sxy, *srgb), weight)
               for sxy, *srgb, weight in filter(None, (gaussian, bilateral))]
    Q = softmax(log_prob)
    for _ in range(iterations):
        Q = softmax(sum((blur(kernel, Q) for kernel in kernels), log_prob))      # [eq. C3]
    return Q.t().reshape(prob.shape)


# ---- Command line --------------------------------------------------------------------------------

def check_score(score):
    if not 0 < score < 1:
        raise InputError(f"--background-score {score}: expected a number in (0, 1)")


def check_cams(folder, split):
    """Raises InputError where the record of CAMs names other classes, or other ones of a photo."""
    record = read_record(folder)
    if record is None:
        if RANK == 0:
            print(f"{folder}: no made_of.json, so these CAMs are taken as they are: a map for each "
                  "class of a photo, in the order of classes.txt")
        return
    if record.get("classes") != split.classes:
        raise InputError(f"{folder}: CAMs of the classes {record.get('classes')}; the data has "
                         f"{split.classes}; pass CAMs of this data")
    for name in split.names:
        if name not in record["shown"]:
            raise InputError(f"{folder}: no CAMs of {name}, a photo of {split.split}.csv; pass the "
                             "--split that they were made for")
        if record["shown"][name] != split.present(name).tolist():
            raise InputError(f"{folder}: made for other labels of {name}; expected CAMs of what "
                             f"{split.split}.csv says now; export them again, to another folder")


def read_cams(folder, name, present, size):
    """folder/NAME.npy (n, any h, any w) in [0, 1], a map for each class in present (n,) -> float32
    (n, H, W), size = (H, W) of the photo"""
    path = Path(folder) / f"{name}.npy"
    if len(present) == 0:
        return torch.zeros(0, *size)
    try:
        maps = np.load(path, allow_pickle=False).astype(np.float32)
        if maps.ndim != 3 or len(maps) != len(present) or not (maps.min() >= 0 and maps.max() <= 1):
            raise ValueError(f"shape {maps.shape}, values {maps.min():.3g} to {maps.max():.3g}")
    except Exception as error:  # a broken header raises anything
        raise InputError(f"{path}: no readable CAMs ({error}); expected {len(present)} maps in [0, "
                         "1]; export them again, or convert another program's with "
                         "prepare/foreign.py") from None
    # By Pillow: the last bit of F.interpolate depends on the number of threads, and a PNG must not
    maps = [np.asarray(Image.fromarray(cam).resize(size[::-1], Image.BILINEAR)) for cam in maps]
    return torch.from_numpy(np.stack(maps))


def read_segments(folder, name, size):
    """folder/NAME.png, a label picture of 8 or 16 bits, 0 for no segment -> int64 (H, W)"""
    path = Path(folder) / f"{name}.png"
    try:
        segments = np.array(open_image(path)).astype(np.int64)
        if segments.shape != size or not 0 <= segments.min() <= segments.max() < 2**16:
            raise ValueError(f"{segments.shape} pixels (height, width), its photo {size}")
    except UNREADABLE as error:
        raise InputError(f"{path}: no readable segments ({error}); expected a label picture of the "
                         "photo's size; prepare/foreign.py --segments makes it of SAM's files"
                         ) from None
    return torch.from_numpy(segments)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="CAMs -> pseudo masks, sharpened by a dense CRF.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="ROOT", help="as for train_cam.py")
    add("--split", default="train", help="ROOT/SPLIT.csv: the photos")
    add("--cams", required=True, metavar="DIR", help="NAME.npy of train_cam.py or foreign.py")
    add("--out", required=True, metavar="DIR", help="where NAME.png go")
    add("--resume", action="store_true", help="go on with a run of the same inputs, whose finished "
        "files are kept")
    add("--recipe", choices=list(RECIPES), default="voc", help="background score and CRF: 0.43 and "
        "voc (toy too), or 0.42 and irn (coco); the scores are WeakTr's, found there with train "
        "masks; on other data a guess")
    add("--background-score", type=float, metavar="T", help="another one, in (0, 1); higher gives "
        "smaller masks")
    add("--segments", metavar="DIR", help="class-agnostic segments, each of which takes one "
        "label: NAME.png, of prepare/foreign.py --segments")
    add("--crf", choices=list(PRESETS), help="another dense CRF: voc (WeakTr), irn (IRNet, COCO), "
        "clip-es (its kernels), weaktr-test (of segmentations), or none")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading processes")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser.parse_args(argv)


def main(args):
    device, (score, crf) = start_processes(args.device), RECIPES[args.recipe]
    score = args.background_score if args.background_score is not None else score
    crf = args.crf or crf
    check_score(score)
    split = Split(args.data, args.split)
    shown = [name for name in split.names if split.labels[name].any()]
    check_cams(args.cams, split)
    record = {"script": "make_pseudo.py", "background_score": score, "crf": crf,
              "photos": split.digest,
              "cams": folder_digest(args.cams, [f"{name}.npy" for name in shown], "export them, or "
                                    "convert another program's with prepare/foreign.py")}
    if args.segments:
        record["segments"] = folder_digest(args.segments, [f"{n}.png" for n in split.names],
                                           "convert SAM's with prepare/foreign.py")
    claim(args.out, [f"{name}.png" for name in split.names], record, args.resume,
          [*split.folders, *filter(None, (args.cams, args.segments))])
    if RANK == 0:
        print(f"background score {score}, CRF {crf}, {len(split.names)} images of {args.split}")
    left = [name for name in split.names[RANK::WORLD] if not Path(args.out, f"{name}.png").exists()]
    for name, photo in load_photos(split, left, "pseudo masks", args.workers):
        photo, present = np.array(photo), split.present(name)
        cams = read_cams(args.cams, name, present, photo.shape[:2])              # (n, H, W)
        if args.segments:
            segments = read_segments(args.segments, name, photo.shape[:2])
            cams = average_in_segments(cams, segments)
        labels = pseudo_mask(photo, cams, present, score, crf, device)
        write_labels(Path(args.out, f"{name}.png"), labels)
    end_processes()
    return (f"{args.out}: masks of {len(split.names)} photos; next:\n    python train_seg.py "
            f"--data {args.data} --split {args.split} --labels {args.out} --out OUT")


if __name__ == "__main__":
    run(main, parse_args())
