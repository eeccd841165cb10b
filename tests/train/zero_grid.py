"""The grid of ZeRO stage x part x mode x experts: its cells, their configs, and a driver that launches many at once.

A cell trains two SGD steps on two ranks through `train.run`; the change of every tensor must be that of one process
without DeepSpeed. `scripts/zero_grid.sh` runs the full grid.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from stage_kit import fresh_model, stage_config, tiny_moe, write_data

from llava_compete.files import write_json_lines
from llava_compete.manifest import git_state
from llava_compete.moe.terms import COMPETITION_COEFS, ROUTER_COEFS

WORKER = Path(__file__).with_name("zero_grid_worker.py")
# Of a tensor's change, in norm, against the one-process run: float32 sums in another order.
TOLERANCE = 1e-3
COEFS = (*ROUTER_COEFS, *COMPETITION_COEFS)
AT_ONCE = 200  # cells of a launch: one that has trained four hundred models takes four times as long for the next
SILENCE = 600  # seconds without a result after which a launch is taken to hang; imports alone take a minute if busy


class Cell(NamedTuple):
    """One point of the grid. `step` is what the MoE layers do in every step; dense cells have none."""

    zero: str
    vision: str
    projector: str
    language: str
    experts: str
    accumulation: int
    checkpointing: bool

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in self)

    @property
    def reference(self) -> Cell:
        """The same training in one process."""
        return self._replace(zero="alone", accumulation=1, checkpointing=False)


AXES: dict[str, Sequence[Any]] = {
    "zero": ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"),
    "vision": ("frozen", "full", "lora"),
    "projector": ("frozen", "full", "lora"),
    "language": ("frozen", "full", "lora"),
    "experts": ("dense", "router", "competition"),
    "accumulation": (1, 2),
    "checkpointing": (False, True),
}


def _possible(cell: Cell) -> bool:
    return {cell.vision, cell.projector, cell.language} != {"frozen"}


def all_cells() -> list[Cell]:
    return [cell for cell in itertools.starmap(Cell, itertools.product(*AXES.values())) if _possible(cell)]


def covering(strength: int, begin: Sequence[Cell] = ()) -> list[Cell]:
    """`begin` and few more cells that hold every combination of values of every `strength` axes.

    Each is the one that adds the most new combinations.
    """
    held = {cell: set(itertools.combinations(enumerate(cell), strength)) for cell in all_cells()}
    missing = set().union(*held.values()).difference(*(held[cell] for cell in begin))
    chosen = list(begin)
    while missing:
        best = max(held, key=lambda cell: len(missing & held[cell]))
        missing -= held[best]
        chosen.append(best)
    return chosen


def in_order() -> tuple[list[Cell], list[int]]:
    """All cells, those first that hold every combination of two axes, then three, then four; and how many these are."""
    chosen, sizes = list[Cell](), []
    for strength in (2, 3, 4):
        chosen = covering(strength, chosen)
        sizes.append(len(chosen))
    return list(dict.fromkeys([*chosen, *all_cells()])), sizes


def eight_rows(folder: Path) -> Path:
    return write_data(folder, rows=8)


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    """What came out, by cell; nothing where there is no such file yet."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    return {Cell(*line.pop("cell")): line for line in lines}


class Grid:
    """Start checkpoints, one-process references and results below one folder; what is there is not run again.

    model, write_rows: what cells start from and train on; the folder of `write_rows` does not exist yet.
    """

    def __init__(
        self,
        folder: Path,
        model: Callable[[], dict[str, Any]] = fresh_model,
        write_rows: Callable[[Path], Path] = eight_rows,
    ) -> None:
        self.folder = folder
        self.results = folder / "results.jsonl"
        self._model, self._write_rows = model, write_rows

    def config(self, cell: Cell) -> dict[str, Any]:
        """The stage of a cell."""
        modes = {"vision": cell.vision, "projector": cell.projector, "language": cell.language}
        trainable = {part: {"mode": "lora", "lora_rank": 2} if mode == "lora" else mode for part, mode in modes.items()}
        moe = cell.experts != "dense"
        rate = {"competition_rate": float(cell.experts == "competition"), "max_competing_layers": 99}
        # Losses of routers that do not train are refused.
        silent = {part: dict.fromkeys(COEFS, 0.0) for part, mode in modes.items() if mode == "frozen"}
        ranks = 1 if cell.zero == "alone" else 2
        training = {
            "max_steps": 2,
            "per_device_train_batch_size": 8 // ranks // cell.accumulation,
            "gradient_accumulation_steps": cell.accumulation,
            "activation_checkpointing": cell.checkpointing,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1e9,  # a norm, and no clipping that would hide a factor
            "save_strategy": "no",
        }
        return stage_config(
            "sft" if moe else "pft",
            self.folder / "data" / "data.json",
            self.folder / "cells" / cell.name,
            model={"checkpoint": str(self.folder / ("moe" if moe else "dense"))},
            trainable=trainable,
            training=training,
            deepspeed=None if cell.zero in ("none", "alone") else cell.zero,
            **({"moe": rate | silent} if moe else {}),
        )

    def prepare(self) -> None:
        """Data, and the two models that cells start from."""
        if not (self.folder / "data").exists():
            self._write_rows(self.folder / "data")
        starts = [("dense", "pretrain_align", {}), ("moe", "sft", {"moe": tiny_moe()})]
        missing = [
            stage_config(
                stage, self.folder / "data" / "data.json", self.folder / name, model=self._model(), deepspeed=None,
                training={"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 8}, **moe,
            )
            for name, stage, moe in starts
            if not (self.folder / name / "config.json").is_file()
        ]  # fmt: skip
        if missing:
            path = self.folder / "starts.json"
            path.write_text(json.dumps(missing), encoding="utf-8")
            said = self._launch(1, ["--starts", str(path)])
            folders = [stage["output_dir"] for stage in missing]
            if lost := [folder for folder in folders if not Path(folder, "config.json").is_file()]:
                raise RuntimeError(f"{', '.join(lost)}: the models that cells start from were not trained:\n{said}")

    def run(self, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
        """Results of `cells`, those of earlier calls among them."""
        cells = list(cells)
        self.prepare()
        self._run_all(sorted({cell.reference for cell in cells}), ranks=1)
        self._run_all(cells, ranks=2)
        done = self.done()
        return {cell: done[cell] for cell in cells}

    def done(self) -> dict[Cell, dict[str, Any]]:
        return read_results(self.results)

    def _run_all(self, cells: Sequence[Cell], ranks: int) -> None:
        while left := [cell for cell in cells if cell not in self.done()]:
            path = self.folder / "todo.json"
            path.write_text(json.dumps([(cell, self.config(cell)) for cell in left[:AT_ONCE]]), encoding="utf-8")
            before = len(self.done())
            said = self._launch(ranks, ["--cells", str(path)])
            if len(self.done()) == before:  # the first of the launch took all down
                self.note(left[0], "crash", said)

    def note(self, cell: Cell, outcome: str, detail: str) -> None:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": cell, "outcome": outcome, "detail": detail[-2000:]}) + "\n")

    def _launch(self, ranks: int, arguments: list[str]) -> str:
        """Run the worker's ranks until all are gone, one fails, or none has a result for SILENCE seconds."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        paths = [str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        logs = [self.folder / f"rank{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w", encoding="utf-8") as file:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, str(WORKER), str(self.folder), *arguments]
                processes.append(subprocess.Popen(command, env=environment | own, stdout=file, stderr=file))
        size, heard = -1, time.monotonic()
        try:
            while any(process.poll() is None for process in processes):
                time.sleep(0.2)
                if (now := self.results.stat().st_size if self.results.is_file() else 0) != size:
                    size, heard = now, time.monotonic()
                if any(process.poll() for process in processes) or time.monotonic() - heard > SILENCE:
                    time.sleep(1)
                    break
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return "\n".join(log.read_text(encoding="utf-8")[-1000:] for log in logs)


HEAD = """# ZeRO grid

`bash scripts/zero_grid.sh`, {date}, commits {commits}: two SGD steps of a tiny model on two CPU ranks, against
one process without DeepSpeed. Equal: the change of every tensor differs by less than 1e-3 of its norm (float32 sums in
another order). Axes: each part frozen, full or LoRA (not all frozen) x dense, experts on a router step, experts on a
competition step x 1 or 2 micro-batches a step x activation checkpointing off or on.

**{ran} of {total}** cells ran, in this order: the first {pairs} hold every combination of the values of two axes, the
first {triples} of three, the first {quadruples} of four; then come the rest. `cells.jsonl` has each of them, and the
same command goes on from there.

"""


def _rows(results: dict[Cell, dict[str, Any]]) -> Iterator[str]:
    """A line for each ZeRO setting and kind of block: what came out, and the largest difference."""
    yield "| ZeRO | blocks | cells | equal | largest difference |"
    yield "| --- | --- | --- | --- | --- |"
    for zero, experts in itertools.product(AXES["zero"], AXES["experts"]):
        mine = [result for cell, result in results.items() if (cell.zero, cell.experts) == (zero, experts)]
        if not mine:
            continue
        worst = max((one["error"] for one in mine if "error" in one), default=float("nan"))
        numbers = [len(mine), sum(one["outcome"] == "equal" for one in mine), f"{worst:.1e}"]
        yield f"| {zero} | {experts} | {' | '.join(map(str, numbers))} |"


def report(results: dict[Cell, dict[str, Any]]) -> str:
    odd = [
        f"- `{cell.name}`: {result['outcome']}: {' '.join(result['detail'].split())[-300:]}"
        for cell, result in results.items()
        if result["outcome"] != "equal"
    ]
    return "\n".join([*_rows(results), "", *(odd or ["No cell came out otherwise."])]) + "\n"


def main(folder: Path, records: Path) -> None:
    """All cells that have not run yet. Ctrl-C or TERM too leaves cells.jsonl and the table in `records`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    grid = Grid(folder.resolve())
    grid.folder.mkdir(parents=True, exist_ok=True)
    cells = records / "cells.jsonl"
    before = read_results(cells)
    order, sizes = in_order()
    commit = git_state().get("commit", "?")[:10]
    try:
        grid.run([cell for cell in order if cell not in before])
    finally:
        done = {cell: {"commit": commit, **result} for cell, result in grid.done().items()} | before
        results = {cell: done[cell] for cell in order if cell in done}
        write_json_lines(cells, ({"cell": cell, **result} for cell, result in results.items()))
        commits = ", ".join(sorted({result["commit"] for result in results.values()}))
        facts = {"date": date.today(), "commits": commits, "ran": f"{len(results):,}"}
        facts |= {"total": f"{len(order):,}"} | dict(zip(("pairs", "triples", "quadruples"), sizes, strict=True))
        (records / "README.md").write_text(HEAD.format(**facts) + report(results), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
