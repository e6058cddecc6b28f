"""The toy world: PASCAL VOC 2012 in miniature, with a small CLIP and a small pretrained ViT, made from a seed.

    python tests/toy_world.py --out runs/toy [--train 600] [--val 200] [--seed 0]
    python tests/toy_world.py --retrain             # trains the committed weights again (about 30 minutes, 2 cores)

It carries the paper's story: objects nearly always stand on "their" background (boat on water, train on rails, ...),
so image-level labels cannot tell the two apart, a classifier's CAM leaks, and the learned prompts must name what leaks.
Writes OUT/VOC2012 (the VOC layout, JPEG photos, XML boxes, palette masks), OUT/clip.pt (OpenAI's state-dict layout) and
OUT/vit.pth (DeiT's layout). The six scripts read these files like any others.

S is the image side in pixels; a "thing" is an object or a background; things are numbered backgrounds first.
"""
import argparse
import colorsys
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

S = 64
DRAW = 4 * S  # objects are drawn at four times the size and averaged down
BACKGROUNDS = ["water", "rails", "sky", "grass", "road", "table"]
OBJECTS = ["boat", "train", "bird", "cow", "car", "bottle"]
THINGS = BACKGROUNDS + OBJECTS


# ---------------------------------------------------------------------------------------------------------------------
# Drawing. An object is a list of (polygon, colour) in a frame of [-1, 1] x [-1, 1], x to the right and y down.
# ---------------------------------------------------------------------------------------------------------------------

def any_colour(rng, saturation=(0.4, 1.0), value=(0.4, 1.0)):
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def oval(x, y, rx, ry, points=24):
    turns = [2 * math.pi * i / points for i in range(points)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]


def boat(rng):
    mast = rng.uniform(-0.1, 0.2)
    return [([(-1, 0.35), (1, 0.35), (0.7, 0.85), (-0.7, 0.85)], any_colour(rng)),
            (box(mast - 0.06, -0.95, mast + 0.06, 0.4), (30, 26, 30)),
            ([(mast + 0.1, -0.85), (mast + 0.1, 0.25), (0.85, 0.25)], (245, 245, 250)),
            ([(mast - 0.1, -0.65), (mast - 0.1, 0.25), (-0.7, 0.25)], (225, 225, 235))]


def train(rng):
    body = any_colour(rng)
    windows = [(box(x, -0.35, x + 0.28, -0.02), (225, 240, 250)) for x in (-0.82, -0.38, 0.06, 0.5)]
    wheels = [(oval(x, 0.58, 0.14, 0.14), (25, 25, 25)) for x in (-0.72, -0.24, 0.24, 0.72)]
    return [(box(-1, -0.55, 1, 0.5), body), (box(-1, 0.12, 1, 0.24), any_colour(rng)), *windows, *wheels]


def bird(rng):
    body, wing = any_colour(rng), any_colour(rng)
    return [([(-0.5, 0.05), (-1, -0.3), (-0.95, 0.35)], wing),
            (oval(-0.05, 0.1, 0.6, 0.34), body), (oval(0.55, -0.15, 0.27, 0.25), body),
            ([(0.78, -0.22), (1, -0.1), (0.76, -0.02)], (245, 180, 40)),
            ([(-0.35, 0.1), (0.2, 0.05), (-0.3 + rng.uniform(-0.2, 0.3), -0.9)], wing),
            (oval(0.62, -0.2, 0.06, 0.06), (10, 10, 10))]


def cow(rng):
    coat = (238, 232, 226)
    legs = [(box(x, 0.2, x + 0.14, 0.9), (215, 205, 200)) for x in (-0.68, -0.42, 0.2, 0.44)]
    spots = [(oval(rng.uniform(-0.5, 0.4), rng.uniform(-0.25, 0.2), rng.uniform(0.1, 0.2), rng.uniform(0.08, 0.16)),
              (55, 40, 35)) for _ in range(4)]
    return [*legs, (box(-0.75, -0.4, 0.62, 0.4), coat), *spots,
            (oval(0.75, -0.5, 0.25, 0.27), (222, 205, 195)), (oval(0.86, -0.4, 0.12, 0.1), (240, 160, 150)),
            ([(-0.75, -0.35), (-0.9, 0.25), (-0.8, 0.25), (-0.68, -0.2)], (150, 130, 120))]


def car(rng):
    body = any_colour(rng)
    wheels = [part for x in (-0.55, 0.55) for part in
              ((oval(x, 0.45, 0.24, 0.24), (25, 25, 25)), (oval(x, 0.45, 0.1, 0.1), (190, 190, 190)))]
    return [([(-0.62, -0.05), (-0.4, -0.6), (0.3, -0.6), (0.62, -0.05)], body),
            ([(-1, -0.08), (0.85, -0.08), (1, 0.1), (1, 0.42), (-1, 0.42)], body),
            ([(-0.48, -0.08), (-0.32, -0.48), (-0.06, -0.48), (-0.06, -0.08)], (205, 225, 240)),
            ([(0.04, -0.08), (0.04, -0.48), (0.25, -0.48), (0.46, -0.08)], (205, 225, 240)), *wheels]


def bottle(rng):
    glass = any_colour(rng)
    return [(box(-0.15, -0.98, 0.15, -0.8), any_colour(rng)),
            ([(-0.13, -0.8), (0.13, -0.8), (0.15, -0.45), (0.36, -0.15), (0.36, 0.98), (-0.36, 0.98), (-0.36, -0.15),
              (-0.15, -0.45)], glass),
            (box(-0.36, 0.15, 0.36, 0.6), (242, 238, 222))]


def smooth_noise(rng, cells, size=S):
    """Values in [0, 1], (size, size): random numbers on a cells x cells grid, interpolated."""
    grid = Image.fromarray((255 * rng.random((cells, cells))).astype(np.uint8))
    return np.asarray(grid.resize((size, size), Image.BICUBIC), np.float32) / 255


def shade(rng, base, spread, pattern):
    """Colour a pattern in [0, 1] (S, S) around a base colour that itself varies by `spread`. Returns (S, S, 3)."""
    base = np.array(base, np.float32) + rng.uniform(-spread, spread, 3)
    return base * (0.65 + 0.7 * pattern[..., None])


def water(rng):
    y, x = np.mgrid[:S, :S] / S
    wave = np.sin(2 * np.pi * (rng.uniform(6, 9) * y + 1.6 * smooth_noise(rng, 5) + rng.uniform(-0.5, 0.5) * x))
    return shade(rng, (45, 90, 185), 22, 0.5 + 0.35 * wave)


def rails(rng):
    y, x = np.mgrid[:S, :S] / S
    sleepers = np.sin(2 * np.pi * (rng.uniform(9, 12) * x + rng.random())) > 0.2
    image = shade(rng, (128, 104, 84), 18, 0.55 * smooth_noise(rng, 32) + 0.45 * sleepers)
    for rail in rng.uniform(0.1, 0.3) + np.array([0.0, 0.2, 0.45, 0.65]):
        image[np.abs(y - rail) < 0.018] = 195 + rng.uniform(-20, 20)
    return image


def sky(rng):
    cloud = np.clip(2.2 * smooth_noise(rng, 6) - 0.9, 0, 1)[..., None]
    return shade(rng, (130, 180, 225), 22, np.full((S, S), 0.5)) * (1 - cloud) + 245 * cloud


def grass(rng):
    return shade(rng, (70, 140, 60), 25, 0.25 + 0.3 * smooth_noise(rng, 40) + 0.25 * rng.random((S, S)))


def road(rng):
    y, x = np.mgrid[:S, :S] / S
    image = shade(rng, (92, 92, 98), 16, 0.35 + 0.3 * rng.random((S, S)))
    lines = [(y - at + 0.08 * (x - 0.5) * rng.uniform(-1, 1)) for at in rng.uniform(0.05, 0.3) + np.array([0, 0.35, 0.7])]
    for line in lines:
        image[(np.abs(line) < 0.018) & (np.sin(2 * np.pi * (4 * x + rng.random())) > -0.2)] = 228
    return image


def table(rng):
    y, x = np.mgrid[:S, :S] / S
    grain = np.sin(2 * np.pi * (rng.uniform(2, 4) * (y + 0.15 * x) + 5 * smooth_noise(rng, 4)))
    return shade(rng, (165, 110, 62), 22, 0.5 + 0.25 * grain)


def paint(rng, name, parts, canvas):
    """Draw object `name` at a random place, size, tilt and side onto canvas (an RGB image, DRAW x DRAW).
    Marks its pixels in `parts` (a single-channel image of the same size) with its number in THINGS."""
    size, tilt, side = rng.uniform(0.5, 0.8) * DRAW / 2, math.radians(rng.uniform(-12, 12)), rng.choice([-1, 1])
    if name == "bottle":
        tilt *= 2
    centre = rng.uniform(0.32, 0.68, 2) * DRAW
    if parts.info.get("half") is not None:  # one of two: keep to its own side
        size, centre[0] = 0.72 * size, (0.27 + 0.46 * parts.info["half"] + rng.uniform(-0.03, 0.03)) * DRAW
    for polygon, colour in globals()[name](rng):
        points = [(side * x * size, y * size) for x, y in polygon]
        points = [(centre[0] + x * math.cos(tilt) - y * math.sin(tilt), centre[1] + x * math.sin(tilt) + y * math.cos(tilt))
                  for x, y in points]
        ImageDraw.Draw(canvas).polygon(points, fill=colour)
        ImageDraw.Draw(parts).polygon(points, fill=THINGS.index(name))


def scene(rng, pairs):
    """A picture of one or two (object or None, background) pairs, side by side.
    Returns image uint8 (S, S, 3) and parts uint8 (S, S), the number in THINGS of what is seen at each pixel."""
    ground, parts = globals()[pairs[0][1]](rng), np.full((S, S), THINGS.index(pairs[0][1]), np.uint8)
    if len(pairs) == 2:
        y, x = np.mgrid[:S, :S] / S
        right = x + rng.uniform(-0.3, 0.3) * (y - 0.5) + 0.12 * (smooth_noise(rng, 4) - 0.5) > 0.5
        ground = np.where(right[..., None], globals()[pairs[1][1]](rng), ground)
        parts[right] = THINGS.index(pairs[1][1])
    big = lambda array: Image.fromarray(array).resize((DRAW, DRAW), Image.NEAREST)  # noqa: E731
    canvas, parts = big(np.clip(ground, 0, 255).astype(np.uint8)), big(parts)
    for half, (name, _) in enumerate(pairs):
        if name is not None:
            parts.info["half"] = half if len(pairs) == 2 else None
            paint(rng, name, parts, canvas)
    image = np.asarray(canvas.resize((S, S), Image.BOX), np.float32) + rng.normal(0, 4, (S, S, 3))
    # a pixel belongs to the thing at its centre
    return np.clip(image, 0, 255).astype(np.uint8), np.asarray(parts)[2::4, 2::4].copy()
