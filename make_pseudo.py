"""Pseudo masks: the class activation maps of an image become one label picture (paper, section 4.1).

A pixel i takes the class whose map M is highest there, or background, label 0, where none exceeds the background score:

    x_i = argmax (background score, M_1(i), .., M_n(i)),   over the n classes that the image shows            [eq. P1]

With --segments, class-agnostic segments (SAM's, say), each takes one label, that of the mean of M inside it; a smaller segment
lies on a larger one, and pixels in no segment keep their own M:

    M_k(i) := mean of M_k(j) over the pixels j of s(i),    s(i) the smallest segment that holds i             [eq. P2]

The dense CRF (Krähenbühl and Koltun, "Efficient inference in fully connected CRFs", NIPS 2011) moves these labels to the
edges of the photo. It ties every pixel to every other one by two Gaussian kernels over position p and colour I:

    E(x)   = Σ_i ψ(x_i) + Σ_i<j [x_i ≠ x_j] k_ij,      ψ(x_i) = -log prob_i(x_i)                              [eq. C1]
    k_ij   = w_g exp(-|p_i-p_j|²/2s_g²)  +  w_b exp(-|p_i-p_j|²/2s_b² - |I_i-I_j|²/2s_rgb²)                   [eq. C2]
    Q_i(l) ∝ exp( -ψ_i(l) + Σ_j k_ij Q_j(l) ),         Q_i(l) ∝ exp(-ψ_i(l)) to begin with                    [eq. C3]

C3 is repeated ten times: it is the mean field of C1, the best guess that treats every pixel as independent. The sum
over j is a Gaussian blur of Q in 2 and in 5 dimensions. `dense_crf_slow` adds up all pairs of pixels; `dense_crf` blurs
on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), as the reference implementation pydensecrf does.

    [detail C1] The paper leaves j = i out of C3; pydensecrf does not, nor is it left out here.
    [detail C2] Each of the two kernels g is normalised by itself, g_ij / sqrt(n_i n_j) with n_i = Σ_j g_ij: pydensecrf's default.
    [detail C3] Probabilities are raised to 1e-5 at least, as by pydensecrf's unary_from_softmax.

Reads photos, image-level labels and the CAMs of train_cam.py or of other programs (docs/data.md); writes OUT/NAME.png, class
numbers in VOC's palette.

    python make_pseudo.py --data runs/toy/data --cams runs/toy/cam/cams --out runs/toy/masks      # started again: goes on
    python make_pseudo.py --data data/VOCdevkit/VOC2012 --split train_aug --cams runs/voc/cams --out runs/voc/masks
    torchrun --nproc-per-node 4 make_pseudo.py ... the same ...                # processes share the images; the same PNGs
"""
import argparse
import io
import json
import math
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from clip_model import InputError, run
from train_cam import BACKGROUND, Split, end_processes, explained, hold, start_processes, write_file

# Dimension key: n classes that an image shows, H W pixels, C labels of a CRF, V = H*W, M lattice points,
#                d features of a pixel (2: x y, or 5: x y r g b).

PRESETS = {  # --crf: what the unary is made of, (sxy, weight), (sxy, srgb, weight)
    "voc": dict(unary="hard", gaussian=(4, 3), bilateral=(83, 5, 3)),  # WeakTr and SemPLeS, VOC
    "irn": dict(unary="hard", gaussian=(3, 3), bilateral=(50, 5, 10)),  # IRNet, and COCO
    "prob": dict(unary="prob", gaussian=(1, 3), bilateral=(67, 3, 4)),  # CLIP-ES, and COCO test images
    "voc-test": dict(unary="prob", gaussian=(3, 3), bilateral=(83, 5, 3)),  # WeakTr, segmentation of VOC's test images
    "none": None,
}


# ---------------------------------------------------------------------------------------------------------------------
# CAMs -> pseudo mask
# ---------------------------------------------------------------------------------------------------------------------

def score_labels(cams, present, background_score):
    """x_i = argmax (background score, M_1(i), .., M_n(i)) [eq. P1]: cams (n, H, W) -> labels uint8 (H, W), 0 or 1 + class."""
    scores = torch.cat([cams.new_full((1, *cams.shape[1:]), background_score), cams])           # (1 + n, H, W)
    return np.array([0, *(1 + present)], np.uint8)[scores.argmax(0).numpy()]


def average_in_segments(cams, segments):
    """M_k(i) := mean of M_k over s(i), the smallest segment that holds i [eq. P2]: cams (n, H, W); segments, the flat indices of
    their pixels -> cams (n, H, W)"""
    maps = cams.flatten(1)                                                                      # (n, H*W)
    averaged = maps.clone()
    for segment in sorted(map(torch.from_numpy, segments), key=len, reverse=True):  # smaller ones over larger ones
        averaged[:, segment] = maps[:, segment].mean(dim=1, keepdim=True)
    return averaged.view(cams.shape)


def pseudo_mask(photo, cams, present, background_score, preset, device):
    """photo uint8 (H, W, 3), cams (n, H, W) -> labels uint8 (H, W), sharpened by the dense CRF of the preset."""
    if PRESETS[preset] is None or len(present) == 0:
        return score_labels(cams, present, background_score)
    unary, gaussian, bilateral = PRESETS[preset].values()
    scores = torch.cat([torch.full_like(cams[:1], background_score), cams])                     # (1 + n, H, W)
    prob = hard_unary(scores.argmax(0), len(scores)) if unary == "hard" else scores / scores.sum(0)
    Q = dense_crf(torch.from_numpy(photo), prob.to(device), gaussian, bilateral)                # (1 + n, H, W)
    return np.array([0, *(1 + present)], np.uint8)[Q.argmax(0).cpu().numpy()]


# ---------------------------------------------------------------------------------------------------------------------
# Dense CRF: the definition
# ---------------------------------------------------------------------------------------------------------------------

MIN_PROB = 1e-5  # [detail C3]  -log 0 would forbid a label for good


def hard_unary(labels, num_labels, gt_prob=0.7):
    """Labels (H, W) in 0..C-1 -> probabilities (C, H, W): gt_prob for the given label, the rest shared by the others.

    -log of it is pydensecrf.utils.unary_from_labels(labels, C, gt_prob, zero_unsure=False)."""
    if labels.ndim != 2 or not 0 <= labels.min() <= labels.max() < num_labels or not 0 < gt_prob < 1:
        raise ValueError(f"labels must be (H, W) in 0..{num_labels - 1} and gt_prob in (0, 1), not {labels.shape} and {gt_prob}")
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
    """uint8 (H, W, 3) -> f (d, V) such that exp(-|f_i - f_j|²/2) is a kernel of [eq. C2]:
    f_i = p_i / sxy, or with srgb f_i = (p_i / sxy, I_i / srgb)."""
    H, W, _ = image.shape
    y, x = torch.meshgrid(*(torch.arange(size, device=image.device) for size in (H, W)), indexing="ij")
    f = torch.stack([x, y]).flatten(1).float()                                                  # (2, V)
    f = f / f.new_tensor(sxy)  # by a tensor: divided by a number, a GPU multiplies by its inverse and rounds differently
    if srgb is not None:
        colour = image.flatten(0, 1).t().float()                                                # (3, V)
        f = torch.cat([f, colour / colour.new_tensor(srgb)])                                    # (5, V)
    if not f.max() < 2**16:  # not (..): NaN too
        raise ValueError(f"sxy {sxy} and srgb {srgb} must be positive, and large enough for float32 to hold {f.max():.3g} of them")
    return f


@torch.no_grad()
def dense_crf_slow(image, prob, gaussian=(3, 3), bilateral=(50, 5, 10), iterations=10):
    """What `dense_crf` approximates, Q_i(l) ∝ exp(-ψ_i(l) + Σ_j k_ij Q_j(l)) [eq. C3] with every pair i, j added up: for
    small images, it takes V² numbers."""
    check_crf_input(image, prob)
    k = 0
    for sxy, *srgb, weight in filter(None, (gaussian, bilateral)):
        f = crf_features(image, sxy, *srgb).t()                                                 # (V, d)
        kernel = torch.exp(-0.5 * (f[:, None] - f).square().sum(2))  # [eq. C2]                 # (V, V)
        n = kernel.sum(1)
        k = k + weight * kernel / (n[:, None] * n).sqrt()  # [detail C2]
    log_prob = prob.flatten(1).float().clamp(MIN_PROB, 1).log()  # -ψ of [eq. C1]               # (C, V)
    Q = log_prob.softmax(0)
    for _ in range(iterations):
        Q = (log_prob + Q @ k).softmax(0)  # [eq. C3]                                           # (C, V)
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
    excess = origin.sum(1, keepdim=True)                                                        # (V, 1)
    place = torch.arange(d + 1, device=f.device) - excess.long()  # the old place of what comes to each place  # (V, d+1)
    turn = (place > d).long() - (place < 0).long()
    place = place - turn * (d + 1)
    residual = residual.gather(1, place) - turn * (d + 1)
    axis = axis.gather(1, place)
    origin = origin.scatter(1, axis, origin.gather(1, axis) + turn)

    inner = (residual[:, :-1] - residual[:, 1:]).flip(1) / (d + 1)                              # (V, d)
    outer = 1 - (residual[:, :1] - residual[:, -1:]) / (d + 1)                                  # (V, 1)
    return origin, axis, torch.cat([outer, inner], 1)


def build_lattice(f):
    """Features (d, V) -> Lattice"""
    d, V = f.shape
    origin, axis, weight = enclosing_simplex(f)

    # One int64 names a point: its digits are the first d coordinates, their sum tells the last.
    low, high = origin.aminmax(dim=0)                                                           # (d+1,)
    base = [(int(extent) + 5) * (d + 1) for extent in high - low]  # corners and their neighbours fit in, and never carry
    if math.prod(base[:d]) >= 2**62:
        raise ValueError("the lattice has more points than int64 can number: make sxy and srgb larger")
    step = torch.tensor([*(math.prod(base[:i]) for i in range(d)), 0], device=f.device)         # (d+1,)
    one_up = step.sum()  # +1 in all coordinates
    key = [((origin - low).long() * step).sum(1) * (d + 1)]  # of corner 0                      # (V,)
    for r in range(1, d + 1):
        key.append(key[r - 1] + one_up - step[axis[:, d + 1 - r]] * (d + 1))
    del origin, axis  # memory
    key, corner = torch.sort(torch.stack(key, 1).flatten(), stable=True)                        # (V*(d+1),)
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
    """Σ_j exp(-|f_i - f_j|²/2) values_j for every pixel i, up to a constant factor: values (V, C) -> (V, C)"""
    points = F.embedding_bag(lattice.splat_pixel, values, lattice.splat_start, mode="sum",
                             per_sample_weights=lattice.splat_weight)                           # (M+1, C)
    for neighbours in lattice.blur_point:
        points = F.embedding_bag(neighbours, points, mode="sum", per_sample_weights=lattice.blur_weight)  # (M+1, C)
    return F.embedding_bag(lattice.slice_point, points, mode="sum", per_sample_weights=lattice.slice_weight)  # (V, C)


def crf_kernel(f, weight):
    """A Lattice whose blur is one kernel of [eq. C2], weight exp(-|f_i - f_j|²/2) / sqrt(n_i n_j) [detail C2]"""
    lattice = build_lattice(f)
    n = blur(lattice, f.new_ones(f.shape[1], 1)).squeeze(1)                                     # (V,)
    scale = (n + 1e-20).rsqrt()
    return lattice._replace(splat_weight=lattice.splat_weight * scale[lattice.splat_pixel],
                            slice_weight=lattice.slice_weight * scale[:, None] * weight)


# ---------------------------------------------------------------------------------------------------------------------
# Dense CRF: mean field
# ---------------------------------------------------------------------------------------------------------------------

def softmax(x):
    """Over the labels of x (V, C); where these are few, torch.softmax takes four times as long on a CPU."""
    e = (x - x.amax(1, keepdim=True)).exp_()
    return e.div_(e.sum(1, keepdim=True))


@torch.no_grad()
def dense_crf(image, prob, gaussian=(3, 3), bilateral=(50, 5, 10), iterations=10):
    """Sharpen label probabilities along the edges of an image; the same labels as pydensecrf, on CPU or GPU.

    image: uint8 (H, W, 3), RGB.
    prob: float (C, H, W) in [0, 1], the probability of each label at each pixel; its device is the one that works.
        Only labels that may occur are worth their time. For labels instead of probabilities see `hard_unary`.
    gaussian: (sxy, weight), the kernel that removes specks. sxy is its standard deviation in pixels; about `weight` is
        added to the log-probability of a label that all neighbours agree on. None leaves the kernel out.
    bilateral: (sxy, srgb, weight), the kernel that follows edges; srgb is the standard deviation in grey levels 0..255
        of each colour channel: pixels within sxy and srgb of each other want the same label. None leaves it out.
    iterations: mean-field steps Q_i(l) ∝ exp(-ψ_i(l) + Σ_j k_ij Q_j(l)) [eq. C3]. Most labels settle in 5.
    Returns Q float (C, H, W), probabilities that sum to 1 over C; Q.argmax(0) are the labels.
    Deterministic. Raises ValueError for wrong shapes, NaN, or probabilities outside [0, 1]. Equals, in pydensecrf:

        crf = DenseCRF2D(W, H, C)
        crf.setUnaryEnergy(unary_from_softmax(prob))            # -log(prob), clipped at 1e-5
        crf.addPairwiseGaussian(sxy=sxy, compat=weight)
        crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=image, compat=weight)
        Q = np.reshape(crf.inference(iterations), (C, H, W))

    To use it elsewhere copy the three dense CRF sections of this file, and above them its imports of math, NamedTuple,
    torch and F: they need nothing else."""
    check_crf_input(image, prob)
    image = image.to(prob.device)
    log_prob = prob.flatten(1).t().float().clamp(MIN_PROB, 1).log().contiguous()  # -ψ of [eq. C1]  # (V, C)
    kernels = [crf_kernel(crf_features(image, sxy, *srgb), weight)
               for sxy, *srgb, weight in filter(None, (gaussian, bilateral))]
    Q = softmax(log_prob)
    for _ in range(iterations):
        Q = softmax(sum((blur(kernel, Q) for kernel in kernels), log_prob))  # [eq. C3]         # (V, C)
    return Q.t().reshape(prob.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Label images and CAM files
# ---------------------------------------------------------------------------------------------------------------------

PALETTE = [sum(((i >> (3 * j + c)) & 1) << (7 - j) for j in range(8)) for i in range(256) for c in range(3)]  # VOC's


def write_labels(path, labels):
    """labels uint8 (H, W): 0 background, 1..K classes, 255 ignore -> a palette PNG in VOC's colours."""
    picture = Image.fromarray(labels)
    picture.putpalette(PALETTE)
    write_file(path, picture.save)


def read_labels(path, size, num_labels):
    """A label PNG -> uint8 (H, W), read-only. size is (H, W) of its photo, None if any will do. InputError for what is no
    label image."""
    try:
        with Image.open(path) as picture:
            mode, labels = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow, of a broken chunk
        raise InputError(f"{path}: no readable label image ({error}); expected a palette PNG with class numbers; "
                         "write it with make_pseudo.py, or pass the folder that holds it") from None
    if mode not in ("P", "L"):
        raise InputError(f"{path}: mode {mode}; expected class numbers (a palette or grey PNG), not colours; convert it")
    if size not in (None, labels.shape):
        raise InputError(f"{path}: {labels.shape[0]}x{labels.shape[1]} (height x width), its photo is {size[0]}x{size[1]}; "
                         "expected equal sizes; make the label image again")
    if (labels + np.uint8(1)).max() > num_labels:  # 255 becomes 0
        label = labels[labels < 255].max()
        remedy = "it was made for another class list"
        if num_labels == 81 and label <= 90:
            remedy = "these are COCO's 91 category ids: write the masks with prepare/coco.py, which numbers them 1 to 80"
        raise InputError(f"{path}: holds label {label}; expected 0 to {num_labels - 1} or 255 (ignore); {remedy}")
    return labels


class PickledType:
    """What a pickle calls numpy.dtype: numbers and "O", a Python object, and nothing made of parts."""

    def __init__(self, name, *_):
        if not re.fullmatch("b1|[iu][1248]|f[248]|O8?", name):
            raise pickle.UnpicklingError(f"values of type {name}")
        self.name, self.order = name, "|"

    def __setstate__(self, state):
        self.order = state[1]


class PickledArray:
    """What a pickle calls numpy's _reconstruct: .array holds its numbers. NumPy's own would follow pointers found in the bytes."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        if kind.name[0] == "O":
            (self.array,), () = data, shape
        else:
            self.array = np.frombuffer(data, kind.order + kind.name).reshape(shape, order="F" if fortran else "C")


class PlainUnpickler(pickle.Unpickler):
    """Numbers, arrays and tensors of them, plain types; a pickle that names anything else is refused before that is imported."""

    KNOWN = {"numpy.ndarray": None, "numpy.dtype": PickledType, "multiarray._reconstruct": PickledArray,
             "collections.OrderedDict": dict,
             "multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.order + kind.name)[0],
             "torch._utils._rebuild_tensor_v2": lambda *parts: torch._utils._rebuild_tensor_v2(*parts).detach(),
             "torch.storage._load_from_bytes": lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)}

    def __init__(self, file):
        begin = file.tell()
        for number, (code, argument, _) in enumerate(pickletools.genops(file)):
            if number > 5000 or code.name == "LONG_BINPUT" and argument > 5000:  # would take memory, or the stack
                raise pickle.UnpicklingError("more parts than CAMs have")
        file.seek(begin)
        super().__init__(file)

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy.core.", "").replace("numpy._core.", "")
        if name not in self.KNOWN:
            raise pickle.UnpicklingError(f"its pickle asks for {name}, which is not executed")
        return self.KNOWN[name]


def foreign_cams(data, present):
    """The dict of another program -> (maps float32 (n, h, w) of the present classes, what it is in words).

    {class: map} (PSA, MCTformer, WeakTr), or {"keys": classes, "high_res", "attn_highres" or "cam": maps} (IRN, CLIMS, AMN,
    CLIP-ES). Class 0 is the first class or the background, whose map is left out: which, follows from the photo's labels."""
    plain = lambda value: value.array if isinstance(value, PickledArray) else value  # noqa: E731
    data = plain(data)
    if "keys" in data:
        name = next((key for key in ("high_res", "attn_highres", "cam") if key in data), None)
        if name is None:
            raise ValueError(f"a dict of {sorted(data)}, without high_res, attn_highres and cam")
        ids, maps, kind = plain(data["keys"]), plain(data[name]), f"a dict of keys and {name} (IRN, CLIMS, AMN, CLIP-ES)"
    else:
        ids, maps, kind = data.keys(), data.values(), "a dict of class and map (PSA, MCTformer, WeakTr)"
    maps = dict(zip(map(int, ids), map(plain, maps), strict=True))
    from_0, from_1 = set(present.tolist()), set((1 + present).tolist())
    fits = [from_0 <= set(maps), from_1 <= set(maps)]
    if all(fits):  # only an exact match can tell
        fits = [set(maps) == from_0, set(maps) in (from_1, from_1 | {0})]
    if fits[0] == fits[1]:
        raise ValueError(f"its classes are {sorted(maps)}, the photo shows {present.tolist()}, counted from 0")
    maps = [maps[k + fits[1]] for k in present]
    if not all(len(cam.shape) == 2 and 0 < cam.shape[0] * cam.shape[1] < 2**28 for cam in maps):
        raise ValueError(f"maps of shape {[tuple(cam.shape) for cam in maps]}")
    return np.stack([np.asarray(cam, np.float32) for cam in maps]), kind + ", with the background as class 0" * fits[1]


def load_cams(path, present):
    """NAME.npy, train_cam.py's or another program's -> (maps float32 (n, h, w) of the present classes, what it is in words).

    Another program's maps that leave [0, 1] are scaled to it, each by itself."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            pickled = read_header(file)[2].hasobject
            if pickled:
                maps, kind = foreign_cams(PlainUnpickler(file).load(), present)
            else:
                maps, kind = np.load(path, allow_pickle=False).astype(np.float32), "of train_cam.py"
        if not np.isfinite(maps).all():
            raise ValueError("values that are not finite")
        if pickled and (maps.min() < 0 or maps.max() > 1.001):
            low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
            maps = (maps - low) / (high - low + 1e-12)
        return maps, kind
    except Exception as error:  # a broken pickle raises anything
        raise InputError(f"{path}: no readable CAMs ({str(error).partition(chr(10))[0]}); expected the .npy file of train_cam.py "
                         "--phase export, or a dict of arrays as IRN, CLIMS, MCTformer, WeakTr, CLIP-ES and AMN write; export "
                         "again or pass the right folder") from None


def read_cams(folder, name, present, size):
    """folder/NAME.npy -> float32 (n, H, W) in [0, 1], one map per present class; size is (H, W) of the photo."""
    path = Path(folder) / f"{name}.npy"
    if len(present) == 0:
        return torch.zeros(0, *size)
    cams, kind = load_cams(path, present)
    expected = (len(present), -(-size[0] // 4), -(-size[1] // 4))
    if kind == "of train_cam.py" and cams.shape != expected:
        raise InputError(f"{path}: shape {cams.shape}, the image has {len(present)} classes and {size[0]}x{size[1]} pixels; "
                         f"expected {expected}; these CAMs are of another class list or data set: export them again")
    # By Pillow: the last bit of F.interpolate depends on the number of threads, and a PNG must not.
    maps = [Image.fromarray(cam).resize(size[::-1], Image.BILINEAR) for cam in cams]
    return torch.from_numpy(np.array(maps, np.float32))


def kind_of_cams(folder, split):
    """What the first file of a folder of CAMs is, in words."""
    name = next((name for name in split.names if split.labels[name].any()), split.names[0])
    present = np.flatnonzero(split.labels[name])
    return load_cams(Path(folder) / f"{name}.npy", present)[1] if len(present) else "of no class"


def run_lengths(rle):
    """COCO's {"size": [H, W], "counts": ...} -> its runs, of 0 and 1 in turn, down the columns.

    A string holds them in base 32, characters from "0" on, little end first: 32 says that more follows, 16 in the last one that
    the number is negative. From the fourth on they are differences to the number two before."""
    if not isinstance(rle["counts"], str):
        return rle["counts"]
    runs, value, shift = [], 0, 0
    for digit in (code - 48 for code in rle["counts"].encode()):
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (1 << shift) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def read_segments(folder, name, size):
    """The segments of a photo of size (H, W), each the flat indices of its pixels. From folder/NAME.json (the output of SAM's
    automatic mask generator, masks run-length encoded), NAME.npz (a boolean array (s, H, W)) or NAME.png (a label picture, 0 is
    no segment)."""
    path = next((path for path in (Path(folder) / f"{name}.{kind}" for kind in ("json", "npz", "png")) if path.is_file()), None)
    try:
        if path is None:
            raise ValueError("no such file")
        if path.suffix == ".json":
            data = json.loads(path.read_text())
            rles = [part["segmentation"] for part in (data["annotations"] if isinstance(data, dict) else data)]
            masks = []
            for rle in rles:
                runs = np.array(run_lengths(rle), np.int64)
                if tuple(rle["size"]) != size or not 0 <= runs.min() <= runs.max() <= size[0] * size[1] == runs.sum():
                    raise ValueError(f"a segment of size {rle['size']} and {runs.sum()} pixels")
                masks.append(np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T)
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > 2**29:
                    raise ValueError("more than 512 MB")
            with np.load(path, allow_pickle=False) as file:
                masks = file[file.files[0]]
            if masks.dtype != bool:
                raise ValueError(f"values of type {masks.dtype}")
        else:
            labels = np.asarray(Image.open(path))
            if labels.shape != size:
                raise ValueError(f"a picture of shape {labels.shape}")
            masks = (labels == label for label in np.unique(labels[labels > 0]))
        segments = []
        for mask in masks:
            if mask.shape != size:
                raise ValueError(f"a segment of {mask.shape} pixels")
            segments.append(np.flatnonzero(mask))
        return [segment for segment in segments if len(segment)]
    except Exception as error:
        raise InputError(f"{path or Path(folder) / name}: no readable segments ({type(error).__name__}: {error}); expected for a "
                         f"photo of {size[0]}x{size[1]} NAME.json of SAM, NAME.npz with a boolean array (segments, H, W), or a "
                         "label picture NAME.png; make it again") from None


def background_score(choice, folder):
    """--background-score -> (score, how it was chosen). A number in (0, 1) is taken as it is; "auto" is the one that
    train_cam.py's export wrote beside the CAMs. No mask is read."""
    path, how = Path(folder) / BACKGROUND, "given"
    try:
        if choice == "auto":
            choice, how = json.loads(path.read_text())["background_score"], "auto: chosen by CLIP, no true mask used"
        score = float(choice)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        score = math.nan
    if 0 < score < 1:
        return score, how
    if how == "given" and choice != "auto":
        raise InputError(f"--background-score {choice}: expected auto or a number in (0, 1), as CAMs have values in [0, 1]")
    raise InputError(f"{path}: no background score found, so nothing has chosen one for these CAMs; expected a number, "
                     "--background-score 0.4; train_cam.py --phase export with --clip and OUT/prompts.pt chooses one")


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="CAMs -> pseudo masks, sharpened by a dense CRF.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--data", required=True, metavar="ROOT", help="as for train_cam.py; photos and image-level labels are read")
    files.add_argument("--split", default="train", help="as for train_cam.py")
    files.add_argument("--cams", required=True, metavar="DIR", help="NAME.npy files of train_cam.py, or of other programs")
    files.add_argument("--out", required=True, metavar="DIR", help="where NAME.png go")
    files.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="make PNGs again that are there")
    masks = parser.add_argument_group("masks")
    masks.add_argument("--background-score", default="auto", metavar="T", help="in (0, 1): higher gives smaller masks; "
                       "auto: what the export of train_cam.py chose without any mask")
    masks.add_argument("--segments", metavar="DIR", help="class-agnostic segments, each of which takes one label: NAME.json of "
                       "SAM's automatic mask generator, NAME.npz of boolean masks, or label pictures NAME.png")
    masks.add_argument("--crf", choices=list(PRESETS), default="voc", help="dense CRF preset: voc (WeakTr, SemPLeS), "
                       "irn (IRNet, COCO), prob (CLIP-ES), or none")
    masks.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    return parser.parse_args(argv)


def main(args):
    rank, world, device = start_processes(args.device)
    split, kept = Split(args.data, args.split), 0
    score, how = background_score(args.background_score, args.cams)
    kind = kind_of_cams(args.cams, split)
    if rank == 0:
        hold(args.out)
        print(f"CAMs {kind}; background score {score} ({how}), CRF {args.crf}, {len(split.names)} images of {args.split}")
    for name in tqdm(split.names[rank::world], desc="pseudo masks", disable=None if rank == 0 else True):
        path = Path(args.out) / f"{name}.png"
        if path.exists() and not args.overwrite:
            kept += 1
            continue
        photo, present = np.array(split.image(name)), np.flatnonzero(split.labels[name])
        cams = read_cams(args.cams, name, present, photo.shape[:2])                             # (n, H, W)
        if args.segments:
            cams = average_in_segments(cams, read_segments(args.segments, name, photo.shape[:2]))
        with explained("pseudo masks", [name], "make the photo smaller, or pass --crf none"):
            labels = pseudo_mask(photo, cams, present, score, args.crf, device)
        write_labels(path, labels)
    if kept:
        print(f"{kept} masks were there already and are kept, whatever they were made of; --overwrite makes them again")
    end_processes()


if __name__ == "__main__":
    run(main, parse_args())
