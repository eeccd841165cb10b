"""A recipe as `plan` reads it: what one YAML says about model, training and sharding, without a download.

A hub model's architecture is the inline `config` of the YAML, and a checkpoint that does not exist yet is followed to
the recipe beside it that writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llava_compete.config import apply_overrides, parse_config, read_yaml
from llava_compete.data.config import DataSection
from llava_compete.data.text.config import TextSection
from llava_compete.errors import UserError
from llava_compete.files import read_json
from llava_compete.language.sources import text_config_of
from llava_compete.model.build import build_config, check_moe_settings
from llava_compete.model.checkpoint import read_config
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.section import ModelSection
from llava_compete.model.upcycle import UpcycleConfig
from llava_compete.moe.config import MoeConfig
from llava_compete.train.config import DEEPSPEED_DIR, Part, PartTraining, TrainConfig
from llava_compete.train.starting_point import moe_in_force


@dataclass(frozen=True)
class Recipe:
    """What a YAML says that matters here; an upcycling, which trains nothing, is planned as the full training after it.

    offload: which of "optimizer" (with the gradients) and "param" DeepSpeed keeps out of GPU memory.
    """

    config: LlavaCompeteConfig
    dtype: torch.dtype = torch.bfloat16
    trainable: dict[Part, PartTraining] | None = None
    length: int = 2048
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = True
    zero_stage: int = 2
    offload: tuple[str, ...] = ()
    quantization: str | None = None
    expert_parallel: int = 1


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a stage's YAML as far as it matters for a plan; errors are the same as those of training."""
    content = apply_overrides(read_yaml(path), overrides)
    if content.get("stage", "upcycle") == "upcycle":
        upcycling = parse_config(UpcycleConfig, content, source=str(path))
        spread = upcycling.moe.expert_parallel
        return Recipe(_with_moe(architecture(path, upcycling.model), upcycling.moe), expert_parallel=spread)
    stage = parse_config(TrainConfig, content, source=str(path))
    config = architecture(path, stage.model)
    moe = (stage.moe or None) if stage.model.checkpoint is None else moe_in_force(stage, config.moe)
    if moe is not None:
        if stage.model.checkpoint is not None:
            check_moe_settings(config, moe)
        config = _with_moe(config, moe)
    training = stage.training
    bf16 = training.bf16 or training.fp16 or stage.model.dtype != "float32"
    length = stage.data.context if isinstance(stage.data, TextSection) else stage.data.max_length
    if isinstance(stage.data, DataSection):
        stage.data.check_tiles(config.tiling)
    limit = getattr(config.text_config, "max_position_embeddings", length)
    zero_stage, offload = _zero_options(stage.deepspeed)
    return Recipe(
        config=config,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        trainable=stage.trainable,
        length=min(length, limit),
        micro_batch=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        checkpointing=training.activation_checkpointing,
        zero_stage=zero_stage,
        offload=offload,
        quantization=stage.model.quantization,
        expert_parallel=1 if moe is None else moe.expert_parallel,
    )


def _zero_options(name: str | None) -> tuple[int, tuple[str, ...]]:
    """ZeRO stage of a file of configs/deepspeed, and what it offloads."""
    if name is None:
        return 0, ()
    zero = read_json(DEEPSPEED_DIR / f"{name}.json")["zero_optimization"]
    return zero["stage"], tuple(what for what in ("optimizer", "param") if f"offload_{what}" in zero)


def architecture(path: Path, section: ModelSection) -> LlavaCompeteConfig:
    """config.json of what a `model:` section names, also of a checkpoint that a recipe beside `path` will write."""
    if section.checkpoint is None:
        assert section.language_model is not None
        config = build_config(section, None, text_config_of(section.language_model, offline=True))
        config.image_token_id = 0  # no tokenizer is read; any id does for shapes
        return config
    if (section.checkpoint / "config.json").is_file():
        return read_config(section.checkpoint, section.trust_remote_code)
    for sibling in sorted(path.parent.glob("*.yaml")):
        content = read_yaml(sibling)
        if content.get("output_dir") != str(section.checkpoint) or "model" not in content or sibling == path:
            continue
        parent = architecture(sibling, parse_config(ModelSection, content["model"], source=f"{sibling}: model"))
        if content.get("stage") == "upcycle":
            return _with_moe(parent, parse_config(UpcycleConfig, content, source=str(sibling)).moe)
        return parent
    raise UserError(
        f"{path}: model.checkpoint {section.checkpoint} does not exist, and no recipe in {path.parent} writes it"
    )


def _with_moe(config: LlavaCompeteConfig, moe: MoeConfig) -> LlavaCompeteConfig:
    values = config.to_dict()
    values["moe"] = moe.of_model()
    return LlavaCompeteConfig.from_dict(values)
