"""Which experts answered each patch of a picture and each token of a text, and the patches an expert is surest of.

A patch is a place of the tower's grid: what the tower's blocks, the projector and the language model's picture tokens
have in common. With several scales (S²) a tower's block is shown at the first. Of pictures in tiles, and where the
projector pools, they have none in common, and no patches are shown. Suffixes: T tokens, K chosen, P patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_compete.evaluation.routing_controls import Batch
from llava_compete.evaluation.routing_data import Row, to_batch, token_classes
from llava_compete.moe.records import RoutingObservation


class Choices(NamedTuple):
    """experts [T, K], the one with the largest weight first, and their weights."""

    experts: np.ndarray
    weights: np.ndarray


class RowChoices(NamedTuple):
    """One row's choices.

    patches: by layer and picture, of the patches in reading order over `grid`.
    tokens: by layer of the language model, of all tokens of the text; `text` and `classes` say which these are.
    pictures: as the tower saw them.
    """

    grid: tuple[int, int]
    patches: dict[str, list[Choices]]
    tokens: dict[str, Choices]
    text: list[str]
    classes: list[int]
    pictures: list[Image.Image]


@torch.inference_mode()
def choices_of(model: Any, processor: Any, row: Row) -> RowChoices:
    """Run one row with its answers, and read every layer's choices."""
    batch = to_batch([row], processor, model.device)
    model(**{key: value for key, value in batch.items() if key != "labels"}, output_routing=True)
    tower: Any = model.model.vision_tower if has_patches(model) else None
    grid = (0, 0) if tower is None else tower.grid
    images = [] if tower is None else row.images
    classes = token_classes(batch, model.config.image_token_id)[0]
    places = [] if tower is None else _picture_places(model, batch["input_ids"][0], len(images))
    patches: dict[str, list[Choices]] = {}
    tokens: dict[str, Choices] = {}
    for name, record in model.routing.records.items():
        choices = _choices(record.observation)
        if name.startswith("language."):
            tokens[name] = choices
            patches[name] = [Choices(choices.experts[place], choices.weights[place]) for place in places]
        else:
            found = (patch_tokens(model, name, number) for number in range(len(images)))
            patches[name] = [Choices(choices.experts[place], choices.weights[place]) for place in found]
    pictures = [] if not images else [to_picture(pixels, tower.config.preprocess) for pixels in batch["pixel_values"]]
    text = [processor.tokenizer.decode([token]) for token in batch["input_ids"][0].tolist()]
    return RowChoices(grid, patches, tokens, text, classes.tolist(), pictures)


def has_patches(model: Any) -> bool:
    """Whether tower, projector and language model see the same places of a picture."""
    tower = model.model.vision_tower
    return tower is not None and model.model.tiling is None and model.config.projector.pool == 1


def patch_tokens(model: Any, name: str, number: int) -> np.ndarray:
    """Where among a tower's or projector's tokens the patches of picture `number` stand."""
    tower = model.model.vision_tower
    size = tower.grid[0] * tower.grid[1]
    if name.startswith("vision."):
        tile = number * tower.config.scales[0] ** 2
        return np.arange(size) + tile * tower.tokens_per_tile + tower.kind.num_prefix_tokens
    return np.arange(size) + (number + 1) * model.config.num_image_tokens - size


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
    """By layer and expert the patches of which its router is surest, one of a picture at most."""
    best: dict[str, list[list[Patch]]] = {}
    for part in rows:
        batch = to_batch(part, processor, model.device)
        if "pixel_values" not in batch or not has_patches(model):
            continue
        model(**{key: value for key, value in batch.items() if key != "labels"}, output_routing=True)
        for name in layers:
            seen = model.routing.records[name].observation
            probs_TR = seen.scores_TR.softmax(-1).cpu()
            chosen_TR = torch.zeros_like(probs_TR).scatter_(1, seen.choices_TC.cpu(), 1.0)
            mine = best.setdefault(name, [[] for _ in range(probs_TR.shape[1])])
            for number, pixels in enumerate(batch["pixel_values"]):
                place = torch.from_numpy(patch_tokens(model, name, number))
                values, patches = (probs_TR[place] * chosen_TR[place]).max(0)
                _keep(mine, values, patches, pixels, model.model.vision_tower, count)
    return best


def _keep(mine: list[list[Patch]], values_R: Tensor, patches_R: Tensor, pixels: Tensor, tower: Any, count: int) -> None:
    """Put one picture's best patch of each expert among the best so far; pictures are made only of those that stay."""
    for expert, (value, patch) in enumerate(zip(values_R.tolist(), patches_R.tolist(), strict=True)):
        if value > 0 and (len(mine[expert]) < count or value > mine[expert][-1].probability):
            cut = _cut(to_picture(pixels, tower.config.preprocess), patch, tower.grid)
            mine[expert] = sorted([*mine[expert], Patch(value, cut)], key=lambda kept: -kept.probability)[:count]


def to_picture(pixels: Tensor, preprocess: Any) -> Image.Image:
    """[3, H, W], uint8 or normalised, as a picture."""
    if pixels.dtype != torch.uint8:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
        pixels = ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _cut(picture: Image.Image, patch: int, grid: tuple[int, int]) -> Image.Image:
    row, column = divmod(patch, grid[1])
    height, width = picture.height / grid[0], picture.width / grid[1]
    left, top = round(column * width), round(row * height)
    return picture.crop((left, top, round(left + width), round(top + height)))


def _picture_places(model: Any, ids_N: Tensor, count: int) -> list[np.ndarray]:
    """Positions of each picture's patches in a row of text; nothing where pictures have other numbers of tokens."""
    size = model.config.num_image_tokens
    places = (ids_N == model.config.image_token_id).nonzero()[:, 0].cpu().numpy()
    if len(places) != count * size:
        return []
    rows, columns = model.model.vision_tower.grid
    return [places[number * size : (number + 1) * size][-rows * columns :] for number in range(count)]


def _choices(seen: RoutingObservation) -> Choices:
    """A shared expert, and whoever else has the largest weight, comes first."""
    weights_TK, order_TK = seen.weights_TK.float().sort(dim=1, descending=True, stable=True)
    return Choices(seen.used_TK.gather(1, order_TK).cpu().numpy(), weights_TK.cpu().numpy())
