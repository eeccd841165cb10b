"""Cells stand over what their tokens saw: the colours that went into a token against those of the original picture."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TOWER, tiny_model

from llava_compete.evaluation.picture_choices import (
    ShownPicture,
    cut_cell,
    on_picture,
    picture_maps,
    shown_pictures,
    token_cells,
)
from llava_compete.evaluation.routing_data import Row
from llava_compete.evaluation.token_choices import choices_of, surest_patches

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {"vision": EXPERTS, "projector": EXPERTS, "language": EXPERTS}
KINDS: dict[str, dict[str, Any]] = {
    "squash": {},
    "pad": {"preprocess": {"resize_mode": "pad"}},
    "crop": {"preprocess": {"resize_mode": "crop"}},
    "pooled": {"pool": 2},
    "class token": {"select": "cls_patch"},
    "scales": {"scales": [1, 2]},
    "tiles": {"tiles": {}},
    "pooled tiles": {"tiles": {}, "pool": 2},
}
FINER = {**TOWER, "vision_cfg": {**TOWER["vision_cfg"], "image_size": 56}}  # a map of 8 x 8
SIZES = [(60, 150), (28, 28), (131, 64)]


def slope(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards: a colour says where it is."""
    red = np.linspace(0, 255, width)[None].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 128)], -1).round().astype(np.uint8))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> tuple[Any, Any]:
    options = KINDS[request.param]
    return tiny_model(MOE, language={"max_position_embeddings": 2048}, tower=FINER, **options)


def colours_of_tokens(model: Any, processor: Any, pictures: list[Image.Image]) -> dict[str, np.ndarray]:
    """By part the mean colour of the pixels behind each token, [T, 3]; -1 for class tokens and newlines."""
    inputs = processor.image_processor(pictures, return_tensors="pt")
    pixels = inputs["pixel_values"]
    mean, std = (torch.tensor(getattr(processor.image_processor, key)).view(3, 1, 1) for key in ("mean", "std"))
    pixels = pixels.float() if pixels.dtype == torch.uint8 else (pixels * std + mean) * 255
    tower, pool = model.model.vision_tower, model.config.projector.pool
    side = tower.grid[0]
    patches = torch.nn.functional.adaptive_avg_pool2d(pixels, side)  # [n, 3, side, side]
    features = torch.nn.functional.avg_pool2d(patches, pool)

    def flat(maps: torch.Tensor, before: int) -> torch.Tensor:
        rows = maps.flatten(2).transpose(1, 2)
        return torch.cat([torch.full((len(rows), before, 3), -1.0), rows], 1)

    extra = int(model.config.tower.select == "cls_patch")
    found = {
        "vision": flat(patches, tower.kind.num_prefix_tokens).flatten(0, 1),
        "projector": flat(features, extra).flatten(0, 1),
    }
    found["language"] = found["projector"]
    if model.model.tiling is not None:  # as the backbone itself puts features and newlines in order
        layout = model.model.tiling.layout([(p.height, p.width) for p in pictures])
        found["language"] = torch.full((sum(layout.lengths), 3), -1.0)
        found["language"][torch.from_numpy(layout.places)] = found["projector"][torch.from_numpy(layout.sources)]
    return {part: colours.numpy() for part, colours in found.items()}


def test_a_cell_is_over_what_its_token_saw(kind) -> None:
    model, processor = kind
    pictures = [slope(*size) for size in SIZES]
    colours = colours_of_tokens(model, processor, pictures)
    for part, shown_cells in ((p, token_cells(model, p, SIZES)) for p in ("vision", "projector", "language")):
        for shown, cells in zip(shown_pictures(processor, pictures), shown_cells, strict=True):
            visible = on_picture(shown, cells.shape) & (cells >= 0)
            assert visible.mean() > 0.3
            middles = 0
            for (row, column), token in np.ndenumerate(cells):
                inside = visible[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].all()
                if not inside:  # at the edges borders are mixed in
                    continue
                cut = np.asarray(cut_cell(shown, cells.shape, row * cells.shape[1] + column), dtype=float)
                difference = np.abs(cut.mean((0, 1)) - colours[part][token])[:2].max()
                assert difference < 16, (part, shown.picture.size, row, column)
                middles += 1
            assert middles >= 3


def test_maps_hold_the_experts_of_their_tokens(kind) -> None:
    """Each token's expert is its number, so that a map shows which token stands where."""
    model, processor = kind
    pictures = [slope(*size) for size in SIZES]
    shown = shown_pictures(processor, pictures)
    before = 5  # tokens of text in front of the pictures
    count = {part: colours.shape[0] for part, colours in colours_of_tokens(model, processor, pictures).items()}
    places = np.arange(count["language"]) + before
    experts = {f"{part}.0": np.arange(count[part] + before * (part == "language"))[:, None] for part in count}
    maps = picture_maps(model, experts, places, shown)
    for part in count:
        for cells, found, picture in zip(token_cells(model, part, SIZES), maps[f"{part}.0"], shown, strict=True):
            seen = (cells >= 0) & on_picture(picture, cells.shape)
            expected = np.where(seen, cells + before * (part == "language"), -1)
            assert found[..., 0].tolist() == expected.tolist()


def test_a_row_and_its_surest_patches(kind) -> None:
    """Two pictures in one row: the maps are those of the blocks' own choices."""
    model, processor = kind
    pictures = [slope(60, 90), slope(40, 40)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    row = Row("0", "test", messages, pictures)
    model.eval()
    choices = choices_of(model, processor, row)
    assert [shown.picture for shown in choices.pictures] == pictures
    used = {name: record.observation.used_TK.numpy() for name, record in model.routing.records.items()}
    (places,) = np.nonzero(np.array(choices.classes) == 0)
    for name, maps in choices.maps.items():
        part = name.split(".")[0]
        tokens = used[name][places] if part == "language" else used[name]
        sizes = [(picture.height, picture.width) for picture in pictures]
        for found, cells in zip(maps, token_cells(model, part, sizes), strict=True):
            shown = found[..., 0] >= 0
            assert shown.any()
            assert np.sort(found[shown]).tolist() == np.sort(tokens[cells[shown]]).tolist()
    best = surest_patches(model, processor, [[row]], ["vision.0", "projector.0"])
    for name, expert in itertools.product(best, range(4)):
        assert len(best[name][expert]) <= 2
        assert all(0 < patch.probability <= 1 for patch in best[name][expert])
    assert all(any(best[name]) for name in best)


def test_a_cell_smaller_than_a_pixel_is_a_pixel() -> None:
    shown = ShownPicture(slope(2, 3), (0, 0, 3, 2))
    assert cut_cell(shown, (4, 4), 15).size == (1, 1)
    assert on_picture(shown, (4, 4)).any()
