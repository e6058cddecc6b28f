"""The mask generator S of SemPLeS: an image becomes class activation maps (paper, section 3.1). A ViT, or a CNN.

The paper takes its generator from WeakTr: a DeiT trunk with one class token per class, and three quantities:

    coarse = conv3x3(patch tokens)                                       coarse CAM                  [eq. W1]
    A      = mean_m w_m A_m,  w = sigmoid(MLP(head features))            adaptive attention fusion   [eq. W2]
    fine   = A_p2p (A_c2p * relu(coarse))                                fine CAM                    [eq. W3]

A_m are the attention maps of all L * A heads, A_c2p the rows from class tokens to patches, A_p2p those from patches to
patches. Three image-level predictions follow (class tokens, pooled coarse, pooled fine), which the classification phase
trains; the fine one trains the fusion alone. Class tokens and patch tokens are read before the trunk's last norm. fine is the
CAM, never negative; train_cam.region_masks scales it to the mask M in [0, 1] that CLIP judges. All as in WeakTr, but for two:
    [detail 1] class_attention=False leaves A_c2p out of W3, for trunks whose [CLS] has learned nothing to attend to.
    [detail 2] Where relu leaves nothing of a map, the gradient that would raise it passes all the same: it can come back.

The CNN is a ResNet with the class activation map of Zhou et al. (CVPR 2016), as IRN and CLIMS have it. With f_c its last features:

    score_k = sum_c w_kc f_c,   CAM_k = relu(score_k),   prediction_k = mean of score_k over all places          [eq. Z1]

Reads DeiT checkpoints ({"model": state dict with timm's names}) and torchvision's ResNets; sizes are read off the shapes.

    python mask_generator.py                                     # downloads DeiT-S once and prints what the file holds
    python mask_generator.py --vit deit_tiny --image photo.jpg   # and its five ImageNet classes
"""
import argparse
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import transforms
from torchvision.models import get_model_weights, resnet
from torchvision.ops import FrozenBatchNorm2d, stochastic_depth

from clip_model import InputError, Linear, fetch_weights, load_tensors, read_image, run

# Dimension key: B images, K classes, H W pixels, h w grid of patches or CNN places, L layers, A heads, D ViT width,
#                T tokens (K + h*w).

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_WIDTH = 64  # channels of one attention head, the same in every DeiT
DEIT = "https://dl.fbaipublicfiles.com/deit/"
VITS = {"deit_tiny": "deit_tiny_patch16_224-a1311bcf.pth", "deit_small": "deit_small_patch16_224-cd65a155.pth",
        "deit_base": "deit_base_patch16_224-b5f2ef4d.pth"}  # named by the head of their SHA-256
RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]  # torchvision's first weights (V1), on which published CAMs rest


# ---------------------------------------------------------------------------------------------------------------------
# The trunk: a Vision Transformer (Dosovitskiy et al. 2021), named as DeiT's checkpoints name it
# ---------------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """A_m = softmax(q k^T / sqrt(64)) for every head m; what it writes is A_m v, all heads side by side, times a matrix."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x, with_maps):
        """x (B, T, D) -> (B, T, D); with_maps: also the maps (B, A, T, T)."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)      # each (B, A, T, 64)
        if with_maps:
            maps = (q * HEAD_WIDTH ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)               # (B, A, T, T)
            x = maps @ v
        else:
            maps, x = None, F.scaled_dot_product_attention(q, k, v)                             # (B, A, T, 64)
        return self.proj(x.transpose(1, 2).reshape(B, T, D)), maps


class Block(nn.Module):
    """x <- x + attention(norm(x));  x <- x + MLP(norm(x)),  MLP(z) = W_2 gelu(W_1 z)

    In training both terms lose a share `dropout` of their values, and are left out for a share `drop_path` of the images."""

    def __init__(self, width, drop_path=0.0, dropout=0.0, eps=1e-6):
        super().__init__()
        self.drop_path, self.dropout = drop_path, dropout
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, 4 * width), "fc2": Linear(4 * width, width)})

    def drop(self, y):
        return stochastic_depth(F.dropout(y, self.dropout, self.training), self.drop_path, "row", self.training)

    def forward(self, x, with_maps=False):
        """x (B, T, D) -> (B, T, D), the maps (B, A, T, T) and what the heads wrote (B, T, A, 64)"""
        y, maps = self.attn(self.norm1(x), with_maps)
        x = x + self.drop(y)
        return x + self.drop(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))), maps, y.unflatten(2, (-1, HEAD_WIDTH))


class ViT(nn.Module):
    """A DeiT of any size. grid is (h, w) of the position embeddings, not of the images: those may have any size.

    .sizes holds what ViT(**sizes) needs to build the same trunk, without the checkpoint's own classes, as plain types."""

    def __init__(self, patch=16, width=384, layers=12, grid=(14, 14), num_classes=0, drop_path=0.0):
        super().__init__()
        self.patch, self.width, self.grid = patch, width, tuple(grid)
        self.sizes = {"patch": patch, "width": width, "layers": layers, "grid": list(grid)}
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, drop_path * i / max(1, layers - 1)) for i in range(layers))  # from 0 up
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else None

    def position(self, h, w):
        """Position embeddings of an h x w patch grid, (1, h*w, D): bicubic from the checkpoint's grid."""
        pos = self.pos_embed[:, 1:]
        if (h, w) != self.grid:
            pos = pos.transpose(1, 2).reshape(1, self.width, *self.grid)
            # size=, not scale_factor=: a rounded scale samples at shifted places
            pos = F.interpolate(pos, size=(h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return pos

    def forward(self, image, class_tokens=None, pool=None):
        """image (B, 3, H, W) ImageNet-normalised; class_tokens (1, K, D) take the place of the one [CLS] token.

        An image whose sides are no multiples of the patch is padded below and at the right with the mean colour (0).
        Returns tokens (B, K + h*w, D) before the last norm, class tokens first, and the grid (h, w); with pool,
        "max" or "mean", also the maps (B, L*A, T, T) and head features (B, L*A, 64): what the heads wrote, pooled over tokens."""
        B, _, H, W = image.shape
        image = F.pad(image, (0, -W % self.patch, 0, -H % self.patch))
        x = self.patch_embed["proj"](image)                                                     # (B, D, h, w)
        h, w = x.shape[2:]
        if class_tokens is None:
            class_tokens = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([class_tokens.expand(B, -1, -1), x.flatten(2).transpose(1, 2) + self.position(h, w)], dim=1)
        all_maps, all_features = [], []
        for block in self.blocks:
            x, maps, written = block(x, with_maps=pool is not None)                             # (B, T, D)
            if pool:
                all_maps.append(maps)
                all_features.append(written.amax(dim=1) if pool == "max" else written.mean(dim=1))  # (B, A, 64)
        if pool:
            return x, (h, w), torch.cat(all_maps, dim=1), torch.cat(all_features, dim=1)
        return x, (h, w)

    def classify(self, image):
        """Logits of the checkpoint's own classes, (B, num_classes)."""
        return self.head(self.norm(self(image)[0][:, 0]))


def load_vit(path, drop_path=0.0):
    """A name of VITS (downloaded once) or a DeiT checkpoint ({"model": state dict} or a bare state dict, timm's names) -> ViT.

    float32; patch, width, depth and grid come from the shapes; every key is used. Raises InputError for anything else."""
    if path in VITS:
        path = fetch_weights(DEIT + VITS[path], VITS[path][-12:-4])
    keys = ("patch_embed.proj.weight", "blocks.0.norm1.weight", "pos_embed", "cls_token")
    state = read_weights(path, keys, "a DeiT", "--vit")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)  # DeiT's grids are square
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    vit = ViT(patch, width, layers, (side, side), state["head.weight"].shape[0] if "head.weight" in state else 0,
              drop_path)
    load_all(vit, state, path, "a DeiT", "--vit")
    return vit


# ---------------------------------------------------------------------------------------------------------------------
# The generator: class tokens, convolutional head, adaptive attention fusion (WeakTr)
# ---------------------------------------------------------------------------------------------------------------------

class AttentionFusion(nn.Module):
    """A = mean_m w_m A_m,  w = sigmoid(MLP(head features)): a weight in (0, 1) for every head of every image.   [eq. W2]"""

    def __init__(self, num_maps, reduction=8):
        super().__init__()
        self.pool = nn.Sequential(nn.Linear(HEAD_WIDTH, 8), nn.Linear(8, 1))
        self.excite = nn.Sequential(nn.Linear(num_maps, max(1, num_maps // reduction), bias=False), nn.ReLU(),
                                    nn.Linear(max(1, num_maps // reduction), num_maps, bias=False), nn.Sigmoid())

    def forward(self, maps, features):
        """maps (B, L*A, T, T), features (B, L*A, 64) -> fused attention (B, T, T)."""
        w = self.excite(self.pool(features).squeeze(-1))                                        # (B, L*A)
        return (w[:, None] @ maps.flatten(2)).view(len(maps), *maps.shape[2:]) / maps.shape[1]  # (B, T, T)


class Rectify(torch.autograd.Function):
    """relu of maps (B, K, h, w); one that is zero everywhere still passes back the gradient that would raise it. [detail 2]

    With a plain relu a class whose map has sunk to zero in all its images would get no gradient any more, and stay there."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        dead = x.amax(dim=(2, 3), keepdim=True) <= 0                                            # (B, K, 1, 1)
        return gradient * ((x > 0) | (dead & (gradient < 0)))


class MaskGenerator(nn.Module):
    """S: X (B, 3, H, W) -> CAMs (B, K, h, w), with the three image-level predictions that train it.

        coarse = conv3x3(patch tokens)  [eq. W1]      fine = A_p2p (A_c2p * relu(coarse))  [eq. W3]"""

    kind, predictions = "vit", ("tokens", "coarse", "fine")

    def __init__(self, vit, num_classes, class_attention=True, pool="max", reduction=8):
        super().__init__()
        self.options = {"class_attention": class_attention, "pool": pool, "reduction": reduction}
        self.trunk, self.num_classes, self.class_attention, self.pool = vit, num_classes, class_attention, pool
        vit.head, vit.norm = None, nn.Identity()  # its ImageNet classes are not ours; S reads its tokens before that norm
        # Two parameters of which only the sum counts: AdamW moves that at twice the rate, as in WeakTr.
        self.class_tokens = nn.Parameter(vit.cls_token.detach().repeat(1, num_classes, 1))     # (1, K, D)
        self.class_positions = nn.Parameter(vit.pos_embed[:, :1].detach().repeat(1, num_classes, 1))
        vit.cls_token.requires_grad_(False)  # replaced by the class tokens
        self.head = nn.Conv2d(vit.width, num_classes, 3, padding=1)
        self.fusion = AttentionFusion(len(vit.blocks) * vit.width // HEAD_WIDTH, reduction)

    def train_through_clip(self):
        """What matching and refinement train: head and fusion; trunk and class tokens stay. Returns self."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self.fusion.requires_grad_(True)
        return self

    def forward(self, image):
        """image (B, 3, H, W) ImageNet-normalised -> cam (B, K, h, w), non-negative, and logits (3, B, K): class tokens, pooled
        coarse and pooled fine."""
        tokens, (h, w), maps, features = self.trunk(image, self.class_tokens + self.class_positions, self.pool)
        K = self.num_classes
        coarse = self.head(tokens[:, K:].transpose(1, 2).unflatten(2, (h, w)))  # [eq. W1]      # (B, K, h, w)
        A = self.fusion(maps.detach(), features.detach())                       # [eq. W2]      # (B, T, T)
        fine = self.spread(A, coarse)                                           # [eq. W3]      # (B, K, h, w)
        of_fusion = self.spread(A, coarse.detach())  # the same: its loss in classification trains the fusion alone
        logits = torch.stack([tokens[:, :K].mean(dim=2), coarse.mean(dim=(2, 3)), of_fusion.mean(dim=(2, 3))])
        return fine, logits

    def spread(self, A, coarse):
        """fine = A_p2p (A_c2p * relu(coarse))  [eq. W3]: A (B, T, T), coarse (B, K, h, w) -> (B, K, h, w)"""
        K = self.num_classes
        A_c2p, A_p2p = A[:, :K, K:], A[:, K:, K:]                                               # (B, K, h*w), (B, h*w, h*w)
        kept = Rectify.apply(coarse).flatten(2)                                                 # (B, K, h*w)
        if self.class_attention:                                                # [detail 1]
            kept = A_c2p * kept
        return (kept @ A_p2p.transpose(1, 2)).view_as(coarse)


# ---------------------------------------------------------------------------------------------------------------------
# The CNN: a ResNet (He et al. 2016) and the classic class activation map
# ---------------------------------------------------------------------------------------------------------------------

class ResNet(nn.Module):
    """torchvision's ResNet, of any size, up to its last features: (B, 3, H, W) -> (B, width, h, w), h = H / patch rounded up.

    patch is 16: the last stage keeps its resolution, by dilation instead of stride. A conv1 of 3x3, as ResNets for small images
    have it, has stride 1 and no pooling behind it: patch is 4 then. Batch norm stands still, as its statistics do in IRN, since
    batches are small."""

    def __init__(self, block="Bottleneck", layers=(3, 4, 6, 3), first=64, stem=7, norm=FrozenBatchNorm2d):
        super().__init__()
        self.sizes = {"block": block, "layers": list(layers), "first": first, "stem": stem}
        small, block = stem == 3, getattr(resnet, block)
        self.patch, width = 4 if small else 16, first
        self.conv1 = nn.Conv2d(3, first, stem, stride=1 if small else 2, padding=stem // 2, bias=False)
        self.bn1 = norm(first)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        for i, count in enumerate(layers):
            stride, out, blocks = 1 if i == 0 else 2, block.expansion * first * 2**i, []
            for j in range(count):
                shortcut = None
                if j == 0 and (stride, width) != (1, out):
                    shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), norm(out))
                blocks.append(block(width, first * 2**i, stride if j == 0 else 1, shortcut, norm_layer=norm))
                width = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.width = width
        for conv in (module for module in self.layer4.modules() if isinstance(module, nn.Conv2d)):
            if conv.stride == (2, 2):
                conv.stride = (1, 1)
            elif conv.kernel_size == (3, 3):  # sees twice as many places now: looks at every other one
                conv.dilation = conv.padding = (2, 2)

    def forward(self, image):
        x = self.pool(self.bn1(self.conv1(image)).relu())
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class CNNGenerator(nn.Module):
    """S as a CNN, with the interface of MaskGenerator:  score_k = sum_c w_kc f_c,  CAM_k = relu(score_k)      [eq. Z1]"""

    kind, predictions = "resnet", ("pooled",)

    def __init__(self, trunk, num_classes):
        super().__init__()
        self.options, self.trunk = {}, trunk
        self.head = nn.Conv2d(trunk.width, num_classes, 1, bias=False)

    def train_through_clip(self):
        """What matching and refinement train: all of it, the trunk at its own low rate (trunk_lr), as CLIMS does. Returns self."""
        return self

    def forward(self, image):
        """image (B, 3, H, W) ImageNet-normalised -> cam (B, K, h, w), non-negative, and logits (1, B, K)."""
        score = self.head(self.trunk(image))                                    # [eq. Z1]      # (B, K, h, w)
        return Rectify.apply(score), score.mean(dim=(2, 3))[None]


def load_resnet(path):
    """A name of RESNETS (downloaded once) or a torchvision state dict -> ResNet; its classifier fc.* is left out.

    float32; every other key is used. Raises InputError for anything else."""
    if path in RESNETS:
        url = get_model_weights(path).IMAGENET1K_V1.url
        path = fetch_weights(url, url.rpartition("-")[2][:-4])
    state = read_weights(path, ("conv1.weight", "bn1.weight", "layer4.0.conv1.weight"), "a ResNet", "--resnet")
    stages = re.findall(r"\blayer(\d)\.(\d+)\.conv1\.weight", " ".join(state))
    first, _, stem, _ = state["conv1.weight"].shape
    trunk = ResNet("Bottleneck" if "layer1.0.conv3.weight" in state else "BasicBlock",
                   [sum(stage == number for stage, _ in stages) for number in "1234"], first, stem)
    load_all(trunk, {key: value for key, value in state.items() if not key.startswith("fc.") and "num_batches" not in key},
             path, "a ResNet", "--resnet")
    return trunk


# ---------------------------------------------------------------------------------------------------------------------

def read_weights(path, keys, what, flag):
    """A checkpoint {"model": state dict} or a bare state dict, which has these keys among others -> the state dict, float32."""
    try:
        state = load_tensors(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {what} checkpoint, or a name to download: "
                         f"{', '.join([*VITS, *RESNETS])}; pass it with {flag}") from None
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a PyTorch checkpoint ({type(error).__name__}); expected {what} checkpoint; "
                         "download it again") from None
    state = state.get("model", state) if isinstance(state, dict) else {}
    state = {key: value.float() for key, value in state.items() if torch.is_tensor(value)} if isinstance(state, dict) else {}
    missing = [key for key in keys if key not in state]
    if missing or state[keys[0]].dim() != 4:  # the first is a convolution
        raise InputError(f"{path}: not {what} checkpoint (no {(missing or keys)[0]}); expected timm's names for a DeiT, "
                         f"torchvision's for a ResNet; pass such a file with {flag}")
    return state


def load_all(model, state, path, what, flag):
    """Into the model goes every key of the file, none is missing; else InputError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: not {what} checkpoint ({str(error).splitlines()[1].strip()}); expected exactly its keys; "
                         f"pass such a file with {flag}") from None


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Shows what a DeiT checkpoint holds, and what it sees in a photo.")
    parser.add_argument("--vit", default="deit_small", metavar="CKPT", help="a DeiT checkpoint in its official format, or a name "
                        f"to download once: {', '.join(VITS)} (default: %(default)s)")
    parser.add_argument("--image", metavar="FILE", help="a photo to classify with the checkpoint's own ImageNet head")
    return parser.parse_args(argv)


def main(args):
    vit = load_vit(args.vit).eval()
    print(f"{args.vit}: patch {vit.patch}, width {vit.width}, {len(vit.blocks)} layers, grid {vit.grid}, "
          f"{sum(p.numel() for p in vit.parameters()):,} parameters")
    if args.image:
        if vit.head is None:
            raise InputError(f"{args.vit}: has no classification head; pass a checkpoint that kept it")
        side = vit.grid[0] * vit.patch
        view = transforms.Compose([transforms.Resize(side * 8 // 7, transforms.InterpolationMode.BICUBIC),
                                   transforms.CenterCrop(side), transforms.ToTensor(),
                                   transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        with torch.no_grad():
            top = vit.classify(view(read_image(args.image))[None]).softmax(dim=1)[0].topk(5)
        for probability, index in zip(*top):
            print(f"class {index:4d}  {probability:.3f}")


if __name__ == "__main__":
    run(main, parse_args())
