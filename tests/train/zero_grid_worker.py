"""One rank of the ZeRO grid: trains cell after cell in one process group (see zero_grid.py)."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import naflex_kit  # noqa: F401 (timm then knows the tiny tower)
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from zero_grid import TOLERANCE, Cell, Grid

from llava_compete.config import parse_config
from llava_compete.errors import UserError
from llava_compete.train import run
from llava_compete.train.config import TrainConfig
from llava_compete.train.distributed import process_group, this_rank

WEIGHTS = "model.safetensors"


def train(content: dict[str, Any]) -> None:
    try:
        run.train(parse_config(TrainConfig, content, source="cell"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def difference(grid: Grid, cell: Cell, content: dict[str, Any]) -> dict[str, Any]:
    """How far the cell's changes of the weights are from those of one process."""
    start = load_file(Path(content["model"]["checkpoint"]) / WEIGHTS)
    found, expected = (load_file(grid.folder / "cells" / one.name / WEIGHTS) for one in (cell, cell.reference))
    errors = {}
    for name, before in start.items():
        change, right = found[name] - before, expected[name] - before
        errors[name] = float((change - right).norm() / right.norm()) if right.any() else float(change.any())
    worst = max(errors, key=lambda name: errors[name])
    changed = sum(not torch.equal(tensor, expected[name]) for name, tensor in start.items())
    outcome = "equal" if errors[worst] < TOLERANCE and changed else "differs"
    return {"outcome": outcome, "error": errors[worst], "detail": f"{worst}; {changed} of {len(start)} tensors change"}


def main(grid: Grid, kind: str, todo: Path) -> None:
    rank = this_rank()
    tasks = json.loads(todo.read_text(encoding="utf-8"))
    if kind == "--starts":
        for content in tasks:
            train(content)
        return
    for values, content in tasks:
        cell = Cell(*values)
        try:
            train(content)
            result = {"outcome": "equal", "detail": ""}
            if rank.is_main and cell != cell.reference:
                result = difference(grid, cell, content)
                shutil.rmtree(content["output_dir"])
        except UserError as error:
            result = {"outcome": "refused", "detail": str(error)}
        dist.barrier()
        if rank.is_main:
            with grid.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": cell, **result}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(this_rank()) as store:

        @contextmanager
        def held_group(_: Any) -> Iterator[Any]:
            yield store

        run.process_group = held_group  # type: ignore[assignment]
        gc.freeze()  # the libraries' objects, which every collection would look through for a second
        main(Grid(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
