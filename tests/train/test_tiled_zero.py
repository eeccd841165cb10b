"""Tiles and patches under ZeRO: ranks that have different numbers of them, or none, change the weights as one process.

Slow (minutes): launched; what needs no second rank is in test_tiled_stage.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiled_kit import naflex_model, tiled_model, write_tiled_rows
from zero_grid import Cell, Grid

from llava_compete.data.sampler import GlobalBatchSampler
from llava_compete.vision.tiles import Tiling

# Half of the 8 rows are text, so that in one go rank 0 has no picture, and in two both have some in the second.
write_rows = partial(write_tiled_rows, rows=8, text_every=2)
CELLS = {
    "a rank without pictures": Cell("zero3", "full", "full", "full", "dense", 1, False),
    "other numbers of tiles": Cell("zero3", "full", "full", "full", "dense", 2, True),
    "LoRA on the tower": Cell("zero3", "lora", "full", "lora", "dense", 1, True),
    "ZeRO-2": Cell("zero2", "full", "full", "full", "dense", 2, False),
    "experts in all parts": Cell("zero3", "full", "full", "full", "competition", 1, True),
    "experts in all parts, ZeRO-2": Cell("zero2", "full", "full", "full", "competition", 2, False),
}


NAFLEX_CELLS = {
    "a rank without pictures": Cell("zero3", "full", "full", "full", "dense", 1, False),
    "experts in all parts": Cell("zero3", "full", "full", "full", "competition", 2, True),
}


class TiledGrid(Grid):
    """Cells on pictures in tiles; dense towers take two at a time."""

    def config(self, cell: Cell) -> dict[str, Any]:
        content = super().config(cell)
        if cell.experts == "dense":
            content["model"]["tile_batch"] = 2
        return content


def test_ranks_have_different_numbers_of_tiles(tmp_path: Path) -> None:
    records = json.loads(write_rows(tmp_path / "data").read_text(encoding="utf-8"))
    tiling = Tiling(16, 1, ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)))
    sizes = [[Image.open(tmp_path / "data" / name).size for name in record["image"]] for record in records]
    tiles = [sum(tiling.num_tiles((height, width)) for width, height in pictures) for pictures in sizes]
    lengths, modalities = np.array(tiles), np.array([int(count > 0) for count in tiles])
    last = {}
    for micro in (4, 2):
        ranks = [GlobalBatchSampler(lengths, modalities, 8, micro, 2, rank, 0) for rank in (0, 1)]
        last[micro] = [sum(tiles[row] for row in list(rank)[-1]) for rank in ranks]
    assert last[4][0] == 0 < last[4][1]
    assert 0 < last[2][0] != last[2][1] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["tiles", "patches"])
def test_two_ranks_change_the_weights_as_one_process(tmp_path: Path, kind: str) -> None:
    cells = CELLS if kind == "tiles" else NAFLEX_CELLS
    grid = TiledGrid(tmp_path, tiled_model, write_rows) if kind == "tiles" else Grid(tmp_path, naflex_model, write_rows)
    results = grid.run(cells.values())
    wrong = {name: results[cell] for name, cell in cells.items() if results[cell]["outcome"] != "equal"}
    assert not wrong
