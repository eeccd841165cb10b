"""How routing behaves on held-out data: expert use by layer, and how many winners the router would have found.

Rows of test tables (image, question, answer) are run with their answers through the checkpoint twice: as at inference,
for the experts' use, and with every competition layer competing, for the agreement. Agreement is the share of the
K winners that are also among the router's top K, averaged over the tokens of a layer (padding left out) and then over
layers; a layer's input then comes from the competitions below it. CompeteSMoE (arXiv 2505.13380), section 3.2.
Caller: `llava-compete eval` with `routing_data`.
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
from llava_compete.language.chat_encoding import encode_conversation
from llava_compete.moe.state import RoutingMetrics
from llava_compete.vision.image_decoder import open_image

log = logging.getLogger(__name__)
_COLUMNS = ("image", "question", "answer")


def measure_routing(config: EvalConfig) -> dict[str, Any]:
    """What routing.json holds; a dense checkpoint, or a router without competition, has None as its agreement.

    Returns:
        router_agreement: mean over layers; router_agreement_by_layer; expert_use: by layer, shares that sum to 1;
        router_entropy: by layer, in nats; tokens: by layer, how many were measured.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, processor = load_for_inference(config.checkpoint, device, torch.float32, adapter=config.adapter)
    batches = [
        {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        for batch in _batches(config, processor)
    ]
    routed = _totals(model, batches, competition=False)
    competed = {} if not routed else _totals(model, batches, competition=True)
    agreement = {
        name: round(float(metrics.recall_sum / metrics.competition_tokens), 4)
        for name, metrics in competed.items()
        if metrics.competition_tokens > 0
    }
    result = {
        "router_agreement": round(sum(agreement.values()) / len(agreement), 4) if agreement else None,
        "router_agreement_by_layer": agreement,
        "expert_use": {name: _shares(metrics) for name, metrics in routed.items()},
        "router_entropy": {
            name: round(float(metrics.entropy_sum / metrics.tokens), 4) for name, metrics in routed.items()
        },
        "tokens": {name: int(metrics.tokens) for name, metrics in routed.items()},
        "data": config.routing_data,
    }
    if agreement:
        log.info("router agreement on held-out tokens: %.3f", result["router_agreement"])
    return result


def _shares(metrics: RoutingMetrics) -> list[float]:
    return [round(share, 4) for share in (metrics.load_E / metrics.load_E.sum()).tolist()]


@torch.inference_mode()
def _totals(model: Any, batches: list[dict[str, torch.Tensor]], competition: bool) -> dict[str, RoutingMetrics]:
    """Routing sums over all batches, by layer."""
    totals: dict[str, RoutingMetrics] = {}
    before = model.config.competition_at_inference
    model.config.competition_at_inference = competition
    try:
        for batch in batches:
            model(**batch, output_routing=True)
            for name, record in model.routing.records.items():
                totals[name] = totals[name] + record.metrics if name in totals else record.metrics
    finally:
        model.config.competition_at_inference = before
    return totals


def _batches(config: EvalConfig, processor: Any) -> Iterator[dict[str, Any]]:
    collate = Collator(processor)
    for path in config.routing_data:
        rows = list(_rows(Path(path), config.routing_rows))
        for start in range(0, len(rows), config.batch_size):
            yield collate([_item(row, processor) for row in rows[start : start + config.batch_size]])


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
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
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
