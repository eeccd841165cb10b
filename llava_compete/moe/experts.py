"""E feed-forward experts as packed parameters [E, out, in], used whole on every rank in every forward.

Two ways through, both by `__call__` so that ZeRO-3's hooks gather the parameters: the chosen experts (through
transformers' experts interface) and the competition (all experts once, `competition.py`). Dense MLPs of both kinds:
gated (gate and up fused, gate first) and plain, biases optional. Called by `SparseMoeBlock`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llava_compete.errors import UserError
from llava_compete.moe.competition import CompetitionResult, compete
from llava_compete.moe.config import MoeLayerConfig
from llava_compete.moe.grouped import AllExpertsUp, Combine, Dispatch, Pairs, grouped_linear


def activation_function(name: str) -> nn.Module:
    """An activation by the name transformers knows it by."""
    if name not in ACT2FN:
        raise UserError(f"activation: found {name!r}, expected one of {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]


class PackedExperts(nn.Module):
    """`up_proj` [E, I, D] or `gate_up_proj` [E, 2I, D], `down_proj` [E, O, I], and `*_bias` if the dense MLP has them.

    `hidden_dropout` acts after the activation (and gate).
    """

    # What transformers' experts functions read of the module.
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(
        self,
        config: MoeLayerConfig,
        *,
        hidden_size: int,
        intermediate_size: int,
        output_size: int,
        activation: str,
        gated: bool,
        bias: bool,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.num_winners = config.num_experts_per_tok
        self.affinity = config.affinity
        self.chunk_tokens = config.competition_chunk_tokens
        self.implementation = config.experts_implementation
        self.has_gate, self.has_bias = gated, bias
        self.act_fn: nn.Module = activation_function(activation)
        if hidden_dropout and not gated:  # transformers' functions apply a plain expert's `act_fn` and nothing else
            self.act_fn = nn.Sequential(self.act_fn, nn.Dropout(hidden_dropout))
        self.gate_dropout = nn.Dropout(hidden_dropout) if hidden_dropout and gated else nn.Identity()

        rows = 2 * intermediate_size if gated else intermediate_size
        self.up_name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(self.num_experts, rows, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, output_size, intermediate_size))
        if bias:
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, output_size))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Each expert as nn.Linear would: uniform within 1/sqrt(fan in)."""
        for name, parameter in self.named_parameters(recurse=False):
            fan_in = self.down_proj.shape[2] if name.startswith("down") else self.up.shape[2]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)

    @property
    def up(self) -> Tensor:
        return getattr(self, self.up_name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))

    def forward(
        self, x_TD: Tensor, selected_experts_TK: Tensor | None = None, routing_weights_TK: Tensor | None = None
    ) -> Tensor | CompetitionResult:
        """The weighted sum [T, O] of the selected experts' outputs; with none given, a competition of them all."""
        weights = _Weights(self, _compute_dtype(x_TD, self.down_proj))
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(weights.down_proj.dtype)
            if selected_experts_TK is None or routing_weights_TK is None:
                return self._compete(weights, x_TD)
            name = self._choose_implementation(x_TD, selected_experts_TK.numel())
            function = ALL_EXPERTS_FUNCTIONS.get_interface(name, _eager)
            return function(weights, x_TD, selected_experts_TK, routing_weights_TK)

    def _choose_implementation(self, x_TD: Tensor, num_pairs: int) -> str:
        """Automatic: what was fastest on 2 CPU cores, float32 and bfloat16; grouped products on CUDA.

        With fewer (token, choice) pairs than experts, as in decoding, grouped_mm took 0.7 to 0.9 of eager's forward,
        for it passes over unused experts; with many, 1.2 to 1.3 of its forward and backward. batched_mm copies an
        expert's weights for each pair: never faster. grouped_mm needs rows of whole 16 bytes.
        """
        output_size, intermediate_size = self.down_proj.shape[1:]
        if output_size != x_TD.shape[1]:
            return "eager"  # transformers' functions assume O = D
        if self.implementation != "auto":
            return self.implementation
        aligned = all(size * x_TD.element_size() % 16 == 0 for size in (output_size, intermediate_size))
        grouped = aligned and (x_TD.device.type == "cuda" or num_pairs < self.num_experts)
        return "grouped_mm" if grouped else "eager"

    def _compete(self, weights: _Weights, x_TD: Tensor) -> CompetitionResult:
        if self.chunk_tokens is None or x_TD.shape[0] <= self.chunk_tokens:
            return self._compete_chunk(weights, x_TD)
        chunks = [
            checkpoint(self._compete_chunk, weights, chunk_TD, use_reentrant=False)
            for chunk_TD in x_TD.split(self.chunk_tokens)
        ]
        return CompetitionResult(*(torch.cat(column) for column in zip(*chunks, strict=True)))

    def _compete_chunk(self, weights: _Weights, x_TD: Tensor) -> CompetitionResult:
        h_TEI = weights.activate(AllExpertsUp.apply(x_TD, weights.up, weights.up_bias))
        return compete(h_TEI, weights.down_proj, weights.down_proj_bias, self.affinity, self.num_winners)


class _Weights:
    """The experts' parameters in the dtype of computation, under the names that transformers' functions read."""

    def __init__(self, experts: PackedExperts, dtype: torch.dtype) -> None:
        up, up_bias = experts.up, getattr(experts, f"{experts.up_name}_bias", None)
        down_bias = getattr(experts, "down_proj_bias", None)
        self.up = self.up_proj = self.gate_up_proj = up.to(dtype)
        self.up_bias = self.up_proj_bias = self.gate_up_proj_bias = None if up_bias is None else up_bias.to(dtype)
        self.down_proj = experts.down_proj.to(dtype)
        self.down_proj_bias = None if down_bias is None else down_bias.to(dtype)
        self.num_experts = experts.num_experts
        self.has_gate, self.has_bias = experts.has_gate, experts.has_bias
        self.has_post_expert_norm = experts.has_post_expert_norm
        self.is_transposed, self.is_concatenated = experts.is_transposed, experts.is_concatenated
        self._is_expert_parallel = experts._is_expert_parallel
        self.act_fn, self.gate_dropout = experts.act_fn, experts.gate_dropout

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.gate_dropout(self.act_fn(gate) * up)

    def activate(self, up: Tensor) -> Tensor:
        return self._apply_gate(up) if self.has_gate else self.act_fn(up)


def _eager(weights: Any, x_TD: Tensor, selected_experts_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
    """Chosen experts by one sort and one matrix product an expert; any O, tokens in a fixed order."""
    pairs = Pairs.sort(selected_experts_TK, weights.num_experts)
    x_PD = Dispatch.apply(x_TD, pairs)
    h_PI = weights.activate(grouped_linear(x_PD, weights.up, weights.up_bias, pairs.ends_E))
    y_PO = grouped_linear(h_PI, weights.down_proj, weights.down_proj_bias, pairs.ends_E)
    return Combine.apply(y_PO, routing_weights_TK.to(y_PO.dtype), pairs)


def _compute_dtype(x_TD: Tensor, parameter: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x_TD.device.type):
        return torch.get_autocast_dtype(x_TD.device.type)
    if x_TD.dtype != parameter.dtype:
        raise UserError(f"dtype: MoE input is {x_TD.dtype}, its experts are {parameter.dtype}; use one or autocast")
    return parameter.dtype
