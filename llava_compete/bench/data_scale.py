"""Does a table of 665,000 rows stay on disk? Start-up time once converted, and what a worker's memory grows by."""

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


def run_scale(folder: Path, processor: Any, num_rows: int = 665_000, rows_read: int = 20_000) -> dict[str, float]:
    """Convert, start again, and read `rows_read` random rows in each of two forked workers.

    Growth is the peak of resident memory, pages of the table that all workers share included.
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
        "worker_growth_mib": round(max(growth), 1),
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


def _worker_growth(dataset: ConversationDataset, worker: int, rows_read: int) -> float:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_read_rows, args=(dataset, worker, rows_read, there))
    process.start()
    growth: float = here.recv()
    process.join()
    return growth


def _read_rows(dataset: ConversationDataset, worker: int, rows_read: int, answer: Connection) -> None:
    process = psutil.Process()
    before = peak = process.memory_info().rss
    rng = random.Random(worker)
    for number in range(rows_read):
        _ = dataset[rng.randrange(len(dataset))]
        if number % 50 == 0:
            peak = max(peak, process.memory_info().rss)
    answer.send((peak - before) / _MEBIBYTE)
