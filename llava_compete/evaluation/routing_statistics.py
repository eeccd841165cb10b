"""Sums over tokens of what each layer's router did, by kind of token and by data source; they add up over batches.

Kinds: pictures, questions and answers in the language model (a question and its pictures are the prefill, answers are
decoded); tower and projector see pictures only. On the same tokens a competition says which experts would have won.
Suffixes: T tokens, E experts, R routed ones, K chosen, G groups (kinds x sources), U different words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava_compete.evaluation.routing_controls import competing
from llava_compete.evaluation.routing_data import TOKEN_CLASSES, Row, to_batch, token_classes
from llava_compete.moe.block import SparseMoeBlock, moe_blocks
from llava_compete.moe.competition import Contest
from llava_compete.moe.experts import ExpertsOutput
from llava_compete.moe.records import RoutingObservation

NOBODY = -1  # a token that takes part in nothing


@dataclass
class LayerSums:
    """One layer. `won_G` and what follows are over the tokens of competitions, None where the layer holds none."""

    load_GE: Tensor
    tokens_G: Tensor
    entropy_G: Tensor
    margin_G: Tensor
    pairs_EE: Tensor  # tokens that both experts answered; the diagonal: one of them
    num_chosen: int
    found_G: Tensor | None = None  # share of a token's winners that the router chose, summed
    divergence_G: Tensor | None = None  # KL(q || p) in nats, q = softmax of the affinities

    def __add__(self, other: LayerSums) -> LayerSums:
        sums = (_plus(getattr(self, name), getattr(other, name)) for name in _SUMS)
        load, tokens, entropy, margin, pairs, found, divergence = sums
        assert load is not None
        assert tokens is not None
        assert entropy is not None
        assert margin is not None
        assert pairs is not None
        return LayerSums(load, tokens, entropy, margin, pairs, self.num_chosen, found, divergence)


_SUMS = ("load_GE", "tokens_G", "entropy_G", "margin_G", "pairs_EE", "found_G", "divergence_G")


@dataclass
class WordCounts:
    """How often each expert answered each token id, by layer of the language model: `counts[layer][id]` is [E]."""

    counts: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def add(self, layer: str, ids_T: Tensor, used_TE: Tensor) -> None:
        words_U, place_T = ids_T.unique(return_inverse=True)
        sums_UE = torch.zeros(len(words_U), used_TE.shape[1]).index_add_(0, place_T, used_TE)
        mine = self.counts.setdefault(layer, {})
        for word, sums_E in zip(words_U.tolist(), sums_UE, strict=True):
            mine[word] = mine[word] + sums_E if word in mine else sums_E

    def __add__(self, other: WordCounts) -> WordCounts:
        merged = {layer: dict(words) for layer, words in self.counts.items()}
        for layer, words in other.counts.items():
            mine = merged.setdefault(layer, {})
            for word, sums_E in words.items():
                mine[word] = mine[word] + sums_E if word in mine else sums_E
        return WordCounts(merged)

    def typical(self, layer: str, count: int, least: int) -> list[list[tuple[int, float]]]:
        """By expert its most typical ids: the expert's share of the id's choices over its share of all (lift), of ids
        that were seen `least` times."""
        words = self.counts.get(layer, {})
        if not words:
            return []
        ids = list(words)
        counts_UE = torch.stack([words[word] for word in ids])
        shares_E = counts_UE.sum(0) / counts_UE.sum()
        seen_U = counts_UE.sum(1)
        lift_UE = counts_UE / seen_U[:, None] / shares_E.clamp(min=1e-12)
        lift_UE[seen_U < least] = 0
        best_XE = lift_UE.topk(min(count, len(ids)), dim=0)
        found = zip(best_XE.indices.T.tolist(), best_XE.values.T.tolist(), strict=True)
        return [[(ids[u], lift) for u, lift in zip(*pair, strict=True) if lift > 1] for pair in found]


@dataclass
class RoutingSums:
    """What some rows amount to: by layer, and words; `+` of two is what all their rows amount to."""

    sources: list[str]
    layers: dict[str, LayerSums] = field(default_factory=dict)
    words: WordCounts = field(default_factory=WordCounts)

    def __add__(self, other: RoutingSums) -> RoutingSums:
        layers = dict(self.layers)
        for name, sums in other.layers.items():
            layers[name] = layers[name] + sums if name in layers else sums
        return RoutingSums(self.sources, layers, self.words + other.words)

    def by_class(self, sums_G: Tensor) -> Tensor:
        """[G, ...] summed over sources: [classes, ...]."""
        return sums_G.unflatten(0, (len(TOKEN_CLASSES), len(self.sources))).sum(1)

    def by_source(self, sums_G: Tensor) -> Tensor:
        """[G, ...] summed over classes: [sources, ...]."""
        return sums_G.unflatten(0, (len(TOKEN_CLASSES), len(self.sources))).sum(0)


@torch.inference_mode()
def sums_of(model: Any, processor: Any, rows: Sequence[Row], sources: list[str]) -> RoutingSums:
    """The sums of one batch of rows, on the host."""
    batch = to_batch(rows, processor, model.device)
    groups = _groups_by_part(model, batch, rows, sources)
    num_groups = len(TOKEN_CLASSES) * len(sources)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    result = RoutingSums(sources)
    model(**inputs, output_routing=True)
    ids_T = batch["input_ids"].flatten()
    for name, record in model.routing.records.items():
        seen = record.observation
        group_T = _group_of(groups, name, seen)
        result.layers[name] = _layer_sums(seen, group_T, num_groups)
        if name.startswith("language."):
            text_T = group_T >= len(sources)  # all classes but the pictures'
            result.words.add(name, ids_T[text_T].cpu(), _marks(seen, text_T).cpu())
    with competing(model), _contests(model) as contests:
        if any(block.config.holds_contests for block in moe_blocks(model).values()):
            model(**inputs, output_routing=True)
            for name, contest in contests.items():
                seen = model.routing.records[name].observation
                _add_contest(result.layers[name], seen, contest, _group_of(groups, name, seen), num_groups)
    return result


def _groups_by_part(model: Any, batch: dict[str, Tensor], rows: Sequence[Row], sources: list[str]) -> dict[str, Tensor]:
    """By part what the tokens' groups are read from: images' sources, and the text's groups [B * N]."""
    place = {name: number for number, name in enumerate(sources)}
    source_B = torch.tensor([place[row.source] for row in rows], device=model.device)
    classes_BN = token_classes(batch, model.config.image_token_id)
    images = [place[row.source] for row in rows for _ in row.images]
    return {
        "images": torch.tensor(images, dtype=torch.int64, device=model.device),
        "language": (classes_BN * len(sources) + source_B[:, None]).flatten(),
    }


def _group_of(groups: dict[str, Tensor], name: str, seen: RoutingObservation) -> Tensor:
    """int64 [T]: the group of each token of a layer, NOBODY for padding. Pictures are the first class."""
    if name.startswith("language."):
        group_T = groups["language"]
    else:  # one sequence an image: the weights say which
        image_T = seen.groups.sequence_weights_ST.argmax(0)
        group_T = groups["images"][image_T]
    return group_T.masked_fill(seen.groups.counted_T == 0, NOBODY)


def _layer_sums(seen: RoutingObservation, group_T: Tensor, num_groups: int) -> LayerSums:
    counted_T = group_T >= 0
    used_TE = _marks(seen, counted_T)
    probs_TR = seen.scores_TR[counted_T].softmax(-1)
    choices_TC = seen.choices_TC[counted_T]
    left_out_T = probs_TR.scatter(1, choices_TC, 0.0).amax(-1)
    margin_T = probs_TR.gather(1, choices_TC[:, -1:])[:, 0] - left_out_T
    member_GT = _members(group_T[counted_T], num_groups)
    return LayerSums(
        load_GE=(member_GT @ used_TE).double().cpu(),
        tokens_G=member_GT.sum(1).double().cpu(),
        entropy_G=(member_GT @ torch.special.entr(probs_TR).sum(-1)).double().cpu(),
        margin_G=(member_GT @ margin_T).double().cpu(),
        pairs_EE=(used_TE.T @ used_TE).double().cpu(),
        num_chosen=seen.used_TK.shape[1],
    )


def _add_contest(sums: LayerSums, seen: RoutingObservation, contest: Contest, group_T: Tensor, num_groups: int) -> None:
    counted_T = group_T >= 0
    winners_TK, choices_TK = contest.winners_TK[counted_T], seen.choices_TC[counted_T]
    found_T = (winners_TK[:, :, None] == choices_TK[:, None, :]).any(-1).float().mean(-1)
    log_q_TE = contest.affinity_TE[counted_T].float().log_softmax(-1)
    log_p_TE = seen.scores_TR[counted_T].log_softmax(-1)
    divergence_T = (log_q_TE.exp() * (log_q_TE - log_p_TE)).sum(-1)
    member_GT = _members(group_T[counted_T], num_groups)
    sums.found_G = (member_GT @ found_T).double().cpu()
    sums.divergence_G = (member_GT @ divergence_T).double().cpu()


def _marks(seen: RoutingObservation, kept_T: Tensor) -> Tensor:
    """float32 [kept, E]: 1 for each expert that answers a token."""
    used_TK = seen.used_TK[kept_T]
    return torch.zeros(len(used_TK), seen.num_experts, device=used_TK.device).scatter_(1, used_TK, 1.0)


def _members(group_T: Tensor, num_groups: int) -> Tensor:
    return (group_T == torch.arange(num_groups, device=group_T.device)[:, None]).float()


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


@contextmanager
def _contests(model: Any) -> Iterator[dict[str, Contest]]:
    """Inside, a forward leaves each layer's contest."""
    found: dict[str, Contest] = {}

    def watch(block: SparseMoeBlock) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, ExpertsOutput) and isinstance(output.contest, Contest):
                found[block.name] = output.contest

        return block.experts.register_forward_hook(keep)

    handles = [watch(block) for block in moe_blocks(model).values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
