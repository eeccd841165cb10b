"""Towers of feature maps (convolutional, hierarchical): the stage's map in order, batch norm that stands still."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import tiny_model
from tower_kit import make_tower, open_clip_tower

from llava_compete.errors import UserError
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.lora import LoraSettings, add_adapters
from llava_compete.train.trainer import StageTrainer
from llava_compete.vision.sources import load_pretrained, resolve_tower
from llava_compete.vision.tower_config import VisionTowerSection


def config_of(name: str, size: int = 64) -> dict[str, Any]:
    return {"embed_dim": 8, "vision_cfg": {"timm_model_name": name, "image_size": size, "timm_pool": "avg"}}


CONVNEXT, EFFICIENTNET = config_of("test_convnext"), config_of("test_efficientnet")


def saved_visual(config: dict[str, Any], path: Path) -> Any:
    """open_clip's whole visual part, also as a file; the statistics of batch norm are not those it starts with."""
    visual = open_clip_tower(config, seed=3)
    for name, buffer in visual.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    save_file({f"visual.{key}": value.contiguous() for key, value in visual.state_dict().items()}, path)
    return visual


@pytest.mark.parametrize(
    ("config", "layer", "module"),
    [
        (CONVNEXT, -2, "stages.2"),
        (EFFICIENTNET, -1, "blocks.4"),
        (EFFICIENTNET, 1, "blocks.1"),
        (config_of("test_resnet"), -2, "layer3"),
    ],
    ids=str,
)
def test_the_tokens_are_the_stages_map(config: dict[str, Any], layer: int, module: str, tmp_path: Path) -> None:
    visual = saved_visual(config, tmp_path / "w.safetensors")
    section = VisionTowerSection(config=config, feature_layer=layer, pretrained=str(tmp_path / "w.safetensors"))
    tower = make_tower(config, feature_layer=layer)
    load_pretrained(tower, section)
    seen: list[torch.Tensor] = []
    visual.trunk.get_submodule(module).register_forward_hook(lambda module, inputs, output: seen.append(output))
    pixels = torch.randn(2, 3, 64, 64)
    visual(pixels)
    features = tower(pixels)
    _, width, rows, columns = seen[0].shape
    assert features.shape == (2, tower.config.num_tokens, tower.config.width) == (2, rows * columns, width)
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(features[:, row * columns + column], seen[0][:, :, row, column])
    features.sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_scales_match_a_loop_over_tiles() -> None:
    tower, base = make_tower(CONVNEXT, scales=(1, 2)), make_tower(CONVNEXT)
    pixels = torch.randn(1, 3, 128, 128)
    small = F.interpolate(pixels, size=(64, 64), mode="bicubic", antialias=True, align_corners=False)
    grid = torch.zeros(1, 48, 8, 8)
    for row in (0, 1):
        for column in (0, 1):
            tile = pixels[:, :, row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
            grid[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = base(tile).mT.unflatten(2, (4, 4))
    expected = torch.cat([base(small), F.avg_pool2d(grid, 2).flatten(2).mT], dim=-1)
    torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_checkpointing_changes_nothing_and_statistics_stand_still(name: str) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        tower = make_tower(config_of(name)).train()
        tower.set_grad_checkpointing(enable)
        before = {key: buffer.clone() for key, buffer in tower.named_buffers()}
        tower(pixels).square().sum().backward()
        for key, buffer in tower.named_buffers():
            assert torch.equal(buffer, before[key]), key
        gradients.append([parameter.grad for parameter in tower.parameters()])
    assert tower.training
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_model_with_such_a_tower_trains_in_any_cut_and_comes_back_whole(tmp_path: Path) -> None:
    model, processor = tiny_model(tower=EFFICIENTNET)
    assert model.config.num_image_tokens == 16
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    whole = model.get_image_features(pixels).pooler_output
    for picture, features in zip(pixels, whole, strict=True):
        torch.testing.assert_close(
            model.get_image_features(picture[None]).pooler_output[0], features, rtol=1e-4, atol=1e-5
        )
    scales = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert len(scales) > 5
    assert not scales & set(StageTrainer.get_decay_parameter_names(StageTrainer.__new__(StageTrainer), model))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    save_checkpoint(model, processor, tmp_path / "saved")
    again, _ = load_checkpoint(tmp_path / "saved")
    assert torch.equal(
        again.train().get_image_features(pixels).pooler_output, model.eval().get_image_features(pixels).pooler_output
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "RN50"}, "ModifiedResNet: neither a vision transformer nor a network of timm"),
        ({"config": CONVNEXT, "feature_layer": 4}, "feature_layer: found 4, but the tower has 4 stages"),
        ({"config": CONVNEXT, "select": "cls_patch"}, "no class token"),
        ({"config": config_of("test_convnext", 72)}, "72 is not a multiple of the stride of the chosen stage 16"),
    ],
)
def test_bad_towers_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_tower(VisionTowerSection(**section))


def test_weights_of_another_network_are_one_line(tmp_path: Path) -> None:
    saved_visual(EFFICIENTNET, tmp_path / "w.safetensors")
    section = VisionTowerSection(config=CONVNEXT, pretrained=str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match=r"not the weights of this tower: missing stem\.0\.weight") as error:
        load_pretrained(make_tower(CONVNEXT), section)
    assert "\n" not in str(error.value)


def test_experts_and_adapters_go_elsewhere() -> None:
    with pytest.raises(UserError, match=r"moe\.vision: found a tower of feature maps \(ConvNeXt\)"):
        tiny_model(moe={"vision": {}}, tower=CONVNEXT)
    model, _ = tiny_model(tower=EFFICIENTNET)
    with pytest.raises(UserError, match="lora: the model has no linear layers in vision"):
        add_adapters(model, {"vision": LoraSettings(), "language": LoraSettings()})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [
        ("convnext_base_w", 16 * 16, 512),
        ("convnext_large_d_320", 20 * 20, 768),
        ("convnext_xxlarge", 16 * 16, 1536),
        ("MobileCLIP-S1", 16 * 16, 256),
        ("MobileCLIP2-S4", 16 * 16, 512),
        ("swin_base_patch4_window7_224", 14 * 14, 512),
    ],
)
def test_towers_of_open_clips_registry(name: str, tokens: int, width: int) -> None:
    tower = resolve_tower(VisionTowerSection(name=name))
    assert (tower.num_tokens, tower.width) == (tokens, width)
