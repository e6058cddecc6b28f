"""What the scripts of this folder draw with. The same data gives the same bytes."""
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import writing

INK, GREY, FONT = (40, 40, 40), (225, 225, 225), ImageFont.load_default(11)
COLOURS = [(40, 90, 180), (215, 100, 30), (50, 140, 80), (150, 70, 160), (120, 120, 120),
           (190, 40, 60), (0, 140, 150)]
# Of CAMs 0, 1/4, 1/2, 3/4, 1
HEAT = np.array([(20, 20, 90), (30, 90, 200), (90, 200, 120), (250, 220, 60), (220, 40, 30)])


def save(picture, path):
    with writing(path) as temporary:
        picture.save(temporary)


def save_gif(figures, path):
    """Figures of matplotlib -> a GIF; the last one stays for 3 seconds. One palette for all, from
    the one in the middle, and no dithering: what does not change takes no space."""
    frames = []
    for figure in figures:
        figure.savefig(png := BytesIO(), format="png")
        frames.append(Image.open(png).convert("RGB"))
    palette = frames[len(frames) // 2].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with writing(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[100] * (len(frames) - 1) + [3000])


def sheet(rows, path, head=(), side=128, lines=0):
    """rows of (picture, text below it of so many lines) -> a PNG with a line of headings"""
    line = 14
    W, H = side + 8, side + 6 + line * lines
    picture = Image.new("RGB", (max(map(len, rows)) * W, line + 4 + len(rows) * H), "white")
    pen = ImageDraw.Draw(picture)
    for column, text in enumerate(head):
        pen.text((column * W + 4, 2), text, INK, FONT)
    for y, row in enumerate(rows):
        for x, (cell, text) in enumerate(row):
            at = (x * W + 4, line + 4 + y * H)
            picture.paste(ImageOps.contain(cell.convert("RGB"), (side, side), Image.NEAREST), at)
            pen.text((at[0], at[1] + side + 1), text, INK, FONT)
    save(picture, path)


def plot(curves, x_label, y_label, ticks=None, marks=(), size=(520, 300), low=None, high=None):
    """curves {name: (xs, ys)} or {name: (xs, ys, deviations)} -> picture. ticks {x: text}, five
    even ones if None; marks [(x, text)], vertical lines; low, high: of the y axis, or of the ys"""
    (W, H), (left, top) = size, (52, 24)
    right, bottom = W - 12, H - 34
    xs, ys = ([value for curve in curves.values() for value in curve[i]] for i in (0, 1))
    x0, x1 = min(xs), max(xs)
    low, high = min(ys) if low is None else low, max(ys) if high is None else high
    high = high if high > low else low + 1

    def place(x, y):
        y = min(max(y, low), high)
        return (left + (right - left) * (x - x0) / ((x1 - x0) or 1),
                bottom - (bottom - top) * (y - low) / (high - low))

    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for y in np.linspace(low, high, 5):
        pen.line([place(x0, y), place(x1, y)], GREY)
        pen.text((left - 6, place(x0, y)[1]), f"{y:.{0 if high > 20 else 2}f}", INK, FONT, "rm")
    for x, text in (ticks or {x: f"{x:g}" for x in np.linspace(x0, x1, 5).round()}).items():
        pen.text((place(x, low)[0], bottom + 4), text, INK, FONT, anchor="ma")
    for x, text in marks:
        pen.line([place(x, low), place(x, high)], (150, 150, 150))
        pen.text((place(x, low)[0] + 3, bottom - (bottom - top) / 4), text, INK, FONT)
    at = left
    for (name, (xs, ys, *deviations)), colour in zip(curves.items(), COLOURS):
        pen.line([place(x, y) for x, y in zip(xs, ys)], colour, 2)
        for x, y in zip(xs, ys) if len(xs) < 25 else ():
            pen.circle(place(x, y), 2, colour)
        for x, y, deviation in zip(xs, ys, *deviations) if deviations else ():
            pen.line([place(x, y - deviation), place(x, y + deviation)], colour)
        pen.text((at, 5), name, colour, FONT)
        at += pen.textlength(name, FONT) + 14
    pen.text((right, H - 14), x_label, INK, FONT, anchor="ra")
    pen.text((6, H - 14), y_label, INK, FONT)
    return picture


def heat(photo, cams):
    """photo uint8 (H, W, 3) in grey under the strongest of its CAMs (n, H, W): blue 0, red 1"""
    cam = cams.amax(dim=0).numpy() if len(cams) else np.zeros(photo.shape[:2], np.float32)
    at = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(cam, at, channel) for channel in HEAT.T], axis=-1)
    grey = photo.mean(axis=2, keepdims=True)
    return Image.fromarray((0.35 * grey + 0.65 * colour).astype(np.uint8))


def blend(photo, values):
    """photo (H, W, 3) in grey under values (H, W) in [-1, 1]: red above 0, blue below"""
    v = np.clip(values, -1, 1)[..., None]
    colour = np.where(v > 0, (230, 40, 30), (30, 70, 220))
    grey = 127 + 0.5 * photo.mean(axis=2, keepdims=True)
    return Image.fromarray(((1 - abs(v)) * grey + abs(v) * colour).astype(np.uint8))


def grown(array, size):
    """(h, w) -> float array of this size, bilinear"""
    array = torch.as_tensor(array, dtype=torch.float32)[None, None]
    return F.interpolate(array, size=size, mode="bilinear")[0, 0].numpy()
