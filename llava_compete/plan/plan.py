"""What a recipe needs before a GPU is rented: parameters, memory a GPU by ZeRO stage, FLOPs, the largest micro-batch.

Builds the model on the meta device and never downloads (`recipe.py`); what a step costs is `step_cost.py`'s.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_compete.errors import UserError
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import competition_layers, moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.experts import PackedExperts
from llava_compete.parts import PREFIXES
from llava_compete.plan.cluster import Cluster, Layer, Step, Weights, layers_of, step
from llava_compete.plan.recipe import Recipe, read_recipe
from llava_compete.plan.step_cost import StepCost, simulate
from llava_compete.train import trainable as stage_trainable
from llava_compete.train.adapters import with_adapters

GIB = 1024**3
# Bytes of a weight that bitsandbytes holds in 8 or 4 bits, scales included.
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.52}
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
class Plan:
    """The result; bytes are of one GPU, FLOPs of one optimizer step over all GPUs."""

    num_gpus: int
    parameters: dict[str, PartCount]
    states: dict[int, StateMemory]
    recipe: Recipe
    per_sample: StepCost
    competition_per_sample: StepCost
    largest_micro_batch: dict[int, dict[str, int]]
    cluster: Cluster
    weights: Weights
    layers: list[Layer]
    num_competing: int

    @property
    def total(self) -> PartCount:
        """Sum over the parts."""
        return PartCount(
            *(sum(getattr(part, key) for part in self.parameters.values()) for key in ("total", "trainable", "active"))
        )

    def activations(self, checkpointing: bool) -> int:
        """Bytes of activations of the recipe's micro-batch on a router step."""
        return self.recipe.micro_batch * self.per_sample.activations(checkpointing)

    @property
    def competition_bytes(self) -> int:
        """Bytes that a competition step adds to the activations."""
        with_competition = self.competition_per_sample.activations(self.recipe.checkpointing)
        return self.recipe.micro_batch * with_competition - self.activations(self.recipe.checkpointing)

    @property
    def flops_per_step(self) -> int:
        """Of a router step."""
        return self.per_sample.step_flops(self.recipe.checkpointing) * self._samples

    @property
    def competition_flops(self) -> int:
        """What a competition step adds."""
        return self.competition_per_sample.step_flops(self.recipe.checkpointing) * self._samples - self.flops_per_step

    @property
    def asking_flops(self) -> int:
        """What a step adds at most whose loss judges the experts that were not chosen: if it asks all it may."""
        return self.per_sample.asking_flops * self._samples

    def step(self, *, competing: bool = False) -> Step:
        """What one optimizer step of the recipe sends, and its seconds."""
        recipe = self.recipe
        return step(
            self.cluster,
            self.weights,
            self.layers,
            self.flops_per_step + (self.competition_flops if competing else 0),
            zero_stage=recipe.zero_stage,
            spread=recipe.expert_parallel,
            accumulation=recipe.accumulation,
            checkpointing=recipe.checkpointing,
            competing=self.num_competing if competing else 0,
        )

    def utilisation(self) -> float:
        """MFU of a router's step: its operations without those that checkpointing repeats, over the devices' peak."""
        needed = self.per_sample.step_flops(False) * self._samples
        return needed / (self.step().total * self.cluster.peak * self.num_gpus)

    @property
    def tokens_per_step(self) -> int:
        """Of the language model, over all GPUs."""
        return self._samples * self.recipe.length

    @property
    def _samples(self) -> int:
        return self.recipe.micro_batch * self.recipe.accumulation * self.num_gpus

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
            "offload": list(self.recipe.offload),
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
            "asking_flops_at_most": self.asking_flops,
            "largest_micro_batch": {f"zero{stage}": sizes for stage, sizes in self.largest_micro_batch.items()},
            "cluster": dataclasses.asdict(self.cluster),
            "expert_parallel": self.recipe.expert_parallel,
            "steps": {
                name: dataclasses.asdict(self.step(competing=competing))
                | {"total": self.step(competing=competing).total}
                for name, competing in (("router", False), ("competition", True))
            },
            "mfu": self.utilisation(),
            "tokens_per_step": self.tokens_per_step,
        }


def plan(path: str | Path, overrides: list[str], cluster: Cluster, gpu_memory_gib: float) -> Plan:
    """Plan the recipe of one YAML (a training stage or an upcycling) on a cluster."""
    recipe, num_gpus = read_recipe(Path(path), overrides), cluster.gpus
    if num_gpus % (spread := recipe.expert_parallel):
        raise UserError(f"moe.expert_parallel: found {spread}, expected a divisor of the number of ranks, {num_gpus}")
    model = build_on_meta(recipe)
    parameters = count_parameters(model)
    weights = weights_of(model, recipe)
    states = {
        stage: state_memory(
            weights, recipe.dtype, stage, num_gpus,
            recipe.offload if stage == recipe.zero_stage else (), recipe.expert_parallel if stage in (1, 2) else 1,
        )
        for stage in range(4)
    }  # fmt: skip
    images = 0 if recipe.config.tower is None else 1
    per_sample = simulate(model, 1, recipe.length, images, frozenset())
    competing = _heaviest_layers(model, recipe.config)
    heaviest = simulate(model, 1, recipe.length, images, competing) if competing else per_sample
    room = int(gpu_memory_gib * GIB * USABLE_SHARE) - FIXED_BYTES
    largest = {
        stage: {
            name: max(0, (room - state.total) // heaviest.activations(checkpointing))
            for name, checkpointing in (("without_checkpointing", False), ("with_checkpointing", True))
        }
        for stage, state in states.items()
    }
    tokens = {name: count * recipe.micro_batch for name, count in per_sample.layer_tokens.items()}
    layers = layers_of(model, tokens, recipe.dtype.itemsize)
    costs = (per_sample, heaviest, largest)
    return Plan(num_gpus, parameters, states, recipe, *costs, cluster, weights, layers, len(competing))


def build_on_meta(recipe: Recipe) -> LlavaCompeteForConditionalGeneration:
    """The model as the stage trains it, adapters included, without memory for its weights."""
    with torch.device("meta"):
        model = LlavaCompeteForConditionalGeneration(recipe.config).to(recipe.dtype).train()
        if recipe.trainable is not None:
            with_adapters(model, recipe.trainable)
            stage_trainable.apply(model, recipe.trainable)
    return model


def count_parameters(model: LlavaCompeteForConditionalGeneration) -> dict[str, PartCount]:
    """By part: all parameters (adapters too), those that train, and those that one token's forward uses."""
    unused: dict[str, int] = defaultdict(int)
    for block in moe_blocks(model).values():
        experts = sum(parameter.numel() for parameter in block.experts.parameters())
        unused[block.part] += (
            experts * (block.config.num_experts - block.config.num_experts_per_tok) // block.config.num_experts
        )
    unused["language"] += _unused_own_experts(model)
    counts: dict[str, PartCount] = {}
    for part, prefix in PREFIXES.items():
        parameters = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if parameters:
            total = sum(parameter.numel() for parameter in parameters)
            trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            counts[part] = PartCount(total, trainable, total - unused[part])
    return counts


def _unused_own_experts(model: LlavaCompeteForConditionalGeneration) -> int:
    """Parameters of experts that the language model brings and a token does not use; they are packed [E, ...]."""
    chosen = getattr(model.config.text_config, "num_experts_per_tok", None)
    unused = 0
    for name, module in model.language_model.named_modules():
        if chosen and name.endswith(".experts") and not isinstance(module, PackedExperts):
            for parameter in module.parameters():
                unused += parameter.numel() * (len(parameter) - chosen) // len(parameter)
    return unused


def weight_bytes(model: LlavaCompeteForConditionalGeneration, quantization: str | None) -> int:
    """Of all weights; with quantisation the language model's frozen linear layers take fewer, its head apart."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if quantization is not None:
        for name, module in model.language_model.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                size -= round(module.weight.numel() * (module.weight.element_size() - QUANTIZED_BYTES[quantization]))
    return size


def weights_of(model: LlavaCompeteForConditionalGeneration, recipe: Recipe) -> Weights:
    """Bytes of a model's weights; of those that train, in the dtype in which DeepSpeed holds them."""
    experts = [parameter for block in moe_blocks(model).values() for parameter in block.experts.parameters()]

    def trained(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * recipe.dtype.itemsize

    return Weights(
        weight_bytes(model, recipe.quantization),
        trained(model.parameters()),
        sum(parameter.numel() * parameter.element_size() for parameter in experts),
        trained(experts),
    )


def state_memory(
    weights: Weights,
    dtype: torch.dtype,
    stage: int,
    num_gpus: int,
    offload: tuple[str, ...] = (),
    expert_parallel: int = 1,
) -> StateMemory:
    """Weights, gradients and Adam's state on one GPU under DeepSpeed.

    Adam keeps two float32 numbers a trainable parameter, and DeepSpeed a float32 master copy beside them. Experts that
    are spread over ranks are fewer on each, and their states are spread over fewer.
    """
    size = dtype.itemsize
    elsewhere = 1 - 1 / expert_parallel  # of the experts
    held = weights.total - round(weights.experts * elsewhere)
    held = 0 if "param" in offload else held // (num_gpus if stage == 3 else 1)
    if "optimizer" in offload:  # gradients follow the optimizer to the host
        return StateMemory(held, 0, 0)
    trained = weights.trained - (round(weights.trained_experts * elsewhere) if stage < 2 else 0)
    gradients = trained // (num_gpus if stage >= 2 else 1)
    master = 4 if size < 4 or stage >= 1 else 0
    return StateMemory(held, gradients, weights.trained // size * (8 + master) // (num_gpus if stage >= 1 else 1))


def _heaviest_layers(model: LlavaCompeteForConditionalGeneration, config: LlavaCompeteConfig) -> frozenset[str]:
    """As many competing layers as one step may have, the largest first."""
    if config.moe is None:
        return frozenset()
    blocks = moe_blocks(model)
    names = sorted(competition_layers(model), key=lambda name: -sum(p.numel() for p in blocks[name].parameters()))
    return frozenset(names[: MoeConfig.model_validate(config.moe).max_competing_layers])
