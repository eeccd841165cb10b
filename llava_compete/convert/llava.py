"""LLaVA's own layout, and those of CompeteSMoE, LibMoE, CuMo and MoE-LLaVA, which are built on it.

config.json is the language model's, with keys `mm_*` beside it. Told apart by what the tensors are called.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from llava_compete.convert import experts, mixtures
from llava_compete.convert.chat import adopt_template
from llava_compete.convert.layout import Import, ImportOptions, Layout, Source
from llava_compete.convert.llava_files import Gathered, gather, plain_name
from llava_compete.convert.pictures import import_preprocessing
from llava_compete.convert.recipes import Recipe
from llava_compete.convert.towers import BLOCKS, import_recipes, import_tower, is_unused
from llava_compete.convert.vocabulary import grow_vocabulary
from llava_compete.errors import UserError
from llava_compete.language.config import LanguageModelSection
from llava_compete.language.interface import refuse_unusable
from llava_compete.language.sources import read_tokenizer
from llava_compete.language.tokenizer import add_image_token
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.vision.projector import projector_depth
from llava_compete.vision.tower_config import ResizeMode, TowerConfig

# What the language model's own type is, where it is not the last word of the whole's.
_TEXT_TYPES = {"llava": "llama", "llava_phi": "phi3", "moe_llava_qwen1_5": "qwen2", "llava_qwen": "qwen2"}
_MODES: dict[str, ResizeMode] = {"pad": "pad", "anyres": "squash"}


def _fits(source: Source) -> bool:
    beside = ("mm_projector.bin", "adapter_config.json")
    return any(key in source.config for key in ("mm_vision_tower", "mm_image_tower", "mm_projector_type")) and (
        any(plain_name(name).startswith("mm_projector.") for name in source.tensors)
        or any((source.directory / name).is_file() for name in beside)
    )


def _read(source: Source, options: ImportOptions) -> Import:
    directory, config = source.directory, source.config
    if config.get("mm_use_im_start_end"):
        raise UserError(
            f"{directory}: mm_use_im_start_end: found true, expected false: images between tokens of their own"
        )
    found = gather(source, options)
    text, language, language_recipes = _language(source, found)
    tower = _tower(source, found)
    vision, vision_recipes = _vision(source, found, tower)
    projector, projector_recipes, projector_type = _projector(source, found)
    tokenizer = read_tokenizer(LanguageModelSection(name=str(found.tokenizer_dir)), None)
    image_id = add_image_token(tokenizer)
    recipes = language_recipes | vision_recipes | projector_recipes
    grow_vocabulary(recipes, found.tensors, image_id, text)
    notes = [f"chat template: {adopt_template(tokenizer, found.tokenizer_dir, text.model_type, options.chat_template)}"]
    notes += _notes(source, found, tower)
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(text, key, getattr(tokenizer, key))
    parts = {"vision": vision, "projector": projector, "language": language}
    settings = {name: part for name, part in parts.items() if part is not None} | _schedule(config)
    whole = LlavaCompeteConfig(
        vision_config=tower.model_dump(mode="json"),
        projector_config={"type": projector_type},
        text_config=text,
        moe=MoeConfig.model_validate(settings).of_model() if any(parts.values()) else None,
        image_token_id=image_id,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        stage="import",
    )
    return Import(whole, tokenizer, recipes, found.tensors, found.unused, notes)


# --- language --------------------------------------------------------------------------------------------------------


def _language(source: Source, found: Gathered) -> tuple[PreTrainedConfig, MoeLayerConfig | None, dict[str, Recipe]]:
    """Config, experts and recipes of the language model."""
    directory, config = source.directory, source.config
    model_type = str(config.get("model_type"))
    text_type = _TEXT_TYPES.get(model_type, model_type.rpartition("_")[2])
    if text_type not in CONFIG_MAPPING:
        raise UserError(f"{directory}: model_type: found {model_type!r}, of whose language model nothing is known here")
    config_class = CONFIG_MAPPING[text_type]
    known = {*config_class().to_dict(), *config_class.attribute_map, "rope_theta", "rope_scaling", "head_dim"}
    # CuMo's `num_experts` are the tower's, beside Mixtral's own `num_local_experts`, which it would be another name of.
    aliases = {alias for alias, name in config_class.attribute_map.items() if alias in config and name in config}
    text = config_class(**{key: config[key] for key in known - {"model_type"} - aliases if key in config})
    refuse_unusable(text, str(directory))
    names = [name for name in found.tensors if name.startswith(("model.language_model.", "lm_head."))]
    names = [name for name in names if name not in found.unused and ".lora_" not in name]
    recipes = {name: found.merged.get(name, Recipe((name,))) for name in names}
    if text_type in experts.FAMILIES:
        dense, moe = experts.import_text_config(text, str(directory))
        return dense, moe, experts.import_expert_recipes(names, text)
    blocks = mixtures.find_deepspeed(found.tensors)
    if not blocks:
        return text, None, recipes
    settings = config.get("moe") or {}
    chosen = settings.get("top_k_experts", 2)
    if settings.get("use_residual"):
        raise UserError(f"{directory}: moe.use_residual: found true: an MLP beside the experts, which is not supported")
    if chosen != 2:
        raise UserError(
            f"{directory}: moe.top_k_experts: found {chosen}, expected 2: DeepSpeed weighs one expert alone by its "
            "probability, and the weights of our routers sum to 1"
        )
    inside = tuple(f"{mixture.block}." for mixture in blocks.values())
    recipes = {name: recipe for name, recipe in recipes.items() if not name.startswith(inside)}
    for layer, mixture in blocks.items():
        recipes |= mixture.recipes(f"model.language_model.layers.{layer}.mlp", "softmax", found.tensors)
    count = mixtures.same_count(blocks, found.tensors, "language model")
    moe = MoeLayerConfig(
        num_experts=count, num_experts_per_tok=2, router="softmax", layers=_layers(blocks, text.num_hidden_layers),
        balance_coef=settings.get("router_aux_loss_coef"),
    )  # fmt: skip
    return text, moe, recipes


# --- pictures --------------------------------------------------------------------------------------------------------


def _tower(source: Source, found: Gathered) -> TowerConfig:
    config, (vision, place) = source.config, found.tower
    preprocess, _ = import_preprocessing(place, vision.image_size)
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect in _MODES:
        preprocess = preprocess.model_copy(update={"resize_mode": _MODES[aspect]})
    elif aspect != "square":
        raise UserError(f"{source.directory}: image_aspect_ratio: found {aspect!r}, expected square, pad or anyres")
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise UserError(f"{source.directory}: mm_vision_select_feature: found {select!r}, expected patch or cls_patch")
    # S² comes with towers of their own, which give the input of the last block whatever the config says.
    scales = config.get("scales")
    layer = -2 if scales else int(config.get("mm_vision_select_layer", -2))
    drops = select == "patch" and vision.model_type == "clip_vision_model"
    tower = import_tower(vision, layer, drops, preprocess, str(source.directory))
    if not scales:
        return tower
    wanted = [float(scale) for scale in (scales.split(",") if isinstance(scales, str) else scales)]
    values = {**tower.model_dump(), "scales": [int(scale) for scale in wanted], "scales_from": "base"}
    if any(scale != int(scale) for scale in wanted):
        raise UserError(f"{source.directory}: scales: found {wanted}, expected whole numbers")
    return TowerConfig.model_validate(values)


def _vision(source: Source, found: Gathered, tower: TowerConfig) -> tuple[MoeLayerConfig | None, dict[str, Recipe]]:
    kind, kept = found.tower.config.model_type, tower.num_layers
    blocks = mixtures.find_mixtures(found.tensors, "vision_tower.encoder.layers")
    used = {layer: mixture for layer, mixture in blocks.items() if layer < kept}
    recipes = {}
    for ours, recipe in import_recipes(kind, kept, set(range(kept)) - used.keys()).items():
        theirs = tuple(f"vision_tower.{name}" for name in recipe.sources)
        recipes[f"model.vision_tower.trunk.{ours}"] = recipe._replace(sources=theirs)
    router = _router(source) if used else ""
    for layer, mixture in used.items():
        recipes |= mixture.recipes(f"model.vision_tower.trunk.{BLOCKS[kind]}.{layer}.mlp", router, found.tensors)
    for name in found.tensors:
        if name.startswith("vision_tower.") and is_unused(kind, name.removeprefix("vision_tower."), kept):
            found.unused[name] = "behind the feature layer"
    _drop(found, used.values(), router)
    if not used:
        return None, recipes
    count = mixtures.same_count(used, found.tensors, "vision tower")
    return _settings(source, router, count, _layers(used, kept)), recipes


def _projector(source: Source, found: Gathered) -> tuple[MoeLayerConfig | None, dict[str, Recipe], str]:
    ours = "model.multi_modal_projector"
    for name, why in (("image_newline", "of LLaVA-NeXT's tiles"),):
        if name in found.tensors:
            found.unused[name] = why
    blocks = mixtures.find_mixtures(found.tensors, "mm_projector")
    if blocks:
        router, (mixture,) = _router(source), blocks.values()
        _drop(found, blocks.values(), router)
        count = mixtures.same_count(blocks, found.tensors, "projector")
        recipes = mixture.recipes(f"{ours}.mlp", router, found.tensors)
        return _settings(source, router, count, "all"), recipes, "mlp2x_gelu"
    kind = source.config.get("mm_projector_type", "linear")
    depth = projector_depth(kind)
    recipes = {}
    for suffix in ("weight", "bias"):
        if depth == 1:
            recipes[f"{ours}.mlp.{suffix}"] = Recipe((f"mm_projector.{suffix}",))
        for number in range(depth if depth > 1 else 0):
            place = {depth - 2: "mlp.up_proj", depth - 1: "mlp.down_proj"}.get(number, f"stem.{2 * number}")
            recipes[f"{ours}.{place}.{suffix}"] = Recipe((f"mm_projector.{2 * number}.{suffix}",))
    return None, recipes, kind


# --- experts ---------------------------------------------------------------------------------------------------------


def _router(source: Source) -> str:
    """Our router of the algorithm that a checkpoint names; CuMo's has no name."""
    name = source.config.get("moe_name", "smoe")
    if name not in mixtures.ROUTERS:
        raise UserError(f"{source.directory}: moe_name: found {name!r}, expected one of {', '.join(mixtures.ROUTERS)}")
    return mixtures.ROUTERS[name]


def _settings(source: Source, router: str, count: int, layers: Any) -> MoeLayerConfig:
    """Experts chosen, and the coefficients that the checkpoint was trained with."""
    config = source.config
    coefs = {"balance_coef": "balance_loss_coef", "router_z_coef": "router_z_loss_coef"}
    if router == "competition":
        coefs |= {
            "distillation_coef": "router_loss_coef",
            "diversity_coef": "diversity_loss_coef",
            "competition_balance_coef": "bal_comp_loss_coef",
        }
        if config.get("hybrid"):
            coefs["winner_distillation_coef"] = "router_theta"
    values = {ours: config[theirs] for ours, theirs in coefs.items() if theirs in config}
    chosen = config.get("num_selected", 2)
    return MoeLayerConfig(num_experts=count, num_experts_per_tok=chosen, router=router, layers=layers, **values)


def _schedule(config: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "competition_rate": "rate_flip",
        "competition_warmup_ratio": "warm_up",
        "max_competing_layers": "max_compete_in_iter",
    }
    return {ours: config[theirs] for ours, theirs in keys.items() if theirs in config}


def _drop(found: Gathered, blocks: Any, router: str) -> None:
    """Name what the blocks store and inference does not read."""
    for mixture in blocks:
        if f"{mixture.block}.prob_flips" in found.tensors:
            found.unused[f"{mixture.block}.prob_flips"] = "LibMoE's schedule, which ours computes"
        if router in ("xmoe", "perturbed_cosine"):
            gates = [name for name in found.tensors if re.fullmatch(rf"{re.escape(mixture.block)}\.gate\.\w+", name)]
            found.unused |= dict.fromkeys(gates, "a gate that this router does not use")


def _layers(blocks: dict[int, Any], count: int) -> Any:
    return "all" if len(blocks) == count else sorted(blocks)


def _notes(source: Source, found: Gathered, tower: TowerConfig) -> list[str]:
    notes = []
    if source.config.get("image_aspect_ratio") == "anyres":
        notes.append(
            "LLaVA-NeXT without its tiles: a picture is seen whole, at the tower's own size, and gives "
            f"{tower.num_tokens} tokens; answers on small print will be worse than the original's"
        )
    if mixtures.find_deepspeed(found.tensors):
        notes.append(
            "MoE-LLaVA's routers are DeepSpeed's: there the second expert is drawn at random, and tokens over an "
            "expert's capacity are dropped; here the two likeliest experts answer for every token"
        )
    return notes


LLAVA = Layout(
    "llava",
    "mm_vision_tower or mm_projector_type in config.json, and tensors named model.mm_projector, or an mm_projector.bin "
    "or adapter_config.json (LLaVA, and CompeteSMoE, LibMoE, CuMo, MoE-LLaVA)",
    _fits,
    _read,
)
