"""Forest plot: differences to a baseline with intervals, benchmark by benchmark, the mean on top."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from llava_compete.files import write_figure
from llava_compete.report.colors import expert_colors

ROW_INCHES = 0.16
MARKS = "osD^vPX*<>hd"


class ForestRow(NamedTuple):
    """One difference: a thick bar over seeds (over questions with one seed), else a thin one over questions."""

    benchmark: str
    method: str
    mean: float
    over_questions: tuple[float, float]
    over_seeds: tuple[float, float] | None


def plot_forest(
    rows: Sequence[ForestRow],
    baseline: str,
    path: Path,
    margin: float | None = None,
    *,
    first: str | None = None,
    apart: Collection[str] = (),
) -> None:
    """Draw `rows` by benchmark; a method has a colour and a mark of its own, and one line in the legend.

    Args:
        margin: points within which methods count as equal, shaded.
        first: the benchmark on top, which is judged.
        apart: methods whose difference on `first` survives correction: they are drawn filled there, the others hollow.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    benchmarks = sorted(dict.fromkeys(row.benchmark for row in rows), key=lambda name: name != first)
    style = dict(zip(methods, zip(expert_colors(len(methods)), MARKS * 9, strict=False), strict=False))
    step = len(methods) + 1.2
    height = 1.6 + ROW_INCHES * step * len(benchmarks)
    figure, axis = plt.subplots(figsize=(8.5, height), layout="constrained")
    several = any(row.over_seeds is not None for row in rows)
    for row in rows:
        y = -step * benchmarks.index(row.benchmark) - methods.index(row.method)
        color, mark = style[row.method]
        axis.plot(row.over_questions, (y, y), color=color, linewidth=1)
        thick = row.over_seeds if several else row.over_questions
        if thick is not None:
            axis.plot(thick, (y, y), color=color, linewidth=4, alpha=0.5, solid_capstyle="butt")
        filled = row.benchmark == first and row.method in apart
        axis.plot([row.mean], [y], mark, color=color, markerfacecolor=color if filled else "white", markersize=5)
    middle = (len(methods) - 1) / 2
    axis.set_yticks([-step * place - middle for place in range(len(benchmarks))], benchmarks, fontsize=9)
    for place in range(1, len(benchmarks)):
        axis.axhline(-step * place + 1.1, color="grey", linewidth=0.4)
    axis.set_ylim(-step * len(benchmarks) + 1.1, 1.1)
    axis.axvline(0, color="black", linewidth=0.8)
    if margin is not None:
        axis.axvspan(-margin, margin, color="grey", alpha=0.15)
    intervals = "95% intervals, thick: over training seeds, thin: over questions" if several else "95% over questions"
    corrected = f"; filled on {first}: p below 0.05 after Holm's correction" if first else ""
    axis.set_xlabel(f"points above {baseline}\n{intervals}{corrected}", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    handles = [plt.Line2D([], [], color=color, marker=mark, label=name) for name, (color, mark) in style.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(methods), 4), fontsize=8)
    write_figure(path, figure, dpi=120)
    plt.close(figure)
