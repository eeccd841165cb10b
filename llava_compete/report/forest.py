"""Forest plot: differences to a baseline with intervals, benchmark by benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROW_INCHES = 0.28


class ForestRow(NamedTuple):
    """One difference: a thick bar over seeds (over questions with one seed), else a thin one over questions."""

    benchmark: str
    method: str
    mean: float
    over_questions: tuple[float, float]
    over_seeds: tuple[float, float] | None


def plot_forest(rows: Sequence[ForestRow], baseline: str, path: Path, margin: float | None = None) -> None:
    """Draw `rows` from top to bottom in their order, a colour a method, a gap between benchmarks; the margin grey."""
    methods = list(dict.fromkeys(row.method for row in rows))
    palette = plt.colormaps["tab10"]
    colors = {method: palette(index % 10) for index, method in enumerate(methods)}
    figure, axis = plt.subplots(figsize=(8, 1.5 + ROW_INCHES * (len(rows) + len({row.benchmark for row in rows}))))
    height, heights, labels = 0.0, [], []
    several = any(row.over_seeds is not None for row in rows)
    previous = None
    for row in rows:
        if previous is not None and row.benchmark != previous:
            height -= 1
        previous = row.benchmark
        color = colors[row.method]
        axis.plot(row.over_questions, (height, height), color=color, linewidth=1)
        thick = row.over_seeds if several else row.over_questions
        if thick is not None:
            axis.plot(thick, (height, height), color=color, linewidth=4, alpha=0.5, solid_capstyle="butt")
        axis.plot([row.mean], [height], "o", color=color, markersize=4)
        heights.append(height)
        labels.append(f"{row.benchmark}: {row.method}")
        height -= 1
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(heights, labels, fontsize=8)
    intervals = "95% intervals, thick: over training seeds, thin: over questions" if several else "95% over questions"
    if margin is not None:
        axis.axvspan(-margin, margin, color="grey", alpha=0.15)
    axis.set_xlabel(f"points above {baseline}\n{intervals}", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
