"""The dense CRF: pydensecrf's outputs, its own definition, properties."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

import make_pseudo
from make_pseudo import (
    PRESETS, dense_crf, dense_crf_slow, hard_unary, pseudo_mask, read_cams)

GOLDEN = np.load(Path(__file__).with_name("crf_golden.npz"))  # of make_crf_golden.py
CRF_PRESETS = ["voc", "irn", "clip-es"]


def scene(H, W, C=3, seed=0):
    """Blobs of C colours with grain uint8 (H, W, 3), and the blobs, blurred (C, H, W)"""
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(1, C, 4, 5, generator=generator), size=(H, W),
                          mode="bicubic")[0].argmax(0)
    image = (255 * torch.rand(C, 3, generator=generator))[blobs]
    image = (image + 6 * torch.randn(H, W, 3, generator=generator)).clamp(0, 255).byte()
    onehot = (blobs == torch.arange(C)[:, None, None]).float()
    return image, F.avg_pool2d(onehot + 0.05, 9, 1, 4, count_include_pad=False) / (1 + 0.05 * C)


def of_preset(prob, preset):
    """-> the preset's unary, and its two kernels"""
    unary, gaussian, bilateral = PRESETS[preset].values()
    return hard_unary(prob.argmax(0), len(prob)) if unary == "hard" else prob, gaussian, bilateral


@pytest.mark.parametrize("preset", CRF_PRESETS)
@pytest.mark.parametrize("name", ["grainy", "flat"])
def test_golden_outputs_of_pydensecrf(name, preset):
    image, prob = (torch.from_numpy(GOLDEN[f"{name}/{part}"]) for part in ("image", "prob"))
    theirs = torch.from_numpy(GOLDEN[f"{name}/Q/{preset}"] / 65535).float()
    ours = dense_crf(image, *of_preset(prob.float(), preset))
    assert torch.equal(ours.argmax(0), theirs.argmax(0))
    assert (ours - theirs).abs().max() < 2e-4  # measured 2e-5; 8e-6 is the rounding to uint16


@pytest.mark.parametrize("preset", CRF_PRESETS)
def test_fast_equals_slow_but_for_the_lattice(preset):
    image, prob = scene(36, 48, seed=1)
    fast, slow = (crf(image, *of_preset(prob, preset)) for crf in (dense_crf, dense_crf_slow))
    assert (fast.argmax(0) == slow.argmax(0)).float().mean() > 0.99  # measured 0.998
    assert (fast - slow).abs().mean() < 0.01  # measured 1.4e-3


def test_slow_one_step_by_hand():
    """Two pixels, two labels, the Gaussian alone: k = [[1, e], [e, 1]] / (1 + e). [eq. C3]"""
    image, prob = torch.zeros(1, 2, 3).byte(), torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]])
    e = math.exp(-0.5)
    a = 0.9 * math.exp(2 * (0.9 + e * 0.4) / (1 + e))
    b = 0.1 * math.exp(2 * (0.1 + e * 0.6) / (1 + e))
    Q = dense_crf_slow(image, prob, gaussian=(1, 2), bilateral=None, iterations=1)
    assert Q[0, 0, 0].item() == pytest.approx(a / (a + b), abs=1e-6)


@pytest.mark.parametrize("preset, kernels", [  # as published: (sxy, weight), (sxy, srgb, weight)
    ("voc", ((4, 3), (83, 5, 3))), ("irn", ((3, 3), (50, 5, 10))),
    ("clip-es", ((1, 3), (67, 3, 4)))])
def test_pseudo_mask_is_the_crf_of_its_unary(preset, kernels):
    """0.7 for the winner, which may be background, or the scores divided by their sum"""
    image, maps = scene(40, 50)
    maps = maps[:2] / maps[:2].amax()
    scores = torch.cat([torch.full((1, 40, 50), 0.3), maps])
    winner = scores.argmax(0)
    unary = torch.stack([torch.where(winner == label, 0.7, 0.15) for label in range(3)])
    Q = dense_crf(image, unary if preset != "clip-es" else scores / scores.sum(0), *kernels)
    found, raw = (pseudo_mask(image.numpy(), maps, np.array([1, 4]), 0.3, name, CPU)
                  for name in (preset, "none"))
    numbers = np.array([0, 2, 5], np.uint8)
    assert np.array_equal(found, numbers[Q.argmax(0)]) and np.array_equal(raw, numbers[winner])
    assert set(found.flat) == {0, 2, 5} and 0.005 < (found != raw).mean() < 0.5


def test_scores_are_divided_by_their_sum(monkeypatch):
    """What a CRF is given, by hand: after it few labels tell this from a softmax."""
    seen = []
    monkeypatch.setattr(make_pseudo, "dense_crf", lambda image, prob, *_: seen.append(prob) or prob)
    pseudo_mask(np.zeros((1, 2, 3), np.uint8), torch.tensor([[[0.1, 0.6]]]), np.array([4]), 0.3,
                "clip-es", CPU)
    assert seen[0].flatten().tolist() == pytest.approx([3 / 4, 1 / 3, 1 / 4, 2 / 3])


@settings(max_examples=15, deadline=None)
@given(H=st.integers(1, 24), W=st.integers(1, 24), C=st.integers(1, 6), seed=st.integers(0, 2**16),
       sxy=st.floats(0.3, 100), srgb=st.floats(0.3, 100))
def test_any_image_gives_probabilities(H, W, C, seed, sxy, srgb):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (H, W, 3), generator=generator).byte()
    prob, order = torch.rand(C, H, W, generator=generator), torch.randperm(C, generator=generator)
    kernels = dict(gaussian=(sxy, 3), bilateral=(sxy, srgb, 5), iterations=3)
    Q = dense_crf(image, prob, **kernels)
    assert Q.shape == prob.shape and Q.min() >= 0
    torch.testing.assert_close(Q.sum(0), torch.ones(H, W))
    swapped = dense_crf(image, prob[order], **kernels)  # labels have no order
    torch.testing.assert_close(swapped, Q[order], atol=1e-5, rtol=0)
    uniform = dense_crf(image * 0 + 128, torch.full((C, H, W), 1 / C), **kernels)
    torch.testing.assert_close(uniform, torch.full((C, H, W), 1 / C))


def test_cams_are_enlarged_bilinearly(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[[0, 1], [0, 1]]], np.float16))
    maps = read_cams(tmp_path, "a", [0], (2, 4))
    assert maps.tolist() == [[[0, 0.25, 0.75, 1]] * 2]


def test_the_number_of_threads_changes_no_bit(tmp_path):
    """One process with all cores and several with one each must write the same PNG."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((3, 54, 80)).astype(np.float16))
    image, before, results = scene(214, 320)[0], torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        maps = read_cams(tmp_path, "a", [0, 1, 2], (214, 320))
        results.append(torch.stack([maps, dense_crf(image, maps, iterations=2)]))
    torch.set_num_threads(before)
    assert results[0].equal(results[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", CRF_PRESETS)
@pytest.mark.parametrize("H, W, C", [(375, 500, 4), (500, 333, 21), (1, 1, 3)])
def test_gpu_equals_cpu(H, W, C, preset):
    image, prob = scene(H, W, C)
    unary, *kernels = of_preset(prob, preset)
    Q, expected = dense_crf(image, unary.cuda(), *kernels), dense_crf(image, unary, *kernels)
    assert Q.is_cuda and (Q.cpu().argmax(0) == expected.argmax(0)).float().mean() >= 0.9999
    assert (Q.cpu() - expected).abs().mean() < 1e-5


@pytest.mark.parametrize("crf", [dense_crf, dense_crf_slow])
def test_what_is_no_image_or_no_probability(crf):
    image, prob = torch.zeros(4, 5, 3, dtype=torch.uint8), torch.full((2, 4, 5), 0.5)
    for bad in ((image, prob * torch.nan), (image, prob + 1), (image, prob.transpose(1, 2)),
                (image.float(), prob)):
        with pytest.raises(ValueError, match="expected image uint8|prob must lie in"):
            crf(*bad)
