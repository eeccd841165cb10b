"""Which experts answered each patch of a picture and each token of a text, and the patches an expert is surest of.

Suffixes: T tokens, K chosen, R routed experts, P patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_compete.evaluation.picture_choices import (
    ShownPicture,
    cut_cell,
    on_picture,
    picture_maps,
    shown_pictures,
    token_cells,
)
from llava_compete.evaluation.routing_controls import Batch
from llava_compete.evaluation.routing_data import TOKEN_CLASSES, Row, to_batch, token_classes
from llava_compete.moe.records import RoutingObservation
from llava_compete.moe.routers import by_weight


class Choices(NamedTuple):
    """experts [T, K], the one with the largest weight first, and their weights."""

    experts: np.ndarray
    weights: np.ndarray


class RowChoices(NamedTuple):
    """One row's choices.

    maps: by layer and picture, as `picture_maps` has them; pictures: as they were given.
    tokens: by layer of the language model, of all tokens of the text; `text` and `classes` say which these are.
    """

    maps: dict[str, list[np.ndarray]]
    tokens: dict[str, Choices]
    text: list[str]
    classes: list[int]
    pictures: list[ShownPicture]


@torch.inference_mode()
def choices_of(model: Any, processor: Any, row: Row) -> RowChoices:
    """Run one row with its answers, and read every layer's choices."""
    batch = to_batch([row], processor, model.device)
    model(**{key: value for key, value in batch.items() if key != "labels"}, output_routing=True)
    choices = {name: _choices(record.observation) for name, record in model.routing.records.items()}
    classes = token_classes(batch, model.config.image_token_id)[0].cpu().numpy()
    pictures = shown_pictures(processor, row.images) if row.images else []
    maps = {}
    if pictures:
        (places_T,) = np.nonzero(classes == TOKEN_CLASSES.index("image"))
        maps = picture_maps(model, {name: chosen.experts for name, chosen in choices.items()}, places_T, pictures)
    tokens = {name: chosen for name, chosen in choices.items() if name.startswith("language.")}
    text = [processor.tokenizer.decode([token]) for token in batch["input_ids"][0].tolist()]
    return RowChoices(maps, tokens, text, classes.tolist(), pictures)


@torch.inference_mode()
def all_choices(model: Any, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """By layer the experts of every counted token of some batches, in their order: [T, K], numbers ascending."""
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        model(**{key: value for key, value in batch.items() if key != "labels"}, output_routing=True)
        for name, record in model.routing.records.items():
            seen = record.observation
            used_TK = seen.used_TK[seen.groups.counted_T > 0].sort(dim=1).values
            found.setdefault(name, []).append(used_TK.to(torch.int16).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def overlap(one_TK: np.ndarray, other_TK: np.ndarray) -> float:
    """Share of the choices of one checkpoint that another makes too, on the same tokens."""
    return float((one_TK[:, :, None] == other_TK[:, None, :]).any(-1).mean())


class Patch(NamedTuple):
    """A patch that an expert answered with this probability of its router, cut out of its picture."""

    probability: float
    picture: Image.Image


@torch.inference_mode()
def surest_patches(
    model: Any, processor: Any, rows: Iterable[Sequence[Row]], layers: Sequence[str], count: int = 6
) -> dict[str, list[list[Patch]]]:
    """By layer (of tower or projector) and expert the patches of which its router is surest, one of a picture at
    most."""
    best: dict[str, list[list[Patch]]] = {}
    for part in rows:
        batch = to_batch(part, processor, model.device)
        pictures = [picture for row in part for picture in row.images]
        if not pictures:
            continue
        model(**{key: value for key, value in batch.items() if key != "labels"}, output_routing=True)
        shown = shown_pictures(processor, pictures)
        sizes = [(picture.height, picture.width) for picture in pictures]
        for name in layers:
            seen = model.routing.records[name].observation
            probs_TR = seen.scores_TR.softmax(-1).cpu()
            chosen_TR = torch.zeros_like(probs_TR).scatter_(1, seen.choices_TC.cpu(), 1.0)
            mine = best.setdefault(name, [[] for _ in range(probs_TR.shape[1])])
            for picture, cells in zip(shown, token_cells(model, name.split(".")[0], sizes), strict=True):
                place_P = torch.from_numpy(cells.reshape(-1))
                inside_P = torch.from_numpy(on_picture(picture, cells.shape).reshape(-1))
                values, patches = ((probs_TR * chosen_TR)[place_P] * inside_P[:, None]).max(0)
                _keep(mine, values, patches, picture, cells.shape, count)
    return best


def _keep(
    mine: list[list[Patch]], values_R: Tensor, patches_R: Tensor, shown: ShownPicture, shape: Any, count: int
) -> None:
    """Put one picture's best patch of each expert among the best so far; only those that stay are cut out."""
    for expert, (value, patch) in enumerate(zip(values_R.tolist(), patches_R.tolist(), strict=True)):
        if value > 0 and (len(mine[expert]) < count or value > mine[expert][-1].probability):
            found = Patch(value, cut_cell(shown, shape, patch))
            mine[expert] = sorted([*mine[expert], found], key=lambda kept: -kept.probability)[:count]


def _choices(seen: RoutingObservation) -> Choices:
    """A shared expert, and whoever else has the largest weight, comes first."""
    experts_TK, weights_TK = by_weight(seen.used_TK, seen.weights_TK)
    return Choices(experts_TK.cpu().numpy(), weights_TK.cpu().numpy())
