"""Heat maps of what routers do: load around 1/E, pairs of experts, one panel a part, readable at 64 experts.

Every figure is drawn with few ticks, numbers in the cells only where there is room for them, and a scale that is the
same in all panels and centred where nothing would be said: white is even use.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from llava_compete.files import write_bytes
from llava_compete.report.colors import OKABE_ITO

MOST_NUMBERS = 12  # columns up to which cells hold their number
LONGEST = 14.0  # inches
# Purple and orange are told apart by the colour-blind, where red and green are not.
AROUND = "PuOr"
UPWARDS = "cividis"
MOST_STEPS = 60  # columns of a map over steps


def load_maps(loads: Mapping[str, Mapping[str, Sequence[float]]]) -> plt.Figure:
    """Share of choices by layer and expert, a panel a kind of token, in multiples of even use.

    Args:
        loads: kind -> layer -> share by expert, which sums to 1; layers have the same number of experts.
    """
    kinds = [kind for kind, layers in loads.items() if layers]
    layers = list(next(iter(loads[kind] for kind in kinds)))
    experts = max(len(shares) for kind in kinds for shares in loads[kind].values())
    side = min(LONGEST / max(len(kinds), 1), 1.2 + 0.42 * experts)
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(side * len(kinds) + 1.6, _height(len(layers))), squeeze=False, sharey=True
    )
    image: Any = None
    for axis, kind in zip(axes[0], kinds, strict=True):
        cells = np.full((len(layers), experts), np.nan)
        for row, layer in enumerate(layers):
            shares = loads[kind].get(layer)
            if shares is not None:
                cells[row, : len(shares)] = np.asarray(shares) * len(shares)
        image = axis.imshow(cells, cmap=AROUND, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        _number(axis, cells, lambda value: abs(value - 1) > 0.7)
        _sparse_ticks(axis.set_xticks, [str(number) for number in range(experts)], 16)
        _sparse_ticks(axis.set_yticks, layers, 40)
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel("expert")
    bar = figure.colorbar(image, ax=list(axes[0]), pad=0.02)
    bar.set_label("load, multiple of even use (1/E)")
    return figure


def square_maps(matrices: Mapping[str, Any], label: str, center: float, spread: float) -> plt.Figure:
    """Expert by expert matrices, a panel a layer, on one scale around `center`; the diagonal is left out."""
    names = list(matrices)
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns + 1, 2.9 * rows + 0.3), squeeze=False)
    image: Any = None
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.axis("off")
            continue
        cells = np.array(matrices[names[place]], dtype=float)
        np.fill_diagonal(cells, np.nan)
        image = axis.imshow(cells, cmap=AROUND, vmin=center - spread, vmax=center + spread, interpolation="nearest")
        _number(axis, cells, lambda value: abs(value - center) > 0.7 * spread)
        labels = [str(number) for number in range(len(cells))]
        _sparse_ticks(axis.set_xticks, labels, 8)
        _sparse_ticks(axis.set_yticks, labels, 8)
        axis.set_title(names[place], fontsize=9)
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), pad=0.02)
    bar.set_label(label)
    return figure


def layer_lines(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> plt.Figure:
    """One number a layer, a panel for each label, in it a line with a mark of its own for each name."""
    series = next(iter(panels.values()))
    layers = list(dict.fromkeys(layer for values in series.values() for layer in values))
    width = min(LONGEST, (3 + 0.2 * len(layers)) * len(panels))
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.2), squeeze=False, layout="constrained")
    for axis, (label, lines) in zip(axes[0], panels.items(), strict=True):
        for number, (name, values) in enumerate(lines.items()):
            places = [layers.index(layer) for layer in values]
            color, mark = OKABE_ITO[number % len(OKABE_ITO)], "osD^vPX*"[number % 8]
            axis.plot(places, list(values.values()), color=color, marker=mark, markersize=4, linewidth=1, label=name)
        _sparse_ticks(axis.set_xticks, layers, 16, rotation=45, ha="right")
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), fontsize=8)
    return figure


def step_lines(series: Mapping[str, tuple[Sequence[int], Sequence[float]]], label: str) -> plt.Figure:
    """Values over training steps."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for number, (name, (steps, values)) in enumerate(series.items()):
        axis.plot(steps, values, color=OKABE_ITO[number % len(OKABE_ITO)], linewidth=1, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def step_maps(series: Mapping[str, tuple[Sequence[int], Sequence[float]]], label: str) -> plt.Figure:
    """Values over training steps of more layers than lines can show: a row a layer, a panel a part, one scale.

    Args:
        series: by layer steps and values. A cell is the mean of the values in its span of steps, blank without any.
    """
    steps = sorted({step for at, _ in series.values() for step in at})
    spans = np.array_split(steps, min(len(steps), MOST_STEPS))
    starts = [span[0] for span in spans]
    parts: dict[str, list[str]] = {}
    for name in series:
        parts.setdefault(name.partition(".")[0], []).append(name)
    cells = {name: np.full(len(spans), np.nan) for name in series}
    for name, (at, values) in series.items():
        columns = np.searchsorted(starts, at, side="right") - 1
        counts = np.bincount(columns, minlength=len(spans))
        met = counts > 0
        cells[name][met] = np.bincount(columns, values, minlength=len(spans))[met] / counts[met]
    finite = np.concatenate(list(cells.values()))
    low, high = np.nanmin(finite), np.nanmax(finite)
    heights = [1.0 + 0.16 * len(names) for names in parts.values()]
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(9, min(LONGEST, sum(heights))), height_ratios=heights, squeeze=False,
        layout="constrained", sharex=True,
    )  # fmt: skip
    for axis, (part, names) in zip(axes[:, 0], parts.items(), strict=True):
        grid = np.stack([cells[name] for name in names])
        image = axis.imshow(grid, cmap=UPWARDS, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        _sparse_ticks(axis.set_yticks, [name.partition(".")[2] for name in names], 16)
        axis.set_ylabel(f"{part} layer")
    _sparse_ticks(axes[-1][0].set_xticks, [str(start) for start in starts], 10)
    axes[-1][0].set_xlabel("step")
    figure.colorbar(image, ax=axes[:, 0].tolist()).set_label(label)
    return figure


def render(figure: plt.Figure, suffix: str, dpi: int = 110) -> bytes:
    """The figure as the bytes of a png or svg file."""
    buffer = io.BytesIO()
    # No date in an svg: the same numbers give the same file.
    figure.savefig(
        buffer, format=suffix, dpi=dpi, bbox_inches="tight", metadata={"Date": None} if suffix == "svg" else {}
    )
    return buffer.getvalue()


def save(figure: plt.Figure, path: Path) -> None:
    """Write the figure into a file of the path's kind, and close it."""
    write_bytes(path, render(figure, path.suffix.removeprefix(".")))
    plt.close(figure)


def as_data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_of(picture: Image.Image, side: int = 384) -> bytes:
    """A picture, made to fit a square of `side` pixels, as a png file's bytes."""
    copy = picture.convert("RGB")
    copy.thumbnail((side, side))
    buffer = io.BytesIO()
    copy.save(buffer, format="PNG")
    return buffer.getvalue()


def _height(layers: int) -> float:
    return min(LONGEST, 1.4 + 0.3 * layers)


def _number(axis: Any, cells: np.ndarray, dark: Any) -> None:
    """Numbers in the cells, in an ink that shows on their colour, where there are few."""
    if cells.shape[1] > MOST_NUMBERS or cells.shape[0] > 40:
        return
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            ink = "white" if dark(value) else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)


def _sparse_ticks(setter: Any, labels: Sequence[str], most: int, **options: Any) -> None:
    step = -(-len(labels) // most)
    places = range(0, len(labels), step)
    setter(list(places), [labels[place] for place in places], fontsize=8, **options)
