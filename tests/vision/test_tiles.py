"""Tiles against transformers' own LLaVA-NeXT processor: pixels, grids and counts; and fewer tokens by pooling."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TOWER
from transformers import InternVLConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llava_compete.errors import UserError
from llava_compete.vision.image_decoder import BadImageError
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor
from llava_compete.vision.projector import Projector, ProjectorSection, check_pool, pooled
from llava_compete.vision.sources import resolve_tower
from llava_compete.vision.tiles import LLAVA_NEXT_GRIDS, Tiling
from llava_compete.vision.tower_config import VisionTowerSection

SIDE = 28
SIZES = [
    (28, 28),
    (56, 56),
    (20, 61),
    (61, 20),
    (200, 131),
    (97, 300),
    (33, 1000),
    (3, 5),
    (57, 84),
    (640, 480),
    (28, 85),
]
NINE = tuple((rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3))


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference(grids: Any) -> Any:
    pinpoints = [[rows * SIDE, columns * SIDE] for rows, columns in grids]
    return LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints,
        do_rescale=False, do_normalize=False, do_pad=False,
    )  # fmt: skip


@pytest.mark.parametrize("grids", [LLAVA_NEXT_GRIDS, NINE], ids=["published", "nine"])
def test_pixels_are_those_of_llava_next(grids: Any) -> None:
    ours = LlavaCompeteImageProcessor(size=SIDE, version=2, tiles=grids)
    pictures = [picture(*size) for size in SIZES]
    found, expected = ours.preprocess(pictures), reference(grids).preprocess(pictures)
    assert found["image_sizes"] == [tuple(size) for size in expected["image_sizes"]] == SIZES
    tiling = ours.tiling(side=4)
    assert tiling is not None
    start = 0
    for size, tiles in zip(SIZES, expected["pixel_values"], strict=True):
        mine = np.stack(found["pixel_values"][start : start + tiling.num_tiles(size)])
        assert mine.dtype == np.uint8
        np.testing.assert_array_equal(mine, tiles.numpy(), err_msg=str(size))
        start += len(mine)
    assert start == len(found["pixel_values"])


@pytest.mark.parametrize("patches", [1, 2, 3, 4, 24])
def test_counts_are_those_of_llava_next(patches: int) -> None:
    side = 24 * patches
    image_processor = LlavaCompeteImageProcessor(size=side, version=2, tiles=LLAVA_NEXT_GRIDS)
    tiling = image_processor.tiling(patches)
    assert tiling is not None

    class Counter(LlavaNextProcessor):
        def __init__(self) -> None:  # no tokenizer
            self.patch_size, self.num_additional_image_tokens = side // patches, 0
            pinpoints = [[rows * side, columns * side] for rows, columns in LLAVA_NEXT_GRIDS]
            self.image_processor = LlavaNextImageProcessor(image_grid_pinpoints=pinpoints)

    counter, rng = Counter(), np.random.default_rng(patches)
    for height, width in [*SIZES, *rng.integers(10, 900, (200, 2)).tolist()]:
        expected = counter._get_number_of_features(height, width, side, side)
        assert tiling.num_tokens((height, width)) == expected, (height, width)


def test_of_a_number_of_tiles_every_grid_is_allowed() -> None:
    tower = resolve_tower(VisionTowerSection(config=TOWER, tiles={"max": 4}))
    assert tower.tiles == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))
    assert resolve_tower(VisionTowerSection(config=TOWER, tiles={})).tiles == LLAVA_NEXT_GRIDS
    assert tower.preprocess.resize_mode == "squash"


def test_the_largest_picture_is_found_among_thousands_of_grids() -> None:
    for grids in (LLAVA_NEXT_GRIDS, NINE, ((1, 1),)):
        tiling = Tiling(SIDE, 4, grids)
        every = [(rows * SIDE, columns * SIDE) for rows, columns in grids]
        sizes = [*every, *np.random.default_rng(0).integers(20, 200, (100, 2)).tolist()]
        assert tiling.num_tokens(tiling.largest) == max(tiling.num_tokens(tuple(size)) for size in sizes)
    many = resolve_tower(VisionTowerSection(config=TOWER, tiles={"max": 1024})).tiles
    assert many is not None
    assert len(many) == 7262
    assert Tiling(SIDE, 4, many).largest == (1024 * SIDE, SIDE)  # a newline ends each of its rows


def test_a_picture_without_a_row_left_is_named() -> None:
    processor = LlavaCompeteImageProcessor(size=SIDE, version=2, tiles=LLAVA_NEXT_GRIDS)
    for size in ((1, 20000), (20000, 1), (2, 5000)):
        with pytest.raises(BadImageError, match=f"{size[1]}x{size[0]} pixels: so thin") as error:
            processor.tiling(4).num_tokens(size)  # type: ignore[union-attr]
        assert error.value.kind == "image_too_small"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tiles": {"grids": [[0, 2]]}}, "grids: found [0, 2], expected one tile or more each way"),
        ({"tiles": {"max": 3, "grids": [[2, 2]]}}, "[2, 2] has 4 tiles, more than max 3"),
        ({"tiles": {"grids": []}}, "expected different grids"),
        ({"tiles": {"max": 10**6}}, "less than or equal to 1024"),
        ({"tiles": {}, "scales": (1, 2)}, "tiles: found with scales [1, 2] and select patch"),
        ({"tiles": {}, "select": "cls_patch"}, "select cls_patch"),
        ({"tiles": {}, "preprocess": {"version": 1}}, "preprocess.version: found 1, expected 2"),
    ],
)
def test_bad_settings_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=re.escape(message)):
        resolve_tower(VisionTowerSection(config=TOWER, **section))


def test_shuffled_pooling_is_smolvlms() -> None:
    features = torch.randn(3, 64, 5)
    for pool in (2, 4):
        expected = Idefics3Connector.pixel_shuffle(None, features, pool)
        assert torch.equal(pooled(features, pool, "shuffle"), expected)
    by_torch = torch.nn.functional.avg_pool2d(features.mT.unflatten(2, (8, 8)), 2).flatten(2).mT
    torch.testing.assert_close(pooled(features, 2, "mean"), by_torch)
    assert pooled(features, 1, "shuffle") is features


@pytest.mark.parametrize("pool_mode", ["shuffle", "mean"])
def test_projector_with_a_norm_is_internvls(pool_mode: Literal["shuffle", "mean"]) -> None:
    pool = 1 if pool_mode == "mean" else 2
    sizes = {"vision_config": {"hidden_size": 12}, "text_config": {"hidden_size": 20, "model_type": "qwen2"}}
    theirs = InternVLMultiModalProjector(InternVLConfig(**sizes, downsample_ratio=1 / pool))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = Projector(ProjectorSection(pool=2, pool_mode=pool_mode, norm=True), 12, 20)
    names = {"norm": "layer_norm", "mlp.up_proj": "linear_1", "mlp.down_proj": "linear_2"}
    state = theirs.state_dict()
    ours.load_state_dict(
        {f"{own}.{w}": state[f"{name}.{w}"] for own, name in names.items() for w in ("weight", "bias")}
    )
    features = torch.randn(3, 16, 12) * 0.1
    torch.testing.assert_close(ours(features), theirs(pooled(features, 2, pool_mode)))


def test_pooling_that_does_not_fit_is_named() -> None:
    tower = resolve_tower(VisionTowerSection(config=TOWER))
    check_pool(ProjectorSection(pool=2), tower)
    with pytest.raises(UserError, match=r"projector\.pool: 3 does not fit the tower, which gives a map of 4 x 4"):
        check_pool(ProjectorSection(pool=3), tower)
    with pytest.raises(UserError, match="select: cls_patch"):
        check_pool(ProjectorSection(pool=2), resolve_tower(VisionTowerSection(config=TOWER, select="cls_patch")))
