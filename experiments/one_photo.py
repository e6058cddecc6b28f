"""One photo, one mask, no generator: why matching leaks, and what refinement does about it.

The mask is a coarse grid of logits, up-sampled. It minimises L_match [eq. 1], then L_total [eq. 3]
with a background word, or a prompt of train_cam.py, as the toy recipe weights it. Reads no mask.

  python experiments/one_photo.py --clip runs/toy/clip.pt --class bird --background sky
                                  --image runs/toy/data/images/train_00038.jpg
  python experiments/one_photo.py --clip ViT-B/32 --image mine.jpg --class dog --background grass
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import CLIP_MEAN, CLIP_STD, class_texts, load_clip  # noqa: E402
from common import InputError, read_checkpoint, read_image, run  # noqa: E402
from mask_generator import scaled_input  # noqa: E402
from pictures import save_gif  # noqa: E402
from train_cam import (  # noqa: E402
    clip_view, cosine, embed_masked, match_loss, recipe_of, refine_loss)

GRID, LR, EVERY, RECIPE = 8, 0.1, 5, recipe_of("toy", "refine", {})  # EVERY: steps between frames


def optimise(clip, X, u_f, u_b, steps):
    """X (1, 3, R, R), u (1, E), steps of each loss -> masks (frames, 1, R, R)"""
    z, masks, far = torch.zeros(1, 1, GRID, GRID, requires_grad=True), [], clip.visual.patch // 2
    optimizer, random = torch.optim.Adam([z], LR), torch.Generator().manual_seed(0)
    for step in range(2 * steps + 1):
        M = F.interpolate(z, size=X.shape[2:], mode="bilinear").sigmoid()        # (1, 1, R, R)
        masks.append(M.detach())
        # Without shifts, of up to half a patch, the mask fits noise that only CLIP responds to
        shift = torch.randint(-far, far + 1, (2,), generator=random).tolist()
        v_f, v_b = embed_masked(clip, X.roll(shift, (2, 3)), M.roll(shift, (2, 3)))  # (1, E)
        loss = match_loss(v_f, v_b, u_f, RECIPE["lambda_b"])                     # [eq. 1]
        loss = loss + (step >= steps) * RECIPE["lambda_r"] * refine_loss(v_f, u_b)  # [eq. 3]
        z.grad = torch.autograd.grad(loss, z)[0]  # of z alone: CLIP is frozen
        optimizer.step()
    return torch.cat(masks[::EVERY])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Optimises the mask of one photo through CLIP.")
    add, group = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--clip", default="ViT-B/32", help="a CLIP by name (default ViT-B/32), or a checkpoint")
    add("--image", required=True, help="a photo")
    add("--class", dest="name", required=True, help="what the mask shall keep")
    group.add_argument("--background", help="a word for what comes with it")
    group.add_argument("--prompts", help="or learned prompts, OUT/prompts.pt, for --class")
    add("--steps", type=int, default=100, help="of each loss (default 100)")
    add("--out", default="one_photo.gif", help="the GIF (default one_photo.gif)")
    return parser.parse_args(argv)


def main(args):
    photo, clip = read_image(args.image), load_clip(args.clip)
    X = clip_view(clip, scaled_input(photo, 1, 1, 10 ** 6))                      # (1, 3, R, R)
    u_f, u_b = class_texts(clip, [args.name, args.background or ""]).split(1)  # (1, E)
    if args.prompts:
        state = read_checkpoint(args.prompts, "u_b", "train_cam.py --phase prompts writes it")
        if state["record"]["clip"] != clip.sha256 or args.name not in state["classes"]:
            raise InputError(f"{args.prompts}: expected the --clip that made it, and a --class of "
                             + ", ".join(state["classes"]))
        u_b = state["u_b"][state["classes"].index(args.name)][None]              # (1, E)
    masks, b = optimise(clip, X, u_f, u_b, args.steps), args.background or "prompt"
    v_f, v_b = embed_masked(clip, X.expand(len(masks), -1, -1, -1), masks)       # (frames, E)
    curves = {f"sim({region}, {text})": cosine(v, u) for text, u in ((args.name, u_f), (b, u_b))
              for region, v in (("kept", v_f), ("dropped", v_b))}
    seen, figures = torch.cat([X, masks * X]).permute(0, 2, 3, 1), []            # (n, R, R, 3)
    seen = (seen * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)).clamp(0, 1).numpy()
    for i, M in enumerate(masks):
        figures.append(Figure((7, 5.6), dpi=100, layout="constrained"))
        axes = figures[i].subplot_mosaic([["photo", "mask (red: 1)", "kept region"], 3 * ["c"]])
        for (name, ax), picture in zip(axes.items(), (seen[0], M[0].numpy(), seen[1 + i])):
            ax.imshow(picture, "turbo", vmin=0, vmax=1, extent=(0, photo.width, photo.height, 0))
            ax.set(title=name, xticks=[], yticks=[])
        for (name, curve), style in zip(curves.items(), ("C0-", "C0:", "C1-", "C1:")):
            axes["c"].plot(range(0, 2 * args.steps + 1, EVERY), curve, style, label=name)
        axes["c"].axvline(args.steps, color="grey", label="refinement begins")
        axes["c"].axvline(EVERY * i, color="black", label="this picture")
        axes["c"].set(xlabel="step", ylabel="cosine")
        figures[i].legend(loc="outside lower center", ncols=3)
    save_gif(figures, args.out)


if __name__ == "__main__":
    run(main, parse_args())
