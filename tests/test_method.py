"""The method: losses and regions by hand, who moves in which phase, resuming, two processes. Read it beside train_cam.py."""
import json
import os
import shutil
import subprocess
import sys
from math import log, sqrt

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import train_cam
from clip_model import CLIP_MEAN, CLIP_STD, InputError, load_clip
from mask_generator import IMAGENET_MEAN, IMAGENET_STD, MaskGenerator, load_vit
from train_cam import PHASES, Split, cosine, embed_regions, match_loss, prompt_loss, refine_loss, region_masks

FLOOR, CEILING = -log(1e-4), -log(1 - 1e-4)  # what -log c gives for cosines <= 0, and for a cosine of 1


def at(*cosines):
    """Unit vectors (N, 2) with these cosines to (1, 0)."""
    return torch.tensor([[x, sqrt(1 - x * x)] for x in cosines])


ONE, TWO = at(1), at(1, 1)


# ------------------------------------------------------------------------------------------ losses

def test_match_loss_by_hand():
    """[eq. 1]"""
    expected = -(log(0.8) + log(0.5)) / 2 - 2.4 * (log(1 - 0.6) + log(1 - 0.2)) / 2
    assert match_loss(at(0.8, 0.5), at(0.6, 0.2), TWO).item() == pytest.approx(expected, abs=1e-5)
    assert match_loss(7 * at(0.8), at(0.6), 3 * ONE, lambda_b=1).item() == pytest.approx(-log(0.8) - log(0.4), abs=1e-5)


@pytest.mark.parametrize("repel, l_t", [("text", -log(1 - 0.28)), ("text-log", log(0.28)), ("image", -log(1 - 0.936))])
def test_prompt_loss_by_hand(repel, l_t):
    """[eq. 2]"""
    loss = prompt_loss(at(0.5), u_b=ONE, u_f=at(0.28), lambda_t=0.1, repel=repel, v_f=at(0.936))
    assert loss.item() == pytest.approx(-log(0.5) + 0.1 * l_t, abs=1e-5)


def test_refine_loss_by_hand():
    """[eq. 3]"""
    assert refine_loss(at(0.3, 0.9), TWO).item() == pytest.approx(-(log(0.7) + log(0.1)) / 2, abs=1e-5)


@pytest.mark.parametrize("x", [-0.6, 0.0, 1e-5, 1.0])
def test_outside_the_clamp_values_are_constant_and_gradients_zero(x):
    attract, repel = (CEILING, FLOOR) if x == 1 else (FLOOR, CEILING)
    for loss, expected in [(lambda v: match_loss(v, at(0.5), ONE, 1), attract - log(0.5)),
                           (lambda v: match_loss(at(0.5), v, ONE, 1), repel - log(0.5)),
                           (lambda v: prompt_loss(ONE, v, ONE, 0.1), attract + 0.1 * repel),
                           (lambda v: prompt_loss(ONE, v, ONE, 0.1, "text-log"), attract - 0.1 * attract),
                           (lambda v: prompt_loss(ONE, v, at(0.5), 0.1, "image", v_f=ONE), attract + 0.1 * repel),
                           (lambda v: refine_loss(v, ONE), repel)]:
        v = at(x).requires_grad_()
        value = loss(v)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=2e-3)  # 1 - 1e-4 in float32
        assert v.grad.abs().max() == 0
    v = at(0.5).requires_grad_()
    refine_loss(v, ONE).backward()
    assert v.grad.abs().max() > 0  # inside it does pull


def test_losses_of_no_pair_and_of_half_precision():
    none = at().view(0, 2)
    assert match_loss(none, none, none) == prompt_loss(none, none, none) == refine_loss(none, none) == 0
    v = at(0.3, 0.9).bfloat16()
    assert refine_loss(v, TWO.bfloat16()).dtype == torch.float32 and cosine(v, v).dtype == torch.float32


# ------------------------------------------------------------------------------------------ regions

@pytest.fixture(scope="module")
def clip(toy):
    return load_clip(toy / "clip.pt")


def test_region_masks_by_hand():
    cam = torch.tensor([[[1.0, 3], [2, 5]], [[4, 4], [4, 4]]])
    expected = torch.tensor([[[0, 2], [1, 4]], [[0.0, 0], [0, 0]]]) / 4.1  # (cam - min) / (max - min + eps), map by map
    torch.testing.assert_close(region_masks(cam, (2, 2), eps=0.1), expected[:, None])
    bigger = region_masks(cam[:1, :1], (1, 8), eps=0)  # 1, 3 -> bilinear, then stretched to 0 .. 1
    torch.testing.assert_close(bigger[0, 0, 0], torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))


def test_regions_by_hand(clip):
    """A CAM of one half: v_f reads the half in its own pixels over CLIP's mean colour, v_b the other half."""
    R, column = clip.resolution, lambda values: torch.tensor(values).view(3, 1, 1)
    pixels = torch.rand(1, 3, R, R)
    cam = torch.zeros(1, 1, R, R)
    cam[..., : R // 2] = 1
    with torch.no_grad():
        image = (pixels - column(IMAGENET_MEAN)) / column(IMAGENET_STD)
        v_f, v_b, _ = embed_regions(clip, image, cam, torch.ones(1, 1), eps=0)
        for v, m in ((v_f, cam), (v_b, 1 - cam)):
            shown = torch.where(m > 0, pixels, column(CLIP_MEAN))
            expected = clip.encode_image((shown - column(CLIP_MEAN)) / column(CLIP_STD))
            torch.testing.assert_close(v, expected, atol=1e-5, rtol=1e-4)


def labels_of(*rows):
    return torch.tensor([[k in row for k in range(6)] for row in rows]).float()


@pytest.mark.parametrize("labels", [labels_of([3], []), labels_of([], []), labels_of(range(6), range(6)), labels_of([0, 5], [2])],
                         ids=["one", "none", "all", "three"])
@pytest.mark.parametrize("H, W", [(64, 64), (40, 88)])
def test_regions_of_a_batch_equal_pair_by_pair(clip, labels, H, W):
    torch.manual_seed(0)
    image, cam = torch.randn(2, 3, H, W), torch.rand(2, 6, H // 8, W // 8)
    with torch.no_grad():
        v_f, v_b, k = embed_regions(clip, image, cam, labels, eps=0.1)
        pairs = [(b, c) for b in range(2) for c in range(6) if labels[b, c]]
        assert k.tolist() == [c for _, c in pairs] and v_f.shape == v_b.shape == (len(pairs), clip.embed_dim)
        for row, (b, c) in enumerate(pairs):
            only = torch.zeros(1, 6).index_fill(1, torch.tensor(c), 1)
            single = embed_regions(clip, image[b:b + 1], cam[b:b + 1], only, eps=0.1)
            torch.testing.assert_close(torch.cat([v_f[row:row + 1], v_b[row:row + 1]]), torch.cat(single[:2]),
                                       atol=3e-5, rtol=2e-5)  # measured 3e-6


# ------------------------------------------------------------------------------------------ who moves in which phase

def moved(before, after):
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("phase", PHASES)
def test_only_what_the_phase_trains_moves(phase, toy, chain, cam, tmp_path, monkeypatch):
    """The real phase with its models caught: gradients and changes reach what it trains, nothing else; CLIP stays as it is."""
    seen = {}

    def catch(name, function):
        def caught(*args, **kwargs):
            seen[name] = function(*args, **kwargs)
            return seen[name]
        return caught
    for name in ("load_clip", "load_generator", "Prompts", "MaskGenerator"):
        monkeypatch.setattr(train_cam, name, catch(name, getattr(train_cam, name)))
    out = shutil.copytree(chain / "cam", tmp_path / "cam")
    saved = cam(out, "--phase", phase)
    if phase != "classify":
        assert all(not p.requires_grad and p.grad is None for p in seen["load_clip"].parameters())
        assert not moved(load_clip(toy / "clip.pt").state_dict(), seen["load_clip"].state_dict())
    generator = seen["MaskGenerator"]
    touched = {name for name, p in generator.named_parameters() if p.grad is not None}
    if phase == "prompts":
        assert not touched and not moved(saved["match"]["generator"], generator.state_dict())
        assert saved["prompts"]["vectors"].shape == (6, 30, 128) and seen["Prompts"].vectors.grad.abs().sum() > 0
        return
    torch.manual_seed(0)  # classify begins like this
    start = MaskGenerator(load_vit(toy / "vit.pth"), 6).state_dict() if phase == "classify" else saved["classify"]["generator"]
    trained = {name for name in start if name.startswith(("head.", "fusion.")) or phase == "classify" and name != "trunk.cls_token"}
    assert touched == moved(start, saved[phase]["generator"]) == trained


def test_refinement_without_its_loss_is_matching(chain, cam, tmp_path):
    """lambda_R = 0: from the same start with the same batches; with lambda_R the prompts matter. [eq. 3]"""
    saved = {}
    for weight in (0, 1):
        out = shutil.copytree(chain / "cam", tmp_path / str(weight))
        saved[weight] = cam(out, "--phase", "refine", "--lambda-r", weight)
    assert not moved(saved[0]["match"]["generator"], saved[0]["refine"]["generator"])
    assert moved(saved[0]["refine"]["generator"], saved[1]["refine"]["generator"])


def test_photos_without_objects(chain, root, cam, tmp_path):
    """Nothing to match: training counts them as nothing, even a batch of such photos alone; the export writes no map."""
    rows = [line.split(",") for line in (root / "train.csv").read_text().split()][:5]
    (root / "few.csv").write_text("".join(f"{path},{shows if i == 4 else ''}\n" for i, (path, shows) in enumerate(rows)))
    out = shutil.copytree(chain / "cam", tmp_path / "cam", ignore=shutil.ignore_patterns("cams"))
    cam(out, "--phase", "all", "--split", "few", "--batch", 1, data=root)
    shapes = [np.load(out / f"cams/{name}.npy").shape for name in Split(root, "few").names]
    assert all(shape[0] == 0 and len(shape) == 3 for shape in shapes[:4]) and shapes[4][0] > 0


# ------------------------------------------------------------------------------------------ the same again

@pytest.mark.parametrize("phase", PHASES)
def test_resume_equals_uninterrupted(phase, chain, cam, tmp_path, monkeypatch):
    straight, killed = (shutil.copytree(chain / "cam", tmp_path / name) for name in ("straight", "killed"))
    for out in (straight, killed):
        (out / f"{phase}.pt").unlink()
    expected = cam(straight, "--phase", phase)[phase]
    original = train_cam.log

    def dies(out, row):
        if row["step"] == 2:
            raise KeyboardInterrupt
        original(out, row)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cam, "log", dies)
        cam(killed, "--phase", phase)
    assert (killed / f"{phase}.part").is_file() and not (killed / f"{phase}.pt").exists()
    with pytest.raises(InputError, match=f"{phase}.part: begun with batch 4, now it is 5"):
        cam(killed, "--phase", phase, "--resume", "--batch", 5)
    resumed = cam(killed, "--phase", phase, "--resume", "--workers", 1)[phase]
    key = "vectors" if phase == "prompts" else "generator"
    torch.testing.assert_close(resumed[key], expected[key], atol=0, rtol=0)
    assert not (killed / f"{phase}.part").exists()
    logs = [[json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()] for out in (straight, killed)]
    assert logs[0] == logs[1]  # every step once
    stamp = (killed / f"{phase}.pt").stat().st_mtime_ns
    cam(killed, "--phase", phase, "--resume")  # a finished phase is kept
    assert (killed / f"{phase}.pt").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("before, after", [("float32", "float16"), ("float16", "float32"), ("float16", "bfloat16")])
def test_resume_in_another_precision(before, after, chain, cam, tmp_path, monkeypatch):
    """What `auto` does between cards: a GradScaler that float32 and bfloat16 have no use for starts anew."""
    out = shutil.copytree(chain / "cam", tmp_path / "cam")
    (out / "match.pt").unlink()
    original = train_cam.log

    def dies(out, row):
        original(out, row)
        if row["step"] == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cam, "log", dies)
        cam(out, "--phase", "match", "--precision", before)
    assert cam(out, "--phase", "match", "--precision", after, "--resume")["match"]["recipe"]["steps"] == 3


def test_export_is_in_float32_and_kept_where_its_generator_is_the_same(chain, cam, tmp_path):
    flags = ["--phase", "export", "--cams", tmp_path / "cams"]
    cam(chain / "cam", *flags, "--precision", "bfloat16")
    cams = {path.name: path.read_bytes() for path in (chain / "cam/cams").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "cams").iterdir()} == cams
    first = tmp_path / "cams/train_00000.npy"
    first.write_bytes(b"kept")  # and what is missing is made again
    (tmp_path / "cams/train_00001.npy").unlink()
    with pytest.raises(ValueError):  # the background score reads it
        cam(chain / "cam", *flags, "--resume")
    assert first.read_bytes() == b"kept" and (tmp_path / "cams/train_00001.npy").read_bytes() == cams["train_00001.npy"]
    other = ["--checkpoint", chain / "cam/match.pt"]
    cam(chain / "cam", *flags, *other, "--resume")  # another generator: all anew
    assert {path.name for path in (tmp_path / "cams").iterdir()} == set(cams)
    assert first.read_bytes() != b"kept"
    first.write_bytes(b"not kept")
    cam(chain / "cam", *flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cams").iterdir()} == cams


@pytest.mark.slow
def test_two_processes_equal_one(toy, chain, cam, tmp_path):
    """All phases, same global batch; the export writes the same files."""
    one, two = tmp_path / "one", tmp_path / "two"
    expected = cam(one, "--phase", "all")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "train_cam.py",
               "--data", toy / "data", "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", two, *TINY]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for phase in PHASES:
        key = "vectors" if phase == "prompts" else "generator"
        found = torch.load(two / f"{phase}.pt", weights_only=True)[key]
        atol = 5e-3 if phase == "prompts" else 2e-4  # measured 5e-4 and 2e-5: AdamW's first steps are signs of gradients near zero
        torch.testing.assert_close(found, expected[phase][key], atol=atol, rtol=0)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert (a["phase"], a["step"]) == (b["phase"], b["step"]) and b["loss"] == pytest.approx(a["loss"], abs=1e-3)
    assert sorted(path.name for path in (one / "cams").iterdir()) == sorted(path.name for path in (two / "cams").iterdir())
