"""One photo, one mask, no generator: why matching leaks, and what refinement does about it.

The mask is a coarse grid of logits, up-sampled. It minimises L_match [eq. 1], then L_total [eq. 3]
with a background word, or a prompt of train_cam.py. Reads no mask. Writes OUT.gif, the mask after
each fifth step, and OUT.png, three states of it on paper.

  python experiments/one_photo.py --clip runs/toy/clip.pt --class boat --background water \
      --image runs/toy/data/images/train_00144.jpg
  python experiments/one_photo.py --image mine.jpg --class dog --background grass    # real CLIP
"""
import argparse
import sys
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import class_texts, load_clip
from common import InputError, read_checkpoint, read_image, run, writing
from drawing import FONT, HEAT, as_picture, grid
from mask_generator import scaled_input
from train_cam import clip_view, cosine, match_loss, refine_loss


# ---- The method on one photo ---------------------------------------------------------------------

def optimise(clip, X, u_f, u_b, steps):
    """X (1, 3, R, R), u_f and u_b (1, E), steps of each loss -> masks (2 steps + 1, 1, R, R)"""
    torch.manual_seed(0)
    masks, half = [], clip.visual.patch // 2
    z = torch.zeros(1, 1, 8, 8, requires_grad=True)           # logits of a coarse mask
    optimizer = torch.optim.Adam([z], lr=0.1)
    for step in range(2 * steps + 1):
        M = F.interpolate(z, size=X.shape[2:], mode="bilinear").sigmoid()        # (1, 1, R, R)
        masks.append(M.detach())

        # Without shifts of up to half a patch the mask fits noise that only CLIP responds to
        shift = torch.randint(-half, half + 1, (2,)).tolist()
        x, m = X.roll(shift, (2, 3)), M.roll(shift, (2, 3))
        v_f = clip.encode_image(m * x)                        # kept region      # (1, E)
        v_b = clip.encode_image((1 - m) * x)                  # dropped region   # (1, E)

        loss = match_loss(v_f, v_b, u_f, lambda_b=0.75)                          # [eq. 1]
        if step >= steps:
            loss = loss + 1.0 * refine_loss(v_f, u_b)                            # [eq. 3]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat(masks)


# ---- The picture ---------------------------------------------------------------------------------

def draw(X, masks, n, cosines):
    """X (3, R, R), masks (N, 1, R, R), cosines {name: (N,)} -> the picture of step n"""
    figure, half = Figure((7, 6), layout="constrained"), len(masks) // 2
    axes = figure.subplot_mosaic([["photo", "mask", "kept"], 3 * ["cosines"]])
    for name, x in (("photo", as_picture(X)), ("mask", masks[n, 0].numpy()),
                    ("kept", as_picture(masks[n] * X))):
        axes[name].imshow(x, HEAT, vmin=0, vmax=1)
        axes[name].set(xticks=[], yticks=[])
        axes[name].set_title(name, fontsize=FONT)
    ax = axes["cosines"]
    for name, ys in cosines.items():
        ax.plot(ys[:n + 1], lw=3, label=name)
    ax.axvline(half, color="grey")
    low, high = (end(torch.stack([*cosines.values()])).item() for end in (torch.min, torch.max))
    ax.set(xlim=(0, 2 * half), ylim=(low - 0.02, high + 0.15 * (high - low)))
    for x, loss in ((0.5, "L_match"), (1.5, "L_match + L_refine")):
        ax.text(x * half, high + 0.05 * (high - low), loss, ha="center", fontsize=FONT,
                color="black" if (n <= half) == (x < 1) else "0.8")
    ax.set_xlabel("step", fontsize=FONT)
    ax.set_ylabel("cosine", fontsize=FONT)
    figure.legend(loc="outside lower center", ncols=3, fontsize=FONT - 3)
    figure.savefig(png := BytesIO(), dpi=100)
    return Image.open(png).convert("RGB")


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Optimises the mask of one photo through CLIP.")
    add, group = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--clip", default="ViT-B/32", help="a CLIP by name (default ViT-B/32), or a checkpoint")
    add("--image", required=True, help="a photo")
    add("--class", dest="name", required=True, help="what the mask should keep")
    group.add_argument("--background", help="a word for what comes with it")
    group.add_argument("--prompts", help="or learned prompts, OUT/prompts.pt, for --class")
    add("--steps", type=int, default=100, help="of each loss (default 100)")
    add("--out", default="one_photo", help="OUT.gif and OUT.png (default one_photo)")
    return parser.parse_args(argv)


def main(args):
    clip = load_clip(args.clip)
    X = clip_view(clip, scaled_input(read_image(args.image), 1, 1, 10 ** 6))     # (1, 3, R, R)
    u_f, u_b = class_texts(clip, [args.name, args.background or ""]).split(1)    # (1, E) twice
    if args.prompts:
        state = read_checkpoint(args.prompts, "u_b", "train_cam.py --phase prompts writes it")
        if state["record"]["clip"] != clip.sha256 or args.name not in state["classes"]:
            raise InputError(f"{args.prompts}: expected the --clip that made it, and a --class of "
                             + ", ".join(state["classes"]))
        u_b = state["u_b"][state["classes"].index(args.name)][None]              # (1, E)
    masks = optimise(clip, X, u_f, u_b, args.steps)                              # (n, 1, R, R)
    v_f, v_b = (clip.encode_image(x) for x in (masks * X, (1 - masks) * X))      # (n, E) twice
    word = args.background or "prompt"
    cosines = {f"kept, {args.name}": cosine(v_f, u_f), f"dropped, {args.name}": cosine(v_b, u_f),
               f"kept, {word}": cosine(v_f, u_b)}  # those in the losses

    frames = [draw(X[0], masks, n, cosines) for n in range(0, len(masks), 5)]
    palette = frames[len(frames) // 2].quantize(255)  # one for all: what stays takes no space
    first, *others = [frame.quantize(palette=palette, dither=0) for frame in frames]
    duration = len(frames) * [100]
    duration[args.steps // 5] = duration[-1] = 2000  # rests: refinement begins, the end
    with writing(f"{args.out}.gif") as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, loop=0, duration=duration)
    states = [0, args.steps, len(masks) - 1]
    grid(Path(f"{args.out}.png"), [[masks[n, 0].numpy() for n in states],
                                   [as_picture(masks[n] * X[0]) for n in states]],
         ("start", "after L_match", "after L_match\n+ L_refine"), ("mask", "kept"),
         [3 * [""], [f"{args.name} {cosines[f'kept, {args.name}'][n]:.2f}, "
                     f"{word} {cosines[f'kept, {word}'][n]:.2f}" for n in states]])
    return f"{args.out}.gif: the mask after each fifth step; {args.out}.png: three states of it"


if __name__ == "__main__":
    run(main, parse_args())
