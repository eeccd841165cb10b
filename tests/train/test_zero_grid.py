"""ZeRO stage x part x mode x experts: two ranks change the weights as one process does.

Slow (minutes): the named cells are run by `.ci/run`, all cells by scripts/zero_grid.sh.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from zero_grid import AXES, Cell, Grid, all_cells, covering

# What went wrong once, and what users run most.
NAMED = {
    "first trainable experts behind a frozen front": Cell("zero3", "frozen", "full", "frozen", "competition", 1, False),
    "projector experts beside LoRA": Cell("zero3_offload", "frozen", "full", "lora", "router", 2, True),
    "all parts with experts": Cell("zero3", "full", "full", "full", "competition", 2, True),
    "LoRA on a tower of torch's attention": Cell("zero3", "lora", "full", "lora", "dense", 1, False),
    "LLaVA's second stage": Cell("zero2", "frozen", "full", "full", "router", 2, True),
    "LoRA on everything": Cell("zero2_offload", "lora", "lora", "lora", "router", 1, False),
}


def test_the_first_cells_hold_every_pair_of_values() -> None:
    chosen = covering(2)
    assert len(chosen) < 40 < len(all_cells())
    for (one, left), (other, right) in itertools.combinations(AXES.items(), 2):
        for values in itertools.product(left, right):
            assert any((getattr(cell, one), getattr(cell, other)) == values for cell in chosen), (one, other, values)


def _check(cells: Sequence[Cell], folder: Path) -> None:
    results = Grid(folder).run(cells)
    wrong = {cell.name: result for cell, result in results.items() if result["outcome"] != "equal"}
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_named_cells(tmp_path: Path) -> None:
    _check(list(NAMED.values()), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_pair_of_values(tmp_path: Path) -> None:
    _check(covering(2), tmp_path)
