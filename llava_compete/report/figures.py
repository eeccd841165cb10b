"""Figures of a run: loss terms over steps, expert use by layer. Matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def plot_loss_terms(stages: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One column a stage; the language-model loss above, every auxiliary term below on a logarithmic axis.

    Args:
        stages: stage name -> logged steps, each with "step", "loss", "lm_loss" and terms named "<part>/<term>_loss".
    """
    figure, axes = plt.subplots(2, len(stages), figsize=(6 * len(stages), 7), squeeze=False, sharex="col")
    for column, (stage, steps) in enumerate(stages.items()):
        above, below = axes[0][column], axes[1][column]
        for name in ("loss", "lm_loss"):
            above.plot(*_series(steps, name), label=name)
        above.set(title=stage, ylabel="nats per token")
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_expert_use(expert_use: dict[str, list[float]], path: Path) -> None:
    """Heat map of the share of choices that each expert gets, a row a layer; shares of a row sum to 1."""
    layers = list(expert_use)
    width = max(len(shares) for shares in expert_use.values())
    figure, axis = plt.subplots(figsize=(2 + 0.9 * width, 1.2 + 0.6 * len(layers)))
    padded = [shares + [float("nan")] * (width - len(shares)) for shares in expert_use.values()]
    image = axis.imshow(padded, cmap="viridis", vmin=0, aspect="auto")
    axis.set_xticks(range(width), [str(index) for index in range(width)])
    axis.set_yticks(range(len(layers)), layers)
    axis.set(xlabel="expert", title="expert use by layer (share of choices)")
    for row, shares in enumerate(expert_use.values()):
        for column, share in enumerate(shares):
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", color="white", fontsize=8)
    figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _series(steps: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(step["step"], step[name]) for step in steps if name in step]
    return [x for x, _ in points], [y for _, y in points]
