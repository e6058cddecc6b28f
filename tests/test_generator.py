"""The mask generator by hand, DeiT's checkpoints, and how the background score is chosen."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_cam
from clip_model import InputError, load_clip
from mask_generator import MaskGenerator, Rectify, ViT, load_vit
from train_cam import Split, match_loss, refine_loss, region_masks


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
    """[detail 4] a plain relu's, but in a map that is zero everywhere what would raise it passes (descent subtracts it)."""
    x = torch.tensor([[2.0, -3, -3, 1], [-2, -3, -1, 0]]).view(2, 1, 2, 2).requires_grad_()
    y = Rectify.apply(x)
    assert y.flatten().tolist() == [2, 0, 0, 1, 0, 0, 0, 0]
    y.backward(torch.tensor([[0.5, 0.5, -0.5, -0.5], [0.5, 0.5, -0.5, -0.5]]).view_as(x))
    assert x.grad.flatten().tolist() == [0.5, 0, 0, -0.5, 0, 0, -0.5, -0.5]


@pytest.mark.parametrize("rectify, comes_back", [(Rectify.apply, True), (torch.relu, False)], ids=["ours", "plain ReLU"])
def test_a_map_that_is_zero_everywhere_can_come_back(rectify, comes_back, monkeypatch):
    """[detail 4] a head that says no to every patch, and a loss that wants the left half kept."""
    monkeypatch.setattr(Rectify, "apply", rectify)
    torch.manual_seed(0)
    generator, image = MaskGenerator(ViT(4, 64, 2, (4, 4)), 1), torch.randn(1, 3, 16, 16)
    nn.init.constant_(generator.head.bias, -5)
    optimizer = torch.optim.AdamW([*generator.head.parameters(), *generator.fusion.parameters()], 0.03)
    for step in range(60):
        cam = generator(image)[0]
        assert step or (cam == 0).all()  # dead at the start
        mask = region_masks(cam[:, 0], (16, 16), eps=0.1)
        loss = mask[..., 8:].mean() - mask[..., :8].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (loss.item() < -0.3) if comes_back else (cam == 0).all()  # measured -0.46


# ------------------------------------------------------------------------------------------ the background score

def test_background_score_is_the_one_whose_hard_masks_have_the_least_loss(toy, chain):
    """Against masks cut one by one as make_pseudo.py cuts them, and losses taken pair by pair."""
    clip = load_clip(toy / "clip.pt")
    from make_pseudo import read_cams, score_labels
    split, folder = Split(toy / "data", "train"), chain / "cam/cams"
    split.names = [name for name in split.names if split.image(name).size == (64, 64)][:5]
    u_f = train_cam.class_texts(clip, split.words, torch.device("cpu"))
    u_b = train_cam.load_prompts(chain / "cam/prompts.pt", clip, split.classes)
    losses = train_cam.background_losses(clip, u_f, u_b, split, folder, torch.device("cpu"), 0, 1)
    assert list(losses) == train_cam.SCORES
    from torchvision.transforms.v2.functional import normalize, pil_to_tensor
    for score in train_cam.SCORES[::5]:
        total = []
        for name in split.names:
            present = np.flatnonzero(split.labels[name])
            labels = score_labels(read_cams(folder, name, present, (64, 64)), present, score)
            X = normalize(pil_to_tensor(split.image(name)).float() / 255, train_cam.CLIP_MEAN, train_cam.CLIP_STD)
            for k in present:
                M = torch.from_numpy(labels == 1 + k).float()
                with torch.no_grad():
                    v_f, v_b = clip.encode_image(torch.stack([M * X, (1 - M) * X])).split(1)
                total.append((match_loss(v_f, v_b, u_f[[k]], 1) + refine_loss(v_f, u_b[[k]])).item())
        assert losses[score] == pytest.approx(np.mean(total), abs=1e-5)  # measured 9e-7
