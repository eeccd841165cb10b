"""Which expert answered which patch, drawn over the picture, and which answered each token, under the text.

A patch has the colour of its first expert (the one with the largest weight) and, where there is room, its number; a
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
from PIL import Image

from llava_compete.report.colors import expert_colors, ink_on

NUMBERED_GRID = 10  # patches a side up to which each holds its expert's number
MOST_LEGEND = 16
COLUMNS = 4


def patch_figure(
    picture: Image.Image, grid: tuple[int, int], experts: Mapping[str, Any], num_experts: int
) -> plt.Figure:
    """The picture, and a panel a layer with each patch in its first expert's colour.

    Args:
        experts: layer -> first expert of each patch in reading order.
    """
    colors = expert_colors(num_experts)
    panels = 1 + len(experts)
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.5 * rows + 0.4), squeeze=False)
    extent = (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)
    for axis in axes.flat:
        axis.axis("off")
    axes.flat[0].imshow(picture, extent=extent)
    axes.flat[0].set_title("as the tower saw it", fontsize=8)
    used: set[int] = set()
    for axis, (name, chosen) in zip(list(axes.flat)[1:], experts.items(), strict=False):
        cells = np.asarray(chosen).reshape(grid)
        used |= set(cells.flatten().tolist())
        axis.imshow(picture.convert("L"), cmap="gray", extent=extent)
        axis.imshow(cells, cmap=ListedColormap(colors), vmin=-0.5, vmax=num_experts - 0.5, alpha=0.6, extent=extent)
        if max(grid) <= NUMBERED_GRID:
            for (row, column), expert in np.ndenumerate(cells):
                axis.text(column, row, str(expert), ha="center", va="center", fontsize=7, color=ink_on(colors[expert]))
        axis.set_title(name, fontsize=8)
    shown = sorted(used)[:MOST_LEGEND]
    handles = [Patch(color=colors[expert], label=f"expert {expert}") for expert in shown]
    more = f" and {len(used) - len(shown)} more" if len(used) > len(shown) else ""
    figure.legend(
        handles=handles, loc="lower center", ncols=min(len(shown), 8), fontsize=8, title="first expert" + more
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


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
