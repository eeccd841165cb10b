"""Does a table of 665,000 rows stay on disk? Start-up time once converted, and what a worker's memory grows by.

Caller: `llava-compete bench data --scale`.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from llava_compete.data.config import DataSection, SourceSection
from llava_compete.data.dataset import ConversationDataset, build_datasets
from llava_compete.data.sampler import GlobalBatchSampler

_MEBIBYTE = 2**20


def run_scale(folder: Path, processor: Any, num_rows: int = 665_000, rows_read: int = 5_000) -> dict[str, float]:
    """Convert, start again, and read `rows_read` rows in the sampler's order in each of two forked workers.

    rss counts the pages of the table that the worker touched, which all workers share; uss is what is its alone.
    """
    section = DataSection(
        sources=[SourceSection(name="scale", path=_write_rows(folder, num_rows))],
        cache_dir=folder / "cache",
    )
    start = time.perf_counter()
    build_datasets(section, processor, seed=0)
    converted = time.perf_counter()
    dataset = build_datasets(section, processor, seed=0).train
    sampler = GlobalBatchSampler(dataset.lengths, dataset.modalities, 128, 16, 8, 0, seed=0)
    next(iter(sampler))
    ready = time.perf_counter()
    growth = [_worker_growth(dataset, worker, rows_read) for worker in range(2)]
    return {
        "rows": num_rows,
        "first_conversion_seconds": round(converted - start, 1),
        "start_up_seconds": round(ready - converted, 1),
        "worker_rss_growth_mib": round(max(rss for rss, _ in growth), 1),
        "worker_uss_growth_mib": round(max(uss for _, uss in growth), 1),
    }


def _write_rows(folder: Path, num_rows: int) -> Path:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scale.jsonl"
    words = [f"word{number}" for number in range(500)]
    with path.open("w") as file:
        for index in range(num_rows):
            turns = [
                {"from": "human", "value": " ".join(rng.choices(words, k=12))},
                {"from": "gpt", "value": " ".join(rng.choices(words, k=30))},
            ]
            file.write(json.dumps({"id": str(index), "conversations": turns}) + "\n")
    return path


def _worker_growth(dataset: ConversationDataset, worker: int, rows_read: int) -> tuple[float, float]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_read_rows, args=(dataset, worker, rows_read, there))
    process.start()
    growth = here.recv()
    process.join()
    return growth


def _read_rows(dataset: ConversationDataset, worker: int, rows_read: int, answer: Connection) -> None:
    process = psutil.Process()
    before = process.memory_full_info()
    rng = random.Random(worker)
    for _ in range(rows_read):
        _ = dataset[rng.randrange(len(dataset))]
    after = process.memory_full_info()
    answer.send(((after.rss - before.rss) / _MEBIBYTE, (after.uss - before.uss) / _MEBIBYTE))
