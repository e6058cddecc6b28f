"""The mask generator by hand, its weights, and how the background score is chosen."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import REAL
from PIL import Image
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from common import IMAGENET_MEAN, IMAGENET_STD, InputError
from mask_generator import MaskGenerator, Rectify, ViT, load_vit


def test_load_vit_uses_every_key(toy, tmp_path):
    state = torch.load(toy / "vit.pth", weights_only=True)["model"]
    vit = load_vit(toy / "vit.pth")
    loaded = vit.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("head.")}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    assert (vit.patch, vit.width, len(vit.blocks), vit.grid) == (4, 128, 4, (16, 16))
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "bare.pth")  # no "model"
    assert load_vit(tmp_path / "bare.pth").norm.weight.dtype == torch.float32
    less = {key: value for key, value in state.items() if key != "norm.bias"}
    for change in ({**state, "dist_token": torch.zeros(1)}, less):
        torch.save({"model": change}, tmp_path / "bad.pth")
        with pytest.raises(InputError, match="dist_token|norm.bias"):
            load_vit(tmp_path / "bad.pth")


@pytest.mark.weights
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
@torch.no_grad()
def test_deit_sees_the_zebra():
    """The real DeiT-Tiny, its classifier taken from the file, says what timm's says."""
    path = REAL / "deit_tiny_patch16_224.pth"
    vit, state = load_vit(path).eval(), torch.load(path, weights_only=True)["model"]
    photo = Image.open(REAL / "coco_mini/val2014/COCO_val2014_000000000034.jpg").convert("RGB")
    photo = photo.resize((round(photo.width * 256 / photo.height), 256), Image.BICUBIC)
    left = (photo.width - 224) // 2
    image = pil_to_tensor(photo.crop((left, 16, left + 224, 240))).float()[None] / 255
    tokens, _ = vit(normalize(image, IMAGENET_MEAN, IMAGENET_STD))
    scores = F.linear(vit.norm(tokens[:, 0]), state["head.weight"], state["head.bias"])
    value, best = scores.softmax(dim=1).max(dim=1)
    assert best == 340 and value.item() == pytest.approx(0.83, abs=0.01)


@pytest.mark.parametrize("H, W", [(8, 8), (2, 3), (1, 30), (21, 10)])
def test_any_image_size(H, W):
    torch.manual_seed(0)
    generator, image = MaskGenerator(ViT(4, 64, 2, (2, 2)), 3).eval(), torch.randn(2, 3, H, W)
    cam, logits = generator(image)
    assert cam.shape == (2, 3, -(-H // 4), -(-W // 4)) and (cam >= 0).all()
    for b in range(2):  # batched = single
        one_cam, one = generator(image[b:b + 1])
        torch.testing.assert_close(cam[b:b + 1], one_cam, atol=1e-5, rtol=1e-4)
        for name, z in logits.items():
            torch.testing.assert_close(z[b:b + 1], one[name], atol=1e-5, rtol=1e-4)
    whole = F.pad(image, (0, -W % 4, 0, -H % 4))  # below and at the right, in the mean colour
    torch.testing.assert_close(generator(whole)[0], cam)
    block, x = generator.backbone.blocks[0], torch.randn(2, 5, 64)
    (fast, none, _), (slow, maps, _) = block(x), block(x, with_maps=True)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    assert none is None and torch.allclose(maps.sum(dim=3), torch.ones(2, 1, 5))


@torch.no_grad()
def test_features_of_a_head_are_every_heads_th_channel():
    torch.manual_seed(0)
    block, x = ViT(4, 192, 1, (2, 2)).blocks[0], torch.randn(2, 5, 192)
    _, _, written = block(x)
    channels, _ = block.attn(block.norm1(x), False)
    assert all(written[:, :, a].equal(channels[:, :, a::3]) for a in range(3))


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(3, 5), (8, 2)])
def test_fusion_and_fine_cam_by_hand(h, w):
    """[eq. W2] of 3 layers of 2 heads; [eq. W3] fine = A_p2p (A_c2p * relu(coarse))"""
    torch.manual_seed(0)
    generator, T = MaskGenerator(ViT(4, 128, 3, (2, 2)), 2), 2 + h * w
    maps, features = torch.rand(3, 1, 2, T, T), torch.randn(3, 1, 2, 64)
    A = generator.fusion(list(maps), list(features))
    weights = generator.fusion.excite(generator.fusion.pool(features.view(6, 64)).squeeze(1))
    torch.testing.assert_close(A[0], sum(x * m for x, m in zip(weights, maps.view(6, T, T))) / 6)
    coarse = torch.randn(1, 2, h, w)
    for class_attention in (True, False):                                        # [detail 1]
        generator.options["class_attention"] = class_attention
        c2p = A[0, :2, 2:] if class_attention else torch.ones(2, h * w)
        expected = [[sum(A[0, 2 + i, 2 + j] * c2p[k, j] * coarse[0, k].flatten()[j].relu()
                         for j in range(h * w)) for i in range(h * w)] for k in range(2)]
        fine = generator.spread(A, coarse)[0].flatten(1)
        torch.testing.assert_close(fine, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_fine_prediction_trains_the_fusion_alone():
    torch.manual_seed(0)
    generator = MaskGenerator(ViT(4, 128, 4, (2, 2)), 3, reduction=1)
    nn.init.constant_(generator.head.bias, 5)  # so that relu leaves something
    generator(torch.randn(2, 3, 8, 8))[1]["fine"].sum().backward()
    touched = {name for name, p in generator.named_parameters()
               if p.grad is not None and p.grad.abs().max() > 0}
    assert touched and all(name.startswith("fusion.") for name in touched)


def test_gradient_of_rectified_maps_by_hand():
    """[detail 2] relu's; in a map of zeros, that which raises it (descent subtracts it)"""
    x = torch.tensor([[2.0, -3, -3, 1], [-2, -3, -1, 0]]).view(2, 1, 2, 2).requires_grad_()
    Rectify.apply(x).backward(torch.tensor([0.5, 0.5, -0.5, -0.5]).view(1, 1, 2, 2).expand_as(x))
    assert x.grad.flatten().tolist() == [0.5, 0, 0, -0.5, 0, 0, -0.5, -0.5]
