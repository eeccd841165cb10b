"""The tower against open_clip's own modules: same features, for both kinds of trunk, and S² against a slow version."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import TOWER
from tower_kit import TIMM, make_tower, open_clip_tower

from llava_compete.errors import UserError
from llava_compete.vision.sources import load_pretrained, resolve_tower
from llava_compete.vision.tower import VisionTower
from llava_compete.vision.tower_config import CLIP_MEAN, VisionTowerSection


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_native_features_are_open_clips(quick_gelu: bool, layer: int) -> None:
    config = {**TOWER, "quick_gelu": quick_gelu}
    tower, reference = make_tower(config, feature_layer=layer), open_clip_tower(config)
    pixels = torch.randn(2, 3, 28, 28)
    seen: list[torch.Tensor] = []
    block = reference.transformer.resblocks[layer]
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    reference(pixels)
    assert torch.equal(tower(pixels), seen[0][:, 1:])
    assert len(tower.blocks) == layer % 3 + 1


def test_last_layer_is_the_output_before_the_head() -> None:
    config = {"embed_dim": 16, "vision_cfg": {**TOWER["vision_cfg"], "output_tokens": True}}
    tower, reference = make_tower(config, feature_layer=-1, select="cls_patch"), open_clip_tower(config)
    pixels = torch.randn(2, 3, 28, 28)
    pooled, tokens = reference(pixels)
    features = reference.ln_post(tower(pixels))
    torch.testing.assert_close(features[:, 1:], tokens, rtol=0, atol=0)
    torch.testing.assert_close(features[:, 0] @ reference.proj, pooled, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [-1, -2])
def test_timm_features_are_open_clips(layer: int) -> None:
    tower, reference = make_tower(TIMM, feature_layer=layer), open_clip_tower(TIMM)
    side = tower.config.image_size
    pixels = torch.randn(2, 3, side, side)
    expected = reference.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"][layer]
    assert torch.equal(tower(pixels), expected)


def test_scales_of_the_base_enlarge_it() -> None:
    """S²'s own order (Shi et al., 2403.13043): enlarge, cut into a chessboard, join the maps, pool by area."""
    tower, one = make_tower(TOWER, scales=(1, 3), scales_from="base"), make_tower(TOWER)
    assert tower.config.image_size == 28
    pixels = torch.randn(2, 3, 28, 28)
    large = F.interpolate(pixels, size=84, mode="bicubic")
    rows = []
    for row in range(3):
        tiles = [one(large[:, :, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28]) for column in range(3)]
        rows.append(torch.cat([tile.transpose(1, 2).unflatten(2, (4, 4)) for tile in tiles], dim=-1))
    pooled = F.interpolate(torch.cat(rows, dim=-2), size=4, mode="area").flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower(pixels), torch.cat([one(pixels), pooled], dim=-1), rtol=0, atol=1e-5)


def test_feature_layer_and_class_token_count_the_image_tokens() -> None:
    assert make_tower(TOWER).config.num_tokens == 16
    tower = make_tower(TOWER, select="cls_patch")
    assert tower.config.num_tokens == 17
    assert tower(torch.randn(1, 3, 28, 28)).shape == (1, 17, 32)


def test_only_the_visual_part_up_to_the_feature_layer_is_built() -> None:
    names = dict(make_tower(TOWER).named_parameters())
    assert not [name for name in names if any(word in name for word in ("token_embedding", "proj_text", "ln_post"))]
    assert not [name for name in names if name.endswith("trunk.proj") or "resblocks.2" in name]
    tower = make_tower(TOWER)
    tower(torch.randn(1, 3, 28, 28)).sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("select", ["patch", "cls_patch"])
def test_scales_match_a_loop_over_tiles(select: str) -> None:
    tower = make_tower(TOWER, scales=(1, 3), select=select)
    base = make_tower(TOWER, select="cls_patch")
    pixels = torch.randn(2, 3, 84, 84)
    small = F.interpolate(pixels, size=(28, 28), mode="bicubic", antialias=True, align_corners=False)
    expected = []
    for image, thumbnail in zip(pixels, small, strict=True):
        first = base(thumbnail[None])[0]
        grid = torch.zeros(32, 12, 12)
        classes = []
        for row in range(3):
            for column in range(3):
                tile = image[None, :, row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]
                feature = base(tile)[0]
                classes.append(feature[0])
                grid[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = feature[1:].T.reshape(32, 4, 4)
        pooled = F.interpolate(grid[None], size=(4, 4), mode="area")[0].flatten(1).T
        patches = torch.cat([first[1:], pooled], dim=-1)
        whole = torch.cat([torch.cat([first[0], torch.stack(classes).mean(0)])[None], patches])
        expected.append(whole if select == "cls_patch" else patches)
    torch.testing.assert_close(tower(pixels), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert tower.config.feature_width == 64
    assert tower.config.image_size == 84


def test_tiles_belong_to_their_image() -> None:
    tower = make_tower(TOWER, scales=(1, 2))
    ids = tower.tile_image_ids(2, torch.device("cpu"))
    assert ids.shape == (2 + 8, 17)
    assert ids[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1]


def test_gradient_checkpointing_changes_nothing() -> None:
    pixels = torch.randn(1, 3, 28, 28)
    gradients = []
    for enable in (False, True):
        tower = make_tower(TOWER).train()
        tower.set_grad_checkpointing(enable)
        tower(pixels).square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "mean", "mode"), [("ViT-B-16-SigLIP", 0.5, "squash"), ("ViT-B-32", CLIP_MEAN[0], "crop")]
)
def test_weights_of_a_file_get_the_pixels_of_the_published_ones(
    name: str, mean: float, mode: str, tmp_path: Path
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"not read here")
    tower = resolve_tower(VisionTowerSection(name=name, pretrained=str(tmp_path / "weights.bin")))
    assert (tower.preprocess.mean[0], tower.preprocess.resize_mode) == (mean, mode)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "ViT-L-14-336-quickgel"}, "ViT-L-14-336-quickgelu"),
        ({"name": "ViT-B-32", "pretrained": "laion3b"}, "known: openai, laion400m_e31"),
        (
            {"config": {**TOWER, "vision_cfg": {**TOWER["vision_cfg"], "image_size": 30}}},
            "30 is not a multiple of its patch",
        ),
        ({"name": "siglip"}, "did you mean"),
        ({"config": {"embed_dim": 8}}, "missing key 'vision_cfg'"),
        ({"config": {**TOWER, "embed_dim": "x"}}, "embed_dim a number"),
        ({"config": {**TOWER, "vision_cfg": {"layers": "three"}}}, "'three'"),
        ({"config": {**TOWER, "vision_cfg": {"image_size": [28, 56]}}}, "image_size [28, 56]: expected one number"),
        ({"config": {**TOWER, "vision_cfg": {"layer": 2}}}, "layer"),
        ({"config": TOWER, "feature_layer": 7}, "feature_layer: found 7, but the tower has 3 blocks"),
        ({"name": "ViT-SO400M-14-SigLIP", "select": "cls_patch"}, "no class token"),
        ({"name": "PE-Core-bigG-14-448", "select": "cls_patch"}, "no class token"),
        ({"config": TOWER, "scales": (2, 3)}, "scales [2, 3]: expected ascending whole numbers that start with 1"),
        (
            {"config": {**TOWER, "preprocess_cfg": {"interpolation": "random"}}},
            "preprocess.interpolation: found 'random'",
        ),
        ({"name": "local-dir:/nowhere"}, "no such directory"),
        ({"config": {**TIMM, "vision_cfg": {**TIMM["vision_cfg"], "image_size": 70}}}, "70 is not a multiple"),
        ({"config": {**TIMM, "vision_cfg": {**TIMM["vision_cfg"], "timm_model_name": "vit_none"}}}, "vit_none"),
    ],
)
def test_bad_towers_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_tower(VisionTowerSection(**section))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"architectures": ["CLIPModel"]}, "missing key 'model_cfg'; not an open_clip config"),
        (["model_cfg"], "missing key 'model_cfg'; not an open_clip config"),
        ({"model_cfg": "ViT-B-32"}, "model_cfg: found 'ViT-B-32', expected a mapping"),
        ({"model_cfg": {"embed_dim": 8, "text_cfg": {}}}, "model_cfg: missing key 'vision_cfg'"),
    ],
)
def test_directories_of_something_else_are_named(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(f"{file}: {message}")):
        resolve_tower(VisionTowerSection(name=f"local-dir:{tmp_path}"))


def test_wrong_pixel_size_names_both() -> None:
    with pytest.raises(UserError, match=r"\(1, 3, 20, 20\).*\[images, 3, 28, 28\]"):
        make_tower(TOWER)(torch.zeros(1, 3, 20, 20))


@pytest.mark.parametrize("config", [TOWER, TIMM], ids=["native", "timm"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_local_directory_gives_the_visual_weights_alone(config: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    visual = open_clip_tower(config, seed=5)
    state = {f"visual.{key}": value.contiguous() for key, value in visual.state_dict().items()}
    state["text.token_embedding.weight"] = torch.zeros(2, 2)
    if suffix == "safetensors":
        save_file(state, tmp_path / "open_clip_model.safetensors")
    else:
        torch.save({"state_dict": state}, tmp_path / "open_clip_pytorch_model.pth")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    model_cfg = {**config, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    section = VisionTowerSection(name=f"local-dir:{tmp_path}")
    tower = VisionTower(resolve_tower(section)).eval()
    assert load_pretrained(tower, section)
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    expected = visual.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"][-2]
    assert torch.equal(tower(pixels), expected)
    assert tower.config.preprocess.resize_mode == "squash"
    assert tower.config.preprocess.mean == (0.5, 0.5, 0.5)


def test_hub_gives_the_same_as_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, filename: str, **_: Any) -> str:
        path = tmp_path / repo_id / filename
        if not path.is_file():
            raise FileNotFoundError(f"{repo_id} has no {filename}")
        return str(path)

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    state = {f"visual.{key}": value.contiguous() for key, value in open_clip_tower(TOWER, seed=5).state_dict().items()}
    repository = tmp_path / "org" / "clip"
    repository.mkdir(parents=True)
    save_file(state, repository / "open_clip_model.safetensors")
    content = {"model_cfg": {**TOWER, "text_cfg": {}}, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6]}}
    (repository / "open_clip_config.json").write_text(json.dumps(content))
    features = []
    for name in ("hf-hub:org/clip", f"local-dir:{repository}"):
        section = VisionTowerSection(name=name)
        tower = VisionTower(resolve_tower(section)).eval()
        assert load_pretrained(tower, section)
        assert tower.config.preprocess.mean == (0.4, 0.5, 0.6)
        features.append(tower(torch.ones(1, 3, 28, 28)))
    assert torch.equal(*features)
    with pytest.raises(UserError, match="hf-hub:org/none: Failed to download file"):
        resolve_tower(VisionTowerSection(name="hf-hub:org/none"))


def test_weights_of_another_tower_are_refused(tmp_path: Path) -> None:
    save_file({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    section = VisionTowerSection(config=TOWER, pretrained=str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="not the weights of this tower: missing class_embedding"):
        load_pretrained(VisionTower(resolve_tower(section)), section)
    (tmp_path / "b.safetensors").write_bytes(b"12345678")
    section = VisionTowerSection(config=TOWER, pretrained=str(tmp_path / "b.safetensors"))
    with pytest.raises(UserError, match=r"b\.safetensors: truncated or damaged"):
        load_pretrained(VisionTower(resolve_tower(section)), section)
    for content in ([torch.zeros(1)], {0: torch.zeros(1)}):
        torch.save(content, tmp_path / "c.pt")
        section = VisionTowerSection(config=TOWER, pretrained=str(tmp_path / "c.pt"))
        with pytest.raises(UserError, match=r"c\.pt: expected tensors by name"):
            load_pretrained(VisionTower(resolve_tower(section)), section)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file:UserWarning")
def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"visual.conv1.weight": Path("/tmp")}, tmp_path / "evil.pt")
    section = VisionTowerSection(config=TOWER, pretrained=str(tmp_path / "evil.pt"))
    with pytest.raises(UserError, match="not a file of weights alone"):
        load_pretrained(VisionTower(resolve_tower(section)), section)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    section = VisionTowerSection(config=TOWER, pretrained=str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match="a TorchScript archive, which holds code"):
        load_pretrained(VisionTower(resolve_tower(section)), section)


def test_weights_decide_about_quick_gelu() -> None:
    assert resolve_tower(VisionTowerSection(name="ViT-L-14-336", pretrained="openai")).quick_gelu
    siglip = resolve_tower(VisionTowerSection(name="ViT-SO400M-14-SigLIP", pretrained="webli"))
    assert (siglip.num_tokens, siglip.width, siglip.num_layers) == (256, 1152, 26)
    assert siglip.preprocess.mean == (0.5, 0.5, 0.5)
    assert siglip.preprocess.resize_mode == "squash"


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("ViT-SO400M-14-SigLIP-384", 384, 27 * 27),  # patches of 14 leave a margin out, as in its own training
        ("ViTamin-S", 224, 14 * 14),  # convolutions before the blocks
        ("MobileCLIP2-B", 224, 14 * 14),
        ("PE-Core-bigG-14-448", 448, 32 * 32),  # timm's Eva without a class token
        ("EVA02-B-16", 224, 14 * 14),
    ],
)
def test_odd_towers_of_the_registry(name: str, size: int, tokens: int) -> None:
    config = resolve_tower(VisionTowerSection(name=name))
    assert (config.image_size, config.num_tokens) == (size, tokens)
    with torch.device("meta"):
        features = VisionTower(config)(torch.zeros(1, 3, size, size))
    assert features.shape == (1, tokens, config.width)


def test_buffers_that_no_checkpoint_stores_are_computed_again() -> None:
    config = {
        "embed_dim": 192,
        "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "", "timm_proj": "none"},
    }
    tower = make_tower(config)
    pixels = torch.randn(1, 3, 224, 224)
    expected = tower(pixels)
    for buffer in tower.buffers():
        buffer.zero_()
    tower.restore_buffers()
    assert torch.equal(tower(pixels), expected)


@pytest.mark.parametrize("scales", [(1,), (1, 2)])
def test_a_tower_that_takes_few_tiles_at_a_time_gives_the_same(scales: tuple[int, ...]) -> None:
    side = 28 * scales[-1]
    pixels = torch.randn(5, 3, side, side)
    gradients, features = [], []
    for tile_batch, chunks in ((None, None), (3, None), (3, 30)):  # 30: another rank has so many
        tower = make_tower(TOWER, scales=scales)
        tower.tile_batch = tile_batch
        features.append(tower(pixels, chunks))
        features[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    for found, gradient in zip(features[1:], gradients[1:], strict=True):
        torch.testing.assert_close(found, features[0], rtol=1e-5, atol=1e-5)
        for one, other in zip(gradient, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert tower.num_chunks(5) == -(-5 * sum(scale * scale for scale in scales) // 3)
