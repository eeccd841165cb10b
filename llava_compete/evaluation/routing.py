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

from llava_compete.data.collator import Collator
from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import load_for_inference
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.routing_controls import Batch, measure_controls
from llava_compete.evaluation.winner_prediction import measure_prediction
from llava_compete.language.chat_encoding import encode_conversation, images_before
from llava_compete.moe.state import RoutingMetrics
from llava_compete.vision.image_decoder import open_image

log = logging.getLogger(__name__)
_COLUMNS = ("image", "question", "answer")


def measure_routing(config: EvalConfig) -> dict[str, Any]:
    """What routing.json holds; a dense checkpoint, or a router without competition, has None as its agreement.

    Returns:
        controls: by control (see `routing_controls`) loss in nats a token and share of exact answers, all rows;
        agreement: mean over layers of what `winner_prediction` measures; agreement_by_layer;
        expert_use: by layer, shares that sum to 1; router_entropy: by layer, in nats; tokens: by layer, how many were
        measured; data: the tables.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, processor = load_for_inference(config.checkpoint, device, torch.float32, adapter=config.adapter)
    halves: tuple[list[Batch], list[Batch]] = ([], [])
    for half, batch in _batches(config, processor):
        halves[half].append({key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)})
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


def _batches(config: EvalConfig, processor: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of each table as batches: 0 and those of its first half, then 1 and those of its second."""
    collate = Collator(processor)
    for path in config.routing_data:
        rows = list(_rows(Path(path), config.routing_rows))
        middle = (len(rows) + 1) // 2
        for half, part in enumerate((rows[:middle], rows[middle:])):
            for start in range(0, len(part), config.batch_size):
                yield half, collate([_item(row, processor) for row in part[start : start + config.batch_size]])


def _rows(path: Path, limit: int) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path}: test table for routing statistics is missing; build it with: llava-compete data demo")
    table = pq.read_table(path)
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: columns {', '.join(table.column_names)}; expected also {', '.join(missing)}")
    yield from table.slice(0, limit).to_pylist()


def _item(row: dict[str, Any], processor: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": images_before(1, [{"type": "text", "text": row["question"]}])},
        {"role": "assistant", "content": row["answer"]},
    ]
    encoded = encode_conversation(processor.tokenizer, messages, tokens_per_image=processor.num_image_tokens)
    pixels = processor.image_processor.preprocess([open_image(row["image"]["bytes"])], return_tensors="pt")
    return {
        "input_ids": torch.tensor(encoded.input_ids),
        "labels": torch.tensor(encoded.labels),
        "pixel_values": pixels["pixel_values"],
        "sample_id": row.get("id", ""),
    }
