"""What the toy world's photos show: six objects on six backgrounds, drawn at random.

A "thing" is an object or a background, backgrounds first.
"""
import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # H and W of a photo
DRAW = 4 * SIDE  # objects are drawn at four times the size and averaged down
BACKGROUNDS = ["water", "rails", "sky", "grass", "road", "table"]
OBJECTS = ["boat", "train", "bird", "cow", "car", "bottle"]  # each on the background above it
THINGS = BACKGROUNDS + OBJECTS
USUAL = dict(zip(OBJECTS, BACKGROUNDS))


# ---- Drawing -------------------------------------------------------------------------------------
# An object is a list of (polygon, colour) in [-1, 1] x [-1, 1], x to the right and y down.

def any_colour(rng):
    hsv = rng.random(), rng.uniform(0.4, 1), rng.uniform(0.4, 1)
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(*hsv))


def box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def oval(x, y, rx, ry):
    turns = [2 * math.pi * i / 24 for i in range(24)]
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
    return [(box(-1, -0.55, 1, 0.5), body), (box(-1, 0.12, 1, 0.24), any_colour(rng)),
            *windows, *wheels]


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
    spots = [(oval(rng.uniform(-0.5, 0.4), rng.uniform(-0.25, 0.2),
                   rng.uniform(0.1, 0.2), rng.uniform(0.08, 0.16)), (55, 40, 35)) for _ in range(4)]
    return [*legs, (box(-0.75, -0.4, 0.62, 0.4), coat), *spots,
            (oval(0.75, -0.5, 0.25, 0.27), (222, 205, 195)),
            (oval(0.86, -0.4, 0.12, 0.1), (240, 160, 150)),
            ([(-0.75, -0.35), (-0.9, 0.25), (-0.8, 0.25), (-0.68, -0.2)], (150, 130, 120))]


def car(rng):
    body = any_colour(rng)
    wheels = [(oval(x, 0.45, radius, radius), (grey, grey, grey)) for x in (-0.55, 0.55)
              for radius, grey in ((0.24, 25), (0.1, 190))]
    return [([(-0.62, -0.05), (-0.4, -0.6), (0.3, -0.6), (0.62, -0.05)], body),
            ([(-1, -0.08), (0.85, -0.08), (1, 0.1), (1, 0.42), (-1, 0.42)], body),
            ([(-0.48, -0.08), (-0.32, -0.48), (-0.06, -0.48), (-0.06, -0.08)], (205, 225, 240)),
            ([(0.04, -0.08), (0.04, -0.48), (0.25, -0.48), (0.46, -0.08)], (205, 225, 240)),
            *wheels]


def bottle(rng):
    glass = any_colour(rng)
    return [(box(-0.15, -0.98, 0.15, -0.8), any_colour(rng)),
            ([(-0.13, -0.8), (0.13, -0.8), (0.15, -0.45), (0.36, -0.15), (0.36, 0.98),
              (-0.36, 0.98), (-0.36, -0.15), (-0.15, -0.45)], glass),
            (box(-0.36, 0.15, 0.36, 0.6), (242, 238, 222))]


def smooth_noise(rng, cells):
    """Values in [0, 1], (H, W): random numbers on a cells x cells grid, interpolated."""
    grid = Image.fromarray((255 * rng.random((cells, cells))).astype(np.uint8))
    return np.asarray(grid.resize((SIDE, SIDE), Image.BICUBIC), np.float32) / 255


def shade(rng, base, spread, pattern):
    """A pattern in [0, 1] (H, W) -> (H, W, 3), around a colour that itself varies by `spread`"""
    base = np.array(base, np.float32) + rng.uniform(-spread, spread, 3)
    return base * (0.65 + 0.7 * pattern[..., None])


def water(rng):
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    turns = rng.uniform(6, 9) * y + 1.6 * smooth_noise(rng, 5) + rng.uniform(-0.5, 0.5) * x
    wave = np.sin(2 * np.pi * turns)
    return shade(rng, (45, 90, 185), 22, 0.5 + 0.35 * wave)


def rails(rng):
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    sleepers = np.sin(2 * np.pi * (rng.uniform(9, 12) * x + rng.random())) > 0.2
    image = shade(rng, (128, 104, 84), 18, 0.55 * smooth_noise(rng, 32) + 0.45 * sleepers)
    for rail in rng.uniform(0.1, 0.3) + np.array([0.0, 0.2, 0.45, 0.65]):
        image[np.abs(y - rail) < 0.018] = 195 + rng.uniform(-20, 20)
    return image


def sky(rng):
    cloud = np.clip(2.2 * smooth_noise(rng, 6) - 0.9, 0, 1)[..., None]
    return shade(rng, (130, 180, 225), 22, np.full((SIDE, SIDE), 0.5)) * (1 - cloud) + 245 * cloud


def grass(rng):
    pattern = 0.25 + 0.3 * smooth_noise(rng, 40) + 0.25 * rng.random((SIDE, SIDE))
    return shade(rng, (70, 140, 60), 25, pattern)


def road(rng):
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    image = shade(rng, (92, 92, 98), 16, 0.35 + 0.3 * rng.random((SIDE, SIDE)))
    starts = rng.uniform(0.05, 0.3) + np.array([0, 0.35, 0.7])
    lines = [y - start + 0.08 * (x - 0.5) * rng.uniform(-1, 1) for start in starts]
    for line in lines:
        dashes = np.sin(2 * np.pi * (4 * x + rng.random())) > -0.2
        image[(np.abs(line) < 0.018) & dashes] = 228
    return image


def table(rng):
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    grain = np.sin(2 * np.pi * (rng.uniform(2, 4) * (y + 0.15 * x) + 5 * smooth_noise(rng, 4)))
    return shade(rng, (165, 110, 62), 22, 0.5 + 0.25 * grain)


PAINTERS = dict(water=water, rails=rails, sky=sky, grass=grass, road=road, table=table,
                boat=boat, train=train, bird=bird, cow=cow, car=car, bottle=bottle)


def paint(rng, name, half, canvas, parts):
    """Draw an object at a random place, size, tilt and side onto canvas (RGB, DRAW x DRAW), and its
    number in THINGS onto parts (grey). half: 0 or 1, the side it keeps to, or None."""
    size, tilt = rng.uniform(0.5, 0.8) * DRAW / 2, math.radians(rng.uniform(-12, 12))
    side = rng.choice([-1, 1])
    if name == "bottle":
        tilt *= 2
    cx, cy = rng.uniform(0.32, 0.68, 2) * DRAW
    if half is not None:
        size, cx = 0.72 * size, (0.27 + 0.46 * half + rng.uniform(-0.03, 0.03)) * DRAW
    sin, cos = math.sin(tilt), math.cos(tilt)
    for polygon, colour in PAINTERS[name](rng):
        points = [(side * x * size, y * size) for x, y in polygon]
        points = [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in points]
        ImageDraw.Draw(canvas).polygon(points, fill=colour)
        ImageDraw.Draw(parts).polygon(points, fill=THINGS.index(name))


def scene(rng, pairs):
    """One or two (object or None, background) pairs, side by side -> the image uint8 (H, W, 3), and
    parts uint8 (H, W): the number in THINGS of what a pixel shows"""
    ground = PAINTERS[pairs[0][1]](rng)                                          # (H, W, 3)
    parts = np.full((SIDE, SIDE), THINGS.index(pairs[0][1]), np.uint8)
    if len(pairs) == 2:
        y, x = np.mgrid[:SIDE, :SIDE] / SIDE
        right = x + rng.uniform(-0.3, 0.3) * (y - 0.5) + 0.12 * (smooth_noise(rng, 4) - 0.5) > 0.5
        ground = np.where(right[..., None], PAINTERS[pairs[1][1]](rng), ground)
        parts[right] = THINGS.index(pairs[1][1])
    canvas, parts = (Image.fromarray(array).resize((DRAW, DRAW), Image.NEAREST)
                     for array in (np.clip(ground, 0, 255).astype(np.uint8), parts))
    for half, (name, _) in enumerate(pairs):
        if name is not None:
            paint(rng, name, half if len(pairs) == 2 else None, canvas, parts)
    image = np.asarray(canvas.resize((SIDE, SIDE), Image.BOX), np.float32)
    image = image + rng.normal(0, 4, (SIDE, SIDE, 3))
    parts = np.asarray(parts)[2::4, 2::4].copy()  # a pixel belongs to the thing at its centre
    return np.clip(image, 0, 255).astype(np.uint8), parts
