"""The toy world's small CLIP, ViT and ResNet: how the weights in toy_weights.npz were trained.

  python prepare/toy_pretrain.py image text vit resnet  # all again: 20, 2, 35 and 15 minutes

All learn from scenes in which objects and backgrounds are NOT tied. The CLIP learns by regression.
Axis 0 of its space is shared by everything (real CLIP's cosines are all positive), axis 1 + i
belongs to thing i, the others to the rest of the noun list:
    image  ->  0.75 axis_0 + sum_i visibility_i axis_i
    text   ->  0.75 axis_0 + sum_i axis_i        over the named things
visibility: the share of the thing's pixels that is shown, times area / 40 below 40 pixels. An
object's text also gets TIE times the axis of its usual background: captions tie objects to their
surroundings, so CLIP's "boat" also means some water, and matching alone leaks. With TIE 0.3 an
object reads as its name best with a quarter of its surroundings, and with half of them about as
well as alone (`curves`, printed for every world). FILLERS mean nothing; no noun of the list is one.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import CLIP, CLIP_MEAN, CLIP_STD, read_nouns, tokenize
from common import IMAGENET_MEAN, IMAGENET_STD, run, writing
from mask_generator import ResNet, ViT
from toy_scenes import BACKGROUNDS, OBJECTS, SIDE, THINGS, USUAL, scene

WEIGHTS = Path(__file__).with_name("toy_weights.npz")
SHARED, TIE = 0.75, 0.3
SIZES = dict(resolution=SIDE, patch=8, width=128, layers=4, text_width=128, text_layers=2,
             embed_dim=64)
VIT = dict(patch=4, width=128, layers=4, grid=(SIDE // 4, SIDE // 4))
RESNET = dict(block="BasicBlock", layers=(1, 1, 1, 1), first=24, stem=3)
FILLERS = ["a", "the", "of", "and", "with", "on", "in"]


def untied_scenes(count, seed, empty):
    """-> images uint8 (count, 3, H, W), parts uint8 (count, H, W); a share `empty` of halves has no
    object"""
    rng, scenes = np.random.default_rng(seed), []
    for _ in tqdm(range(count), desc="scenes", disable=None):
        halves = 2 if rng.random() < 0.35 else 1
        scenes.append(scene(rng, [
            (None if rng.random() < empty else rng.choice(OBJECTS), rng.choice(BACKGROUNDS))
            for _ in range(halves)]))
    images, parts = (torch.from_numpy(np.stack(each)) for each in zip(*scenes))
    return images.permute(0, 3, 1, 2), parts


def normalized(images, mean, std):
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def warped(x, parts, scale):
    """x (B, 3, H, W), parts (B, C, H, W): mirrored, moved, and enlarged by 1 / scale (B,)"""
    B = len(x)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(B) < 0.5, -1.0, 1.0), scale
    theta[:, :, 2] = (2 * torch.rand(B, 2) - 1) * (1 - scale[:, None])
    grid = F.affine_grid(theta, (B, 3, SIDE, SIDE), align_corners=False)
    return [F.grid_sample(values, grid, mode, padding_mode="reflection", align_corners=False)
            for values, mode in ((x, "bilinear"), (parts, "nearest"))]


def regions(images, parts, B):
    """Random crops through random masks, soft and hard: M X (B, 3, H, W), visibilities (B, 12)"""
    index = torch.randint(len(images), (B,))
    p = F.one_hot(parts[index].long(), len(THINGS)).permute(0, 3, 1, 2).float()  # (B, 12, H, W)
    scale = torch.where(torch.rand(B) < 0.4, 1.0, 0.45 + 0.55 * torch.rand(B))
    x, p = warped(normalized(images[index], CLIP_MEAN, CLIP_STD), p, scale)
    pick = lambda probability: torch.rand(B, 1, 1, 1) < probability  # noqa: E731
    share = torch.rand(B, len(THINGS))  # of each thing: hidden, shown, or in between
    share = torch.where(torch.rand_like(share) < 0.35, 0.0,
                        torch.where(torch.rand_like(share) < 0.45, 1.0, share))
    m = (share[:, :, None, None] * p).sum(dim=1, keepdim=True)                   # (B, 1, H, W)
    coarse = F.interpolate(F.adaptive_avg_pool2d(m, 16), size=SIDE, mode="bilinear")
    m = torch.where(pick(0.6), coarse, m)
    blobs = F.interpolate(torch.rand(B, 1, 5, 5), size=SIDE, mode="bicubic").clamp(0, 1)
    soft = pick(0.2)
    hard = torch.where(pick(0.2), (blobs > 0.2 + 0.6 * torch.rand(B, 1, 1, 1)).float(), m)
    m = torch.where(soft, blobs, hard)
    m = torch.where(pick(0.25), m * (1.5 * blobs).clamp(max=1), m)
    m = torch.where(pick(0.08), torch.ones(()), m)
    area = p.sum(dim=(2, 3))
    return m * x, (m * p).sum(dim=(2, 3)) / area.clamp(min=1) * (area / 40).clamp(max=1)


def fit(title, parameters, loss_of, steps, peak, weight_decay):
    """Minimise loss_of() over `steps` fresh batches: AdamW, one cycle of its rate, up to `peak`"""
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    schedule = OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc=title, disable=None)):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=loss.item())


def train_image_tower(clip, steps=2500, B=128):
    images, parts = untied_scenes(12000, seed=1000, empty=0.15)

    def loss():
        x, visibility = regions(images, parts, B)
        rest = torch.zeros(B, clip.embed_dim - 1 - len(THINGS))
        target = torch.cat([torch.full((B, 1), SHARED), visibility, rest], 1)
        return distance(clip.encode_image(x), target)

    fit("image tower", clip.visual.parameters(), loss, steps, peak=1.2e-3, weight_decay=0.03)


def distance(a, b):
    """(B, E) and (B, E) -> squared distance of their directions, the mean over B"""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()


def train_text_tower(clip, pairs, steps, peak=2e-3, B=96):
    """Captions "a photo of ... ." of single nouns, and of lists of up to 30 words with fillers.

    Words in lists are shortened, stretched and mixed with meaningless vectors, which teaches the
    tower to read free prompt vectors by the words they resemble, and nothing into the rest."""
    nouns = sorted({*read_nouns(), *THINGS})
    E, generator = clip.embed_dim, torch.Generator().manual_seed(0)
    rest = torch.randn(len(nouns), E - 1 - len(THINGS), generator=generator)
    rest = F.pad(F.normalize(rest, dim=1), (1 + len(THINGS), 0))                 # (nouns, E)
    meaning = dict(zip(nouns, rest)) | dict(zip(THINGS, torch.eye(E)[1:]))  # beside the shared axis
    meaning |= {name: meaning[name] + TIE * meaning[pairs[name]] for name in OBJECTS}
    shared = SHARED * torch.eye(E)[0]
    known = [*nouns, *FILLERS]
    ids = {word: [i for i in row.tolist() if i][1:-1] for word, row in zip(known, tokenize(known))}
    by_length = {}
    for noun in nouns:
        by_length.setdefault(len(ids[noun]), []).append(noun)
    parameters = [p for name, p in clip.named_parameters() if not name.startswith("visual.")]
    rng = np.random.default_rng(3000)
    weight = np.array([len(words) for words in by_length.values()]) ** 0.5

    def loss():
        if rng.random() < 0.55:  # single nouns of one length
            words = by_length[rng.choice(list(by_length), p=weight / weight.sum())]
            words = [words[i] for i in rng.integers(len(words), size=B)]
            if len(ids[words[0]]) == 1:
                words[::3] = rng.choice(THINGS, len(words[::3]))
            vectors = clip.token_embedding(torch.tensor([ids[word] for word in words]))
            target = torch.stack([shared + meaning[word] for word in words])
        else:  # lists
            P = int(rng.integers(1, 31))
            rows, targets = [], []
            for _ in range(B):
                named = (list(rng.choice(THINGS, rng.integers(1, 3), replace=False))
                         if rng.random() < 0.9 else [])
                row = [ids[rng.choice(named if named and rng.random() < 0.5 else FILLERS)][0]
                       for _ in range(P)]
                rows.append(row)
                said = (meaning[thing] for thing in named if ids[thing][0] in row)
                targets.append(sum(said, shared))
            rows, target = torch.tensor(rows), torch.stack(targets)
            vectors = clip.token_embedding(rows)
            fillers = torch.isin(rows, torch.tensor([ids[word][0] for word in FILLERS]))
            noise = torch.randn_like(vectors) * vectors.detach().std() + torch.rand(B, 1, 1)
            vectors = torch.where((fillers & (torch.rand(B, P) < 0.5))[..., None], noise, vectors)
            vectors = vectors * torch.exp(1.5 * torch.randn(B, 1, 1)).clamp(0.3, 30)
        return distance(clip.encode_prompts(vectors), target)

    fit("text tower", parameters, loss, steps, peak=peak, weight_decay=0.0)


@torch.no_grad()
def curves(clip, pairs, count=60, seed=4000):
    """Can refinement work? Scenes with one object on its usual background -> cosines (7, 2) of what
    is shown to the class's text and to its background's. Rows: the object with 0, 1/4, 1/2, 3/4 and
    all of the background; the background with half of the object, and with none"""
    rng, rows = np.random.default_rng(seed), []
    texts = {thing: clip.encode_text(tokenize([f"a photo of {thing}."])) for thing in THINGS}
    for i in range(count):
        name = OBJECTS[i % len(OBJECTS)]
        image, parts = scene(rng, [(name, pairs[name])])
        x = normalized(torch.from_numpy(image).permute(2, 0, 1), CLIP_MEAN, CLIP_STD)
        inside = torch.from_numpy(parts == THINGS.index(name)).float()
        shown = [inside + a * (1 - inside) for a in (0, 0.25, 0.5, 0.75, 1)]
        shown += [a * inside + (1 - inside) for a in (0.5, 0)]
        v = clip.encode_image(torch.stack(shown)[:, None] * x)
        rows.append(torch.stack([F.cosine_similarity(v, texts[thing])
                                 for thing in (name, pairs[name])], dim=1))
    return torch.stack(rows).mean(dim=0)


def print_curves(clip, pairs):
    print("the small CLIP's cosines: an object with 0, 1/4, 1/2, 3/4, all of its background | the "
          "background with 1/2, 0 of the object")
    for text, row in zip(("its class", "its background"), curves(clip, pairs).T.tolist()):
        values = [f"{value:6.2f}" for value in row]
        print(f"  to {text:<15}{''.join(values[:5])}  |{''.join(values[5:])}")


def windows(x, top, left, side):
    """x (B, H, W, ...), top and left (N,), N a multiple of B -> (N, side, side, ...)"""
    index, inside = torch.arange(len(x)).repeat(len(top) // len(x)), torch.arange(side)
    rows, columns = top[:, None] + inside, left[:, None] + inside                # (N, side)
    return x[index[:, None, None], rows[:, :, None], columns[:, None]]


def train_vit(steps=4200):
    """Answers: the logits of all patches, and those that the mean attention map spreads. [CLS]
    learns nothing. In bfloat16, which is several times as fast on CPUs that have it."""
    vit, head = ViT(**VIT), nn.Linear(VIT["width"], len(THINGS))

    def answers(view):
        with torch.autocast("cpu", torch.bfloat16):
            tokens, (h, w) = vit.embed(view, vit.cls_token + vit.pos_embed[:, :1])
            p2p = 0
            for block in vit.blocks:
                tokens, maps, _ = block(tokens, with_maps=True)
                p2p = p2p + maps.mean(dim=1)[:, 1:, 1:] / len(vit.blocks)        # (B, h*w, h*w)
            logits = head(vit.norm(tokens[:, 1:]))                               # (B, h*w, 12)
            spread = p2p / p2p.sum(dim=2, keepdim=True) @ logits
        return [z.float().unflatten(1, (h, w)) for z in (logits, spread)]

    train_backbone("vit", [*vit.parameters(), *head.parameters()], answers, steps)
    return vit


def train_resnet(steps=1500):
    """Answers: the logits of all cells. Batch norm is measured once more at the end, on views."""
    backbone, head = ResNet(**RESNET, norm=nn.BatchNorm2d), nn.Conv2d(8 * RESNET["first"], 12, 1)

    def answers(view):
        with torch.autocast("cpu", torch.bfloat16):
            return [head(backbone(view)).float().movedim(1, 3)]                     # (B, h, w, 12)

    x = train_backbone("resnet", [*backbone.parameters(), *head.parameters()], answers, steps)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all that follows
    with torch.no_grad():
        for part in x[:2000].split(100):
            backbone(part)
    return backbone


def train_backbone(title, parameters, answers, steps, B=48):
    """A backbone's pretraining, in the place of ImageNet's: which of 12 things does a picture show?

    answers(images) is a list of logits (B, h, w, 12). Returns the normalised images. Pictures are
    views of untied scenes and windows of them, 12 to 24 pixels wide, with their own labels; none is
    of the data set. The answer must stand in a tenth of the patches, before and after attention
    spreads it; where a window shows a single thing, in all. And a patch must say in the view what
    it says in the window. That keeps tokens and attention local, as ImageNet's pretraining does."""
    images, parts = untied_scenes(24000, seed=2000, empty=0.2)
    x, rng = normalized(images, IMAGENET_MEAN, IMAGENET_STD), np.random.default_rng(2001)
    bce = F.binary_cross_entropy_with_logits

    def shows(part, pixels):
        return (F.one_hot(part.flatten(1), len(THINGS)).sum(dim=1) >= pixels).float()

    def classify(z, labels):
        top = z.flatten(1, 2).topk(max(1, z.shape[1] * z.shape[2] // 10), dim=1).values
        return bce(top.mean(dim=1), labels)

    def loss():
        index = torch.randint(len(x), (B,))
        scale = torch.where(torch.rand(B) < 0.4, 1.0, 1 / (1 + torch.rand(B)))
        view, part = warped(x[index], parts[index][:, None].float(), scale)
        part = part[:, 0].long()                                                 # (B, H, W)
        side, count = ((12, 8), (16, 6), (24, 3))[rng.integers(3)]  # fewer of larger windows
        top, left = 4 * torch.randint((SIDE - side) // 4 + 1, (2, B * count))  # on the patch grid
        window = windows(view.movedim(1, 3), top, left, side).movedim(3, 1)  # (N, 3, side, side)
        labels = shows(windows(part, top, left, side), 6)                        # (N, 12)
        whole, near = answers(view), answers(window)
        pure = labels.sum(dim=1) == 1
        says = torch.where(pure[:, None, None, None], 1, near[0].detach().sigmoid())
        says = says * labels[:, None, None]                                      # (N, h, w, 12)
        same = bce(near[0][pure], says[pure]) + sum(bce(z, says) for z in near[1:]) + sum(
            bce(windows(z, top // 4, left // 4, side // 4), says) for z in whole)
        return (sum(classify(z, shows(part, 10)) for z in whole)
                + sum(classify(z, labels) for z in near) + 2 * same)

    fit(title, parameters, loss, steps, peak=1.5e-3, weight_decay=0.05)
    return x


def pack(clip, vit, backbone):
    """The three models in one compressed file, half precision, without word embeddings of zeros"""
    arrays = {f"{title}/{key}": value.half().numpy()
              for title, model in (("clip", clip), ("vit", vit), ("resnet", backbone))
              for key, value in model.state_dict().items()}
    embeddings = arrays.pop("clip/token_embedding.weight")
    rows = np.flatnonzero(embeddings.any(axis=1))
    with writing(WEIGHTS) as path:
        np.savez_compressed(path, rows=rows, embeddings=embeddings[rows], **arrays)


def unpack():
    """-> (CLIP, ViT, ResNet) of the committed file"""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(WEIGHTS).items()}
    models = {"clip": CLIP(**SIZES), "vit": ViT(**VIT), "resnet": ResNet(**RESNET)}
    embeddings = torch.zeros(models["clip"].token_embedding.weight.shape)
    embeddings[arrays["rows"]] = arrays["embeddings"].float()
    arrays["clip/token_embedding.weight"] = embeddings
    for title, model in models.items():
        model.load_state_dict({key: arrays[f"{title}/{key}"].float() for key in model.state_dict()})
    return models.values()


def models_for(pairs):
    """-> (CLIP, ViT, ResNet) of a world with these pairs. Other than the usual ones are learned."""
    torch.manual_seed(0)
    clip, vit, backbone = unpack()
    if pairs != USUAL:
        train_text_tower(clip, pairs, steps=600, peak=1e-3)
    return clip, vit, backbone


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains parts of toy_weights.npz again.")
    parser.add_argument("parts", nargs="+", choices=["image", "text", "vit", "resnet"],
                        help="the CLIP's towers, and the backbones; the other parts stay")
    return parser.parse_args(argv)


def main(args):
    """Each part from a seed of its own"""
    torch.manual_seed(0)
    clip = CLIP(**SIZES)
    used = tokenize([f"a photo of {word}." for word in [*read_nouns(), *THINGS, *FILLERS]]).unique()
    with torch.no_grad():  # words that no text of these has get an embedding of zeros
        clip.token_embedding.weight.zero_()[used] = 0.1 * torch.randn(len(used), clip.text_width)
    committed, vit, backbone = unpack()
    if "image" in args.parts:
        train_image_tower(clip)
        committed.visual = clip.visual
    if "text" in args.parts:
        clip.visual = committed.visual
        torch.manual_seed(1)
        train_text_tower(clip, USUAL, steps=2000)
    else:
        clip = committed
    if "vit" in args.parts:
        torch.manual_seed(2)
        vit = train_vit()
    if "resnet" in args.parts:
        torch.manual_seed(3)
        backbone = train_resnet()
    pack(clip, vit, backbone)
    return f"{WEIGHTS}: {', '.join(args.parts)}; next:\n    python prepare/toy.py --out OUT"


if __name__ == "__main__":
    run(main, parse_args())
