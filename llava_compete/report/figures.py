"""Loss terms of stages over their steps. Matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from llava_compete.files import write_figure
from llava_compete.report.colors import OKABE_ITO


def plot_loss_terms(stages: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One column a stage: the language model's loss, what the routing losses add to it, and each term of these.

    Args:
        stages: stage name -> logged steps, each with "step", "loss", "lm_loss" and terms named "<part>/<term>_loss".
    """
    figure, axes = plt.subplots(3, len(stages), figsize=(6 * len(stages), 9), squeeze=False, sharex="col")
    for column, (stage, steps) in enumerate(stages.items()):
        above, middle, below = (row[column] for row in axes)
        above.plot(*_series(steps, "lm_loss"), label="lm_loss", color=OKABE_ITO[0])
        above.set(title=stage, ylabel="nats per token")
        # The difference on an axis of its own: on that of the loss the two lines lie on each other.
        both = [{**step, "added": step["loss"] - step["lm_loss"]} for step in steps if "lm_loss" in step]
        middle.plot(*_series(both, "added"), label="loss - lm_loss", color=OKABE_ITO[5])
        middle.set(ylabel="nats per token")
        middle.legend()
        terms = sorted({name for step in steps for name in step if "/" in name and name.endswith("_loss")})
        for name in terms:
            below.plot(*_series(steps, name), label=name, marker=".", linewidth=1)
        below.set(xlabel="step", ylabel="auxiliary terms")
        if terms:
            below.set_yscale("log")
            below.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
        else:
            below.text(0.5, 0.5, "dense: no auxiliary terms", ha="center", va="center", transform=below.transAxes)
        above.legend()
    figure.tight_layout()
    write_figure(path, figure, dpi=120)
    plt.close(figure)


def _series(steps: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(step["step"], step[name]) for step in steps if name in step]
    return [x for x, _ in points], [y for _, y in points]
