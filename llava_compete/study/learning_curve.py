"""Accuracy against the number of training samples, for the softmax router and competition, on the harder scenes.

From one dense parent every run upcycles, trains `sft` on the first n rows of one shuffled order (so that smaller sets
are inside larger ones) and is evaluated. Every run takes the same number of optimizer steps, enough to see all rows
once: only the number of different samples changes, small sets are seen more often. Each run is done by the user's own
commands in a process of its own, and finished runs are kept.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava_compete.config import read_yaml
from llava_compete.errors import UserError
from llava_compete.files import read_json, read_json_lines, write_json

logger = logging.getLogger(__name__)
_RESAMPLES = 4000


@dataclass(frozen=True)
class Settings:
    """One study.

    parent: dense checkpoint; {seed} in its name stands for the run's seed. config, upcycle: YAMLs of `sft` and of the
    upcycling. data: LLaVA JSON of all rows.
    rows: the largest set; None for all rows of the data. suite: what to evaluate. steps: of every run; None for one
    pass over the largest set. jobs: runs at a time, one core each on a CPU.
    """

    parent: Path
    config: Path
    upcycle: Path
    data: Path
    suite: str
    out: Path
    routers: tuple[str, ...] = ("softmax", "competition")
    fractions: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    seeds: int = 3
    rows: int | None = None
    steps: int | None = None
    limit: int | None = None
    jobs: int = 1


class Run(NamedTuple):
    """One training run: router, number of rows, seed."""

    router: str
    rows: int
    seed: int


def run(settings: Settings) -> dict[str, Any]:
    """Train and evaluate what is missing, then put the curve together as plain data."""
    total = _count_rows(settings.data)
    if settings.rows is not None and not 0 < settings.rows <= total:
        raise UserError(f"--rows: found {settings.rows:,}; expected 1 to {total:,}, the rows of {settings.data}")
    total = settings.rows or total
    settings = replace(settings, steps=_steps(settings, total))
    _refuse_other_settings(settings)
    sizes = sorted({max(1, round(total * fraction)) for fraction in settings.fractions})
    runs = [Run(router, rows, seed) for seed in range(settings.seeds) for rows in sizes for router in settings.routers]
    with ThreadPoolExecutor(settings.jobs) as pool:
        for _ in pool.map(lambda one: _do(settings, one), runs):
            pass
    points = []
    for rows in sizes:
        scores = {
            router: np.stack([_scores(_folder(settings, Run(router, rows, s))) for s in range(settings.seeds)])
            for router in settings.routers
        }
        points.append({"rows": rows, **_summarise(scores, settings.routers)})
    return {"settings": {key: str(value) for key, value in asdict(settings).items()}, "points": points}


def _count_rows(data: Path) -> int:
    if not data.is_file():
        raise UserError(f"{data}: no such file; build it with `llava-compete data scenes-hard`")
    return len(read_json(data))


def _steps(settings: Settings, rows: int) -> int:
    """Steps that see all rows at least once: else the larger sets would be the same in effect."""
    training = read_yaml(settings.config).get("training", {})
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    needed = math.ceil(rows / batch)
    if settings.steps is not None and settings.steps < needed:
        raise UserError(
            f"--steps: found {settings.steps}, which see {settings.steps * batch:,} of {rows:,} rows in batches of "
            f"{batch}; expected at least {needed}"
        )
    return settings.steps or needed


def _refuse_other_settings(settings: Settings) -> None:
    """A curve must not mix runs: what was trained into this folder before was trained in the same way."""
    free = {"out", "jobs", "seeds", "fractions", "routers"}  # more of these only adds runs
    content = {key: str(value) for key, value in asdict(settings).items() if key not in free}
    path = settings.out / "settings.json"
    if path.is_file():
        before = read_json(path)
        for key, value in content.items():
            if before.get(key) != value:
                raise UserError(
                    f"{settings.out}: holds runs with {key} {before.get(key)}, now {value}; give another --out"
                )
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _folder(settings: Settings, one: Run) -> Path:
    return settings.out / one.router / f"rows{one.rows}" / f"seed{one.seed}"


def _parent(settings: Settings, seed: int) -> Path:
    return Path(str(settings.parent).replace("{seed}", str(seed)))


def _do(settings: Settings, one: Run) -> None:
    folder = _folder(settings, one)
    if (folder / "eval" / "summary.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = f"[{{name: scenes, path: {settings.data}, image_folder: {settings.data.parent / 'images'}, "
    source += f"max_rows: {one.rows}}}]"
    _command(
        folder,
        *("upcycle", "--config", settings.upcycle, f"model.checkpoint={_parent(settings, one.seed)}"),
        *(f"output_dir={folder / 'upcycle'}", f"moe.language.router={one.router}"),
        *(f"seed={one.seed}", f"moe.seed={one.seed}"),
    )
    _command(
        folder,
        *("train", settings.config, "--stage", "sft", f"model.checkpoint={folder / 'upcycle'}"),
        *(f"output_dir={folder / 'sft'}", f"data.sources={source}", f"training.max_steps={settings.steps}"),
        *(f"seed={one.seed}", "deepspeed=none"),
    )
    limit = [] if settings.limit is None else ["--limit", str(settings.limit)]
    _command(
        folder,
        *("eval", folder / "sft", "--suite", settings.suite, "--out", folder / "eval", "--processes", "1", *limit),
    )
    logger.info("%s, %d rows, seed %d: done", *one)


def _command(folder: Path, *arguments: Any) -> None:
    """One of our commands; its output goes to log.txt, and a failure names it."""
    words = [str(argument) for argument in arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        status = subprocess.run(
            [sys.executable, "-m", "llava_compete.cli", *words], stdout=log, stderr=log, env=environment, check=False
        ).returncode
    if status:
        raise UserError(f"`llava-compete {' '.join(words[:2])}` ended with status {status}: see {folder / 'log.txt'}")


def _scores(folder: Path) -> NDArray[np.float64]:
    """Scores of all questions of the suite's tasks [questions], each task with the same total weight."""
    directory = folder / "eval"
    pieces = []
    for task in read_json(directory / "summary.json")["tasks"]:
        scores = np.array([line["score"] for line in read_json_lines(directory / "samples" / f"{task}.jsonl")])
        pieces.append(scores / len(scores))
    return np.concatenate(pieces) * sum(map(len, pieces)) / len(pieces)


def _summarise(scores: dict[str, NDArray[np.float64]], routers: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy by router and its difference to the first router, with 95% intervals over seeds and questions.

    Seeds and questions are resampled together; the questions drawn are the same for all routers (paired).
    """
    rng = np.random.default_rng(0)
    seeds, questions = scores[routers[0]].shape
    weights = rng.multinomial(questions, np.full(questions, 1 / questions), size=_RESAMPLES) / questions
    drawn = {}
    for router, scores_SQ in scores.items():
        by_seed_BS = weights @ scores_SQ.T
        picks = rng.integers(seeds, size=(_RESAMPLES, seeds))
        drawn[router] = np.take_along_axis(by_seed_BS, picks, axis=1).mean(1)
    summary: dict[str, Any] = {"questions": questions}
    for router, scores_SQ in scores.items():
        summary[router] = {
            "accuracy": float(scores_SQ.mean()),
            "by_seed": scores_SQ.mean(1).tolist(),
            "interval": np.quantile(drawn[router], [0.025, 0.975]).tolist(),
        }
        if router != routers[0]:
            difference = drawn[router] - drawn[routers[0]]
            summary[router]["difference"] = float(scores_SQ.mean() - scores[routers[0]].mean())
            summary[router]["difference_interval"] = np.quantile(difference, [0.025, 0.975]).tolist()
    return summary


def draw(result: dict[str, Any], routers: tuple[str, ...], path: Path) -> None:
    """Accuracy against rows, a line a router, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    rows = [point["rows"] for point in result["points"]]
    for router in routers:
        entries = [point[router] for point in result["points"]]
        middle = np.array([entry["accuracy"] for entry in entries])
        low, high = np.array([entry["interval"] for entry in entries]).T
        axis.errorbar(rows, middle, [middle - low, high - middle], marker="o", capsize=3, label=router)
    axis.set(xscale="log", xlabel="training rows", ylabel="accuracy", title="Learning curve, same optimizer steps")
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe(result: dict[str, Any], routers: tuple[str, ...], command: str) -> str:
    """Markdown: a row a size."""
    lines = [
        "# Learning curve",
        "",
        f"`{command}`",
        "",
        "Accuracy with 95% intervals over seeds and questions; differences to the first router, paired by question.",
        "",
        "| rows | " + " | ".join(routers) + " | " + " | ".join(f"{r} - {routers[0]}" for r in routers[1:]) + " |",
        "| --- |" + " --- |" * (2 * len(routers) - 1),
    ]
    for point in result["points"]:
        cells = [_percent(point[r]["accuracy"], point[r]["interval"]) for r in routers]
        cells += [_percent(point[r]["difference"], point[r]["difference_interval"]) for r in routers[1:]]
        lines.append(f"| {point['rows']:,} | " + " | ".join(cells) + " |")
    apart = [
        f"{point['rows']:,}"
        for point in result["points"]
        for r in routers[1:]
        if point[r]["difference_interval"][0] > 0 or point[r]["difference_interval"][1] < 0
    ]
    verdict = (
        f"Intervals of the difference exclude 0 at {', '.join(apart)} rows."
        if apart
        else ("No difference can be told from 0 at any size.")
    )
    return "\n".join([*lines, "", verdict, ""])


def _percent(value: float, interval: list[float]) -> str:
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
