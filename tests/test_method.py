"""The method: losses and regions by hand, what each phase trains, resuming, two processes. Read it
beside train_cam.py."""
import json
import shutil
from argparse import Namespace
from contextlib import nullcontext
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PHASES, TINY, moved, two_processes

import common
import train_cam
from clip_model import CLIP_MEAN, CLIP_STD, load_clip, tokenize
from common import IMAGENET_MEAN, IMAGENET_STD, InputError, Split
from mask_generator import MaskGenerator, load_resnet, load_vit
from train_cam import (
    cosine, embed_regions, match_loss, prompt_loss, refine_loss, region_masks)

FLOOR, CEILING = -log(1e-4), -log(1 - 1e-4)  # -log c of a cosine of 0 or less, and of 1


def at(*cosines):
    """Unit vectors (N, 2) with these cosines to (1, 0)."""
    return torch.tensor([[x, sqrt(1 - x * x)] for x in cosines])


ONE = at(1)


@pytest.fixture(scope="module")
def clip(toy):
    return load_clip(toy / "clip.pt")


# ---- Losses and regions --------------------------------------------------------------------------

@pytest.mark.parametrize("x", [-0.6, 0.0, 1e-5, 1.0])
def test_outside_the_clamp_losses_are_constant_and_gradients_zero(x):
    attract, repel = (CEILING, FLOOR) if x == 1 else (FLOOR, CEILING)
    for loss, expected in [
            (lambda v: match_loss(v, at(0.5), ONE, 1), attract - log(0.5)),
            (lambda v: match_loss(at(0.5), v, ONE, 1), repel - log(0.5)),
            (lambda v: prompt_loss(ONE, v, ONE, 0.1), attract + 0.1 * repel),
            (lambda v: prompt_loss(ONE, v, ONE, 0.1, "text-log"), attract - 0.1 * attract),
            (lambda v: refine_loss(v, ONE), repel)]:
        v = at(x).requires_grad_()
        value = loss(v)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=2e-3)  # 1 - 1e-4 in float32
        assert v.grad.abs().max() == 0
    v = at(0.5).requires_grad_()
    refine_loss(v, ONE).backward()
    assert v.grad.abs().max() > 0  # inside, it pulls


def test_cosines_are_in_float32():
    v = at(0.3, 0.9).bfloat16()
    assert refine_loss(v, v).dtype == cosine(v, v).dtype == torch.float32


def test_region_masks_by_hand():
    """M = (m - min m) / (max m - min m + eps), map by map"""
    cam = torch.tensor([[[1.0, 3], [2, 5]], [[4, 4], [4, 4]]])
    expected = torch.tensor([[[0, 2], [1, 4]], [[0.0, 0], [0, 0]]]) / 4.1
    torch.testing.assert_close(region_masks(cam, (2, 2), eps=0.1), expected[:, None])
    bigger = region_masks(cam[:1, :1], (1, 8), eps=0)[0, 0, 0]  # 1, 3: bilinear, then 0 to 1
    torch.testing.assert_close(bigger, torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))


def test_slopes_of_the_masks():
    """The minimum and the maximum of M move with the map: finite differences. float32 always"""
    torch.manual_seed(0)
    cam, weight = torch.rand(1, 3, 3), torch.rand(3, 3)
    value = lambda m: (weight * region_masks(m, (3, 3), eps=0.1)).sum()  # noqa: E731
    slope, = torch.autograd.grad(value(m := cam.clone().requires_grad_()), m)
    for i in range(9):
        step = 1e-3 * torch.eye(9)[i].view(1, 3, 3)
        finite = (value(cam + step) - value(cam - step)) / 2e-3
        assert slope.flatten()[i].item() == pytest.approx(finite.item(), abs=5e-3)
    assert region_masks(cam.bfloat16(), (3, 3), eps=0.1).dtype == torch.float32


def test_a_large_image_is_shrunk_for_clip_with_antialias(clip):
    image = torch.randn(1, 3, 128, 160)
    expected = F.interpolate(image, size=(64, 64), mode="bicubic", antialias=True)
    values = [torch.tensor(v).view(3, 1, 1)
              for v in (IMAGENET_STD, IMAGENET_MEAN, CLIP_MEAN, CLIP_STD)]
    expected = (expected * values[0] + values[1] - values[2]) / values[3]
    torch.testing.assert_close(train_cam.clip_view(clip, image), expected)


def test_regions_by_hand(clip):
    """A CAM of one half: v_f is E_I of that half over CLIP's mean colour, v_b of the other one."""
    R, column = clip.resolution, lambda values: torch.tensor(values).view(3, 1, 1)
    pixels, cam = torch.rand(1, 3, R, R), torch.zeros(1, 1, R, R)
    cam[..., :R // 2] = 1
    image = (pixels - column(IMAGENET_MEAN)) / column(IMAGENET_STD)
    v_f, v_b, _ = embed_regions(clip, image, cam, torch.ones(1, 1), eps=0)
    for v, m in ((v_f, cam), (v_b, 1 - cam)):
        shown = torch.where(m > 0, pixels, column(CLIP_MEAN))
        expected = clip.encode_image((shown - column(CLIP_MEAN)) / column(CLIP_STD))
        torch.testing.assert_close(v, expected, atol=1e-5, rtol=1e-4)


# ---- One step of each phase ----------------------------------------------------------------------

class OneBatch:
    """In the place of common.Training: one batch, and what the phase hands to step"""
    autocast, finish = nullcontext(), staticmethod(lambda state=None: None)

    def __init__(self, model, image, labels):
        self.model, self.batch = model, (image, labels)

    def batches(self):
        yield self.batch

    def step(self, losses, n):
        self.losses, self.n = losses, n


@torch.no_grad()
@pytest.mark.parametrize("repel", ["text", "text-log", "image"])
def test_steps_equal_the_losses_pair_by_pair(clip, repel, monkeypatch):
    """[eq. 1, 2, 3] of fixed maps: every pair has the text and the prompt of its own class, its own
    regions, the recipe's weights and eps. The lengths of features do not count."""
    torch.manual_seed(0)
    labels, image = torch.tensor([[0, 1, 0], [1, 0, 1.0]]), torch.randn(2, 3, 40, 88)
    cams, u_f, u_b = torch.rand(2, 3, 5, 11), torch.rand(3, 64) + 0.1, torch.rand(3, 64)
    recipe = {"eps": 0.3, "lambda_b": 2.4, "lambda_r": 0.5, "lambda_t": 0.7, "repel": repel,
              "drop_path": 0, "length": 2}
    sums, X = {"match": 0, "refine": 0, "prompts": 0}, train_cam.clip_view(clip, image)
    sim = lambda a, b: torch.cosine_similarity(a, b, dim=-1).clamp(1e-4, 1 - 1e-4)  # noqa: E731
    for b, k in ((0, 1), (1, 0), (1, 2)):
        M = region_masks(cams[b, k][None], X.shape[2:], 0.3)
        v_f, v_b = clip.encode_image(M * X[b]), clip.encode_image((1 - M) * X[b])
        match = -sim(v_f, u_f[k]).log() - 2.4 * (1 - sim(v_b, u_f[k])).log()
        L_T = {"text": -(1 - sim(u_f[k], u_b[k])).log(), "text-log": sim(u_f[k], u_b[k]).log(),
               "image": -(1 - sim(v_f, u_b[k])).log()}[repel]
        sums["match"] += match
        sums["refine"] += match - 0.5 * (1 - sim(v_f, u_b[k])).log()
        sums["prompts"] += -sim(v_b, u_b[k]).log() + 0.7 * L_T

    S = torch.nn.Identity()
    S.forward, S.train_through_clip = lambda x: (cams, {}), lambda: None
    monkeypatch.setattr(train_cam, "load_generator", lambda *_: S)
    monkeypatch.setattr(train_cam, "load_prompts", lambda *_: u_b)
    monkeypatch.setattr(train_cam, "write_words", lambda *_: None)
    for name, expected in sums.items():
        model = S if name != "prompts" else lambda: u_b
        loop = OneBatch(model, image, labels)
        monkeypatch.setattr(train_cam, "training", lambda *_: loop)
        train_cam.PHASES[name](Namespace(out=Path()), recipe, {}, Namespace(classes="abc"), "cpu",
                               clip, u_f)
        assert loop.n == 3
        assert loop.losses["loss"].item() == pytest.approx(expected.item() / 3, rel=1e-4)


def test_classification_step_by_hand(toy, monkeypatch):
    """The mean over photos, classes and the predictions of S"""
    tokens, fine, labels = torch.tensor([[[2.0, -1], [0, 3]], [[1, 1], [-2, 0]], [[1, 0], [1, 1]]])
    logits = {"tokens": tokens, "fine": fine}
    loop = OneBatch(lambda x: (None, logits), torch.zeros(2), labels)
    monkeypatch.setattr(train_cam, "training", lambda *_: loop)
    train_cam.classification(Namespace(generator="vit", vit=toy / "vit.pth"),
                             train_cam.recipe_of("toy", "classify", {}), {},
                             Namespace(classes="ab"), "cpu")
    right = {"tokens": (2, 1, 0, 3), "fine": (1, -1, -2, 0)}  # the logit, or minus it where y is 0
    hand = {name: sum(log(1 + exp(-z)) for z in row) / 4 for name, row in right.items()}
    assert loop.n == 2 and {name: x.item() for name, x in loop.losses.items()} == pytest.approx(
        hand | {"loss": sum(hand.values()) / 2})


@pytest.fixture
def seen(monkeypatch):
    """What runs: steps [(what trains, a random number)], generators, given [(clip, u_f)]"""
    seen = Namespace(steps=[], generators=[], given=[])
    step, load = common.Training.step, train_cam.load_generator

    def watched_step(loop, losses, n):
        step(loop, losses, n)
        seen.steps.append((loop.parts["model"], torch.rand(()).item()))

    def watched_load(*args):
        seen.generators.append(load(*args))
        return seen.generators[-1]
    monkeypatch.setattr(common.Training, "step", watched_step)
    monkeypatch.setattr(train_cam, "load_generator", watched_load)
    for phase, run in train_cam.PHASES.items():
        monkeypatch.setitem(train_cam.PHASES, phase, lambda *args, run=run, **given: (
            seen.given.append(given), run(*args, **given)))
    return seen


def test_options_reach_the_checkpoints(cam, chain, tmp_path, seen):
    """Of classify: drop path too; of prompts: their length"""
    out = shutil.copytree(chain / "cam", tmp_path / "cam")
    saved = cam(out, "--phase", "classify", "--set", "pool=mean", "drop_path=0.25")
    assert saved["classify"]["options"]["pool"] == "mean"
    assert seen.steps[0][0].backbone.blocks[-1].drop_path == 0.25
    saved = cam(out, "--phase", "prompts", "--set", "length=4")
    assert saved["prompts"]["vectors"].shape == (6, 4, 128)


@pytest.mark.parametrize("phase", ["match", "prompts", "refine"])
def test_what_a_phase_is_given(phase, toy, root, chain, cam, tmp_path, seen, monkeypatch):
    """The text of a class is that of its words; S stands still in prompts and drops paths where it
    trains, others in every step and process."""
    drop = [] if phase == "prompts" else ["--set", "drop_path=0.25"]
    names = (root / "classes.txt").read_text().split()
    (root / "classes.txt").write_text("boat: steam ship\n" + "\n".join(names[1:]))
    for rank in (0, 1):
        out = shutil.copytree(chain / "cam", tmp_path / f"rank {rank}")
        monkeypatch.setattr(common, "RANK", rank)
        monkeypatch.setattr(common, "in_first_process", lambda function: function())
        monkeypatch.setattr(train_cam, "in_first_process", lambda function: function())
        cam(out, "--phase", phase, "--steps", 2, *drop, data=root)
    assert len({number for _, number in seen.steps}) == 4
    texts = load_clip(toy / "clip.pt").encode_text(tokenize(
        [f"a photo of {words}." for words in ("steam ship", *names[1:])]))
    for S, given in zip(seen.generators, seen.given, strict=True):
        assert (S.training, S.backbone.blocks[-1].drop_path) == (
            (False, 0) if phase == "prompts" else (True, 0.25))
        torch.testing.assert_close(given["u_f"], texts, atol=1e-5, rtol=0)


def test_prompts_start_between_0_and_1(clip):
    torch.manual_seed(0)
    vectors = train_cam.Prompts(clip, 6, 30).vectors
    assert vectors.shape == (6, 30, 128) and vectors.min() >= 0 and vectors.max() < 1
    assert vectors.std().item() == pytest.approx(12 ** -0.5, rel=0.02)


# ---- What each phase trains ----------------------------------------------------------------------

@pytest.mark.parametrize("phase", PHASES)
def test_only_what_the_phase_trains_moves(phase, toy, chain, cam, tmp_path, seen):
    """Gradients reach what a phase trains and nothing else."""
    saved = cam(shutil.copytree(chain / "cam", tmp_path / "cam"), "--phase", phase)
    (model, _), given = seen.steps[-1], seen.given[-1]
    if clip := given.get("clip"):
        assert all(not p.requires_grad and p.grad is None for p in clip.parameters())
        assert not moved(load_clip(toy / "clip.pt").state_dict(), clip.state_dict())
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    start, trained = saved["classify"]["generator"], ("head.", "fusion.")
    if phase == "prompts":
        S, = seen.generators
        assert touched == {"vectors"} and all(p.grad is None for p in S.parameters())
        assert not moved(saved["match"]["generator"], S.state_dict())
        return
    if phase == "classify":
        torch.manual_seed(0)  # as main begins
        start = MaskGenerator(load_vit(toy / "vit.pth"), 6, reduction=2).state_dict()
        trained = ("head.", "fusion.", "class_",
                   *(f"backbone.{part}" for part in ("patch", "pos", "blocks")))
    expected = {name for name in start if name.startswith(trained)}
    assert touched == moved(start, saved[phase]["generator"]) == expected


def test_all_of_a_cnn_trains_in_every_phase(toy, cam, tmp_path):
    """Batch norm alone stands still."""
    flags = ["--generator", "resnet", "--resnet", toy / "resnet.pth"]
    saved = [cam(tmp_path, *flags, "--steps", 1, "--phase", phase) for phase in PHASES][-1]
    start = saved["classify"]["generator"]
    convolutions = {name for name, weight in start.items() if weight.dim() == 4}
    before = load_resnet(toy / "resnet.pth").state_dict()
    backbone = {name[9:]: x for name, x in start.items() if name.startswith("backbone.")}
    trained = {f"backbone.{name}" for name in moved(before, backbone)}
    assert trained | {"head.weight"} == convolutions
    for phase in ("match", "refine"):
        assert moved(start, saved[phase]["generator"]) == convolutions


def test_refinement_without_its_loss_is_matching(chain, cam, tmp_path):
    """lambda_R = 0: same start, same batches; with lambda_R the prompts matter. [eq. 3]"""
    out = shutil.copytree(chain / "cam", tmp_path / "cam")
    refined = torch.load(out / "refine.pt", weights_only=True)["generator"]
    saved = cam(out, "--phase", "refine", "--set", "lambda_r=0")
    assert not moved(saved["match"]["generator"], saved["refine"]["generator"])
    assert moved(saved["refine"]["generator"], refined)


def test_photos_without_objects(root, cam, tmp_path):
    """They count as nothing, even a batch of such photos alone; the export writes no map."""
    *bare, shown = (root / "train.csv").read_text().splitlines()[:5]
    bare = [line.split(",")[0] + "," for line in bare]
    (root / "few.csv").write_text("\n".join([*bare, shown]))
    out = tmp_path / "new"
    cam(out, "--split", "few", "--batch", 1, data=root)
    shapes = [np.load(out / f"cams/{name}.npy").shape for name in Split(root, "few").names]
    assert all(shape[0] == 0 and len(shape) == 3 for shape in shapes[:4]) and shapes[4][0] > 0


# ---- The same again ------------------------------------------------------------------------------

def weights(folder, phase):
    state = torch.load(folder / f"{phase}.pt", weights_only=True)
    return state["vectors" if phase == "prompts" else "generator"]


def rows(folder, phase):
    return [json.loads(line) for line in (folder / f"{phase}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("phase", PHASES)
def test_resume_equals_uninterrupted(phase, chain, cam, tmp_path, dies_at_2, monkeypatch):
    """A phase by name, killed, equals that of a whole run; classify with all that is random. On a
    GPU, loading a photo seeds the GPU too, for which the CPU stands here: no drop path changes."""
    strong = ["--set", "drop_path=0.5", "augment=True"] if phase == "classify" else []
    straight, own = chain / "cam", shutil.ignore_patterns(f"{phase}.*")
    killed = shutil.copytree(straight, tmp_path / "killed", ignore=own)
    flags, load = ["--phase", phase, *strong], train_cam.Crops.__getitem__

    def seeds(crops, place):
        torch.manual_seed(place[1])
        return load(crops, place)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cam.Crops, "__getitem__", seeds)
        cam(killed, *flags)
    dies_at_2()  # not again
    if strong:
        straight = tmp_path / "straight"
        cam(straight, *flags)
    assert (killed / f"{phase}.part").is_file() and not (killed / f"{phase}.pt").exists()
    with pytest.raises(InputError, match=f"{phase}.part: made with batch 4, now it is 5"):
        cam(killed, *flags, "--resume", "--batch", 5)
    cam(killed, *flags, "--resume", "--workers", 1)
    torch.testing.assert_close(weights(killed, phase), weights(straight, phase), atol=0, rtol=0)
    losses = [[row["loss"] for row in rows(out, phase)] for out in (straight, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 3  # every step once
    assert not (killed / f"{phase}.part").exists()
    stamp = (killed / f"{phase}.pt").stat().st_mtime_ns
    cam(killed, *flags, "--resume")  # a finished phase is kept
    assert (killed / f"{phase}.pt").stat().st_mtime_ns == stamp


def test_resume_in_another_precision(chain, cam, tmp_path, dies_at_2):
    """What `auto` does between cards: a GradScaler without a state begins anew."""
    own = shutil.ignore_patterns("match.*")
    out = shutil.copytree(chain / "cam", tmp_path / "cam", ignore=own)
    with pytest.raises(KeyboardInterrupt):
        cam(out, "--phase", "match", "--precision", "float32")
    dies_at_2()
    assert "match" in cam(out, "--phase", "match", "--precision", "float16", "--resume")


def test_two_processes_equal_one(toy, chain, tmp_path):
    """All phases, the same batches over both; the export writes the same files."""
    two_processes("conftest.call", "train_cam", "--data", toy / "data", "--clip", toy / "clip.pt",
                  "--vit", toy / "vit.pth", "--out", tmp_path, *TINY)
    for phase in PHASES:
        # measured 5e-4 and 2e-5: AdamW's first steps are signs of gradients, some of them near 0
        torch.testing.assert_close(weights(tmp_path, phase), weights(chain / "cam", phase),
                                   atol=5e-3 if phase == "prompts" else 2e-4, rtol=0)
        for a, b in zip(rows(chain / "cam", phase), rows(tmp_path, phase), strict=True):
            assert a["step"] == b["step"] and b["loss"] == pytest.approx(a["loss"], abs=1e-3)
    names = [{path.name for path in (out / "cams").iterdir()} for out in (tmp_path, chain / "cam")]
    assert names[0] == names[1]
