"""Which expert answered which patch, drawn over the picture, and which answered each token, under the text.

A cell has the colour of its first expert (the one with the largest weight) and, where there is room, its number; a
token has one row of cells a layer. One palette and one legend for all layers of a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from llava_compete.evaluation.picture_choices import ShownPicture
from llava_compete.evaluation.spreading import spread
from llava_compete.report.colors import expert_colors, ink_on
from llava_compete.vision.tiles import Box

MOST_LAYERS = 11  # panels of a picture's map
NUMBERED_GRID = 10  # patches a side up to which each holds its expert's number
MOST_LEGEND = 16
COLUMNS = 4


def map_of_layers(
    shown: ShownPicture, maps: Mapping[str, Any], num_experts: int, most: int = MOST_LAYERS
) -> tuple[plt.Figure, str]:
    """`patch_figure` of at most so many layers, from the first to the last, and what it shows.

    Args:
        maps: layer -> experts of each cell, [rows, columns, K], best first.
    """
    names = list(maps)
    first = {names[place]: np.asarray(maps[names[place]])[..., 0] for place in spread(len(names), most)}
    shapes = dict.fromkeys(f"{cells.shape[0]} x {cells.shape[1]}" for cells in first.values())
    return patch_figure(shown, first, num_experts), f"First expert of each of {', '.join(shapes)} patches, by layer."


def patch_figure(shown: ShownPicture, experts: Mapping[str, Any], num_experts: int) -> plt.Figure:
    """The picture, and a panel a layer with each cell in its first expert's colour, in its place on the picture.

    Args:
        experts: layer -> first expert of each cell, [rows, columns], -1 where there is none; layers may have other
            numbers of cells.
    """
    colors = expert_colors(num_experts)
    panels = 1 + len(experts)
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    width, height = shown.picture.size
    tall = min(max(height / width, 0.4), 2.5)
    figure, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.4 * tall * rows + 0.9), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    picture_extent = (0, width, height, 0)
    axes.flat[0].imshow(shown.picture, extent=picture_extent)
    axes.flat[0].set_title("the picture", fontsize=8)
    used: set[int] = set()
    grey = shown.picture.convert("L")
    left, top, right, bottom = shown.box
    for axis, (name, chosen) in zip(list(axes.flat)[1:], experts.items(), strict=False):
        cells = np.ma.masked_less(np.asarray(chosen), 0)
        used |= set(cells.compressed().tolist())
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=picture_extent)
        axis.imshow(
            cells,
            cmap=ListedColormap(colors),
            vmin=-0.5,
            vmax=num_experts - 0.5,
            alpha=0.6,
            extent=(left, right, bottom, top),
            interpolation="nearest",
        )
        axis.set(xlim=(0, width), ylim=(height, 0), title=name)
        axis.title.set_fontsize(8)
        if max(cells.shape) <= NUMBERED_GRID:
            _write_numbers(axis, cells, shown.box, colors)
    handles = [Patch(color=colors[expert], label=f"expert {expert}") for expert in sorted(used)[:MOST_LEGEND]]
    more = f" and {len(used) - len(handles)} more" if len(used) > len(handles) else ""
    figure.legend(
        handles=handles, loc="lower center", ncols=min(len(handles), 8), fontsize=8, title="first expert" + more
    )
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    return figure


def _write_numbers(axis: Any, cells: np.ma.MaskedArray, box: Box, colors: Sequence[str]) -> None:
    left, top, right, bottom = box
    across, down = (right - left) / cells.shape[1], (bottom - top) / cells.shape[0]
    for (row, column), expert in np.ndenumerate(cells):
        if expert >= 0:
            place = left + (column + 0.5) * across, top + (row + 0.5) * down
            ink = ink_on(colors[expert])
            axis.text(*place, str(expert), ha="center", va="center", fontsize=7, color=ink, clip_on=True)


def token_table(tokens: Sequence[str], experts: Mapping[str, Any], num_experts: int) -> str:
    """An HTML table: a column a token, a row a layer, each cell its experts' numbers on the first one's colour.

    Args:
        experts: layer -> [tokens, K], best first.
    """
    colors = expert_colors(num_experts)
    head = "".join(f"<th>{escape(token) or '&nbsp;'}</th>" for token in tokens)
    lines = [f"<tr><th></th>{head}</tr>"]
    for name, chosen in experts.items():
        cells = []
        for row in np.asarray(chosen).tolist():
            color = colors[row[0]]
            numbers = ",".join(map(str, row))
            cells.append(f'<td style="background:{color};color:{ink_on(color)}">{numbers}</td>')
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="tokens">{"".join(lines)}</table></div>'
