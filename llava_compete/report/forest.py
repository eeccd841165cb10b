"""Forest plot: differences to a baseline with intervals, benchmark by benchmark. Caller: `llava-compete compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROW_INCHES = 0.28


class ForestRow(NamedTuple):
    """One difference: a thick bar over questions, a thin one over questions and seeds."""

    benchmark: str
    method: str
    mean: float
    over_questions: tuple[float, float]
    over_seeds: tuple[float, float] | None


def plot_forest(rows: Sequence[ForestRow], baseline: str, path: Path) -> None:
    """Draw `rows` from top to bottom in their order, a colour a method, a gap between benchmarks."""
    methods = list(dict.fromkeys(row.method for row in rows))
    palette = plt.colormaps["tab10"]
    colors = {method: palette(index % 10) for index, method in enumerate(methods)}
    figure, axis = plt.subplots(figsize=(8, 1.5 + ROW_INCHES * (len(rows) + len({row.benchmark for row in rows}))))
    height, heights, labels = 0.0, [], []
    previous = None
    for row in rows:
        if previous is not None and row.benchmark != previous:
            height -= 1
        previous = row.benchmark
        color = colors[row.method]
        if row.over_seeds is not None:
            axis.plot(row.over_seeds, (height, height), color=color, linewidth=1)
        axis.plot(row.over_questions, (height, height), color=color, linewidth=4, alpha=0.5, solid_capstyle="butt")
        axis.plot([row.mean], [height], "o", color=color, markersize=4)
        heights.append(height)
        labels.append(f"{row.benchmark}: {row.method}")
        height -= 1
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(heights, labels, fontsize=8)
    intervals = "95% intervals, thick: over questions, thin: over questions and training seeds"
    axis.set_xlabel(f"points above {baseline}\n{intervals}", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
