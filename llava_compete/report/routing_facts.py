"""A checkpoint's measured routing as plain numbers: what report.json holds and the page draws."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llava_compete.evaluation.checkpoint_routing import CheckpointRouting
from llava_compete.evaluation.routing_data import TOKEN_CLASSES
from llava_compete.evaluation.routing_statistics import LayerSums, RoutingSums

LEAST_SEEN = 5  # times that a word must have been met to be called typical
TYPICAL_WORDS = 8
# Kinds of token in the order of the figures. A picture's tokens and the question are the prefill, answers are decoded.
KINDS = ("picture", "question", "answer")


def routing_facts(found: CheckpointRouting) -> dict[str, Any]:
    """By layer and kind of token the loads, entropy and margin; pairs; agreement with a competition; controls, worth,
    likeness and typical words. Shares sum to 1, entropies and losses are in nats."""
    if found.sums is None:
        return {"path": found.path, "rows": found.num_rows, "layers": {}}
    sums = found.sums
    return {
        "path": found.path,
        "rows": found.num_rows,
        "compared_rows": found.num_compared,
        "sources": sums.sources,
        "layers": {name: {**found.settings[name], **_layer(found, sums, name)} for name in sums.layers},
        "controls": {name: _rounded(score._asdict()) for name, score in (found.controls or {}).items()},
        "winners_found": {name: _rounded(shares) for name, shares in (found.prediction or {}).items()},
    }


def _layer(found: CheckpointRouting, sums: RoutingSums, name: str) -> dict[str, Any]:
    layer = sums.layers[name]
    worth, likeness = (found.worth or {}).get(name), (found.likeness or {}).get(name)
    competes = layer.found_G is not None
    facts: dict[str, Any] = {
        "all": _group(layer, [layer.load_GE.sum(0), *_totals(layer)]),
        "by_kind": _split(sums.by_class, layer, KINDS),
        "by_source": _split(sums.by_source, layer, sums.sources),
        "pairs": _pairs(layer),
        "words": _words(found, sums, name),
    }
    if competes:
        assert layer.found_G is not None
        assert layer.divergence_G is not None
        tokens = float(layer.tokens_G.sum())
        facts["competition"] = {
            "recall": round(float(layer.found_G.sum()) / tokens, 4),
            "divergence": round(float(layer.divergence_G.sum()) / tokens, 5),
        }
    if worth is not None:
        facts["worth"] = {key: round(value, 5) for key, value in worth._asdict().items()}
    if likeness is not None:
        facts["likeness"] = likeness._asdict()
    return facts


def _totals(layer: LayerSums) -> list[Tensor]:
    return [layer.tokens_G.sum(), layer.entropy_G.sum(), layer.margin_G.sum()]


def _split(reduce: Any, layer: LayerSums, names: Any) -> dict[str, Any]:
    """Facts by kind or by source; those without a token are left out."""
    columns = [reduce(sums) for sums in (layer.load_GE, layer.tokens_G, layer.entropy_G, layer.margin_G)]
    groups = zip(names, *columns, strict=True)
    return {name: _group(layer, list(parts)) for name, *parts in groups if float(parts[1]) > 0}


def _group(layer: LayerSums, parts: list[Tensor]) -> dict[str, Any]:
    load_E, tokens, entropy, margin = parts
    count = float(tokens)
    return {
        "tokens": int(count),
        "load": [round(share, 5) for share in (load_E / load_E.sum()).tolist()],
        "entropy": round(float(entropy) / count, 4),
        "margin": round(float(margin) / count, 4),
    }


def _pairs(layer: LayerSums) -> list[list[float | None]]:
    """How often two experts answer one token together, over what independent choices of these loads would give.

    Expected: with K of E chosen and marginal rates a_i, a pair meets in a_i a_j (K - 1) / (K - s) of the tokens, where
    s is the sum of a² / K: exact for even loads. None where two never could meet.
    """
    tokens = float(layer.tokens_G.sum())
    chosen = layer.num_chosen
    rates_E = layer.pairs_EE.diagonal() / tokens
    if chosen < 2:
        return [[None] * len(rates_E)] * len(rates_E)
    scale = (chosen - 1) / (chosen - float((rates_E**2).sum()) / chosen)
    expected_EE = rates_E[:, None] * rates_E[None, :] * scale * tokens
    ratios = layer.pairs_EE / expected_EE
    return [
        [None if expected <= 0 else round(ratio, 3) for ratio, expected in zip(*pair, strict=True)]
        for pair in zip(ratios.tolist(), expected_EE.tolist(), strict=True)
    ]


def _words(found: CheckpointRouting, sums: RoutingSums, name: str) -> list[list[dict[str, Any]]]:
    """By expert its typical words, decoded, with their lift."""
    return [
        [{"word": found.tokenizer.decode([word]), "lift": round(lift, 2)} for word, lift in words]
        for words in sums.words.typical(name, TYPICAL_WORDS, LEAST_SEEN)
    ]


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


assert len(KINDS) == len(TOKEN_CLASSES)
