"""The mask generator and the training: losses by hand, who moves in which phase, batches, resume, processes."""
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, TINY

import train_cam
from clip_model import InputError, load_clip
from mask_generator import MaskGenerator, Rectify, ViT, load_vit
from train_cam import Crops, Data, cosine, embed_regions, match_loss, prompt_loss, refine_loss, region_masks

log = math.log
FLOOR, CEILING = -log(1e-4), -log(1 - 1e-4)  # what -log c gives for cosines <= 0, and for a cosine of 1


def at(*cosines):
    """Unit vectors (N, 2) with these cosines to (1, 0)."""
    return torch.tensor([[x, math.sqrt(1 - x * x)] for x in cosines])


ONE, TWO = at(1), at(1, 1)


# ------------------------------------------------------------------------------------------ losses

def test_match_loss_by_hand():
    expected = -(log(0.8) + log(0.5)) / 2 - 2.4 * (log(1 - 0.6) + log(1 - 0.2)) / 2
    assert match_loss(at(0.8, 0.5), at(0.6, 0.2), TWO).item() == pytest.approx(expected, abs=1e-5)
    assert match_loss(7 * at(0.8), at(0.6), 3 * ONE, lambda_b=1).item() == pytest.approx(-log(0.8) - log(0.4), abs=1e-5)


@pytest.mark.parametrize("repel, l_t", [("text", -log(1 - 0.28)), ("text-log", log(0.28)), ("image", -log(1 - 0.936))])
def test_prompt_loss_by_hand(repel, l_t):
    loss = prompt_loss(at(0.5), u_b=ONE, u_f=at(0.28), lambda_t=0.1, repel=repel, v_f=at(0.936))
    assert loss.item() == pytest.approx(-log(0.5) + 0.1 * l_t, abs=1e-5)


def test_refine_loss_by_hand():
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


def test_losses_are_float32_under_bfloat16():
    v = at(0.3, 0.9).bfloat16()
    assert refine_loss(v, TWO.bfloat16()).dtype == torch.float32 and cosine(v, v).dtype == torch.float32


# ------------------------------------------------------------------------------------------ regions

def test_region_masks_values():
    cam = torch.tensor([[[1.0, 3], [2, 5]], [[4, 4], [4, 4]]])
    masks = region_masks(cam, (2, 2), eps=0.1)
    expected = torch.tensor([[[0, 2], [1, 4]], [[0.0, 0], [0, 0]]]) / 4.1  # (cam - min) / (max - min + eps), map by map
    torch.testing.assert_close(masks, expected[:, None])
    bigger = region_masks(cam[:1, :1], (1, 8), eps=0)  # 1, 3 -> bilinear, then stretched to 0 .. 1
    torch.testing.assert_close(bigger[0, 0, 0], torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))
    assert region_masks(cam[:0], (6, 4), 0.1).shape == (0, 1, 6, 4)


@pytest.fixture(scope="module")
def clip(toy):
    return load_clip(toy / "clip.pt")


def labels_of(*rows):
    return torch.tensor([[k in row for k in range(6)] for row in rows]).float()


@pytest.mark.parametrize("labels", [labels_of([3], []), labels_of([], []), labels_of(range(6), range(6)), labels_of([0, 5], [2])],
                         ids=["one", "none", "all", "three"])
@pytest.mark.parametrize("H, W", [(64, 64), (40, 88)])
def test_embed_regions_equals_pair_by_pair(clip, labels, H, W):
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


def test_foreground_and_background_by_hand(clip):
    """A CAM of one half: v_f reads the half in its own pixels over CLIP's mean colour, v_b the other half."""
    from mask_generator import IMAGENET_MEAN, IMAGENET_STD
    R = clip.resolution
    pixels = torch.rand(1, 3, R, R)
    image = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    cam = torch.zeros(1, 1, R, R)
    cam[..., : R // 2] = 1
    mean, std = torch.tensor(train_cam.CLIP_MEAN).view(3, 1, 1), torch.tensor(train_cam.CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        v_f, v_b, _ = embed_regions(clip, image, cam, torch.ones(1, 1), eps=0)
        for v, m in ((v_f, cam), (v_b, 1 - cam)):
            torch.testing.assert_close(v, clip.encode_image((torch.where(m > 0, pixels, mean) - mean) / std), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------ ViT and generator

def test_load_vit_uses_every_key(toy, tmp_path):
    state = torch.load(toy / "vit.pth", weights_only=True)["model"]
    vit = load_vit(toy / "vit.pth")
    loaded = vit.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    assert (vit.patch, vit.width, len(vit.blocks), vit.grid) == (4, 128, 4, (16, 16))
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "bare.pth")  # no "model", half precision
    assert load_vit(tmp_path / "bare.pth").norm.weight.dtype == torch.float32
    less = {key: value for key, value in state.items() if key != "norm.bias"}
    for name, change in (("more", {**state, "dist_token": torch.zeros(1)}), ("less", less)):
        torch.save({"model": change}, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match="dist_token|norm.bias"):
            load_vit(tmp_path / f"{name}.pth")


def test_position():
    vit = ViT(4, 64, 1, (3, 5))
    torch.testing.assert_close(vit.position(3, 5), vit.pos_embed[:, 1:], atol=0, rtol=0)
    for h, w in ((1, 1), (5, 3), (7, 20)):
        assert vit.position(h, w).shape == (1, h * w, 64)
    with torch.no_grad():  # a ramp from top to bottom stays one: rows go with h, columns with w
        vit.pos_embed[:, 1:] = torch.arange(3.0).repeat_interleave(5)[None, :, None]
    rows = vit.position(6, 2).view(6, 2, 64)
    assert torch.equal(rows[:, 0], rows[:, 1]) and (rows[1:, 0] > rows[:-1, 0]).all()


@pytest.mark.parametrize("H, W", [(8, 8), (2, 3), (1, 30), (21, 10)])
def test_any_image_size(H, W):
    torch.manual_seed(0)
    generator, image = MaskGenerator(ViT(4, 64, 2, (2, 2)), 3).eval(), torch.randn(2, 3, H, W)
    cam, logits = generator(image)
    assert cam.shape == (2, 3, -(-H // 4), -(-W // 4)) and logits.shape == (3, 2, 3) and (cam >= 0).all()
    for b in range(2):  # batched = single
        one_cam, one_logits = generator(image[b:b + 1])
        torch.testing.assert_close(cam[b:b + 1], one_cam, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[:, b:b + 1], one_logits, atol=1e-5, rtol=1e-4)
    whole = F.pad(image, (0, -W % 4, 0, -H % 4))  # below and at the right, in the mean colour
    torch.testing.assert_close(generator(whole)[0], cam)
    tokens, _, maps, _ = generator.trunk(image, with_maps=True)
    torch.testing.assert_close(generator.trunk(image)[0], tokens, atol=1e-5, rtol=1e-4)  # the fast path gives the same
    torch.testing.assert_close(maps.sum(dim=3), torch.ones_like(maps[..., 0]))


class Fixed(nn.Module):
    """A trunk that returns these tokens and this attention."""

    def __init__(self, grid, tokens, attention, heads):
        super().__init__()
        self.grid, self.tokens, self.maps = grid, tokens, attention.expand(1, heads, *attention.shape)

    def forward(self, image, class_tokens, with_maps):
        return self.tokens, self.grid, self.maps, torch.zeros(1, self.maps.shape[1], 64)


@pytest.mark.parametrize("h, w", [(3, 5), (8, 2)])
def test_refinement_by_hand(h, w):
    """[detail 1] with hand-made attention, every head weighted sigmoid(0) = 1/2: uniform class rows scale relu(coarse)
    by 1/2 * hw/T only, patch rows gather from where they look, and the scale of the patch rows does not matter."""
    torch.manual_seed(0)
    K, T = 2, 2 + h * w
    generator = MaskGenerator(ViT(4, 64, 3, (2, 2)), K)
    nn.init.zeros_(generator.fusion.excite[2].weight), nn.init.zeros_(generator.fusion.excite[2].bias)
    tokens = torch.randn(1, T, 64)
    coarse = generator.head(tokens[:, K:].transpose(1, 2).reshape(1, 64, h, w))
    relu = 0.5 * h * w / T * coarse.relu()

    def refined(patch_rows, class_rows=None):
        attention = torch.cat([torch.full((K, T), 1 / T) if class_rows is None else class_rows,
                               torch.cat([torch.zeros(h * w, K), patch_rows], 1)])
        generator.trunk = Fixed((h, w), tokens, attention, heads=3)
        return generator(None)

    cam, logits = refined(torch.eye(h * w))
    torch.testing.assert_close(cam, relu)
    torch.testing.assert_close(logits[0], tokens[:, :K].mean(dim=2))
    torch.testing.assert_close(logits[1], coarse.mean(dim=(2, 3)))
    torch.testing.assert_close(logits[2], 0.5 * h * w / T * coarse.mean(dim=(2, 3)))  # [detail 2] no relu here
    torch.testing.assert_close(refined(0.01 * torch.eye(h * w))[0], cam)
    torch.testing.assert_close(refined(torch.ones(h * w, h * w))[0], relu.mean(dim=(2, 3), keepdim=True).expand_as(cam))
    shifted = torch.eye(h * w).roll(1, dims=1)  # patch i looks at patch i + 1
    torch.testing.assert_close(refined(shifted)[0].flatten(2), relu.flatten(2).roll(-1, dims=2))
    rows = torch.zeros(K, T)
    rows[:, K:] = torch.rand(K, h * w)  # class k looks at some patches only
    torch.testing.assert_close(refined(torch.eye(h * w), rows)[0], 0.5 * h * w * rows[:, K:].view(1, K, h, w) * coarse.relu())


def test_gradient_of_the_rectified_maps():
    """[detail 6] a plain relu's, but in a map that is zero everywhere what would raise it passes (descent subtracts it)."""
    x = torch.tensor([[2.0, -3, -3, 1], [-2, -3, -1, 0]]).view(2, 1, 2, 2).requires_grad_()
    y = Rectify.apply(x)
    assert y.flatten().tolist() == [2, 0, 0, 1, 0, 0, 0, 0]
    y.backward(torch.tensor([[0.5, 0.5, -0.5, -0.5], [0.5, 0.5, -0.5, -0.5]]).view_as(x))
    assert x.grad.flatten().tolist() == [0.5, 0, 0, -0.5, 0, 0, -0.5, -0.5]


@pytest.mark.parametrize("rectify, comes_back", [(Rectify.apply, True), (torch.relu, False)], ids=["ours", "plain ReLU"])
def test_a_map_that_is_zero_everywhere_can_come_back(rectify, comes_back, monkeypatch):
    """[detail 6] a head that says no to every patch, and a loss that wants the left half kept."""
    monkeypatch.setattr(Rectify, "apply", rectify)
    torch.manual_seed(0)
    generator, image = MaskGenerator(ViT(4, 64, 2, (4, 4)), 1), torch.randn(1, 3, 16, 16)
    nn.init.constant_(generator.head.bias, -5)
    optimizer = torch.optim.AdamW(generator.mask_parameters(), 0.03)
    for step in range(60):
        cam = generator(image)[0]
        assert step or (cam == 0).all()  # dead at the start
        mask = region_masks(cam[:, 0], (16, 16), eps=0.1)
        loss = mask[..., 8:].mean() - mask[..., :8].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (loss.item() < -0.3) if comes_back else (cam == 0).all()  # measured -0.46


# ------------------------------------------------------------------------------------------ who moves in which phase

def moved(before, after):
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_parameters_moved_by_the_scripts(toy, chain):
    saved = {phase: torch.load(chain / f"cam/{phase}.pt", weights_only=True) for phase in train_cam.PHASES}
    torch.manual_seed(0)  # classify begins like this
    start = MaskGenerator(load_vit(toy / "vit.pth"), 6).state_dict()
    classify = saved["classify"]["generator"]
    assert moved(start, classify) == set(start) - {"trunk.cls_token"}
    for phase in ("match", "refine"):
        assert moved(classify, saved[phase]["generator"]) == {k for k in start if k.startswith(("head.", "fusion."))}
    assert saved["prompts"].keys() == {"phase", "classes", "words", "args", "vectors"}
    assert saved["prompts"]["vectors"].shape == (6, 30, 128)


@pytest.mark.parametrize("phase, trained", [("classify", "all but cls_token"), ("match", "head, fusion"),
                                            ("prompts", "vectors"), ("refine", "head, fusion")])
def test_gradients_reach_only_what_the_phase_trains(phase, trained, toy, chain, cam, tmp_path, monkeypatch):
    """The real phase with its models caught: everything it trains has a gradient, nothing else, and CLIP stays as it is."""
    seen = {}

    def catch(name, function):
        def caught(*args, **kwargs):
            seen[name] = function(*args, **kwargs)
            return seen[name]
        return caught
    for name in ("load_clip", "load_generator", "Prompts", "MaskGenerator"):
        monkeypatch.setattr(train_cam, name, catch(name, getattr(train_cam, name)))
    out = shutil.copytree(chain / "cam", tmp_path / "cam")
    cam(out, "--phase", phase)
    clip = seen["load_clip"]
    assert all(not p.requires_grad and p.grad is None for p in clip.parameters())
    assert not moved(load_clip(toy / "clip.pt").state_dict(), clip.state_dict())
    touched = {name for name, p in seen["MaskGenerator"].named_parameters() if p.grad is not None}
    names = {name for name, _ in seen["MaskGenerator"].named_parameters()}
    if trained == "vectors":
        assert not touched
        assert not moved(torch.load(out / "match.pt", weights_only=True)["generator"], seen["load_generator"].state_dict())
        (name, vectors), = seen["Prompts"].named_parameters()
        assert name == "vectors" and (vectors.grad.flatten(1).abs().amax(dim=1) > 0).any()
    elif trained == "all but cls_token":
        assert touched == names - {"trunk.cls_token"}
    else:
        assert touched == {name for name in names if name.startswith(("head.", "fusion."))}


def test_refine_without_weight_equals_match_and_reads_the_prompts(chain, cam, tmp_path):
    """lambda_R = 0 is matching, from the same start with the same batches; with lambda_R the prompts matter."""
    saved = {}
    for weight in (0, 1):
        out = shutil.copytree(chain / "cam", tmp_path / str(weight))
        saved[weight] = cam(out, "--phase", "refine", "--lambda-r", weight)
    assert not moved(saved[0]["match"]["generator"], saved[0]["refine"]["generator"])
    assert moved(saved[0]["refine"]["generator"], saved[1]["refine"]["generator"])


def test_image_without_objects(chain, voc, cam, tmp_path):
    """No present class: training counts it as nothing, the export writes no map. A batch of such images alone, too."""
    names = (voc / "ImageSets/Segmentation/train.txt").read_text().split()[:5]
    (voc / "ImageSets/Segmentation/few.txt").write_text("\n".join(names))
    for name in names[:4]:
        (voc / f"Annotations/{name}.xml").write_text("<annotation></annotation>")
    out = shutil.copytree(chain / "cam", tmp_path / "cam", ignore=shutil.ignore_patterns("cams"))
    cam(out, "--split", "few", "--batch", 1, data=voc)
    for name in names[:4]:
        maps = np.load(out / f"cams/{name}.npy", allow_pickle=False)
        assert maps.shape[0] == 0 and maps.dtype == np.float16 and maps.ndim == 3
    assert np.load(out / f"cams/{names[4]}.npy").shape[0] > 0


@pytest.mark.parametrize("share", [0, 0.5])
def test_trunk_rate(share, toy, cam, tmp_path):
    """--trunk-lr: the trunk's share of the rate in classify; class tokens, head and fusion keep the whole."""
    torch.manual_seed(0)
    start = MaskGenerator(load_vit(toy / "vit.pth"), 6).state_dict()
    found = cam(tmp_path, "--phase", "classify", "--trunk-lr", share, "--weight-decay", 0)["classify"]["generator"]
    changed = moved(start, found)
    assert {"class_tokens", "head.weight", "fusion.pool.0.weight"} <= changed
    assert any(key.startswith("trunk.") for key in changed) == (share > 0)


# ------------------------------------------------------------------------------------------ the same again

def test_crops_depend_on_seed_epoch_and_index_alone(toy):
    data = Data(toy / "VOC2012", "train")

    def view(seed, epoch, i):
        crops = Crops(data, 32, seed, strong=True)
        crops.epoch = epoch
        return crops[i]
    first = view(1, 2, 3)
    before = torch.random.get_rng_state()
    torch.manual_seed(99)
    image, labels, i = view(1, 2, 3)
    assert torch.equal(image, first[0]) and i == 3
    assert labels.tolist() == data.labels(data.names[3]).tolist() and image.shape == (3, 32, 32)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(view(*other)[0], image)
    torch.random.set_rng_state(before)
    view(5, 5, 5)
    assert torch.equal(torch.random.get_rng_state(), before)  # and leaves the process's random numbers alone


@pytest.mark.parametrize("phase", train_cam.PHASES)
def test_resume_equals_uninterrupted(phase, chain, cam, tmp_path, monkeypatch):
    flags = ["--phase", phase, "--epochs", 3, "--prompt-epochs", 3]
    straight, killed = (shutil.copytree(chain / "cam", tmp_path / name) for name in ("straight", "killed"))
    for out in (straight, killed):
        (out / f"{phase}.pt").unlink()
    expected = cam(straight, *flags)[phase]
    original = train_cam.log

    def dies(out, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt
        original(out, row)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cam, "log", dies)
        cam(killed, *flags)
    assert (killed / f"{phase}.part").is_file() and not (killed / f"{phase}.pt").exists()
    for other, says in ((["--weight-decay", 0.5], "--weight-decay 0.03, now it is 0.5"), (["--no-augment"], "--augment True, now")):
        with pytest.raises(InputError, match=rf"{phase}.part: begun with {says}"):
            cam(killed, *flags, "--resume", *other)
    resumed = cam(killed, *flags, "--resume", "--workers", 1, "--scales", 1)[phase]  # these change nothing
    key = "vectors" if phase == "prompts" else "generator"
    torch.testing.assert_close(resumed[key], expected[key], atol=0, rtol=0)
    assert not (killed / f"{phase}.part").exists()
    rows = (killed / "log.jsonl").read_text().splitlines()
    assert len(rows) == len((straight / "log.jsonl").read_text().splitlines())  # every epoch once
    stamp = (killed / f"{phase}.pt").stat().st_mtime_ns
    cam(killed, *flags, "--resume")  # a finished phase is kept
    assert (killed / f"{phase}.pt").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_two_processes_equal_one(toy, chain, cam, tmp_path):
    """All phases after classify, same global batch. Prompts take one step on all pairs, so their order does not matter."""
    flags = ["--phase", "all", "--resume", "--prompt-batch", 64]
    leave = shutil.ignore_patterns("match.pt", "prompts.*", "refine.pt", "cams", "log.jsonl")
    one, two = (shutil.copytree(chain / "cam", tmp_path / name, ignore=leave) for name in ("one", "two"))
    expected = cam(one, *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "train_cam.py",
               "--data", toy / "VOC2012", "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", two, *TINY, *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for phase, key, atol in (("match", "generator", 5e-7), ("refine", "generator", 5e-7), ("prompts", "vectors", 2e-4)):
        found = torch.load(two / f"{phase}.pt", weights_only=True)[key]
        torch.testing.assert_close(found, expected[phase][key], atol=atol, rtol=0)  # measured 5e-8, 5e-8, 2e-5
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert [a[key] for key in ("phase", "epoch", "step")] == [b[key] for key in ("phase", "epoch", "step")]
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-3)
    assert sorted(path.name for path in (one / "cams").iterdir()) == sorted(path.name for path in (two / "cams").iterdir())


# ------------------------------------------------------------------------------------------ what is kept, what is chosen

def test_seen_crops_equal_looking_again(toy, chain):
    """--mask-views: the trunk's output in memory gives the CAMs of the crop itself, up to float16; views come in turns."""
    data = Data(toy / "VOC2012", "train")
    generator = train_cam.load_generator(chain / "cam/classify.pt", data.classes, "")
    crops = Crops(data, 64, 1)
    seen = train_cam.SeenCrops(crops, generator, 2, torch.device("cpu"), quiet=True)
    assert len(seen) == len(data.names)
    for epoch in (0, 1, 2, 5):
        crops.epoch, seen.epoch = epoch % 2, epoch
        for i in (0, 7):
            image, labels, number, *parts = seen[i]
            fresh, fresh_labels, _ = crops[i]
            assert torch.equal(image, fresh) and torch.equal(labels, fresh_labels) and number == i
            with torch.no_grad():
                cam, _ = generator(seen=[*(part[None].float() for part in parts), seen.grid])
                expected, _ = generator(fresh[None])
            torch.testing.assert_close(cam, expected, atol=1.5e-3, rtol=0)  # measured 1.3e-4
    assert not torch.equal(seen.views[0][0], seen.views[1][0])


def test_mask_views_train_the_same_parameters(chain, cam, tmp_path):
    out = shutil.copytree(chain / "cam", tmp_path / "cam")
    saved = cam(out, "--phase", "match", "--mask-views", 2)
    changed = moved(saved["classify"]["generator"], saved["match"]["generator"])
    assert changed == {key for key in changed if key.startswith(("head.", "fusion."))} and "head.weight" in changed


def test_background_score_is_the_one_whose_hard_masks_have_the_least_loss(toy, chain, clip):
    """Against masks cut one by one as make_pseudo.py cuts them, and losses taken pair by pair."""
    from make_pseudo import read_cams, score_labels
    data, folder = Data(toy / "VOC2012", "train"), chain / "cam/cams"
    data.names = [name for name in data.names if data.image(name).size == (64, 64)][:5]
    u_f = train_cam.class_texts(clip, data.words, torch.device("cpu"))
    u_b = train_cam.load_prompts(chain / "cam/prompts.pt", clip, data.classes, "")
    losses = train_cam.score_backgrounds(clip, u_f, u_b, data, folder, torch.device("cpu"), 0, 1)
    assert list(losses) == train_cam.SCORES
    from torchvision.transforms.v2.functional import normalize, pil_to_tensor
    for score in train_cam.SCORES[::5]:
        total = []
        for name in data.names:
            present = np.flatnonzero(data.labels(name))
            labels = score_labels(read_cams(folder, name, present, (64, 64)), present, score)
            X = normalize(pil_to_tensor(data.image(name)).float() / 255, train_cam.CLIP_MEAN, train_cam.CLIP_STD)
            for k in present:
                M = torch.from_numpy(labels == 1 + k).float()
                with torch.no_grad():
                    v_f, v_b = clip.encode_image(torch.stack([M * X, (1 - M) * X])).split(1)
                total.append((match_loss(v_f, v_b, u_f[[k]], 1) + refine_loss(v_f, u_b[[k]])).item())
        assert losses[score] == pytest.approx(np.mean(total), abs=1e-5)  # measured 9e-7


def test_export_writes_the_background_score_and_auto_reads_it(toy, chain, tmp_path):
    from make_pseudo import background_score
    folder = shutil.copytree(chain / "cam/cams", tmp_path / "cams")
    chosen = json.loads((folder / "background.json").read_text())
    assert chosen["background_score"] == float(min(chosen["losses"], key=chosen["losses"].get))
    data, cpu = Data(toy / "VOC2012", "train"), torch.device("cpu")
    value, how = background_score("auto", data, folder, 0, 1, cpu)
    assert value == chosen["background_score"] and "no mask read" in how
    assert background_score("0.3", data, folder, 0, 1, cpu) == (0.3, "given")
    (folder / "background.json").write_text("{}")
    with pytest.raises(InputError, match="background.json"):
        background_score("auto", data, folder, 0, 1, cpu)
    (folder / "background.json").unlink()  # CAMs of other origin
    assert "Otsu" in background_score("auto", data, folder, 0, 1, cpu)[1]
