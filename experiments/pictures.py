"""What the scripts of this folder draw with. The same data gives the same bytes."""
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import writing

INK, FONT, LINE = (40, 40, 40), ImageFont.load_default(11), 14
HEAT = LinearSegmentedColormap.from_list("heat", np.array([  # of CAMs 0, 1/4, 1/2, 3/4, 1
    (20, 20, 90), (30, 90, 200), (90, 200, 120), (250, 220, 60), (220, 40, 30)]) / 255)


def save_gif(figures, path):
    """Figures of matplotlib -> a GIF; the last one stays for 3 seconds. One palette for all, from
    the one in the middle, and no dithering: what does not change takes no space."""
    frames = []
    for figure in figures:
        figure.savefig(png := BytesIO(), format="png")
        frames.append(Image.open(png).convert("RGB"))
    palette = frames[len(frames) // 2].quantize(255)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with writing(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[100] * (len(frames) - 1) + [3000])


def sheet(rows, path, head=(), side=128, lines=0, bars=()):
    """rows of (picture, text below it of so many lines) -> a PNG with a line of headings, and below
    it colour bars (colour map, least, greatest value, label)"""
    W, H = side + 8, side + 6 + LINE * lines
    width, top = max(map(len, rows)) * W, LINE + 4 + len(rows) * H
    picture = Image.new("RGB", (width, top + 56 * bool(bars)), "white")
    pen = ImageDraw.Draw(picture)
    for column, text in enumerate(head):
        pen.text((column * W + 4, 2), text, INK, FONT)
    for y, row in enumerate(rows):
        for x, (cell, text) in enumerate(row):
            at = (x * W + 4, LINE + 4 + y * H)
            how = Image.NEAREST if max(cell.size) <= side else Image.LANCZOS
            picture.paste(ImageOps.contain(cell.convert("RGB"), (side, side), how), at)
            pen.text((at[0], at[1] + side + 1), text, INK, FONT)
    for i, bar in enumerate(bars):
        part = width // len(bars)
        picture.paste(colour_bar(*bar, part), (i * part, top))
    with writing(path) as temporary:
        picture.save(temporary)


def colour_bar(colours, low, high, label, width):
    """-> picture, 56 pixels high"""
    figure = Figure((width / 100, 0.56), dpi=100)
    axes = figure.add_axes((15 / width, 0.72, 1 - 30 / width, 0.22))
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours), cax=axes,
                          orientation="horizontal")
    bar.ax.tick_params(labelsize=7, length=2, pad=1)
    bar.set_label(label, fontsize=8, labelpad=1)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def plot(path, *panels, width=5.2):
    """Panels side by side -> a PNG. Of a panel: curves {name: (xs, ys)}, or {name: (xs, ys,
    deviations)}, None for a single seed, a hollow point; x, y: labels; title; ticks {x: text}; mark
    (x, text), a vertical line; low, high: of the y axis"""
    figure = Figure((width * len(panels), 3.3), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, (name, (xs, ys, *deviations)) in enumerate(panel["curves"].items()):
            for bars in deviations:
                axes.errorbar(xs, ys, [bar or 0 for bar in bars], fmt="none", ecolor=f"C{i}",
                              capsize=3)
                single = [j for j, bar in enumerate(bars) if bar is None]
                axes.plot([xs[j] for j in single], [ys[j] for j in single], "o", color=f"C{i}",
                          mfc="white", zorder=3)
            axes.plot(xs, ys, "o-" if len(xs) < 25 else "-", color=f"C{i}", ms=4, label=name)
        if "mark" in panel:
            axes.axvline(panel["mark"][0], color="0.4", ls="--", lw=1, label=panel["mark"][1])
        if "ticks" in panel:
            axes.set_xticks(list(panel["ticks"]), panel["ticks"].values())
        axes.set_ylim(panel.get("low", 0), panel.get("high"))
        axes.set_xlabel(panel["x"])
        axes.set_ylabel(panel["y"])
        axes.set_title(panel.get("title"), fontsize=10)
        axes.grid(color="0.9")
        axes.legend(fontsize=8)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})


def heat(photo, cams):
    """photo uint8 (H, W, 3) in grey under the strongest of its CAMs (n, H, W): blue 0, red 1"""
    cam = cams.amax(dim=0).numpy() if len(cams) else np.zeros(photo.shape[:2])
    return Image.fromarray((0.35 * photo.mean(axis=2, keepdims=True)
                            + 0.65 * HEAT(cam, bytes=True)[..., :3]).astype(np.uint8))


def in_colours(values, colours, low, high):
    """values (H, W) -> picture, in the colours that `colours` has from low to high"""
    colours = ScalarMappable(Normalize(low, high), colours)
    return Image.fromarray(colours.to_rgba(np.asarray(values), bytes=True)[..., :3].copy())
