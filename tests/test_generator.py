"""The mask generator by hand, DeiT's checkpoints, and how the background score is chosen."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_cam
from clip_model import InputError, load_clip
from mask_generator import MaskGenerator, Rectify, ViT, load_vit
from train_cam import Split, choose_score, cosine, region_masks


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
    tokens, _, maps, _ = generator.trunk(image, pool="max")
    torch.testing.assert_close(generator.trunk(image)[0], tokens, atol=1e-5, rtol=1e-4)  # the fast path gives the same
    torch.testing.assert_close(maps.sum(dim=3), torch.ones_like(maps[..., 0]))


class Fixed(nn.Module):
    """A trunk that returns these tokens and this attention."""

    def __init__(self, grid, tokens, attention, heads):
        super().__init__()
        self.grid, self.tokens, self.maps = grid, tokens, attention.expand(1, heads, *attention.shape)

    def forward(self, image, class_tokens, pool):
        return self.tokens, self.grid, self.maps, torch.zeros(1, self.maps.shape[1], 64)


@pytest.mark.parametrize("h, w", [(3, 5), (8, 2)])
def test_fine_cam_by_hand(h, w):
    """[eq. W3] fine = A_p2p (A_c2p * relu(coarse)) with hand-made attention, every head weighted sigmoid(0) = 1/2."""
    torch.manual_seed(0)
    K, T = 2, 2 + h * w
    generator = MaskGenerator(ViT(4, 64, 3, (2, 2)), K)
    nn.init.zeros_(generator.fusion.excite[2].weight)
    tokens = torch.randn(1, T, 64)
    coarse = generator.head(tokens[:, K:].transpose(1, 2).reshape(1, 64, h, w))
    class_rows = torch.rand(K, h * w)
    for patch_rows in (torch.eye(h * w), torch.eye(h * w).roll(1, dims=1), torch.rand(h * w, h * w)):
        attention = torch.cat([torch.cat([torch.zeros(K, K), class_rows], 1), torch.cat([torch.zeros(h * w, K), patch_rows], 1)])
        generator.trunk = Fixed((h, w), tokens, attention, heads=3)
        fine, logits = generator(None)
        weighted = 0.5 * class_rows * coarse.relu().flatten(2)
        expected = torch.stack([(0.5 * patch_rows[i] * weighted).sum(dim=2) for i in range(h * w)], dim=2)
        torch.testing.assert_close(fine.flatten(2), expected)
        torch.testing.assert_close(logits, torch.stack([tokens[:, :K].mean(2), coarse.mean((2, 3)), expected.mean(2)]))
    generator.class_attention = False  # [detail 1]
    torch.testing.assert_close(generator(None)[0].flatten(2), 0.5 * coarse.relu().flatten(2) @ (0.5 * patch_rows).T * 2)


def test_the_fine_prediction_trains_the_fusion_alone():
    torch.manual_seed(0)
    generator = MaskGenerator(ViT(4, 128, 4, (2, 2)), 3, reduction=1)
    nn.init.constant_(generator.head.bias, 5)  # so that relu leaves something
    generator(torch.randn(2, 3, 8, 8))[1][2].sum().backward()
    touched = {name for name, p in generator.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched and all(name.startswith("fusion.") for name in touched)


def test_all_three_predictions_learn(toy):
    """Each loss falls by more than a tenth in thirty steps on twelve photos; the fine one has a map of zero or more only."""
    split = Split(toy / "data", "train")
    crops = train_cam.Crops(split, 64, 0, 1, False)
    image, labels = (torch.stack(part) for part in zip(*[crops[0, i][:2] for i in range(12)]))
    torch.manual_seed(0)
    generator = MaskGenerator(load_vit(toy / "vit.pth"), 6, class_attention=False)
    optimizer, losses = torch.optim.AdamW(generator.parameters(), 1e-3), []
    for _ in range(30):
        values, n = train_cam.classification(generator, image, labels, generator.predictions)
        losses.append({name: value.item() for name, value in values.items()})
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
    for name in ("tokens", "coarse", "fine"):
        assert losses[-1][name] < 0.9 * losses[0][name], (name, losses[0][name], losses[-1][name])


def test_drop_path_and_dropout_in_training_only():
    torch.manual_seed(0)
    vit, image = ViT(4, 64, 3, (2, 2), drop_path=0.5), torch.randn(64, 3, 8, 8)
    assert [block.drop_path for block in vit.blocks] == [0, 0.25, 0.5]
    assert torch.equal(vit.eval()(image)[0], vit(image)[0])
    plain = ViT(**vit.sizes)
    plain.load_state_dict(vit.state_dict())
    torch.testing.assert_close(plain.train()(image)[0], vit(image)[0])  # sizes hold no drop path
    assert not torch.allclose(vit.train()(image)[0], vit(image)[0])


def test_gradient_of_the_rectified_maps():
    """[detail 2] a plain relu's, but in a map that is zero everywhere what would raise it passes (descent subtracts it)."""
    x = torch.tensor([[2.0, -3, -3, 1], [-2, -3, -1, 0]]).view(2, 1, 2, 2).requires_grad_()
    y = Rectify.apply(x)
    assert y.flatten().tolist() == [2, 0, 0, 1, 0, 0, 0, 0]
    y.backward(torch.tensor([[0.5, 0.5, -0.5, -0.5], [0.5, 0.5, -0.5, -0.5]]).view_as(x))
    assert x.grad.flatten().tolist() == [0.5, 0, 0, -0.5, 0, 0, -0.5, -0.5]


@pytest.mark.parametrize("rectify, comes_back", [(Rectify.apply, True), (torch.relu, False)], ids=["ours", "plain ReLU"])
def test_a_map_that_is_zero_everywhere_can_come_back(rectify, comes_back, monkeypatch):
    """[detail 2] a head that says no to every patch, and a loss that wants the left half kept."""
    monkeypatch.setattr(Rectify, "apply", rectify)
    torch.manual_seed(0)
    generator, image = MaskGenerator(ViT(4, 64, 2, (4, 4)), 1), torch.randn(1, 3, 16, 16)
    nn.init.constant_(generator.head.bias, -5)
    optimizer = torch.optim.AdamW([*generator.head.parameters(), *generator.fusion.parameters()], 0.03)
    for step in range(60):
        cam = generator(image)[0]
        assert step or (cam == 0).all()  # dead at the start
        mask = region_masks(cam[:, 0], (16, 16), eps=1e-4)
        loss = mask[..., 8:].mean() - mask[..., :8].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (loss.item() < -0.2) if comes_back else (cam == 0).all()  # measured -0.28


# ------------------------------------------------------------------------------------------ the background score

def test_losses_of_the_background_scores(toy, chain):
    """Against masks cut one by one as make_pseudo.py cuts them, and losses taken pair by pair."""
    clip = load_clip(toy / "clip.pt")
    from make_pseudo import read_cams, score_labels
    split, folder = Split(toy / "data", "train"), chain / "cam/cams"
    split.names = [name for name in split.names if split.image(name).size == (64, 64)][:5]
    u_f = train_cam.class_texts(clip, split.words, torch.device("cpu"))
    u_b = train_cam.load_background(None, chain / "cam/prompts.pt", clip, split)
    losses = train_cam.background_losses(clip, u_f, u_b, split, folder, torch.device("cpu"), 0, 1)
    assert losses.shape == (sum(split.labels[name].sum() for name in split.names), len(train_cam.SCORES))
    from torchvision.transforms.v2.functional import normalize, pil_to_tensor
    for column, score in list(enumerate(train_cam.SCORES))[::5]:
        total = []
        for name in split.names:
            present = np.flatnonzero(split.labels[name])
            labels = score_labels(read_cams(folder, name, present, (64, 64)), present, score)
            X = normalize(pil_to_tensor(split.image(name)).float() / 255, train_cam.CLIP_MEAN, train_cam.CLIP_STD)
            for k in present:
                M = torch.from_numpy(labels == 1 + k).float()
                with torch.no_grad():
                    v_f, v_b = clip.encode_image(torch.stack([M * X, (1 - M) * X])).split(1)
                total.append((cosine(v_b, u_f[[k]]) - cosine(v_f, u_f[[k]]) + 2 * cosine(v_f, u_b[[k]])).item())
        assert losses[:, column].tolist() == pytest.approx(total, abs=1e-5)  # measured 9e-7


def test_the_score_is_the_middle_of_the_valley():
    """A flat valley from 0.4 to 0.6 whose least value is at its left end: the middle, whatever the noise; and how far it cannot say."""
    scores, rng = np.array(train_cam.SCORES), np.random.default_rng(0)
    valley = np.maximum(0, 10 * (np.abs(scores - 0.5) - 0.125))
    valley[np.isclose(scores, 0.4)] = -0.01
    for _ in range(20):
        walk = 0.3 * rng.normal(size=(250, len(scores))).cumsum(axis=1)  # scores far from each other differ the more
        score, low, high = choose_score(torch.tensor(valley + walk))
        assert score == pytest.approx(0.5, abs=0.02) and low <= 0.45 and high >= 0.5
    assert choose_score(torch.tensor(valley)[None].expand(9, -1))[1:] == (0.4, 0.4)  # no noise
    assert choose_score(torch.tensor(scores)[None])[0] == pytest.approx(0.24, abs=0.01)  # one flank: from the end of the scores
