"""The mask generator by hand: both kinds, their weights, the CAMs of a whole photo."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import REAL
from PIL import Image
from torchvision.models import resnet
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from common import IMAGENET_MEAN, IMAGENET_STD, InputError
from mask_generator import (
    Block, CNNGenerator, MaskGenerator, Rectify, ViT, generator_state, load_generator, load_resnet,
    load_vit, photo_cams, scaled_input)


def test_load_vit_uses_every_key(toy, tmp_path):
    state = torch.load(toy / "vit.pth", weights_only=True)["model"]
    vit = load_vit(toy / "vit.pth")
    loaded = vit.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("head.")}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    assert (vit.patch, vit.width, len(vit.blocks), vit.grid) == (4, 128, 4, (16, 16))
    S = MaskGenerator(vit, 3)  # every class starts as [CLS], at its place
    for name, start in (("class_tokens", "cls_token"), ("class_positions", "pos_embed")):
        assert getattr(S, name).equal(state[start][:, :1].expand(1, 3, 128))
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


@torch.no_grad()
@pytest.mark.parametrize("H, W", [(8, 8), (2, 3), (1, 30), (21, 10)])
def test_any_image_size(H, W):
    torch.manual_seed(0)
    generator, image = MaskGenerator(ViT(4, 64, 2, (2, 2)), 3).eval(), torch.randn(2, 3, H, W)
    cam, logits = generator(image)
    assert cam.shape == (2, 3, -(-H // 4), -(-W // 4)) and (cam >= 0).all()
    second, its = generator(image[1:])  # batched = single
    torch.testing.assert_close(cam[1:], second, atol=1e-5, rtol=1e-4)
    for name, z in logits.items():
        torch.testing.assert_close(z[1:], its[name], atol=1e-5, rtol=1e-4)
    whole = F.pad(image, (0, -W % 4, 0, -H % 4))  # below and at the right, in the mean colour
    torch.testing.assert_close(generator(whole)[0], cam)


def test_attention_without_its_maps():
    block, x = Block(64).eval(), torch.randn(2, 5, 64)
    (fast, none, _), (slow, maps, _) = block(x), block(x, with_maps=True)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    assert none is None and torch.allclose(maps.sum(dim=3), torch.ones(2, 1, 5))


def norm(x, p, name, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def block_by_hand(x, p):
    """Tokens (T, D) -> (T, D), the map of every head, its features: channels a, a + A, a + 2A"""
    D, A = x.shape[1], x.shape[1] // 64
    qkv = linear(norm(x, p, "norm1"), p, "attn.qkv")
    q, k, v = (each.view(-1, A, 64) for each in qkv.split(D, dim=1))
    maps = [(q[:, a] @ k[:, a].T / 8).softmax(1) for a in range(A)]
    heads = torch.cat([m @ v[:, a] for a, m in enumerate(maps)], dim=1)
    written = linear(heads, p, "attn.proj")
    x = x + written
    y = linear(F.gelu(linear(norm(x, p, "norm2"), p, "mlp.fc1")), p, "mlp.fc2")
    return x + y, maps, [written[:, [a + A * i for i in range(D // A)]] for a in range(A)]


@torch.no_grad()
@pytest.mark.parametrize("pool, reduction, class_attention", [("max", 2, True), ("mean", 1, False)])
def test_forward_by_hand(pool, reduction, class_attention):
    """[eq. W1, W2, W3] and the predictions, token by token: 3 layers of 2 heads, 2 classes, a grid
    of 2 x 3. No part is computed by the module it checks."""
    torch.manual_seed(0)
    K, S = 2, MaskGenerator(ViT(4, 128, 3, (2, 3)), 2, class_attention, pool, reduction).eval()
    for parameter in S.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # none is 0, no two are equal
    S.fusion.excite[0].weight[0] *= -1  # something for its relu
    p, image = S.state_dict(), torch.randn(1, 3, 8, 12)
    kernel = p["backbone.patch_embed.proj.weight"].flatten(1)                    # (D, 48)
    patches = [kernel @ image[0, :, y:y + 4, x:x + 4].flatten() for y in (0, 4) for x in (0, 4, 8)]
    x = torch.stack(patches) + p["backbone.patch_embed.proj.bias"] + p["backbone.pos_embed"][0, 1:]
    x, maps, features = torch.cat([(p["class_tokens"] + p["class_positions"])[0], x]), [], []
    for i in range(3):
        start = f"backbone.blocks.{i}."
        x, m, f = block_by_hand(x, {key.removeprefix(start): w for key, w in p.items()
                                    if key.startswith(start)})
        maps, features = maps + m, features + f
    pooled = torch.stack([f.amax(0) if pool == "max" else f.mean(0) for f in features])  # (6, 64)
    z = linear(linear(pooled, p, "fusion.pool.0"), p, "fusion.pool.1")[:, 0]
    w = linear(linear(z, p, "fusion.excite.0").clamp(min=0), p, "fusion.excite.2").sigmoid()
    A = sum(weight * m for weight, m in zip(w, maps, strict=True)) / 6
    coarse = F.conv2d(x[K:].T.reshape(1, 128, 2, 3), p["head.weight"], p["head.bias"], padding=1)[0]
    coarse = coarse.flatten(1)                                                   # (K, 6)
    c2p = A[:K, K:] if class_attention else torch.ones(K, 6)                     # [detail 1]
    fine = torch.tensor([[sum(A[K + i, K + j] * c2p[k, j] * max(coarse[k, j], 0) for j in range(6))
                          for i in range(6)] for k in range(K)])
    cam, logits = S(image)
    assert linear(z, p, "fusion.excite.0").min() < 0 and coarse.min() < 0
    torch.testing.assert_close(cam[0].flatten(1), fine, atol=1e-4, rtol=1e-4)
    for name, expected in (("tokens", x[:K]), ("coarse", coarse), ("fine", fine)):
        torch.testing.assert_close(logits[name][0], expected.mean(1), atol=1e-4, rtol=1e-4)


def test_drop_path_grows_over_the_blocks():
    """From 0 to the recipe's, and a block whose terms are dropped passes its input on"""
    vit = ViT(4, 64, 5, (2, 2), drop_path=0.4)
    assert [block.drop_path for block in vit.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x, block = torch.randn(200, 3, 64), Block(64, drop_path=0.4).train()
    passed = (block(x)[0] == x).flatten(1).all(1).float().mean().item()  # both terms dropped
    assert passed == pytest.approx(0.16, abs=0.1)
    assert (block.eval()(x)[0] != x).any(2).all()


@torch.no_grad()
def test_positions_of_another_grid_are_bicubic():
    """By hand: along a row a step, 6 made 12, with overshoots; along a column they stay 0, 1, 2"""
    vit = ViT(4, 64, 0, (3, 6))
    vit.pos_embed[0, 1:, 0] = (torch.arange(6) > 2).float().repeat(3)
    vit.pos_embed[0, 1:, 1] = torch.arange(3.0).repeat_interleave(6)
    for parameter in vit.patch_embed.parameters():
        parameter.zero_()
    tokens, grid = vit.embed(torch.randn(1, 3, 12, 48), torch.zeros(1, 0, 64))
    half = torch.tensor([0, 0, 0, -0.03516, -0.10547, 0.22656])
    row, column = torch.cat([half, 1 - half.flip(0)]), torch.arange(3.0)[:, None].expand(3, 12)
    for channel, expected in ((0, row.repeat(3)), (1, column.flatten())):
        torch.testing.assert_close(tokens[0, :, channel], expected, atol=1e-5, rtol=0)
    assert grid == (3, 12)


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


# ---- The CNN -------------------------------------------------------------------------------------

@torch.no_grad()
def test_resnet_equals_torchvisions_and_cams_by_hand(tmp_path):
    """torchvision's own dilation of the last stage; [eq. Z1]; 100 pixels are 7 places of 16"""
    torch.manual_seed(0)
    theirs = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 3],
                           replace_stride_with_dilation=[False, False, True]).eval()
    for name, x in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if x.dim() == 1:  # norms
            x.copy_(torch.rand_like(x) + (0.5 if "var" in name else 0))
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    S, image = CNNGenerator(load_resnet(tmp_path / "resnet.pth"), 3), torch.randn(2, 3, 100, 64)
    f = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    f = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(f))))
    assert f.shape == (2, 2048, 7, 4)
    torch.testing.assert_close(S.backbone(image), f, atol=1e-4, rtol=1e-4)
    score = torch.einsum("kc,bcyx->bkyx", S.head.weight[:, :, 0, 0], f)
    cam, logits = S.train()(image)  # batch norm stands still
    assert score.min() < 0 and logits.keys() == {"pooled"}
    torch.testing.assert_close(cam, score.clamp(min=0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits["pooled"], score.mean(dim=(2, 3)), atol=1e-3, rtol=1e-3)


# ---- CAMs of a whole photo -----------------------------------------------------------------------

class Ramp:
    """A generator whose map of class k is channel k of the patches times their column, 0, 1, .."""

    backbone = SimpleNamespace(patch=4)

    def __call__(self, x):
        patches = F.avg_pool2d(x, 4)
        return patches * torch.arange(patches.shape[3]), {}


def test_cams_of_a_photo_by_hand():
    """A sum over scales and mirror images, each turned back: of Ramp's columns i and w - 1 - i, so
    w - 1 times the patches. In the order of the present classes"""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
    expected = 0
    for W, H in ((40, 24), (48, 28)):  # 1.2 times 24 is 28.8: 7 whole patches
        x = torch.from_numpy(np.array(photo.resize((W, H), Image.BICUBIC))).float() / 255
        x = ((x - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(2, 0, 1)
        patches = x.view(3, H // 4, 4, W // 4, 4).mean(dim=(2, 4)) * (W // 4 - 1)
        expected = expected + F.interpolate(patches[None], size=(6, 10), mode="bilinear")[0]
    maps = photo_cams(Ramp(), photo, torch.tensor([2, 0]), (1, 1.2))
    torch.testing.assert_close(maps, expected[[2, 0]], atol=1e-4, rtol=1e-4)
    mirrored = photo_cams(Ramp(), photo.transpose(Image.FLIP_LEFT_RIGHT), torch.tensor([2, 0]),
                          (1, 1.2))
    torch.testing.assert_close(mirrored.flip(2), maps, atol=0.05, rtol=0)  # a grey level of 255


def test_a_huge_photo_is_shrunk_to_what_memory_holds():
    """To at most 2,500 patches of the same proportions; others get the scale they ask for"""
    for size, scale, shape in (((4000, 3000), 1, (43 * 16, 58 * 16)), ((100, 60), 1.5, (96, 144)),
                               ((3, 5), 1, (16, 16))):
        x = scaled_input(Image.new("RGB", size, (124, 116, 104)), scale, 16, 2500)
        assert x.shape == (1, 3, *shape) and x.abs().max() < 0.02  # the mean colour


@torch.no_grad()
def test_a_checkpoint_keeps_its_options(tmp_path):
    """COCO's generator, mean pooling and reduction 1, gives its own CAMs when it is loaded."""
    torch.manual_seed(0)
    S = MaskGenerator(ViT(8, 128, 2, (4, 4)), 3, pool="mean", reduction=1).eval()
    for parameter in S.fusion.parameters():
        parameter += torch.randn_like(parameter)  # so that the pooled features count
    torch.save(generator_state(S, ["a", "b", "c"]) | {"record": {}}, tmp_path / "match.pt")
    loaded = load_generator(tmp_path / "match.pt", SimpleNamespace(classes=["a", "b", "c"])).eval()
    image = torch.randn(1, 3, 32, 32)
    assert loaded.options == S.options and torch.equal(loaded(image)[0], S(image)[0])
    S.options["pool"] = "max"
    assert not torch.equal(loaded(image)[0], S(image)[0])
