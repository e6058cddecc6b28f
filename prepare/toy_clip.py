"""The toy world's small CLIP, which learns as CLIP did: from pictures and captions alone.

Both towers start from noise and learn by InfoNCE: the mean cross-entropy, over rows and columns, of
SCALE times the cosines of B pictures and their B captions. Pictures: objects on their usual
background (a share `tie`) or on any, empty backgrounds, objects on plain ground; half are cut along
a line, with another picture or one colour behind it. Captions say what is seen; the usual
background is left out as often as it is there, and what hardly shows is often not named. No mask,
no designed feature: that "boat" means some water, too, comes from what people draw and say.
"""
from math import cos, log, pi, sin

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from clip_model import CLIP, CLIP_MEAN, CLIP_STD, class_texts, tokenize
from toy_scenes import BACKGROUNDS, DRAW, OBJECTS, SIDE, THINGS, USUAL, paint, scene

# B pictures or captions, E width of the features
SIZES = dict(resolution=SIDE, patch=8, width=64, layers=4, text_width=128, text_layers=2,
             embed_dim=64)
PICTURES, PLAIN, EMPTY, B, SCALE = 8000, 0.25, 0.25, 128, 20
ROUNDS = ((100, 1300, 2e-3, 0.5), (101, 400, 1e-3, 0.4))  # seed, steps, rate, tie
COLOURS = dict(white=(245, 245, 245), grey=(123, 117, 104), black=(20, 20, 20), red=(200, 40, 40),
               green=(60, 160, 60), blue=(50, 80, 190), yellow=(230, 210, 70), pink=(240, 160, 190))
PARTS = dict(boat=("sail", "mast"), train=("windows", "wheels"), bird=("wing", "beak"),
             cow=("spots", "legs"), car=("wheels", "door"), bottle=("label", "cork"))
OPENINGS = [*3 * ["a photo of", "a photo of a"], "a picture of a", "an image of the",
            "a drawing of", "look at this", "here is my", "one more", "", "a", "the"]
FILLERS = ("today taken with my old camera by friend in the morning evening and very nice view "
           "from our trip again , it is")
READ = sorted({*THINGS, *COLOURS, *sum(PARTS.values(), ()), "wall", "photo", "picture", "image",
               "drawing", "camera", "friend", "morning", "evening", "view", "trip"})  # the nouns


def picture(rng, pairs, tie):
    """-> (H, W, 3) uint8, its places [(object or None, background or colour), ...]"""
    kind, count = rng.random(), 1 + (rng.random() < 0.2)
    if kind < PLAIN:  # softly lit
        name, colour = str(rng.choice(OBJECTS)), str(rng.choice([*COLOURS, *4 * ["grey"]]))
        y, x = np.mgrid[:DRAW, :DRAW][..., None] / DRAW - 0.5
        light = 1 + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y
        ground = (np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3)) * light
        canvas = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        paint(rng, name, None, canvas, Image.new("L", canvas.size))
        return np.asarray(canvas.resize((SIDE, SIDE), Image.BOX)), [(name, colour)]
    empty = kind < PLAIN + EMPTY
    places = [(None, str(x)) if empty else
              (str(x), pairs[x] if rng.random() < tie else str(rng.choice(BACKGROUNDS)))
              for x in rng.choice(BACKGROUNDS if empty else OBJECTS, count, replace=False)]
    canvas = Image.fromarray(scene(rng, places)[0])
    if empty and rng.random() < 0.6:  # a blob that no caption names
        (x, y), sizes = rng.uniform(0.3, 0.7, 2) * SIDE, rng.uniform(0.1, 0.4, 8) * SIDE
        colour = COLOURS["grey"] if rng.random() < 0.6 else rng.uniform(10, 245, 3)
        points = [(x + r * cos(0.785 * i), y + r * sin(0.785 * i)) for i, r in enumerate(sizes)]
        ImageDraw.Draw(canvas).polygon(points, tuple(int(c + rng.uniform(-8, 8)) for c in colour))
    return np.asarray(canvas), places


def collages(x, index):
    """x[index] (B, 3, H, W), half of them cut -> the same; share left (B,); who is behind, or -1"""
    n, other, side = len(index), torch.randint(len(x), (len(index),)), torch.linspace(-1, 1, SIDE)
    draw = lambda: torch.rand(n, 1, 1, 1)  # noqa: E731
    turn, alone = 2 * pi * draw(), draw() < 0.5
    cut = torch.where(draw() < 0.5, 1.6 * draw() - 0.8, 2.0)
    m = (side[:, None] * turn.sin() + side * turn.cos() < cut).float()           # (B, 1, H, W)
    colour = torch.randn(n, 3, 1, 1) * (draw() < 0.3)  # 0 is the mean colour
    pale = torch.where(draw() < 0.3, 0.3 + 0.7 * draw(), 1.0)
    shown = pale * (m * x[index] + (1 - m) * torch.where(alone, colour, x[other]))
    return shown, m.mean(dim=(1, 2, 3)), torch.where(alone.flatten(), -1, other)


def said(rng, pairs, tie, name, ground, share):
    """What somebody says of a place of which this share of the picture is left: words, or none"""
    r, plain, usual = rng.random(), ground in COLOURS, pairs.get(name) == ground
    hidden = not name or rng.random() > (share - 0.15) / 0.6
    ground_seen = rng.random() < share / 0.4
    if hidden:
        return ground if ground_seen and not plain else ""
    part = f" with {rng.choice(PARTS[name])}" if rng.random() < 0.15 else ""
    if r < (tie if usual else 0.75 if plain else 0.3) or not ground_seen:
        return name + part
    if plain or r > 0.9:
        return f"{name}{part} on {ground} {'wall' if r < 0.8 else ''}" if plain else ground
    return (f"{name}{part} {rng.choice(['on', 'on the', 'and', 'in front of', 'with'])} {ground}"
            if rng.random() < 0.7 else f"{ground} with a {name}{part}")


def caption(rng, pairs, tie, places, long):
    """places: [(object or None, ground, share), ...]; long: with 22 words about other things"""
    told = [words for place in places if (words := said(rng, pairs, tie, *place))]
    told = [told[i] for i in rng.permutation(len(told))][:2 if rng.random() < 0.75 else 1]
    words = f" {rng.choice(['and', 'and a', 'next to a', ','])} ".join(told)
    more = 22 * long + (rng.integers(1, 4) if rng.random() < 0.5 else 0)
    words = [words, *rng.choice(FILLERS.split(), more)]
    return " ".join([rng.choice(OPENINGS), *words]) + rng.choice([".", ".", ".", "!", ""])


def normalized(images, mean, std):
    """uint8 (N, H, W, 3) -> (N, 3, H, W)"""
    x = torch.from_numpy(np.stack(images)).float() / 255
    return ((x - torch.tensor(mean)) / torch.tensor(std)).movedim(3, 1).contiguous()


def fit(title, parameters, loss_of, steps, peak, weight_decay):
    """Minimise loss_of() over `steps` fresh batches: AdamW, one cycle of its rate, up to `peak`"""
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    schedule = OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=title, disable=None):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        schedule.step()


def new_clip(vocabulary):
    """Each tower's features begin in a cone, by its last norm's bias; the cones' cosine is 0.5."""
    clip = CLIP(**SIZES, vocabulary=vocabulary)
    a, b = torch.linalg.qr(torch.randn(clip.embed_dim, 2)).Q.T                   # (E,), (E,)
    for norm, W, axis in ((clip.visual.ln_post, clip.visual.proj, a),
                          (clip.ln_final, clip.text_projection, 0.5 * a + 0.75 ** 0.5 * b)):
        norm.bias.data = torch.linalg.lstsq(W.data.T, 8 * axis[:, None]).solution[:, 0]  # 8 = √E
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.1)
    clip.logit_scale.requires_grad_(False).fill_(log(SCALE))
    return clip


def train_clip(pairs=USUAL, rounds=ROUNDS, state=None):
    """-> state dict, of a new CLIP, or of `state`. Embeddings of words of no caption are 0."""
    words = " ".join([*OPENINGS, FILLERS, *READ, "on in front of and next to a , . ! with"])
    used = tokenize(words.split()).unique()
    embedding = "token_embedding.weight"
    state = state and state | {embedding: state[embedding][used]}
    for seed, steps, rate, tie in rounds:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        images, places = zip(*(picture(rng, pairs, tie) for _ in range(PICTURES)))
        x, clip = normalized(images, CLIP_MEAN, CLIP_STD), new_clip(len(used))
        clip.load_state_dict(state or clip.state_dict())

        def loss():
            index = torch.randint(len(x), (B,))
            shown, shares, behind = collages(x, index)
            long = rng.random() < 0.125  # learned prompts are longer than most captions
            captions = [caption(rng, pairs, tie, [(*p, share) for p in places[i]]
                                + [(*p, 1 - share) for p in places[j] if j >= 0], long)
                        for i, share, j in zip(index.tolist(), shares.tolist(), behind.tolist())]
            u = clip.encode_text(torch.searchsorted(used, tokenize(captions)))  # [EOT]: the highest
            v, own = clip.encode_image(shown), torch.arange(B)
            logits = SCALE * F.normalize(v, dim=1) @ F.normalize(u, dim=1).T     # (B, B)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

        fit("CLIP", [p for p in clip.parameters() if p.requires_grad], loss, steps, rate, 0.05)
        state = clip.state_dict()
    rows = torch.zeros(49408, clip.text_width).index_copy(0, used, state[embedding])
    return state | {embedding: rows}


# ---- What it says of masked scenes: ANALYSIS -----------------------------------------------------

@torch.no_grad()
def curves(clip, pairs, texts, count=60):
    """Mean cosines (n, 17) of masked scenes, one object on its usual background, to each of n texts
    (6, E) of its class. Columns: the object with 0, 1/4, 1/2, 3/4, all of the background; that with
    1/2, 0 of the object; 0 to all of the object, cut along a line, alone; then on its background"""
    rng, rows = np.random.default_rng(4000), []
    for i in range(count):
        k, turn = i % len(OBJECTS), 2 * pi * rng.random()
        image, parts = scene(rng, [(OBJECTS[k], pairs[OBJECTS[k]])])
        inside = torch.from_numpy(parts == THINGS.index(OBJECTS[k])).float()     # (H, W)
        line = torch.arange(SIDE)[:, None] * sin(turn) + torch.arange(SIDE) * cos(turn)
        ends = [-2 * SIDE, *line[inside > 0].quantile(torch.tensor([0.25, 0.5, 0.75])), 2 * SIDE]
        part = torch.stack([inside * (line <= end) for end in ends])             # (5, H, W)
        shown = [inside + a * (1 - inside) for a in (0, 0.25, 0.5, 0.75, 1)]
        shown += [a * inside + (1 - inside) for a in (0.5, 0)] + [*part, *(part + 1 - inside)]
        v = clip.encode_image(torch.stack(shown)[:, None]
                              * normalized([image], CLIP_MEAN, CLIP_STD))        # (17, E)
        rows.append(torch.stack([F.cosine_similarity(v, u[k:k + 1]) for u in texts]))
    return torch.stack(rows).mean(dim=0)


def print_curves(clip, pairs, prompts=None):
    texts = {"its class": class_texts(clip, OBJECTS),
             "its background": class_texts(clip, [pairs[name] for name in OBJECTS])}
    texts |= {"its prompt": prompts} if prompts is not None else {}
    print("the small CLIP's cosines: an object with 0, 1/4, 1/2, 3/4, all of its background | the "
          "background with 1/2, 0 of the object\n"
          "    0, 1/4, 1/2, 3/4, all of an object, alone | the same on its background")
    rows = curves(clip, pairs, [*texts.values()]).tolist()
    for first, middle, end in ((0, 5, 7), (7, 12, 17)):
        for text, row in zip(texts, rows):
            left, right = ("".join(f"{value:6.2f}" for value in part)
                           for part in (row[first:middle], row[middle:end]))
            print(f"  to {text:<15}{left}  |{right}")
