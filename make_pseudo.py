"""Pseudo masks: the class activation maps of an image become one label picture.

The dense CRF (Krähenbühl and Koltun, "Efficient inference in fully connected CRFs", NIPS 2011) gives every pixel i a
label x_i, and ties it to every other pixel by two Gaussian kernels over position p and colour I:

    E(x)   = Σ_i ψ(x_i) + Σ_i<j [x_i ≠ x_j] k_ij,      ψ(x_i) = -log prob_i(x_i)                              [eq. C1]
    k_ij   = w_g exp(-|p_i-p_j|²/2sxy²)  +  w_b exp(-|p_i-p_j|²/2sxy² - |I_i-I_j|²/2srgb²)                    [eq. C2]
    Q_i(l) ∝ exp( -ψ_i(l) + Σ_j k_ij Q_j(l) ),         Q_i(l) ∝ exp(-ψ_i(l)) to begin with                    [eq. C3]

C3 is repeated ten times: it is the mean field of C1, the best guess that treats every pixel as independent. The sum
over j is a Gaussian blur of Q in 2 and in 5 dimensions. `dense_crf_slow` adds up all pairs of pixels; `dense_crf` blurs
on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), as the reference implementation pydensecrf does.

    [detail C1] The paper leaves j = i out of C3; pydensecrf does not, nor is it left out here.
    [detail C2] Each kernel is normalised, k_ij / sqrt(n_i n_j) with n_i = Σ_j k_ij: pydensecrf's default.
    [detail C3] Probabilities are raised to 1e-5 at least, as by pydensecrf's unary_from_softmax.

Reads photos, image-level labels and the CAMs of train_cam.py; writes OUT/NAME.png, class numbers in VOC's palette.

    python make_pseudo.py --data data/VOCdevkit/VOC2012 --cams runs/voc/cams --out runs/voc/masks     # started again: goes on
    torchrun --nproc-per-node 4 make_pseudo.py ... the same ...                 # processes share the images; the same PNGs
"""
import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from clip_model import InputError, run
from train_cam import BACKGROUND, Data, end_processes, start_processes, write_file

# Dimension key: B images, H W pixels, C labels of a CRF, V pixels of all images that share a lattice, M lattice points,
#                d features of a pixel (2: x y, or 5: x y r g b).

PRESETS = {  # --crf: what the unary is made of, (sxy, weight), (sxy, srgb, weight)
    "voc": dict(unary="hard", gaussian=(4, 3), bilateral=(83, 5, 3)),  # WeakTr and SemPLeS, VOC
    "irn": dict(unary="hard", gaussian=(3, 3), bilateral=(50, 5, 10)),  # IRNet, and COCO
    "prob": dict(unary="prob", gaussian=(1, 3), bilateral=(67, 3, 4)),  # CLIP-ES, and COCO test images
    "none": None,
}


# ---------------------------------------------------------------------------------------------------------------------
# Dense CRF: what goes in
# ---------------------------------------------------------------------------------------------------------------------

MIN_PROB = 1e-5  # [detail C3]  -log 0 would forbid a label for good
PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**23}  # small images share a lattice up to here: caches want few, a GPU many


def hard_unary(labels, num_labels, gt_prob=0.7):
    """Labels (H, W) in 0..C-1 -> probabilities (C, H, W): gt_prob for the given label, the rest shared by the others.

    -log of it is pydensecrf.utils.unary_from_labels(labels, C, gt_prob, zero_unsure=False)."""
    labels = torch.as_tensor(labels)
    if labels.ndim != 2 or not 0 < gt_prob < 1:
        raise ValueError(f"labels must be (H, W) and gt_prob in (0, 1), not {tuple(labels.shape)} and {gt_prob}")
    if labels.numel() and not 0 <= labels.min() <= labels.max() < num_labels:
        raise ValueError(f"labels must lie in 0..{num_labels - 1}, not {labels.min()}..{labels.max()}")
    given = labels == torch.arange(num_labels, device=labels.device)[:, None, None]  # (C, H, W)
    return torch.where(given, gt_prob, (1 - gt_prob) / max(num_labels - 1, 1))


def check_crf_input(image, prob):
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image must be a uint8 tensor (H, W, 3), not {image.dtype} {tuple(image.shape)}")
    if prob.ndim != 3 or prob.shape[1:] != image.shape[:2] or prob.numel() == 0:
        raise ValueError(f"prob must be (C, H, W) with H, W = {tuple(image.shape[:2])}, not {tuple(prob.shape)}")
    if not (prob.min() >= 0 and prob.max() <= 1.001):  # not (.. and ..): NaN fails every comparison
        raise ValueError(f"prob must lie in [0, 1], not {prob.min():.3g}..{prob.max():.3g}")


def crf_features(image, sxy, srgb=None):
    """uint8 (H, W, 3) -> f (d, H*W) such that a kernel of [eq. C2] is exp(-|f_i - f_j|²/2)"""
    if not (sxy > 0 and (srgb is None or srgb > 0)):
        raise ValueError(f"sxy and srgb must be positive, not {sxy} and {srgb}")
    H, W, _ = image.shape
    y, x = torch.meshgrid(*(torch.arange(size, device=image.device) for size in (H, W)), indexing="ij")
    position = torch.stack([x, y]).flatten(1).float()  # (2, H*W)
    if srgb is None:
        return position / position.new_tensor(sxy)  # a tensor, as a GPU would multiply by 1 / number
    colour = image.flatten(0, 1).t().float()  # (3, H*W)
    return torch.cat([position / position.new_tensor(sxy), colour / colour.new_tensor(srgb)])  # (5, H*W)


# ---------------------------------------------------------------------------------------------------------------------
# Dense CRF: the definition
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def dense_crf_slow(image, prob, gaussian=(3, 3), bilateral=(50, 5, 10), iterations=10):
    """What `dense_crf` approximates, every pair of pixels added up: for small images, it takes (H*W)² numbers."""
    check_crf_input(image, prob)
    K = 0
    for sxy, *srgb, weight in filter(None, (gaussian, bilateral)):
        f = crf_features(image, sxy, *srgb).t()  # (H*W, d)
        k = torch.exp(-0.5 * (f[:, None] - f).square().sum(2))  # [eq. C2]  (H*W, H*W)
        n = k.sum(1)
        K = K + weight * k / (n[:, None] * n).sqrt()  # [detail C2]
    log_prob = prob.flatten(1).float().clamp(MIN_PROB, 1).log()  # -ψ of [eq. C1]  (C, H*W)
    Q = log_prob.softmax(0)
    for _ in range(iterations):
        Q = (log_prob + Q @ K).softmax(0)  # [eq. C3]  (C, H*W)
    return Q.view(prob.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Dense CRF: a Gaussian blur on the permutohedral lattice
#
# The lattice cuts the d-dimensional space of features into simplices. A pixel hands its value to the d+1 corners around
# it (splat), the corners blur among neighbours along d+1 axes, and the pixel takes its value back (slice).
# ---------------------------------------------------------------------------------------------------------------------

class Lattice(NamedTuple):
    """Three kinds of sparse matrix. A row is a bag of `embedding_bag`: some indices and the weights to add them up by.
    The last point, number M, stands for "no neighbour" and always holds 0."""
    splat_pixel: torch.Tensor  # (V*(d+1),) int32: the pixels around point 0, then those around point 1, ...
    splat_weight: torch.Tensor  # (V*(d+1),)
    splat_start: torch.Tensor  # (M+1,) int32: where the pixels of each point begin
    blur_point: list  # d+1 times (M+1, 3) int32: a point and its two neighbours along one axis
    blur_weight: torch.Tensor  # (M+1, 3): 1, ½, ½
    slice_point: torch.Tensor  # (V, d+1) int32: the points around each pixel
    slice_weight: torch.Tensor  # (V, d+1)


def enclosing_simplex(f):
    """Features (d, V) -> for each pixel, the lattice simplex that it lies in.

    Lattice points live in the plane Σ_i x_i = 0 of d+1 dimensions; their coordinates are integers, all alike mod d+1.
    origin: the corner with coordinates 0 mod d+1, divided by d+1; float (V, d+1).
    axis: the way to the other d corners; int64 (V, d+1). One goes from corner r-1 to corner r by adding 1 to all
        coordinates, and subtracting d+1 from coordinate axis[:, d+1-r].
    weight: how near the pixel is to each corner, from 0 to 1, sum 1; float (V, d+1)."""
    d, V = f.shape
    elevated = f.new_empty(V, d + 1)
    total = f.new_zeros(V)
    for j in range(d, 0, -1):  # f in the basis (1, .., 1, -j, 0, .., 0) / sqrt(j(j+1)) of the plane
        along = f[j - 1] * ((d + 1) * math.sqrt(2 / 3) / math.sqrt(j * (j + 1)))  # so big that the blur has variance 1
        elevated[:, j] = total - j * along
        total = total + along
    elevated[:, 0] = total

    # The nearest multiples of d+1 are a lattice point only if their sum is 0. If it is `excess` times d+1, lower those
    # that were rounded up most (raise, for a negative one): in the order of residuals, that is a rotation.
    origin = (elevated * (1 / (d + 1))).round()
    residual, axis = torch.sort(elevated - origin * (d + 1), dim=1, descending=True, stable=True)
    excess = origin.sum(1, keepdim=True)  # (V, 1)
    place = torch.arange(d + 1, device=f.device) - excess.long()  # (V, d+1): the old place of what comes to each place
    turn = (place > d).long() - (place < 0).long()
    place = place - turn * (d + 1)
    residual = residual.gather(1, place) - turn * (d + 1)
    axis = axis.gather(1, place)
    origin = origin.scatter(1, axis, origin.gather(1, axis) + turn)

    inner = (residual[:, :-1] - residual[:, 1:]).flip(1) / (d + 1)  # (V, d)
    outer = 1 - (residual[:, :1] - residual[:, -1:]) / (d + 1)  # (V, 1)
    return origin, axis, torch.cat([outer, inner], 1)


def build_lattice(f, image_index):
    """Features (d, V) and the number, ascending from 0, of each pixel's image (V,) -> Lattice; images do not mix."""
    d, V = f.shape
    if V * (d + 1) >= 2**31:
        raise ValueError(f"{V} pixels are more than a lattice can number in int32: make the image smaller")
    if f.max() >= 2**16:
        raise ValueError(f"{f.max():.0f} standard deviations are too many for float32: make sxy and srgb larger")
    origin, axis, weight = enclosing_simplex(f)

    # One int64 names a point: its digits are the first d coordinates (their sum tells the last), then the image.
    low, high = origin.min(0).values.long().tolist(), origin.max(0).values.long().tolist()
    step = [1]
    for i in range(d):
        step.append(step[i] * (high[i] - low[i] + 5) * (d + 1))  # corners and their neighbours fit in, and never carry
    if step[d] * (int(image_index[-1]) + 2) >= 2**62:
        raise ValueError("the lattice has more points than int64 can number: make sxy and srgb larger")
    per_image = step[d]
    step = torch.tensor(step[:d] + [0], device=f.device)  # (d+1,)
    one_up = step.sum()  # +1 in all coordinates
    origin = origin.long() - torch.tensor(low, device=f.device)
    key = [(origin * step).sum(1) * (d + 1) + image_index * per_image]  # (V,)
    for r in range(1, d + 1):
        key.append(key[r - 1] + one_up - step[axis[:, d + 1 - r]] * (d + 1))
    del origin, axis
    key, corner = torch.sort(torch.stack(key, 1).flatten(), stable=True)  # (V*(d+1),)
    key, point, count = torch.unique_consecutive(key, return_inverse=True, return_counts=True)  # (M,), (V*(d+1),), (M,)
    slice_point = torch.empty_like(corner, dtype=torch.int32).scatter_(0, corner, point.int()).view(V, d + 1)

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
    return Lattice(splat_pixel=(corner // (d + 1)).int(), splat_weight=weight.flatten()[corner],
                   splat_start=F.pad(count.cumsum(0), (1, 0)).int(), blur_point=blur_point,
                   blur_weight=weight.new_tensor([1, 0.5, 0.5]).repeat(M + 1, 1),
                   slice_point=slice_point, slice_weight=weight)


def blur(lattice, values):
    """Gaussian blur of values (V, C), up to a constant factor -> (V, C)"""
    points = F.embedding_bag(lattice.splat_pixel, values, lattice.splat_start, mode="sum",
                             per_sample_weights=lattice.splat_weight)  # (M+1, C)
    for neighbours in lattice.blur_point:
        points = F.embedding_bag(neighbours, points, mode="sum", per_sample_weights=lattice.blur_weight)  # (M+1, C)
    return F.embedding_bag(lattice.slice_point, points, mode="sum", per_sample_weights=lattice.slice_weight)  # (V, C)


def crf_kernel(f, image_index, weight):
    """A Lattice whose blur is one kernel of [eq. C2]: normalised, and times its weight [detail C2]"""
    lattice = build_lattice(f, image_index)
    n = blur(lattice, f.new_ones(f.shape[1], 1)).squeeze(1)  # (V,)
    scale = (n + 1e-20).rsqrt()
    return lattice._replace(splat_weight=lattice.splat_weight * scale[lattice.splat_pixel],
                            slice_weight=lattice.slice_weight * scale[:, None] * weight)


# ---------------------------------------------------------------------------------------------------------------------
# Dense CRF: mean field
# ---------------------------------------------------------------------------------------------------------------------

def dense_crf(image, prob, gaussian=(3, 3), bilateral=(50, 5, 10), iterations=10):
    """Sharpen label probabilities along the edges of an image; the same labels as pydensecrf, on CPU or GPU.

    image: uint8 (H, W, 3), RGB.
    prob: float (C, H, W) in [0, 1], the probability of each label at each pixel; its device is the one that works.
        Only labels that may occur are worth their time. For labels instead of probabilities see `hard_unary`.
    gaussian: (sxy, weight), the kernel that removes specks. sxy is its standard deviation in pixels; about `weight` is
        added to the log-probability of a label that all neighbours agree on. None leaves the kernel out.
    bilateral: (sxy, srgb, weight), the kernel that follows edges; srgb is the standard deviation in grey levels 0..255
        of each colour channel: pixels within sxy and srgb of each other want the same label. None leaves it out.
    iterations: mean-field steps [eq. C3]. Most labels settle in 5.
    Returns Q float (C, H, W), probabilities that sum to 1 over C; Q.argmax(0) are the labels.
    Deterministic. Raises ValueError for wrong shapes, NaN, or probabilities outside [0, 1]. Equals, in pydensecrf:

        crf = DenseCRF2D(W, H, C)
        crf.setUnaryEnergy(unary_from_softmax(prob))            # -log(prob), clipped at 1e-5
        crf.addPairwiseGaussian(sxy=sxy, compat=weight)
        crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=image, compat=weight)
        Q = np.reshape(crf.inference(iterations), (C, H, W))

    To use it elsewhere copy the four dense CRF sections of this file, and above them its imports of math, NamedTuple,
    torch and F: they need nothing else."""
    return dense_crf_batch([image], [prob], gaussian, bilateral, iterations)[0]


def dense_crf_batch(images, probs, gaussian=(3, 3), bilateral=(50, 5, 10), iterations=10):
    """`dense_crf` for lists of images and probabilities of any sizes and label counts: the same results in fewer and
    larger steps. Neighbours in the list share a lattice as long as PIXELS_AT_ONCE allows: memory is bounded."""
    results, group, pixels = [], [], 0
    for image, prob in zip(images, probs, strict=True):
        check_crf_input(image, prob)
        if group and pixels + prob[0].numel() > PIXELS_AT_ONCE["cuda" if prob.is_cuda else "cpu"]:
            results += mean_field(group, gaussian, bilateral, iterations)
            group, pixels = [], 0
        group.append((image.to(prob.device), prob))
        pixels += prob[0].numel()
    return results + mean_field(group, gaussian, bilateral, iterations) if group else results


def softmax(x):
    """Over the labels of x (V, C); where these are few, torch.softmax takes four times as long on a CPU."""
    e = (x - x.amax(1, keepdim=True)).exp_()
    return e.div_(e.sum(1, keepdim=True))


@torch.no_grad()
def mean_field(group, gaussian, bilateral, iterations):
    """Pairs (image, prob) on one device -> the list of their Q"""
    sizes = [prob[0].numel() for _, prob in group]
    C = max(len(prob) for _, prob in group)
    log_prob = torch.cat([  # labels that an image lacks have log 0: they stay at Q = 0
        F.pad(prob.flatten(1).t().float().clamp(MIN_PROB, 1).log(), (0, C - len(prob)), value=-math.inf)
        for _, prob in group])  # -ψ of [eq. C1]  (V, C)
    image_index = torch.arange(len(group)).repeat_interleave(torch.tensor(sizes)).to(log_prob.device)  # (V,)
    kernels = []
    for sxy, *srgb, weight in filter(None, (gaussian, bilateral)):
        f = torch.cat([crf_features(image, sxy, *srgb) for image, _ in group], 1)  # (d, V)
        kernels.append(crf_kernel(f, image_index, weight))

    Q = softmax(log_prob)
    for _ in range(iterations):
        Q = softmax(sum((blur(kernel, Q) for kernel in kernels), log_prob))  # [eq. C3]  (V, C)
    return [q[:, :len(prob)].t().reshape(prob.shape) for q, (_, prob) in zip(Q.split(sizes), group, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Label images and pictures
# ---------------------------------------------------------------------------------------------------------------------

PALETTE = [sum(((i >> (3 * j + c)) & 1) << (7 - j) for j in range(8)) for i in range(256) for c in range(3)]  # VOC's


def write_labels(path, labels):
    """labels uint8 (H, W): 0 background, 1..K classes, 255 ignore -> a palette PNG in VOC's colours."""
    picture = Image.fromarray(labels, "P")
    picture.putpalette(PALETTE)
    write_file(path, picture.save)


def read_labels(path, size, num_labels):
    """A label PNG -> uint8 (H, W). size is (H, W) of its photo, None if any will do. Raises InputError for anything that is
    no label image. The array is read-only: a copy would cost as much as all checks."""
    try:
        with Image.open(path) as picture:
            mode, labels = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a broken chunk a SyntaxError
        raise InputError(f"{path}: no readable label image ({error}); expected a palette PNG with class numbers; "
                         "write it with make_pseudo.py, or pass the folder that holds it") from None
    if mode not in ("P", "L"):
        raise InputError(f"{path}: mode {mode}; expected class numbers (a palette or grey PNG), not colours; convert it")
    if size is not None and labels.shape != size:
        raise InputError(f"{path}: {labels.shape[0]}x{labels.shape[1]} (height x width), its photo is {size[0]}x{size[1]}; "
                         "expected equal sizes; make the label image again")
    signed = labels.view(np.int8)  # 255 is -1 here: two quick looks tell that all is well, or that a slow one is needed
    foreign = []
    if signed.min() < -1 or signed.max() >= num_labels:
        foreign = np.setdiff1d(labels, [*range(num_labels), 255])
    if len(foreign):
        coco = num_labels == 81 and foreign[-1] <= 90
        raise InputError(f"{path}: holds label {foreign[-1]}; expected 0 to {num_labels - 1} or 255 (ignore); " + (
            "these are COCO's 91 category ids: renumber them, 1 to 80 in their order, or write masks with eval.py --save-truth"
            if coco else "it was made for another class list"))
    return labels


def read_cams(folder, name, present, size):
    """folder/NAME.npy -> float32 (n, H, W) in [0, 1], one map per present class; size is (H, W) of the photo."""
    path = Path(folder) / f"{name}.npy"
    try:
        cams = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: no readable CAMs ({error}); expected the .npy file of train_cam.py --phase export; "
                         "export again or pass the right folder") from None
    expected = (len(present), -(-size[0] // 4), -(-size[1] // 4))
    if getattr(cams, "shape", None) != expected:
        raise InputError(f"{path}: shape {getattr(cams, 'shape', None)}, the image has {len(present)} classes and "
                         f"{size[0]}x{size[1]} pixels; "
                         f"expected {expected}; these CAMs are of another class list or data set: export them again")
    if not np.isfinite(cams).all():
        raise InputError(f"{path}: holds values that are not finite; expected maps in [0, 1]; export them again")
    # By Pillow: the last bit of F.interpolate depends on the number of threads, and a PNG must not.
    maps = [Image.fromarray(cam).resize(size[::-1], Image.BILINEAR) for cam in cams.astype(np.float32)]
    return torch.from_numpy(np.array(maps, np.float32).reshape(len(present), *size))


def picture_strip(rows, captions, path, side=128):
    """rows: lists of equally many PIL images, captions one a column -> one PNG, every cell `side` pixels high and wide."""
    sheet = Image.new("RGB", (len(captions) * (side + 4), len(rows) * (side + 4) + 16), "white")
    for column, caption in enumerate(captions):
        ImageDraw.Draw(sheet).text((column * (side + 4) + 4, 2), caption, fill="black")
        for row, cells in enumerate(rows):
            cell = cells[column].convert("RGB").resize((side, side), Image.NEAREST)
            sheet.paste(cell, (column * (side + 4), row * (side + 4) + 16))
    write_file(path, sheet.save)


# ---------------------------------------------------------------------------------------------------------------------
# The stage: CAMs -> pseudo masks
# ---------------------------------------------------------------------------------------------------------------------

def otsu(histogram):
    """The threshold in [0, 1] that splits a histogram (bins,) of values in [0, 1] into the two classes that differ most
    (Otsu 1979: largest between-class variance w_0 w_1 (m_1 - m_0)^2). Looks at CAM values only, never at a mask."""
    value = (torch.arange(len(histogram)) + 0.5) / len(histogram)
    w_0 = histogram.double().cumsum(0)                                                          # (bins,)
    s_0 = (histogram * value).double().cumsum(0)
    w_1, s_1 = w_0[-1] - w_0, s_0[-1] - s_0
    between = w_0 * w_1 * (s_1 / w_1.clamp(min=1) - s_0 / w_0.clamp(min=1)) ** 2
    return (between.argmax().item() + 1) / len(histogram)


def background_score(choice, data, folder, rank, world, device):
    """--bg-score -> (score in (0, 1), how it was chosen). Opens no ground truth.

    A number is taken as it is; "auto" is the score that train_cam.py's export wrote beside the CAMs or, without that file,
    Otsu's threshold on the strongest CAM at each pixel, over the whole split. The processes share the images and add up whole
    numbers, so their count changes nothing. Raises InputError for anything else, and for a file that holds no score."""
    if choice != "auto":
        try:
            number = float(choice)
        except ValueError:
            number = math.nan
        if not 0 < number < 1:
            raise InputError(f"--bg-score or --threshold {choice}: expected a number in (0, 1) or auto; a CAM has values in [0, 1]")
        return number, "given"
    chosen = Path(folder) / BACKGROUND
    if chosen.is_file():
        try:
            return float(json.loads(chosen.read_text())["background_score"]), "auto: as CLIP reads its masks best, no mask read"
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{chosen}: no background score in it; expected what train_cam.py --phase export writes; export "
                             "again, or pass a number") from None
    histogram = torch.zeros(100, dtype=torch.long)
    for name in tqdm(data.names[rank::world], desc="background score", disable=None if rank == 0 else True):
        present = np.flatnonzero(data.labels(name))
        if len(present):
            W, H = data.image(name).size
            histogram += torch.histc(read_cams(folder, name, present, (H, W)).amax(0), 100, 0, 1).long()
    if dist.is_initialized():
        histogram = histogram.to(device)
        dist.all_reduce(histogram)
    return round(otsu(histogram.cpu()), 2), "auto: Otsu's threshold on the CAM values, no mask read"


def score_labels(cams, present, threshold):
    """[eq. P1]  argmax over (threshold, CAMs): cams (n, H, W) -> labels uint8 (H, W), 0 or 1 + class."""
    scores = torch.cat([cams.new_full((1, *cams.shape[1:]), threshold), cams])                  # (1 + n, H, W)
    return np.array([0, *(1 + present)], np.uint8)[scores.argmax(0).numpy()]


def pseudo_mask(photo, cams, present, threshold, preset, min_confidence, device):
    """photo uint8 (H, W, 3), cams (n, H, W) -> labels uint8 (H, W), sharpened by the dense CRF of the preset."""
    labels = score_labels(cams, present, threshold)
    if PRESETS[preset] is None or len(present) == 0:
        return labels
    unary, gaussian, bilateral = PRESETS[preset].values()
    ids = np.array([0, *(1 + present)], np.uint8)
    if unary == "hard":
        prob = hard_unary(torch.from_numpy(np.searchsorted(ids, labels)), len(ids))             # (1 + n, H, W)
    else:
        prob = torch.cat([torch.full_like(cams[:1], threshold), cams])
        prob = prob / prob.sum(dim=0)
    Q = dense_crf(torch.from_numpy(photo), prob.to(device), gaussian, bilateral).cpu()
    labels = ids[Q.argmax(0).numpy()]
    labels[Q.amax(0).numpy() < min_confidence] = 255
    return labels


def is_whole(path):
    """A finished label PNG: opens and decodes to its end."""
    try:
        with Image.open(path) as picture:
            picture.load()
        return True
    except (OSError, SyntaxError, ValueError):
        return False


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="CAMs -> pseudo masks, sharpened by a dense CRF.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, metavar="ROOT", help="as for train_cam.py; photos and image-level labels are read")
    parser.add_argument("--split", default="train", help="as for train_cam.py")
    parser.add_argument("--cams", required=True, metavar="DIR", help="NAME.npy files of train_cam.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="where NAME.png go")
    parser.add_argument("--bg-score", default="auto", metavar="T", help="background score in (0, 1): higher gives smaller "
                        "masks; auto: what the export of train_cam.py chose, else Otsu's threshold on the CAMs; no mask is read")
    parser.add_argument("--crf", choices=list(PRESETS), default="voc", help="dense CRF preset: voc (WeakTr, SemPLeS), "
                        "irn (IRNet, COCO), prob (CLIP-ES), or none")
    parser.add_argument("--min-confidence", type=float, default=0.0, help="in [0, 1]: pixels whose best probability after the "
                        "CRF is below become 255 (ignore)")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="redo finished PNGs too")
    parser.add_argument("--skip-bad", action=argparse.BooleanOptionalAction, default=False, help="read all photos and CAMs "
                        "once before; go on without those that cannot be read, list them at the end, exit 3")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="nothing here is random; accepted for uniformity")
    return parser.parse_args(argv)


def main(args):
    if not 0 <= args.min_confidence <= 1:
        raise InputError(f"--min-confidence {args.min_confidence}: expected a probability, a number in [0, 1]")
    if args.min_confidence > 0 and args.crf == "none":
        raise InputError("--min-confidence: looks at the CRF's probabilities, and --crf none has none; leave one of the two out")
    rank, world, device = start_processes(args.device)
    data, out = Data(args.data, args.split), Path(args.out)

    def read(name):
        photo, present = np.array(data.image(name)), np.flatnonzero(data.labels(name))
        return photo, present, read_cams(args.cams, name, present, photo.shape[:2])
    if args.skip_bad:
        data.leave_out_bad(read)
    out.mkdir(parents=True, exist_ok=True)
    threshold, chosen = background_score(args.bg_score, data, args.cams, rank, world, device)
    if rank == 0:
        print(f"background score {threshold} ({chosen}), CRF {args.crf}, {len(data.names)} images of {args.split}")
    for name in tqdm(data.names[rank::world], desc="pseudo masks", disable=None if rank == 0 else True):
        path = out / f"{name}.png"
        if not args.overwrite and is_whole(path):
            continue
        photo, present, cams = read(name)
        write_labels(path, pseudo_mask(photo, cams, present, threshold, args.crf, args.min_confidence, device))
    return end_processes(data, rank, world)


if __name__ == "__main__":
    run(main, parse_args())
