"""The dense CRF: pydensecrf's outputs, its own definition, a lattice of dictionaries, what must hold in any case."""
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_crf import coarse_prob, draw_scene, random_prob
from hypothesis import given, settings
from hypothesis import strategies as st

from make_pseudo import PRESETS, blur, build_lattice, crf_features, crf_kernel, dense_crf, dense_crf_slow, hard_unary, read_cams

GOLDEN = Path(__file__).parent / "crf_golden.npz"  # written by make_crf_golden.py
CRF_PRESETS = ["voc", "irn", "prob"]


def weights(preset):
    return PRESETS[preset]["gaussian"], PRESETS[preset]["bilateral"]


def unary(prob, preset):
    return hard_unary(prob.argmax(0), len(prob)) if PRESETS[preset]["unary"] == "hard" else prob


# ------------------------------------------------------------------------------------------ independent implementations

@pytest.mark.parametrize("preset", CRF_PRESETS)
@pytest.mark.parametrize("name", ["grainy", "flat"])
def test_golden_outputs_of_pydensecrf(name, preset):
    golden = np.load(GOLDEN)
    image, prob = torch.from_numpy(golden[f"{name}/image"]), torch.from_numpy(golden[f"{name}/prob"]).float()
    theirs = torch.from_numpy(golden[f"{name}/Q/{preset}"] / 65535).float()
    ours = dense_crf(image, unary(prob, preset), *weights(preset))
    assert torch.equal(ours.argmax(0), theirs.argmax(0))
    assert (ours - theirs).abs().max() < 2e-4  # measured 2e-5; 8e-6 is the rounding to 1/65535


def slow_blur(f, values):
    """`blur` with a dictionary for the lattice, pixel by pixel in float64, corners by the definition of the lattice."""
    f, values = f.double().numpy(), values.double().numpy()
    d, V = f.shape
    splat, corners = {}, []
    for i in range(V):
        scaled = [f[j, i] * (d + 1) * math.sqrt(2 / 3) / math.sqrt((j + 1) * (j + 2)) for j in range(d)]
        x = np.array([sum(scaled[j:]) - (j * scaled[j - 1] if j else 0) for j in range(d + 1)])
        # The simplex around x: of all ways to round each coordinate to a multiple of d+1 with sum 0, the one where the
        # residuals, sorted, span no more than d+1.
        for up in product((0, 1), repeat=d + 1):
            origin = (np.floor(x / (d + 1)) + up) * (d + 1)
            if origin.sum() == 0 and np.ptp(x - origin) <= d + 1:
                break
        y = x - origin
        order = np.argsort(-y)
        around = []
        for r in range(d + 1):  # corner r: r everywhere, but r - (d+1) on the r coordinates with the smallest residual
            corner = origin + r
            corner[order[d + 1 - r:]] -= d + 1
            near = (y[order[d - r]] - y[order[d + 1 - r]]) / (d + 1) if r else 1 - (y[order[0]] - y[order[d]]) / (d + 1)
            around.append((tuple(corner.astype(int)), near))
            splat[around[-1][0]] = splat.get(around[-1][0], 0) + near * values[i]
        corners.append(around)
    for j in range(d + 1):
        def neighbour(point, sign, j=j):
            return tuple(c + sign * (1 - (d + 1) * (i == j)) for i, c in enumerate(point))
        splat = {point: value + 0.5 * (splat.get(neighbour(point, 1), 0) + splat.get(neighbour(point, -1), 0))
                 for point, value in splat.items()}
    return torch.tensor(np.stack([sum(near * splat[corner] for corner, near in around) for around in corners]))


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("spread", [0.3, 3, 300])
def test_lattice_equals_a_lattice_of_dictionaries(d, spread):
    generator = torch.Generator().manual_seed(d)
    f = spread * torch.rand(d, 60, generator=generator)
    values = torch.rand(60, 4, generator=generator)
    fast = blur(build_lattice(f), values)
    error = 1e-6 * max(spread, 10)  # measured 1e-6, and 2e-5 for 300: float32 knows large positions less well
    torch.testing.assert_close(fast.double(), slow_blur(f, values), atol=error, rtol=error)


@pytest.mark.parametrize("kernel", [(1,), (3,), (4,), (50, 5), (83, 5), (67, 3), (10, 10)])
def test_one_kernel_against_all_pairs(kernel):
    """The lattice's own error: a piecewise linear spline stands for the Gaussian."""
    image, _ = draw_scene(48, 64)
    f = crf_features(image, *kernel)
    values = random_prob(48, 64, 3).flatten(1).t().contiguous()
    k = torch.exp(-0.5 * torch.cdist(f.t(), f.t()).square())
    n = k.sum(1).rsqrt()
    exact = (n[:, None] * k * n) @ values
    fast = blur(crf_kernel(f, weight=1), values)
    assert (fast - exact).norm() / exact.norm() < 0.06  # measured .012 to .042


@pytest.mark.parametrize("preset", CRF_PRESETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fast_equals_slow_but_for_the_lattice(preset, seed):
    image, labels = draw_scene(48, 64, seed)
    prob = unary(coarse_prob(labels, cell=8), preset)
    fast, slow = (crf(image, prob, *weights(preset)) for crf in (dense_crf, dense_crf_slow))
    assert (fast.argmax(0) == slow.argmax(0)).float().mean() > 0.99  # measured 99.84 to 100 %
    assert (fast - slow).abs().mean() < 0.01  # measured up to 9e-4


def test_slow_one_step_by_hand():
    """Two pixels, two labels, the Gaussian kernel alone: k = [[1, e], [e, 1]] / (1 + e), e = exp(-1/2)."""
    image, prob = torch.zeros(1, 2, 3, dtype=torch.uint8), torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]])
    e = math.exp(-0.5)
    a = 0.9 * math.exp(2 * (0.9 + e * 0.4) / (1 + e))
    b = 0.1 * math.exp(2 * (0.1 + e * 0.6) / (1 + e))
    Q = dense_crf_slow(image, prob, gaussian=(1, 2), bilateral=None, iterations=1)
    assert Q[0, 0, 0].item() == pytest.approx(a / (a + b), abs=1e-6)


def test_hard_unary_is_unary_from_labels():
    labels = torch.tensor([[0, 1, 2], [2, 2, 0]])
    prob = hard_unary(labels, 3, gt_prob=0.7)
    assert torch.equal(prob.argmax(0), labels)
    torch.testing.assert_close(prob.sort(0).values[:, 0, 0], torch.tensor([0.15, 0.15, 0.7]))
    torch.testing.assert_close(prob.sum(0), torch.ones(2, 3))
    assert hard_unary(torch.zeros(2, 3, dtype=torch.uint8), 1).shape == (1, 2, 3)
    for wrong, gt_prob in [([[0, 255]], 0.7), ([[-1, 0]], 0.7), ([[0, 1]], 1.0), ([0, 1], 0.7)]:
        with pytest.raises(ValueError, match="labels must be"):
            hard_unary(torch.tensor(wrong), 2, gt_prob)


# ------------------------------------------------------------------------------------------ properties

@settings(max_examples=25, deadline=None)
@given(H=st.integers(1, 24), W=st.integers(1, 24), C=st.integers(1, 6), seed=st.integers(0, 2**16),
       sxy=st.floats(0.3, 100), srgb=st.floats(0.3, 100))
def test_any_image_gives_probabilities(H, W, C, seed, sxy, srgb):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (H, W, 3), generator=generator).to(torch.uint8)
    prob = torch.rand(C, H, W, generator=generator)
    before, kernels = (image.clone(), prob.clone()), dict(gaussian=(sxy, 3), bilateral=(sxy, srgb, 5), iterations=3)
    Q = dense_crf(image, prob, **kernels)
    assert Q.shape == prob.shape and Q.min() >= 0
    torch.testing.assert_close(Q.sum(0), torch.ones(H, W))
    order = torch.randperm(C, generator=generator)  # labels have no order
    torch.testing.assert_close(dense_crf(image, prob[order], **kernels), Q[order], atol=1e-5, rtol=0)
    assert torch.equal(image, before[0]) and torch.equal(prob, before[1])  # the input is left alone


@pytest.mark.parametrize("H, W", [(1, 1), (1, 50), (50, 1), (13, 29)])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_constant_image_and_uniform_prob_stay_uniform(H, W, grey):
    image = torch.full((H, W, 3), grey, dtype=torch.uint8)
    Q = dense_crf(image, torch.full((4, H, W), 0.25))
    torch.testing.assert_close(Q, torch.full((4, H, W), 0.25))


def test_no_steps_is_the_unary_and_zero_weights_change_nothing():
    image, prob = draw_scene(20, 30)[0], random_prob(20, 30, 3)
    for Q in (dense_crf(image, prob, iterations=0), dense_crf(image, prob, (3, 0), (50, 5, 0)),
              dense_crf(image, prob, None, None)):
        torch.testing.assert_close(Q, prob)


def test_the_number_of_threads_changes_no_bit(tmp_path):
    """What torchrun makes with one thread a process and a lone process with all of them must be the same PNG."""
    cams = np.random.default_rng(0).random((3, 107, 160)).astype(np.float16)
    np.save(tmp_path / "photo.npy", cams)
    image, before, results = draw_scene(428, 640)[0], torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            maps = read_cams(tmp_path, "photo", [0, 1, 2], (428, 640))
            results.append((maps, dense_crf(image, maps, iterations=2)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    by_torch = F.interpolate(torch.from_numpy(cams.astype(np.float32))[None], size=(428, 640), mode="bilinear")[0]
    torch.testing.assert_close(maps, by_torch, atol=6e-7, rtol=0)  # measured 6e-8


def test_the_sections_can_be_copied_and_need_torch_alone():
    """What the docstring of dense_crf promises to people with another project."""
    parts = (Path(__file__).parent.parent / "make_pseudo.py").read_text(encoding="utf-8").split("# " + "-" * 117 + "\n")
    sections = [title + body for title, body in zip(parts[1::2], parts[2::2]) if title.startswith("# Dense CRF")]
    copy = "import math\nfrom typing import NamedTuple\nimport torch\nimport torch.nn.functional as F\n" + "".join(sections)
    assert len(sections) == 3 and copy.count("import ") == 4
    theirs = {"__name__": "another_project"}
    exec(compile(copy, "copy", "exec"), theirs)
    image, labels = draw_scene(30, 40)
    prob = theirs["hard_unary"](labels, 3)
    assert torch.equal(theirs["dense_crf"](image, prob, iterations=3), dense_crf(image, hard_unary(labels, 3), iterations=3))
    assert torch.equal(theirs["dense_crf_slow"](image, prob, iterations=3), dense_crf_slow(image, prob, iterations=3))


def test_zero_probabilities_and_other_dtypes():
    image, prob = draw_scene(20, 30)[0], random_prob(20, 30, 3)
    onehot = hard_unary(prob.argmax(0), 3, gt_prob=1 - 1e-7).round()
    assert dense_crf(image, onehot).isfinite().all()
    for dtype in (torch.float16, torch.float64):
        torch.testing.assert_close(dense_crf(image, prob.to(dtype)), dense_crf(image, prob), atol=0.02, rtol=0)
    strided = prob.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    torch.testing.assert_close(dense_crf(image, strided), dense_crf(image, prob))


# ------------------------------------------------------------------------------------------ mistakes

IMAGE, PROB = torch.zeros(4, 5, 3, dtype=torch.uint8), torch.full((2, 4, 5), 0.5)


@pytest.mark.parametrize("crf", [dense_crf, dense_crf_slow])
@pytest.mark.parametrize("image, prob, says", [
    (IMAGE, PROB * math.nan, "prob must lie in"), (IMAGE, PROB - 1, "prob must lie in"), (IMAGE, PROB + 1, "prob must lie in"),
    (IMAGE, PROB.transpose(1, 2), "prob must be"), (IMAGE, PROB[0], "prob must be"), (IMAGE, PROB[:0], "prob must be"),
    (IMAGE.float(), PROB, "uint8"), (IMAGE.permute(2, 0, 1), PROB, "uint8 tensor"), (IMAGE[:0], PROB[:, :0], "prob must be")])
def test_bad_input_raises(crf, image, prob, says):
    with pytest.raises(ValueError, match=says):
        crf(image, prob)


@pytest.mark.parametrize("bad", [0, 1e-6, math.nan])
def test_bad_widths_raise(bad):
    for kernels in (dict(gaussian=(bad, 3)), dict(bilateral=(bad, 5, 3)), dict(bilateral=(50, bad, 3))):
        with pytest.raises(ValueError, match="positive"):
            dense_crf(IMAGE + 255, PROB, **kernels)


def test_keys_never_overflow_silently():
    with pytest.raises(ValueError, match="int64"):
        build_lattice(torch.rand(5, 2000) * 60000)


# ------------------------------------------------------------------------------------------ GPU

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", CRF_PRESETS)
@pytest.mark.parametrize("H, W, C", [(375, 500, 4), (500, 333, 21), (64, 64, 2), (1, 1, 3)])
def test_gpu_equals_cpu(H, W, C, preset):
    image, prob = draw_scene(H, W, seed=C)[0], unary(random_prob(H, W, C), preset)
    Q, expected = dense_crf(image, prob.cuda(), *weights(preset)), dense_crf(image, prob, *weights(preset))
    assert Q.is_cuda and (Q.cpu().argmax(0) == expected.argmax(0)).float().mean() >= 0.9999
    assert (Q.cpu() - expected).abs().mean() < 1e-5
