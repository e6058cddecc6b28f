"""How companion.py and one_photo.py draw: grids of pictures, curves, points. Of the run they know
nothing."""
import sys
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import CLIP_MEAN, CLIP_STD
from common import label_picture, writing

HEAT, SIGNED = colormaps["turbo"], colormaps["RdBu_r"]  # of values from 0 to 1
FONT = 15  # readable where a page shows a picture at half its size


def save(figure, path):
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, bbox_inches="tight", metadata={"Software": None})


def grid(path, rows, head, left=(), texts=(), bars=()):
    """Rows of pictures (PIL, colours (H, W, 3), values (H, W) from 0 to 1, None: a gap) -> a PNG of
    about 800 pixels, none without rows. head: above the columns; left: beside the rows; texts: rows
    of what stands below each picture; bars: (columns, (colours, lowest, highest value, label))"""
    if not rows:
        return
    tall = [max(np.divide(*np.shape(x)[:2]) for x in row if x is not None) for row in rows]
    lines, width = max((1 + x.count("\n") for row in texts for x in row), default=0), len(head)
    inches = (8 - 1.2 * bool(left)) / width * sum(tall) + 0.25 * lines * len(rows) + 1.5
    figure = Figure((8, inches), layout="compressed")
    spec = figure.add_gridspec(len(rows) + 1, width, height_ratios=[*tall, 0.1])
    for y, row in enumerate(rows):
        below = texts[y] if texts else width * [""]
        for x, picture in enumerate(row):
            ax = figure.add_subplot(spec[y, x])
            if picture is not None:
                ax.imshow(picture, HEAT, vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(below[x], fontsize=FONT)
            ax.set_title(head[x] if y == 0 else "", fontsize=FONT)
            if x == 0 and left:
                ax.set_ylabel(left[y], fontsize=FONT, rotation=0, ha="right", va="center")
    for columns, (colours, low, high, label) in bars:
        bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours), ticks=[low, high],
                              cax=figure.add_subplot(spec[-1, columns]), orientation="horizontal")
        bar.ax.tick_params(labelsize=FONT - 2)
        bar.set_label(label, fontsize=FONT)
    save(figure, path)


def plot(path, panels, styles, xs, x, y, pairs=None):
    """panels {title: {name: values at the first xs}} side by side, with the same axes -> a PNG.
    styles: of the curves, in order; pairs {name: {kind: value}}: one more panel, of bars"""
    figure = Figure((8, 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels) + bool(pairs), squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items()):
        for (name, ys), style in zip(curves.items(), styles):
            ax.plot(xs[:len(ys)], ys, style, label=name, lw=1.5 + (style[-1] == "-"))
        ax.set_title(title, fontsize=FONT)
        ax.set_xlabel(x, fontsize=FONT - 2)
        ax.grid(color="0.9")
        ax.sharex(axes[0])
        ax.sharey(axes[0])
        ax.tick_params(labelsize=FONT - 3)
    axes[0].set_ylabel(y, fontsize=FONT)
    for i, values in enumerate((pairs or {}).values()):
        for j, (kind, value) in enumerate(values.items()):
            bar = axes[-1].barh(-i - 0.4 * j, value, 0.35, color=f"C{7 - 4 * j}",
                                label=kind if i == 0 else None)
            axes[-1].bar_label(bar, fmt="%.2f", padding=2, fontsize=FONT - 3)
    if pairs:
        axes[-1].set_yticks([-i - 0.2 for i in range(len(pairs))], [*pairs], fontsize=FONT - 2)
        axes[-1].set_title("ties of class texts", fontsize=FONT)
        axes[-1].margins(x=0.25)
        axes[-1].legend(fontsize=FONT - 3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=FONT - 2)
    save(figure, path)


def scatter(path, points, x, y):
    """points (n, 2) -> a PNG; above the line the second value is the higher one"""
    figure = Figure((5, 5.6), layout="constrained")
    ax, better = figure.subplots(), points[:, 1] > points[:, 0]
    ax.axline((100, 100), slope=1, color="0.7")
    ax.scatter(*points[better].T, color="C0", label=f"better: {better.sum()} of {len(points)}")
    ax.scatter(*points[~better].T, color="C3", label="not better")
    ax.set(xlim=(points.min() - 2, 102), ylim=(points.min() - 2, 102), aspect="equal")
    ax.set_xlabel(f"mIoU of the {x}", fontsize=FONT)
    ax.set_ylabel(f"mIoU of the {y}", fontsize=FONT)
    ax.tick_params(labelsize=FONT - 3)
    figure.legend(fontsize=FONT - 2, loc="outside upper center", ncols=2)
    save(figure, path)


def heat(photo, cams):
    """A photo in grey under the strongest of its CAMs (n, H, W)"""
    grey = np.asarray(photo.convert("L"))[..., None] / 255
    return 0.35 * grey + 0.65 * HEAT(cams.amax(dim=0).numpy())[..., :3]


def coloured(labels):
    return label_picture(labels).convert("RGB")


def as_picture(X):
    """X (3, R, R) in CLIP's normalisation -> (R, R, 3) in [0, 1]"""
    return (X.permute(1, 2, 0).numpy() * CLIP_STD + CLIP_MEAN).clip(0, 1)
