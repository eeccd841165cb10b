"""How routing behaves on held-out data: expert use by layer, what it is worth, and how well a router knows the winners.

Rows of test tables (image, question, answer) are run with their answers through the checkpoint: as at inference, with
controls in the router's place (`routing_controls`), and with every layer competing (`winner_prediction`).
CompeteSMoE (arXiv 2505.13380), section 3.2, names the agreement alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import load_for_inference
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.routing_controls import Batch, measure_controls
from llava_compete.evaluation.routing_data import Rows, batches_of, to_batch
from llava_compete.evaluation.winner_prediction import measure_prediction
from llava_compete.model.devices import usable_device
from llava_compete.moe.metrics import RoutingMetrics

log = logging.getLogger(__name__)


def measure_routing(config: EvalConfig) -> dict[str, Any]:
    """What routing.json holds; a dense checkpoint, or a router without competition, has None as its agreement.

    Returns:
        controls: by control (see `routing_controls`) loss in nats a token and share of exact answers, all rows;
        agreement: mean over layers of what `winner_prediction` measures; agreement_by_layer;
        expert_use: by layer, shares that sum to 1; router_entropy: by layer, in nats; tokens: by layer, how many were
        measured; data: the tables.
    """
    device = usable_device(config.device, "device")
    model, processor = load_for_inference(config.checkpoint, device, torch.float32, adapter=config.adapter)
    halves: tuple[list[Batch], list[Batch]] = ([], [])
    for half, batch in _batches(config, processor, device):
        halves[half].append(batch)
    batches = [*halves[0], *halves[1]]
    routed = _totals(model, batches)
    loads = {name: metrics.load_E for name, metrics in routed.items()}
    controls = measure_controls(model, batches, loads) if routed else {}
    by_layer = measure_prediction(model, *halves) if routed else {}
    agreement = {
        kind: round(sum(layer[kind] for layer in by_layer.values()) / len(by_layer), 4)
        for kind in next(iter(by_layer.values()), {})
    }
    result = {
        "controls": {
            name: {key: round(value, 4) for key, value in s._asdict().items()} for name, s in controls.items()
        },
        "agreement": agreement or None,
        "agreement_by_layer": {name: {k: round(v, 4) for k, v in found.items()} for name, found in by_layer.items()},
        "expert_use": {name: _shares(metrics) for name, metrics in routed.items()},
        "router_entropy": {
            name: round(float(metrics.entropy_sum / metrics.tokens), 4) for name, metrics in routed.items()
        },
        "tokens": {name: int(metrics.tokens) for name, metrics in routed.items()},
        "data": config.routing_data,
    }
    for line in _in_words(result):
        log.info("%s", line)
    return result


def _in_words(result: dict[str, Any]) -> Iterator[str]:
    for name, found in result["controls"].items():
        yield f"routing, {name}: loss {found['loss']:.4f}, exact answers {found['exact']:.3f}"
    if result["agreement"]:
        words = (f"{kind.replace('_', ' ')} {share:.3f}" for kind, share in result["agreement"].items())
        yield f"winners of a competition that are found: {', '.join(words)}"


def _shares(metrics: RoutingMetrics) -> list[float]:
    return [round(share, 4) for share in (metrics.load_E / metrics.load_E.sum()).tolist()]


@torch.inference_mode()
def _totals(model: Any, batches: list[Batch]) -> dict[str, RoutingMetrics]:
    """Routing sums over all batches, by layer."""
    totals: dict[str, RoutingMetrics] = {}
    for batch in batches:
        model(**batch, output_routing=True)
        for name, record in model.routing.records.items():
            totals[name] = totals[name] + record.metrics if name in totals else record.metrics
    return totals


def _batches(config: EvalConfig, processor: Any, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """The rows of each table as batches: 0 and those of its first half, then 1 and those of its second."""
    for path in config.routing_data:
        rows = Rows([_table(path)], limit=config.routing_rows)
        for half, numbers in enumerate(rows.halves(range(len(rows)))):
            for part in batches_of(rows, config.batch_size, numbers):
                yield half, to_batch(part, processor, device)


def _table(path: str) -> Path:
    if not Path(path).is_file():
        raise UserError(f"{path}: test table for routing statistics is missing; build it with: llava-compete data demo")
    return Path(path)
