"""The mask generator S: a photo becomes class activation maps (paper, section 3.1).

The paper takes S from WeakTr: a ViT (DeiT) with one class token per class, and three quantities:

  coarse = conv3x3(patch tokens)                                      coarse CAM           [eq. W1]
  A      = mean_m w_m A_m,  w = sigmoid(MLP(features))                attention fusion     [eq. W2]
  fine   = A_p2p (A_c2p * relu(coarse))                               fine CAM             [eq. W3]

A_m is the map of attention head m, of all layers; A_c2p are the rows of A from class tokens to
patches, A_p2p those from patches to patches. The classification phase trains three image-level
predictions: class tokens, pooled coarse, pooled fine; the last one trains the fusion alone. Class
and patch tokens are read before the backbone's last norm. fine is the CAM, never negative;
train_cam.region_masks scales it to the mask in [0, 1] that CLIP sees. As in WeakTr, except:
  [detail 1] class_attention=False leaves A_c2p out of W3, for backbones whose [CLS] has learned
             nothing to attend to.
  [detail 2] Where relu leaves nothing of a map, the gradient that would raise it still passes.

S may be a CNN: a ResNet with the class activation map of Zhou et al. (CVPR 2016), as in IRN and
CLIMS. With f_c its last features:

  score_k = sum_c w_kc f_c,   CAM_k = relu(score_k),   prediction_k = mean of score_k      [eq. Z1]

Reads DeiT checkpoints ({"model": state dict}, timm's names) and torchvision's ResNets.
"""
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import get_model_weights, resnet
from torchvision.ops import FrozenBatchNorm2d, stochastic_depth
from torchvision.transforms import InterpolationMode, v2

from common import (
    IMAGENET_MEAN, IMAGENET_STD, InputError, check_classes, fetch_weights, load_weights,
    read_checkpoint, read_tensors)

# B images, K classes, H W pixels, h w grid of patches or CNN cells, L layers, A heads of
# attention, D ViT width, T tokens (K + h*w)

HEAD_WIDTH = 64  # channels of one head of attention, the same in every DeiT
DEIT = "https://dl.fbaipublicfiles.com/deit/"
VITS = {"deit_tiny": "deit_tiny_patch16_224-a1311bcf.pth",  # the digits begin their SHA-256
        "deit_small": "deit_small_patch16_224-cd65a155.pth",
        "deit_base": "deit_base_patch16_224-b5f2ef4d.pth"}
RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]  # torchvision's V1 weights


# ---- The generator: class tokens, CAM head, attention fusion (WeakTr) ---------------------------

class MaskGenerator(nn.Module):
    """S: X (B, 3, H, W) -> CAMs (B, K, h, w) and three image-level predictions"""

    kind = "vit"

    def __init__(self, vit, num_classes, class_attention=True, pool="max", reduction=8):
        super().__init__()
        self.options = {"class_attention": class_attention, "pool": pool, "reduction": reduction}
        self.backbone, self.num_classes = vit, num_classes
        # Only their sum matters. Two parameters double the effective step, as in WeakTr
        self.class_tokens = nn.Parameter(vit.cls_token.detach().repeat(1, num_classes, 1))
        self.class_positions = nn.Parameter(vit.pos_embed[:, :1].detach().repeat(1, num_classes, 1))
        self.head = nn.Conv2d(vit.width, num_classes, 3, padding=1)
        self.fusion = AttentionFusion(len(vit.blocks) * vit.width // HEAD_WIDTH, reduction)
        vit.cls_token.requires_grad_(False)      # replaced by the class tokens
        vit.norm.requires_grad_(False)           # tokens are read before it

    def train_through_clip(self):
        """What matching and refinement train: head and fusion."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self.fusion.requires_grad_(True)

    def forward(self, image):
        """image (B, 3, H, W) ImageNet-normalised -> cam (B, K, h, w), not negative, and logits
        {"tokens", "coarse", "fine": (B, K)}"""
        K, maps, features = self.num_classes, [], []
        x, (h, w) = self.backbone.embed(image, self.class_tokens + self.class_positions)
        for block in self.backbone.blocks:
            x, attention, written = block(x, with_maps=True)             # (B, K + h*w, D)
            # Detached, as in WeakTr: a loss on the CAM trains the weights w, not the attention maps
            maps.append(attention.detach())                              # (B, A, T, T)
            pooled = written.amax(dim=1) if self.options["pool"] == "max" else written.mean(dim=1)
            features.append(pooled.detach())                             # (B, A, 64)
        coarse = self.head(x[:, K:].transpose(1, 2).unflatten(2, (h, w)))        # [eq. W1]
        fused = self.fusion(maps, features)                              # (B, T, T) [eq. W2]
        fine = self.spread(fused, coarse)                                # (B, K, h, w)
        of_fusion = self.spread(fused, coarse.detach())  # same value; trains only the fusion
        return fine, {"tokens": x[:, :K].mean(dim=2), "coarse": coarse.mean(dim=(2, 3)),
                      "fine": of_fusion.mean(dim=(2, 3))}

    def spread(self, fused, coarse):
        """fine = A_p2p (A_c2p * relu(coarse)): A (B, T, T), coarse (B, K, h, w) -> (B, K, h, w)"""
        K = self.num_classes
        A_c2p, A_p2p = fused[:, :K, K:], fused[:, K:, K:]                # (B, K, hw), (B, hw, hw)
        m = Rectify.apply(coarse).flatten(2)                             # (B, K, hw)
        if self.options["class_attention"]:                              # [detail 1]
            m = A_c2p * m
        return (m @ A_p2p.transpose(1, 2)).view_as(coarse)               # [eq. W3]


class AttentionFusion(nn.Module):
    """A = mean_m w_m A_m,  w = sigmoid(MLP(features)), one for each image  [eq. W2]. A head's
    features: 64 channels of its layer's attention output, max or mean over all tokens. `pool` has
    two linear layers and nothing between, as in WeakTr."""

    def __init__(self, num_maps, reduction=8):
        super().__init__()
        hidden = max(1, num_maps // reduction)
        self.pool = nn.Sequential(nn.Linear(HEAD_WIDTH, 8), nn.Linear(8, 1))
        self.excite = nn.Sequential(nn.Linear(num_maps, hidden, bias=False), nn.ReLU(),
                                    nn.Linear(hidden, num_maps, bias=False), nn.Sigmoid())

    def forward(self, maps, features):
        """L maps (B, A, T, T), L features (B, A, 64) -> fused attention (B, T, T)"""
        w = self.excite(self.pool(torch.cat(features, dim=1)).squeeze(-1))       # (B, L*A)
        total = 0
        for attention, weight in zip(maps, w.chunk(len(maps), dim=1)):   # layer by layer: memory
            total = total + weight[:, None] @ attention.flatten(2)       # (B, 1, T*T)
        return total.view(-1, *maps[0].shape[2:]) / w.shape[1]


class Rectify(torch.autograd.Function):
    """relu of maps (B, K, h, w), but a map that is zero everywhere passes the gradient that would
    raise it: with a plain relu it would stay zero. [detail 2]"""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        dead = x.amax(dim=(2, 3), keepdim=True) <= 0                     # (B, K, 1, 1)
        return gradient * ((x > 0) | (dead & (gradient < 0)))


# ---- The backbone: a Vision Transformer (Dosovitskiy et al. 2021), with DeiT's names -------------

class Attention(nn.Module):
    """A_m = softmax(q k^T / sqrt(64)) for each head m; out = all A_m v side by side, times W"""

    def __init__(self, width):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, with_maps):
        """x (B, T, D) -> (B, T, D), and the maps (B, A, T, T) or None"""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        if with_maps:
            maps = (q * HEAD_WIDTH ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
            x = maps @ v                                                 # (B, A, T, 64)
        else:
            maps, x = None, F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D)), maps


class Block(nn.Module):
    """x <- x + attention(norm(x));  x <- x + MLP(norm(x)),  MLP(z) = W_2 gelu(W_1 z)

    In training both terms lose a share `dropout` of their values, and are left out for a share
    `drop_path` of the images."""

    def __init__(self, width, drop_path=0.0, dropout=0.0, eps=1e-6):
        super().__init__()
        self.drop_path, self.dropout = drop_path, dropout
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width),
                                  "fc2": nn.Linear(4 * width, width)})

    def drop(self, y):
        y = F.dropout(y, self.dropout, self.training)
        return stochastic_depth(y, self.drop_path, "row", self.training)

    def forward(self, x, with_maps=False):
        """x (B, T, D) -> (B, T, D), the maps (B, A, T, T), what attention wrote (B, T, A, 64)"""
        y, maps = self.attn(self.norm1(x), with_maps)
        x = x + self.drop(y)
        x = x + self.drop(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))
        # As WeakTr counts them, the features of head a are the channels a, a + A, a + 2A, ...
        return x, maps, y.unflatten(2, (HEAD_WIDTH, -1)).transpose(2, 3)


class ViT(nn.Module):
    """A DeiT of any size. grid (h, w): of the position embeddings; images may have any size. eps:
    of its norms. ViT(**vit.sizes) is the same backbone with other weights."""

    def __init__(self, patch=16, width=384, layers=12, grid=(14, 14), eps=1e-6, drop_path=0.0):
        super().__init__()
        self.sizes = {"patch": patch, "width": width, "layers": layers, "grid": list(grid),
                      "eps": eps}
        self.patch, self.width, self.grid = patch, width, tuple(grid)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, drop_path * i / max(1, layers - 1), eps=eps)
                                    for i in range(layers))  # drop path grows from 0
        self.norm = nn.LayerNorm(width, eps)

    def position(self, h, w, mode="bicubic"):
        """Position embeddings of an h x w grid, (1, h*w, D), interpolated from those of `grid`"""
        pos = self.pos_embed[:, 1:]
        if (h, w) != self.grid:
            pos = pos.transpose(1, 2).reshape(1, self.width, *self.grid)
            # size=, not scale_factor=: a rounded scale samples at shifted places
            pos = F.interpolate(pos, size=(h, w), mode=mode).flatten(2).transpose(1, 2)
        return pos

    def embed(self, image, class_tokens):
        """image (B, 3, H, W), class tokens (1, K, D) -> tokens (B, K + h*w, D) and (h, w). Sides
        that are no multiples of the patch are padded below and at the right by the mean colour."""
        B, _, H, W = image.shape
        image = F.pad(image, (0, -W % self.patch, 0, -H % self.patch))
        x = self.patch_embed["proj"](image)                              # (B, D, h, w)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.position(h, w)           # (B, h*w, D)
        return torch.cat([class_tokens.expand(B, -1, -1), x], dim=1), (h, w)

    def forward(self, image):
        """image (B, 3, H, W), ImageNet-normalised -> tokens (B, 1 + h*w, D) before the last norm,
        [CLS] first, and (h, w)"""
        x, grid = self.embed(image, self.cls_token + self.pos_embed[:, :1])
        for block in self.blocks:
            x, _, _ = block(x)
        return x, grid


# ---- The CNN: a ResNet (He et al. 2016) and the classic class activation map ---------------------

class CNNGenerator(nn.Module):
    """S as a CNN, used like MaskGenerator: score_k = sum_c w_kc f_c, CAM_k = relu(score_k)"""

    kind = "resnet"

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.options, self.backbone = {}, backbone
        self.head = nn.Conv2d(backbone.width, num_classes, 1, bias=False)

    def train_through_clip(self):
        """If S is a CNN, all of it is fine-tuned, the backbone at a lower rate, as in CLIMS."""

    def forward(self, image):
        """image (B, 3, H, W) ImageNet-normalised -> cam (B, K, h, w) and {"pooled": (B, K)}"""
        score = self.head(self.backbone(image))                             # (B, K, h, w) [eq. Z1]
        return Rectify.apply(score), {"pooled": score.mean(dim=(2, 3))}


class ResNet(resnet.ResNet):
    """torchvision's ResNet up to its last features: (B, 3, H, W) -> (B, width, H/patch, W/patch).

    patch is 16: dilation takes the place of the stride of layer4. With a conv1 of 3 x 3, as
    ResNets for small images have it, patch is 4. Batch-norm statistics are frozen because batches
    are small."""

    def __init__(self, block="Bottleneck", layers=(3, 4, 6, 3), first=64, stem=7,
                 norm=FrozenBatchNorm2d):
        nn.Module.__init__(self)  # torchvision's __init__ knows no other `first` and `stem`
        self.sizes = {"block": block, "layers": list(layers), "first": first, "stem": stem}
        small, block = stem == 3, getattr(resnet, block)
        self.patch, self.width = 4 if small else 16, block.expansion * first * 8
        self.conv1 = nn.Conv2d(3, first, stem, 1 if small else 2, padding=stem // 2, bias=False)
        self.bn1 = norm(first)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self.inplanes, self.groups, self.base_width = first, 1, 64  # what _make_layer reads
        self.dilation, self._norm_layer = 1, norm
        for i, count in enumerate(layers):
            stage = self._make_layer(block, first * 2**i, count, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
        for conv in (module for module in self.layer4.modules() if isinstance(module, nn.Conv2d)):
            if conv.stride == (2, 2):  # torchvision's own dilation is of Bottleneck alone
                conv.stride = (1, 1)
            elif conv.kernel_size == (3, 3):  # sees twice as many cells now: takes every other one
                conv.dilation = conv.padding = (2, 2)

    def forward(self, image):
        x = self.pool(self.bn1(self.conv1(image)).relu())
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


# ---- CAMs of a whole photo -----------------------------------------------------------------------

def scaled_input(photo, scale, patch, max_patches):
    """PIL photo -> (1, 3, h*patch, w*patch), ImageNet-normalised, resized to whole patches.
    Attention memory is quadratic, so photos of more patches are shrunk."""
    W, H = photo.size
    scale = min(scale, patch * (max_patches / (H * W)) ** 0.5)
    size = [max(1, round(side * scale / patch)) * patch for side in (H, W)]
    pixels = v2.functional.resize(photo, size, InterpolationMode.BICUBIC)
    pixels = v2.functional.pil_to_tensor(pixels).float() / 255
    return v2.functional.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)[None]


@torch.no_grad()
def photo_cams(generator, photo, present, scales):
    """PIL photo -> CAMs (n, ceil(H/4), ceil(W/4)) of the n present classes, summed over scales and
    mirror images. float32, whatever the training's was."""
    W, H = photo.size
    quarter, total = (-(-H // 4), -(-W // 4)), 0
    for scale in scales:
        x = scaled_input(photo, scale, generator.backbone.patch, 2500).to(present.device)
        cam, mirrored = generator(torch.cat([x, x.flip(3)]))[0][:, present]      # (n, h, w) twice
        for view in (cam, mirrored.flip(2)):
            total = total + F.interpolate(view[:, None], size=quarter, mode="bilinear")
    return total[:, 0]


# ---- Weights ------------------------------------------------------------------------------------

def weight_file(name):
    """A name of VITS or RESNETS, downloaded once, or a file -> Path"""
    if name in VITS:
        return fetch_weights(DEIT + VITS[name], VITS[name][-12:-4])
    if name in RESNETS:
        url = get_model_weights(name).IMAGENET1K_V1.url
        return fetch_weights(url, url.rpartition("-")[2][:-4])
    if not Path(name).is_file():
        raise InputError(f"{name}: no such file; expected a checkpoint, or one of "
                         f"{', '.join([*VITS, *RESNETS])}")
    return Path(name)


def load_vit(name, drop_path=0.0):
    """A name of VITS or a DeiT checkpoint -> ViT, float32. Sizes come from the shapes; its own
    classifier is left out. Raises InputError for anything else."""
    path = weight_file(name)
    state = read_weights(path, ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"),
                         "a DeiT", "--vit", VITS)
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    return load_weights(lambda: ViT(**vit_sizes(state), drop_path=drop_path), state, path,
                        "a DeiT with timm's names")


def vit_sizes(state):
    """A DeiT's state dict -> {patch, width, layers, grid}. DeiT's grids are square."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    return {"patch": patch, "width": width, "layers": layers, "grid": (side, side)}


def load_resnet(name):
    """A name of RESNETS or torchvision's state dict -> ResNet, float32, without its classifier.
    Raises InputError for anything else."""
    path = weight_file(name)
    state = read_weights(path, ("conv1.weight", "bn1.weight", "layer4.0.conv1.weight"),
                         "a ResNet", "--resnet", RESNETS)
    stages = re.findall(r"\blayer(\d)\.(\d+)\.conv1\.weight", " ".join(state))
    layers = [sum(stage == number for stage, _ in stages) for number in "1234"]
    block = "Bottleneck" if "layer1.0.conv3.weight" in state else "BasicBlock"
    first, _, stem, _ = state["conv1.weight"].shape
    state = {key: value for key, value in state.items()
             if not key.startswith("fc.") and "num_batches" not in key}
    return load_weights(lambda: ResNet(block, layers, first, stem), state, path,
                        "a ResNet with torchvision's names")


def read_weights(path, keys, what, flag, names):
    """{"model": state dict} or a state dict with these keys, the first a convolution -> float32"""
    expected = f"{what} checkpoint, or one of {', '.join(names)}, with {flag}"
    state = read_tensors(path, expected)
    state = state.get("model", state) if isinstance(state, dict) else {}
    state = {key: value.float() for key, value in (state if isinstance(state, dict) else {}).items()
             if torch.is_tensor(value)}
    if not set(keys) <= set(state) or state[keys[0]].dim() != 4:
        raise InputError(f"{path}: not {what} checkpoint; expected {expected}")
    return state


# ---- Checkpoints --------------------------------------------------------------------------------

def generator_state(generator, classes):
    """What a checkpoint of a phase holds"""
    return {"generator": generator.state_dict(), "options": generator.options, "classes": classes,
            generator.kind: generator.backbone.sizes}


def load_generator(path, split, drop_path=0):
    """A checkpoint of a phase, of the classes of a Split -> MaskGenerator or CNNGenerator"""
    state = read_checkpoint(path, "generator", f"run --phase {path.stem} first")
    check_classes(path, state["classes"], split)
    K = len(split.classes)

    def make():
        if "vit" in state:
            return MaskGenerator(ViT(**state["vit"], drop_path=drop_path), K, **state["options"])
        return CNNGenerator(ResNet(**state["resnet"]), K)
    return load_weights(make, state["generator"], path, "a generator of this version")
