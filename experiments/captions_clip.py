"""Can a small CLIP that is made as CLIP is carry the toy world? It sees pictures and captions only.

Both towers start from noise and learn by InfoNCE: the mean cross-entropy, over rows and columns, of
SCALE times the cosines of B pictures and their B captions. Pictures: objects on their usual
background (a share `tie`) or any, empty backgrounds, objects on plain ground; half are cut along a
line, with another picture or one colour behind it. Captions say what is seen; the usual background
is left out as often as it is there (`tie`), and often what hardly shows. Training never sees the
drawing code's masks; eval.py and the curves do. The control: refinement with the prompts permuted,
the boat has the bottle's and so on. Writes OUT/clip.pt, unless it is there, and OUT/seedS.

  python experiments/captions_clip.py --out runs/captions [--seed 1]  # 21 + 20 minutes, a busy core
"""
import argparse
import json
import shlex
from math import cos, log, pi, sin
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from demo import step  # comes first: it makes the folders of the scripts known
from clip_model import (
    CLIP, CLIP_MEAN, CLIP_STD, class_texts, load_clip, nearest_words, tokenize)
from common import read_checkpoint, run, save
from toy_pretrain import SIZES, fit, normalized, print_curves
from toy_scenes import BACKGROUNDS, DRAW, OBJECTS, SIDE, THINGS, USUAL, paint, scene

# B pictures or captions, E width of the features
PICTURES, PLAIN, EMPTY, B, SCALE = 8000, 0.25, 0.25, 128, 20
ROUNDS = ((1300, 2e-3, 0.5), (400, 1e-3, 0.4))  # steps, rate, tie
COLOURS = dict(white=(245, 245, 245), grey=(123, 117, 104), black=(20, 20, 20), red=(200, 40, 40),
               green=(60, 160, 60), blue=(50, 80, 190), yellow=(230, 210, 70), pink=(240, 160, 190))
PARTS = dict(boat=("sail", "mast"), train=("windows", "wheels"), bird=("wing", "beak"),
             cow=("spots", "legs"), car=("wheels", "door"), bottle=("label", "cork"))
OPENINGS = [*3 * ["a photo of", "a photo of a"], "a picture of a", "an image of the",
            "a drawing of", "look at this", "here is my", "one more", "", "a", "the"]
FILLERS = ("today taken with my old camera by friend in the morning evening and very nice view "
           "from our trip again , it is")
READ = sorted({*THINGS, *COLOURS, *sum(PARTS.values(), ()), "wall", "photo", "picture", "image",
               "drawing", "camera", "friend", "morning", "evening", "view", "trip"})
CHANGES = {"prompts": "--set lambda_t=0.1", "refine": "--set lambda_r=0.5"}  # of the toy recipe


def picture(rng, tie):
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
              (str(x), USUAL[x] if rng.random() < tie else str(rng.choice(BACKGROUNDS)))
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


def said(rng, tie, name, ground, share):
    """What somebody says of a place of which this share of the picture is left: words, or none"""
    r, plain, usual = rng.random(), ground in COLOURS, USUAL.get(name) == ground
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


def caption(rng, tie, places, long):
    """places: [(object or None, ground, share), ...]; long: with 22 words about other things"""
    told = [words for place in places if (words := said(rng, tie, *place))]
    told = [told[i] for i in rng.permutation(len(told))][:2 if rng.random() < 0.75 else 1]
    words = f" {rng.choice(['and', 'and a', 'next to a', ','])} ".join(told)
    more = 22 * long + (rng.integers(1, 4) if rng.random() < 0.5 else 0)
    words = [words, *rng.choice(FILLERS.split(), more)]
    return " ".join([rng.choice(OPENINGS), *words]) + rng.choice([".", ".", ".", "!", ""])


def new_clip(vocabulary):
    """Each tower's features begin in a cone, by its last norm's bias; the cones' cosine is 0.5."""
    clip = CLIP(**SIZES | {"width": 64}, vocabulary=vocabulary)
    a, b = torch.linalg.qr(torch.randn(clip.embed_dim, 2)).Q.T                   # (E,), (E,)
    for norm, W, axis in ((clip.visual.ln_post, clip.visual.proj, a),
                          (clip.ln_final, clip.text_projection, 0.5 * a + 0.75 ** 0.5 * b)):
        norm.bias.data = torch.linalg.lstsq(W.data.T, 8 * axis[:, None]).solution[:, 0]  # 8 = √E
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.1)
    clip.logit_scale.requires_grad_(False).fill_(log(SCALE))
    return clip


def train_clip(seed):
    """-> state dict; words of no caption get embeddings of 0"""
    words = " ".join([*OPENINGS, FILLERS, *READ, "on in front of and next to a , . ! with"])
    used, state = tokenize(words.split()).unique(), None
    for number, (steps, rate, tie) in enumerate(ROUNDS):
        rng = np.random.default_rng(seed + number)
        torch.manual_seed(seed + number)
        images, places = zip(*(picture(rng, tie) for _ in range(PICTURES)))
        x = normalized(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), CLIP_MEAN, CLIP_STD)
        clip = new_clip(len(used))
        clip.load_state_dict(state or clip.state_dict())

        def loss():
            index = torch.randint(len(x), (B,))
            shown, shares, behind = collages(x, index)
            long = rng.random() < 0.125  # learned prompts are longer than most captions
            captions = [caption(rng, tie, [(*p, share) for p in places[i]]
                                + [(*p, 1 - share) for p in places[j] if j >= 0], long)
                        for i, share, j in zip(index.tolist(), shares.tolist(), behind.tolist())]
            u = clip.encode_text(torch.searchsorted(used, tokenize(captions)))  # [EOT]: the highest
            v, own = clip.encode_image(shown), torch.arange(B)
            logits = SCALE * F.normalize(v, dim=1) @ F.normalize(u, dim=1).T     # (B, B)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

        fit("CLIP", [p for p in clip.parameters() if p.requires_grad], loss, steps, rate, 0.05)
        state = clip.state_dict()
    rows = torch.zeros(49408, clip.text_width).index_copy(0, used, clip.token_embedding.weight.data)
    return state | {"token_embedding.weight": rows}


@torch.no_grad()
def part_curve(clip, count=60):
    """Cosines to the class text (2, 5): the object alone, and on its usual background. Columns: 0,
    1/4, 1/2, 3/4, all of it are seen, cut along a line"""
    rng, rows, u = np.random.default_rng(4000), [], class_texts(clip, OBJECTS)
    for i in range(count):
        k, turn = i % len(OBJECTS), 2 * pi * rng.random()
        image, parts = scene(rng, [(OBJECTS[k], BACKGROUNDS[k])])
        inside = torch.from_numpy(parts == THINGS.index(OBJECTS[k])).float()     # (H, W)
        line = torch.arange(SIDE)[:, None] * sin(turn) + torch.arange(SIDE) * cos(turn)
        ends = [-2 * SIDE, *line[inside > 0].quantile(torch.tensor([0.25, 0.5, 0.75])), 2 * SIDE]
        seen = torch.stack([inside * (line <= end) for end in ends])             # (5, H, W)
        x = normalized(torch.from_numpy(image).permute(2, 0, 1), CLIP_MEAN, CLIP_STD)
        v = clip.encode_image(torch.cat([seen, seen + 1 - inside])[:, None] * x)  # (10, E)
        rows.append(F.cosine_similarity(v, u[k:k + 1]).view(2, 5))
    return torch.stack(rows).mean(dim=0)


def pipeline(folder, path, common):
    """Trainings, CAMs and their scores, by the scripts' command lines: yields stage, scores"""
    prompts = folder / "permuted/prompts.pt"
    for stage in ("cam/classify", "cam/match", "cam/prompts", "cam/refine", "permuted/refine"):
        place, phase = stage.split("/")
        if place == "permuted" and not prompts.is_file():
            state = read_checkpoint(folder / "cam/prompts.pt", "u_b", "run --phase prompts")
            save(prompts, state | {"u_b": state["u_b"].roll(1, dims=0)})
            (prompts.parent / "classify.pt").write_bytes((folder / "cam/classify.pt").read_bytes())
        train = f"{common} --resume --workers 0 --out {path}/{place}"
        step(stage, "train_cam.py", train, f"--phase {phase} {CHANGES.get(phase, '')}")
        if phase != "prompts":
            step(f"CAMs of {stage}", "train_cam.py", train, "--phase export",
                 f"--checkpoint {path}/{stage}.pt --cams {path}/cams/{stage}")
            step(f"Score of {stage}", "eval.py", f"--data {path}/data --split train --oracle-sweep",
                 f"--cams {path}/cams/{stage} --json {path}/cams/{stage}.json")
            yield stage, json.loads((folder / f"cams/{stage}.json").read_text())


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="A small CLIP from pictures and captions alone.")
    parser.add_argument("--out", type=Path, default=Path("runs/captions"), help="for everything")
    parser.add_argument("--seed", type=int, default=0, help="of world and generator")
    parser.add_argument("--clip-seed", type=int, default=100, help="of pictures and CLIP")
    return parser.parse_args(argv)


def main(args):
    file, folder = args.out / "clip.pt", args.out / f"seed{args.seed}"
    if not file.is_file():
        save(file, train_clip(args.clip_seed))
    clip, path = load_clip(file), shlex.quote(str(folder))
    print_curves(clip, USUAL)
    alone, placed = part_curve(clip).double().numpy().round(2).tolist()
    print(f"0, 1/4, 1/2, 3/4, all of the object, to its class: {alone}; on its background {placed}")

    step("The toy world", "prepare/toy.py", f"--out {path} --seed {args.seed}",
         unless=(folder / "vit.pth").is_file())
    scores = dict(pipeline(folder, path, f"--data {path}/data --recipe toy --seed {args.seed} "
                           f"--clip {shlex.quote(str(file))} --vit {path}/vit.pth"))
    print(f"\nCAMs of seed {args.seed}: mIoU at 0.43, and the best (found with masks)")
    for stage, score in scores.items():
        print(f"  {stage:<16}{score['miou']:5.1f} {score['oracle']['miou']:5.1f}")
    u_b = read_checkpoint(folder / "cam/prompts.pt", "u_b", "run --phase prompts")["u_b"]
    print(f"The two of {len(READ)} words that are nearest to each prompt:")
    for name, ((word, near), (second, far)) in zip(OBJECTS, nearest_words(u_b, READ, clip, top=2)):
        print(f"  {name:<8}{word} {near:.3f}, {second} {far:.3f}")


if __name__ == "__main__":
    run(main, parse_args())
