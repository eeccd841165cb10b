"""Pictures at their own proportions against transformers' SigLIP 2 and timm's NaFlex transformer of equal weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naflex_kit import NAME, PATCH, TOWER, siglip2
from PIL import Image
from safetensors.torch import save_file
from transformers.models.siglip2.image_processing_siglip2 import (
    Siglip2ImageProcessor,
    get_image_size_for_max_num_patches,
)

from llava_compete.errors import UserError
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor
from llava_compete.vision.naflex import NativeSizes
from llava_compete.vision.naflex_tower import NaFlexTower
from llava_compete.vision.projector import ProjectorSection, check_pool
from llava_compete.vision.sources import load_pretrained, resolve_tower
from llava_compete.vision.tower_config import VisionTowerSection

BUDGET = 40
SIZES = [(20, 61), (61, 20), (32, 32), (200, 131), (3, 5), (1, 2000)]


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def section(**options: Any) -> VisionTowerSection:
    return VisionTowerSection(config=TOWER, **{"naflex": {"max_patches": BUDGET}, **options})


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[NaFlexTower, Any]:
    """Ours, and transformers' model whose weights it has read from a file."""
    theirs, path = siglip2(), tmp_path_factory.mktemp("siglip2") / "model.safetensors"
    save_file({f"vision_model.{name}": tensor for name, tensor in theirs.state_dict().items()}, path)
    mine = section(pretrained=str(path))
    tower = NaFlexTower(resolve_tower(mine)).eval()
    assert load_pretrained(tower, mine)
    return tower, theirs


def prepared(tower: NaFlexTower, pool: int = 1) -> tuple[LlavaCompeteImageProcessor, NativeSizes]:
    processor = LlavaCompeteImageProcessor.from_tower(tower.config, pool)
    sizes = processor.tiling(side=1)
    assert isinstance(sizes, NativeSizes)
    return processor, sizes


@pytest.mark.parametrize("layer", [-1, -2])
def test_pixels_and_features_are_siglip2s(towers: tuple[NaFlexTower, Any], layer: int, tmp_path: Path) -> None:
    _, theirs = towers
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")  # as transformers names a vision model alone
    mine = section(pretrained=str(tmp_path / "model.safetensors"), feature_layer=layer)
    tower = NaFlexTower(resolve_tower(mine)).eval()
    load_pretrained(tower, mine)
    processor, sizes = prepared(tower)
    pictures = [picture(*size) for size in SIZES]
    reference = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=BUDGET)(pictures, return_tensors="pt")
    found = processor(pictures, return_tensors="pt")
    assert [sizes.grid(size) for size in SIZES] == [tuple(grid) for grid in reference["spatial_shapes"].tolist()]
    mask = reference["pixel_attention_mask"].bool()
    normalised = (found["pixel_values"].permute(0, 2, 3, 1).flatten(1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(normalised, reference["pixel_values"][mask])
    with torch.no_grad():
        features = tower(found["pixel_values"], sizes.layout(SIZES))
        expected = theirs(**reference, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(features, expected[mask], rtol=1e-4, atol=1e-4)


def test_timms_own_forward_gives_the_same(towers: tuple[NaFlexTower, Any]) -> None:
    tower, _ = towers
    processor, sizes = prepared(tower)
    layout, longest = sizes.layout(SIZES), max(map(sizes.num_tiles, SIZES))
    pixels = processor([picture(*size) for size in SIZES], return_tensors="pt")["pixel_values"]
    values = ((pixels.float() / 255 - 0.5) / 0.5).permute(0, 2, 3, 1).flatten(1)
    patches, coords = torch.zeros(len(SIZES), longest, values.shape[1]), torch.zeros(len(SIZES), longest, 2).long()
    valid, start = torch.zeros(len(SIZES), longest, dtype=torch.bool), 0
    for number, (rows, columns) in enumerate(layout.grids):
        count = rows * columns
        patches[number, :count], valid[number, :count] = values[start : start + count], True
        coords[number, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        start += count
    theirs = timm.create_model(NAME).eval()
    theirs.prune_intermediate_layers([len(tower.blocks) - 1], prune_norm=True)
    theirs.load_state_dict(tower.trunk.state_dict())
    with torch.no_grad():
        expected = theirs.forward_features(patches, coords, valid)["patches"]
    with torch.no_grad():
        found = tower(pixels, layout)
    torch.testing.assert_close(found, expected[valid], rtol=1e-4, atol=1e-5)


def test_a_batch_is_each_picture_alone(towers: tuple[NaFlexTower, Any]) -> None:
    tower, _ = towers
    processor, sizes = prepared(tower)
    pixels = [processor([picture(*size)], return_tensors="pt")["pixel_values"] for size in SIZES]
    together = tower(torch.cat(pixels), sizes.layout(SIZES))
    alone = [tower(one, sizes.layout([size])) for one, size in zip(pixels, SIZES, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    gradients = []
    for losses in ([together.square().sum()], [one.square().sum() for one in alone]):
        tower.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        gradients.append({name: parameter.grad.clone() for name, parameter in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), budget=st.integers(4, 1024), pool=st.sampled_from([1, 2])
)
@settings(max_examples=100)
def test_budgets_hold(height: int, width: int, budget: int, pool: int) -> None:
    sizes = NativeSizes(16, pool, budget)
    rows, columns = sizes.grid((height, width))
    assert rows % pool == columns % pool == 0 < rows * columns <= budget
    assert sizes.num_tokens((height, width)) == rows * columns // pool**2 <= sizes.num_tokens(sizes.largest)
    expected = get_image_size_for_max_num_patches(height, width, 16 * pool, budget // pool**2)
    assert (rows * 16, columns * 16) == expected


def test_pooled_patches_are_neighbours() -> None:
    """A picture of 4 x 6 patches whose features are their own places."""
    sizes = NativeSizes(8, 2, 24)
    layout = sizes.layout([(32, 48), (16, 16)])
    assert layout.grids == [(4, 6), (4, 4)]
    assert layout.lengths == [6, 4]
    blocks = layout.sources[:24].reshape(6, 4)
    assert blocks.tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert layout.sources[24:28].tolist() == [24, 25, 28, 29]
    assert layout.places[24:].tolist() == list(range(24, 40))


def test_cells_of_maps_are_the_tokens() -> None:
    sizes = NativeSizes(8, 2, 24)
    tower = sizes.token_cells([(32, 48), (16, 16)], in_tower=True, num_prefix=1)
    assert (tower[0][0, 0], tower[0][3, 5], tower[1][0, 0]) == (1, 24, 1 + 25)
    tokens = sizes.token_cells([(32, 48), (16, 16)], in_tower=False, num_prefix=1)
    assert [cells.tolist() for cells in tokens] == [[[0, 1, 2], [3, 4, 5]], [[6, 7], [8, 9]]]
    assert sizes.box((32, 48)) == (0, 0, 48, 32)


def other(name: str) -> dict[str, Any]:
    return {"embed_dim": 8, "vision_cfg": {"timm_model_name": name, "image_size": 64, "timm_pool": ""}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": {}}, "naflex: found with tiles, scales [1]"),
        ({"scales": (1, 2)}, "scales [1, 2]"),
        ({"select": "cls_patch"}, "select cls_patch"),
        ({"preprocess": {"version": 1}}, "preprocess.version: found 1, expected 2"),
        ({"naflex": {"max_patches": 0}}, "greater than 0"),
        ({"config": other("test_vit2")}, "found the tower test_vit2, expected one of timm's NaFlex transformers"),
        ({"config": other("naflexvit_base_patch16_parfac_gap")}, "has factorized position embeddings, expected a lear"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=re.escape(message)):
        resolve_tower(section(**options) if "config" not in options else VisionTowerSection(naflex={}, **options))


def test_a_budget_below_the_pool_is_named(towers: tuple[NaFlexTower, Any]) -> None:
    tower, _ = towers
    check_pool(ProjectorSection(pool=6), tower.config)
    with pytest.raises(UserError, match=r"projector\.pool: 7 needs naflex\.max_patches of 49 or more"):
        check_pool(ProjectorSection(pool=7), tower.config)
    with pytest.raises(UserError, match=r"pixel_values: found shape \(1, 3, 32, 32\), expected \[patches, 3, 8, 8\]"):
        tower(torch.zeros(1, 3, 32, 32), NativeSizes(8, 1, 40).layout([(8, 8)]))
