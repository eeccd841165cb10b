"""What a recipe needs before a GPU is rented: parameters, memory a GPU by ZeRO stage, FLOPs, the largest micro-batch.

Builds the model on the meta device and never downloads: a hub model's architecture is the inline `config` of the
YAML, and a checkpoint that does not exist yet is followed to the recipe beside it that writes it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_compete.config import apply_overrides, parse_config, read_yaml
from llava_compete.data.text_config import TextSection
from llava_compete.errors import UserError
from llava_compete.model.build import build_config, text_config_of
from llava_compete.model.checkpoint import read_config
from llava_compete.model.config import ModelSection
from llava_compete.model.configuration import LlavaCompeteConfig
from llava_compete.model.meta_step import StepCost, simulate
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.upcycle import UpcycleConfig

GIB = 1024**3
PARTS = {"vision": "vision_tower.", "projector": "projector.", "language": "language_model."}
# CUDA context, allocator slack and collective buffers, measured as memory that is no tensor of ours.
FIXED_BYTES = int(1.5 * GIB)
USABLE_SHARE = 0.95


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model."""

    total: int
    trainable: int
    active: int


@dataclass(frozen=True)
class StateMemory:
    """Bytes a GPU holds for the model itself at one ZeRO stage."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Recipe:
    """What a YAML says that matters here; `training` is empty where the YAML trains nothing."""

    config: LlavaCompeteConfig
    dtype: torch.dtype
    trainable: dict[str, str]
    lora_rank: dict[str, int]
    length: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    zero_stage: int


@dataclass(frozen=True)
class Plan:
    """The result; bytes are of one GPU, FLOPs of one optimizer step over all GPUs."""

    num_gpus: int
    parameters: dict[str, PartCount]
    states: dict[int, StateMemory]
    recipe: Recipe
    per_sample: StepCost
    competition_bytes: int
    competition_flops: int
    flops_per_step: int
    largest_micro_batch: dict[int, dict[str, int]]

    @property
    def total(self) -> PartCount:
        """Sum over the parts."""
        return PartCount(
            *(sum(getattr(part, key) for part in self.parameters.values()) for key in ("total", "trainable", "active"))
        )

    def activations(self, checkpointing: bool) -> int:
        """Bytes of activations of the recipe's micro-batch on a router step."""
        cost = self.per_sample
        return self.recipe.micro_batch * (cost.checkpointed if checkpointing else cost.activations)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        total = self.total
        return {
            "parameters": {
                **dataclasses.asdict(total),
                "parts": {name: dataclasses.asdict(part) for name, part in self.parameters.items()},
            },
            "num_gpus": self.num_gpus,
            "zero_stage": self.recipe.zero_stage,
            "tokens_per_sample": self.recipe.length,
            "micro_batch": self.recipe.micro_batch,
            "gradient_checkpointing": self.recipe.checkpointing,
            "bytes_per_gpu": {
                **{
                    f"zero{stage}": dataclasses.asdict(state) | {"total": state.total}
                    for stage, state in self.states.items()
                },
                "activations": self.activations(False),
                "activations_with_checkpointing": self.activations(True),
                "competition_step_extra": self.competition_bytes,
            },
            "flops_per_step": self.flops_per_step,
            "competition_step_extra_flops": self.competition_flops,
            "largest_micro_batch": {f"zero{stage}": sizes for stage, sizes in self.largest_micro_batch.items()},
        }


def plan(path: str | Path, overrides: list[str], num_gpus: int, gpu_memory_gib: float) -> Plan:
    """Plan the recipe of one YAML (a training stage or an upcycling) on `num_gpus` GPUs."""
    recipe = read_recipe(Path(path), overrides)
    with torch.device("meta"):
        model = LlavaCompeteForConditionalGeneration(recipe.config).to(recipe.dtype).train()
    freeze(model, recipe.trainable)
    parameters = count_parameters(model, recipe)
    trainable = sum(part.trainable for part in parameters.values())
    total = sum(part.total for part in parameters.values())
    states = {stage: state_memory(total, trainable, recipe.dtype, stage, num_gpus) for stage in range(4)}
    images = 0 if recipe.config.tower is None else 1
    per_sample = simulate(model, 1, recipe.length, images, frozenset())
    competing = _heaviest_layers(model, recipe)
    extra_bytes, extra_flops = 0, 0
    if competing:
        with_competition = simulate(model, 1, recipe.length, images, competing)
        kept = "checkpointed" if recipe.checkpointing else "activations"
        extra_bytes = recipe.micro_batch * (getattr(with_competition, kept) - getattr(per_sample, kept))
        extra_flops = with_competition.flops - per_sample.flops
    samples = recipe.micro_batch * recipe.accumulation * num_gpus
    room = int(gpu_memory_gib * GIB * USABLE_SHARE) - FIXED_BYTES
    extra_sample = extra_bytes // recipe.micro_batch
    largest = {
        stage: {
            "without_checkpointing": max(0, (room - state.total) // (per_sample.activations + extra_sample)),
            "with_checkpointing": max(0, (room - state.total) // (per_sample.checkpointed + extra_sample)),
        }
        for stage, state in states.items()
    }
    # Checkpointing runs the layers' forward once more: about a third of forward and backward together.
    factor = 4 / 3 if recipe.checkpointing else 1
    return Plan(
        num_gpus=num_gpus,
        parameters=parameters,
        states=states,
        recipe=recipe,
        per_sample=per_sample,
        competition_bytes=extra_bytes,
        competition_flops=extra_flops * samples,
        flops_per_step=int(per_sample.flops * samples * factor),
        largest_micro_batch=largest,
    )


def freeze(model: LlavaCompeteForConditionalGeneration, trainable: dict[str, str]) -> None:
    """Set `requires_grad` as a stage's `trainable` table says (LoRA: frozen base)."""
    for part, prefix in PARTS.items():
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                parameter.requires_grad_(trainable.get(part) == "full")
    if not any(mode == "full" for mode in trainable.values()):
        model.get_input_embeddings().requires_grad_(True)  # stands for the adapters: something has a gradient


def count_parameters(model: LlavaCompeteForConditionalGeneration, recipe: Recipe) -> dict[str, PartCount]:
    """By part: all parameters, those that train, and those that one token's forward uses."""
    unused = dict.fromkeys(PARTS, 0)
    for block in moe_blocks(model).values():
        experts = sum(parameter.numel() for parameter in block.experts.parameters())
        unused[block.part] += (
            experts * (block.config.num_experts - block.config.num_experts_per_tok) // block.config.num_experts
        )
    counts = {}
    for part, prefix in PARTS.items():
        parameters = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not parameters:
            continue
        total = sum(parameter.numel() for parameter in parameters)
        mode = recipe.trainable.get(part, "frozen")
        if mode == "lora":  # rank * (in + out) of each matrix
            trainable = recipe.lora_rank[part] * sum(sum(p.shape[-2:]) for p in parameters if p.ndim in (2, 3))
        else:
            trainable = total if mode == "full" else 0
        counts[part] = PartCount(total, trainable, total - unused[part])
    return counts


def state_memory(total: int, trainable: int, dtype: torch.dtype, stage: int, num_gpus: int) -> StateMemory:
    """Weights, gradients and Adam's state on one GPU under DeepSpeed.

    Adam keeps two float32 numbers a trainable parameter, and DeepSpeed a float32 master copy beside them.
    """
    size = dtype.itemsize
    weights = total * size // (num_gpus if stage == 3 else 1)
    gradients = trainable * size // (num_gpus if stage >= 2 else 1)
    master = 4 if size < 4 or stage >= 1 else 0
    return StateMemory(weights, gradients, trainable * (8 + master) // (num_gpus if stage >= 1 else 1))


def _heaviest_layers(model: LlavaCompeteForConditionalGeneration, recipe: Recipe) -> frozenset[str]:
    """As many competing layers as one step may have, the largest first."""
    if recipe.config.moe is None:
        return frozenset()
    blocks = [block for block in moe_blocks(model).values() if block.config.router == "competition"]
    blocks.sort(key=lambda block: -block.experts.down_proj.numel())
    limit = MoeConfig.model_validate(recipe.config.moe).max_competing_layers
    return frozenset(block.name for block in blocks[:limit])


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a stage's YAML as far as it matters for a plan; errors are the same as those of training."""
    from llava_compete.train.config import TrainConfig

    content = apply_overrides(read_yaml(path), overrides)
    if content.get("stage") == "upcycle" or "trainable" not in content:
        upcycling = parse_config(UpcycleConfig, content, source=str(path))
        config = _upcycled(architecture(path, upcycling.model), upcycling.moe)
        return Recipe(config, torch.bfloat16, dict.fromkeys(PARTS, "full"), {}, 2048, 1, 1, True, 2)
    stage = parse_config(TrainConfig, content, source=str(path))
    config = architecture(path, stage.model)
    if stage.model.checkpoint is None and stage.moe:
        config = _upcycled(config, stage.moe)
    training = stage.training
    bf16 = training.get("bf16") or training.get("fp16") or stage.model.dtype != "float32"
    length = stage.data.context if isinstance(stage.data, TextSection) else stage.data.max_length
    limit = getattr(config.text_config, "max_position_embeddings", length)
    return Recipe(
        config=config,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        trainable={part: entry.mode for part, entry in stage.trainable.items()},
        lora_rank={part: entry.lora_rank for part, entry in stage.trainable.items()},
        length=min(length, limit),
        micro_batch=int(training.get("per_device_train_batch_size", 8)),
        accumulation=int(training.get("gradient_accumulation_steps", 1)),
        checkpointing=bool(training.get("gradient_checkpointing") or training.get("activation_checkpointing")),
        zero_stage=int(stage.deepspeed[4]) if stage.deepspeed and stage.deepspeed.startswith("zero") else 0,
    )


def architecture(path: Path, section: ModelSection) -> LlavaCompeteConfig:
    """config.json of what a `model:` section names, also of a checkpoint that a recipe beside `path` will write."""
    if section.checkpoint is None:
        config = build_config(section, None, text_config_of(section, offline=True))
        config.image_token_id = 0  # no tokenizer is read; any id does for shapes
        return config
    if (section.checkpoint / "config.json").is_file():
        return read_config(section.checkpoint)
    for sibling in sorted(path.parent.glob("*.yaml")):
        content = read_yaml(sibling)
        if content.get("output_dir") != str(section.checkpoint) or "model" not in content:
            continue
        parent = architecture(sibling, parse_config(ModelSection, content["model"], source=f"{sibling}: model"))
        if content.get("stage") == "upcycle":
            return _upcycled(parent, parse_config(UpcycleConfig, content, source=str(sibling)).moe)
        return parent
    raise UserError(
        f"{path}: model.checkpoint {section.checkpoint} does not exist, and no recipe in {path.parent} writes it"
    )


def _upcycled(config: LlavaCompeteConfig, moe: MoeConfig) -> LlavaCompeteConfig:
    values = config.to_dict()
    values["moe"] = moe.model_dump(mode="json")
    return LlavaCompeteConfig.from_dict(values)


def write_json(result: Plan, path: Path) -> None:
    """Write the plan for another program."""
    path.write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
