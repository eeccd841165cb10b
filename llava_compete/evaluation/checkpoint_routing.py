"""All that is measured of one checkpoint's routing on some rows: sums, controls, worth, likeness, examples.

Sums run over all rows, in several processes if asked; what compares losses or shows examples takes the first ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import Answerer, Prompt, load_for_inference
from llava_compete.evaluation.generation_settings import GenerationSettings
from llava_compete.evaluation.layer_worth import Likeness, Worth, measure_likeness, measure_worth
from llava_compete.evaluation.routing_controls import Score, measure_controls
from llava_compete.evaluation.routing_data import Row, Rows, batches_of, to_batch
from llava_compete.evaluation.routing_statistics import RoutingSums, sums_of
from llava_compete.evaluation.spreading import spread
from llava_compete.evaluation.token_choices import Patch, RowChoices, all_choices, choices_of, surest_patches
from llava_compete.evaluation.winner_prediction import measure_prediction
from llava_compete.model.devices import usable_device
from llava_compete.moe.block import moe_blocks
from llava_compete.processes import end_with_parent

log = logging.getLogger(__name__)
ANSWER_TOKENS = 64
PATCH_LAYERS = 3  # whose surest patches are shown


@dataclass(frozen=True)
class MeasureOptions:
    """compared_rows: for controls and worth, which run the model once more a layer; examples: rows that are shown."""

    compared_rows: int = 64
    examples: int = 4
    batch_size: int = 8
    processes: int = 1
    device: str | None = None


class Example(NamedTuple):
    """A row, what the model answers, and which experts did."""

    row: Row
    answer: str
    choices: RowChoices


@dataclass
class CheckpointRouting:
    """What was found; a dense checkpoint has examples only."""

    path: str
    settings: dict[str, Any]  # by layer: router, experts, chosen
    examples: list[Example]
    num_rows: int
    num_compared: int  # rows of controls, worth, and choices
    tokenizer: Any
    sums: RoutingSums | None = None
    controls: dict[str, Score] | None = None
    prediction: dict[str, dict[str, float]] | None = None
    worth: dict[str, Worth] | None = None
    likeness: dict[str, Likeness] | None = None
    patches: dict[str, list[list[Patch]]] | None = None
    choices: dict[str, np.ndarray] | None = None  # of the compared rows


def measure_checkpoint(
    path: Path, rows: Rows, options: MeasureOptions, progress: Callable[[int], Any] = lambda count: None
) -> CheckpointRouting:
    """Measure one checkpoint; `progress` is called with numbers of rows that are done."""
    device = usable_device(options.device)
    model, processor = load_for_inference(str(path), device, torch.float32)
    if model.model.vision_tower is None and any(rows[number].images for number in range(min(len(rows), 8))):
        raise UserError(f"{path}: has no vision tower, and the data have pictures")
    blocks = moe_blocks(model)
    found = CheckpointRouting(
        path=str(path),
        settings={
            name: {
                "router": block.config.router,
                "experts": block.num_slots,
                "chosen": block.config.num_experts_per_tok,
            }
            for name, block in blocks.items()
        },
        examples=list(_examples(model, processor, rows, options.examples)),
        num_rows=len(rows),
        num_compared=min(options.compared_rows, len(rows)),
        tokenizer=processor.tokenizer,
    )
    if not blocks:
        return found
    found.sums = _all_sums(path, model, processor, rows, options, progress)
    # Of each source: what was fitted on pictures alone would be measured on text alone.
    halves = rows.halves(spread(len(rows), options.compared_rows))
    fitted, held_out = (list(batches_of(rows, options.batch_size, half)) for half in halves)
    parts = [*fitted, *held_out]
    batches = [to_batch(part, processor, device) for part in parts]
    loads = {name: sums.load_GE.sum(0).to(device) for name, sums in found.sums.layers.items()}
    found.controls = measure_controls(model, batches, loads)
    found.choices = all_choices(model, batches)
    if any(block.config.holds_contests for block in blocks.values()) and held_out:
        found.prediction = measure_prediction(model, batches[: len(fitted)], batches[len(fitted) :])
    found.worth = measure_worth(model, batches)
    found.likeness = measure_likeness(model, batches[0])
    found.patches = surest_patches(model, processor, parts, _patch_layers(list(blocks)))
    return found


def _patch_layers(names: list[str]) -> list[str]:
    """Some of the layers that see patches, from the first to the last."""
    seeing = [name for name in names if not name.startswith("language.")]
    return [seeing[place] for place in spread(len(seeing), PATCH_LAYERS)]


def _examples(model: Any, processor: Any, rows: Rows, count: int) -> Iterator[Example]:
    """First questions of some rows, answered; the choices are those of the expected answer's tokens."""
    answerer = Answerer(model, processor, 1)
    settings = GenerationSettings.from_task({"max_new_tokens": ANSWER_TOKENS})
    for number in spread(len(rows), count):
        row = rows[number].first_exchange()
        prompt = Prompt(row.question, partial(list, row.images), f"{row.source}/{row.id}")
        yield Example(row, answerer.generate([prompt], [settings])[0], choices_of(model, processor, row))


def _all_sums(
    path: Path, model: Any, processor: Any, rows: Rows, options: MeasureOptions, progress: Callable[[int], Any]
) -> RoutingSums:
    total = RoutingSums(rows.sources)
    numbers = [list(range(start, min(start + options.batch_size, len(rows))))
               for start in range(0, len(rows), options.batch_size)]  # fmt: skip
    if options.processes == 1:
        for part in numbers:
            total = total + sums_of(model, processor, [rows[number] for number in part], rows.sources)
            progress(len(part))
        return total
    context = get_context("spawn")  # a forked process could not use a GPU, nor torch's threads
    with ProcessPoolExecutor(options.processes, context, _start, (path, rows, str(model.device))) as pool:
        for part, sums in zip(numbers, pool.map(_part_sums, numbers), strict=True):
            total = total + sums
            progress(len(part))
    return total


_worker: tuple[Any, Any, Rows] | None = None


def _start(path: Path, rows: Rows, device: str) -> None:
    """A process's own model, on the GPU of its number where there are several."""
    global _worker
    end_with_parent()
    if device.startswith("cuda"):
        number = int(get_context().current_process().name.rpartition("-")[2] or 1) - 1
        device = f"cuda:{number % torch.cuda.device_count()}"
    else:
        torch.set_num_threads(1)
    _worker = (*load_for_inference(str(path), torch.device(device), torch.float32), rows)


def _part_sums(numbers: list[int]) -> RoutingSums:
    assert _worker is not None
    model, processor, rows = _worker
    return sums_of(model, processor, [rows[number] for number in numbers], rows.sources)
