"""CLIP's and SigLIP's vision towers as transformers has them, and as open_clip and timm do: names and architectures.

The arithmetic is the same; q, k and v are one projection here, and the embedding of positions has another shape. What
lies behind the feature layer (later blocks, the last norm, pooling) has no part in a feature and is left out.
"""

from __future__ import annotations

import fnmatch
from typing import Any, Literal

import torch
from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from llava_compete.convert.recipes import Recipe, rows, third
from llava_compete.errors import UserError
from llava_compete.vision.tower_config import PreprocessConfig, TowerConfig
from llava_compete.vision.trunks import OpenClipTrunk, build_trunk, tower_facts, trunk_of

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
# Ours: theirs, outside the blocks and in a block; each has a weight and, where it is not in `_NO_BIAS`, a bias.
_STEMS = {
    CLIP: {"conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm"},
    SIGLIP: {"patch_embed.proj": "embeddings.patch_embedding"},
}
BLOCKS = {CLIP: "transformer.resblocks", SIGLIP: "blocks"}
_LAYERS = {
    CLIP: {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"},
    SIGLIP: {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2"},
}
_MLPS = {
    CLIP: {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
    SIGLIP: {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
}
_JOINED = {CLIP: "attn.in_proj_", SIGLIP: "attn.qkv."}
_NO_BIAS = "conv1"
# Widths of the SigLIP towers, and what timm calls them.
_SIGLIP_SIZES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}


def import_recipes(kind: str, num_layers: int, dense_layers: set[int] | None = None) -> dict[str, Recipe]:
    """Names in our trunk, each from names in transformers' vision model (`embeddings.`, `encoder.layers.`).

    dense_layers: blocks whose MLP is a dense one; default all.
    """
    recipes = {}
    for ours, theirs in _STEMS[kind].items():
        for suffix in ("weight",) if ours == _NO_BIAS else ("weight", "bias"):
            recipes[f"{ours}.{suffix}"] = Recipe((f"{theirs}.{suffix}",))
    positions = "embeddings.position_embedding.weight"
    if kind == CLIP:
        recipes["class_embedding"] = Recipe(("embeddings.class_embedding",))
        recipes["positional_embedding"] = Recipe((positions,))
    else:
        recipes["pos_embed"] = Recipe((positions,), lambda weight: weight[None])
    for number in range(num_layers):
        block, layer = f"{BLOCKS[kind]}.{number}", f"encoder.layers.{number}"
        dense = dense_layers is None or number in dense_layers
        for suffix in ("weight", "bias"):
            for ours, theirs in (_LAYERS[kind] | (_MLPS[kind] if dense else {})).items():
                recipes[f"{block}.{ours}.{suffix}"] = Recipe((f"{layer}.{theirs}.{suffix}",))
            projections = tuple(f"{layer}.self_attn.{name}_proj.{suffix}" for name in "qkv")
            recipes[f"{block}.{_JOINED[kind]}{suffix}"] = Recipe(projections, rows)
    return recipes


def export_recipes(kind: str, num_layers: int) -> dict[str, Recipe]:
    """`import_recipes` the other way."""
    recipes = {}
    for ours, recipe in import_recipes(kind, num_layers).items():
        if len(recipe.sources) == 3:
            recipes.update({name: third(ours, number) for number, name in enumerate(recipe.sources)})
        elif ours == "pos_embed":
            recipes[recipe.sources[0]] = Recipe((ours,), lambda table: table[0])
        else:
            recipes[recipe.sources[0]] = Recipe((ours,))
    return recipes


def is_unused(kind: str, name: str, num_layers: int) -> bool:
    """Whether a tensor of transformers' vision model has no part in the feature of block `num_layers - 1`."""
    if name.startswith(("post_layernorm.", "head.", "embeddings.position_ids")):
        return True
    return name.startswith("encoder.layers.") and int(name.split(".")[2]) >= num_layers


def import_tower(
    vision: PreTrainedConfig, hidden_state: int, drops_first: bool, preprocess: PreprocessConfig, source: str
) -> TowerConfig:
    """Our config of a tower of transformers.

    hidden_state: index into transformers' `hidden_states`, of which 0 is the embedding and -1 the last block's output.
    drops_first: the first feature, CLIP's class token, is left out (`vision_feature_select_strategy` default).
    """
    kind = vision.model_type
    if kind not in _STEMS:
        raise UserError(f"{source}: vision_config.model_type: found {kind!r}, expected one of {', '.join(_STEMS)}")
    if kind == SIGLIP and drops_first:
        raise UserError(
            f"{source}: vision_feature_select_strategy: found 'default' with a SigLIP tower, which has no class token: "
            "it drops the first patch, which is not supported"
        )
    num_layers = vision.num_hidden_layers
    if not -num_layers <= hidden_state <= num_layers or hidden_state == 0:
        raise UserError(
            f"{source}: vision_feature_layer: found {hidden_state}, expected a block's output of {num_layers} blocks"
        )
    block = (hidden_state - 1 if hidden_state > 0 else hidden_state) % num_layers
    for key, found in (("image_size", vision.image_size), ("patch_size", vision.patch_size)):
        if not isinstance(found, int):
            raise UserError(f"{source}: vision_config.{key}: found {found}, expected one number")
    architecture = _open_clip_of(vision, source) if kind == CLIP else _timm_of(vision, source)
    quick = kind == CLIP and vision.hidden_act == "quick_gelu"
    select: Literal["patch", "cls_patch"] = "patch" if kind == SIGLIP or drops_first else "cls_patch"
    embed_dim = getattr(vision, "projection_dim", None) or vision.hidden_size
    # A timm architecture may have more blocks than these weights, so the block is counted from the front.
    layer = block - num_layers if kind == CLIP else block
    facts = tower_facts(embed_dim, architecture, quick, layer, select)
    return TowerConfig(
        embed_dim=embed_dim,
        quick_gelu=quick,
        vision_cfg=architecture,
        feature_layer=layer,
        select=select,
        preprocess=preprocess,
        width=facts.width,
        num_tokens=facts.num_tokens,
        num_layers=facts.num_layers,
    )


def _open_clip_of(vision: PreTrainedConfig, source: str) -> dict[str, Any]:
    if vision.hidden_act not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise UserError(f"{source}: vision_config.hidden_act: found {vision.hidden_act!r}, expected quick_gelu or gelu")
    tanh = {"act_kwargs": {"approximate": "tanh"}} if vision.hidden_act == "gelu_pytorch_tanh" else {}
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        # open_clip cuts width * mlp_ratio down to a whole number.
        "mlp_ratio": (vision.intermediate_size + 0.5) / vision.hidden_size
        if vision.intermediate_size % vision.hidden_size
        else vision.intermediate_size / vision.hidden_size,
        **tanh,
        **({} if vision.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": vision.layer_norm_eps}}),
    }


def _timm_of(vision: PreTrainedConfig, source: str) -> dict[str, Any]:
    import timm

    if vision.hidden_act not in ("gelu", "gelu_pytorch_tanh"):
        raise UserError(f"{source}: vision_config.hidden_act: found {vision.hidden_act!r}, expected gelu_pytorch_tanh")
    pattern = f"vit_{_SIGLIP_SIZES.get(vision.hidden_size)}_patch{vision.patch_size}_siglip_*"
    names = [
        name for name in timm.list_models() if fnmatch.fnmatchcase(name, pattern) and name.split("_")[-1].isdigit()
    ]
    if not names:
        raise UserError(
            f"{source}: timm has no SigLIP tower of width {vision.hidden_size} on patches of {vision.patch_size}; "
            f"expected a width of {', '.join(str(width) for width in _SIGLIP_SIZES)}"
        )
    nearest = min(names, key=lambda name: abs(int(name.split("_")[-1]) - vision.image_size))
    tanh = "tanh" if vision.hidden_act == "gelu_pytorch_tanh" else "none"
    return {
        "image_size": vision.image_size,
        "timm_model_name": nearest,
        "timm_pool": "map",
        "timm_proj": "none",
        "act_kwargs": {"approximate": tanh},
    }


def export_tower(tower: TowerConfig) -> PreTrainedConfig:
    """transformers' config of our tower, cut after its feature layer.

    Raises:
        UserError: a tower that transformers' CLIP and SigLIP cannot express; says why.
    """
    if tower.scales != (1,):
        raise UserError(f"the tower has S² scales {list(tower.scales)}, which transformers' Llava has not")
    with torch.device("meta"):
        module = build_trunk(tower.embed_dim, tower.vision_cfg, tower.quick_gelu)
        trunk = trunk_of(module, tower.preprocess.size)
    trunk.keep(tower.num_layers)
    kind = CLIP if isinstance(trunk, OpenClipTrunk) else SIGLIP
    found = set(trunk.module.state_dict())
    expected = set(import_recipes(kind, tower.num_layers))
    if found != expected:
        odd = sorted(found ^ expected)
        raise UserError(
            f"the tower {tower.name or tower.vision_cfg.get('timm_model_name', 'of open_clip')} is neither CLIP's nor "
            f"SigLIP's, which are what transformers' Llava is written for: {odd[0]} "
            f"{'has no place there' if odd[0] in found else 'is not in it'}"
        )
    first: Any = trunk.blocks[0]
    if kind == CLIP:
        up, norm, heads = first.mlp.c_fc, first.ln_1, first.attn.num_heads
        activation = "quick_gelu" if tower.quick_gelu else _gelu(first.mlp.gelu)
        patch = trunk.module.patch_size[0]
    else:
        up, norm, heads = first.mlp.fc1, first.norm1, first.attn.num_heads
        activation, patch = _gelu(first.mlp.act), trunk.module.patch_embed.patch_size[0]
    values = {
        "hidden_size": tower.width,
        "intermediate_size": up.out_features,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": heads,
        "image_size": tower.preprocess.size,
        "patch_size": patch,
        "hidden_act": activation,
        "layer_norm_eps": norm.eps,
    }
    if kind == CLIP:
        return CLIPVisionConfig(**values, projection_dim=tower.embed_dim)
    return SiglipVisionConfig(**values, vision_use_head=False)


def _gelu(module: Any) -> str:
    approximate = "tanh" if "Tanh" in type(module).__name__ else getattr(module, "approximate", "none")
    return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[approximate]
