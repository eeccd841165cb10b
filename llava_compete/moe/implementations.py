"""Ways to run the chosen experts (`experts_implementation`): ours in `FUNCTIONS`, and transformers' experts interface.

Each is a function of (weights, x [T, D], chosen slots [T, C], their weights [T, C], shared weight) to the weighted sums
[T, O]: (1 - s) x the sum over a token's choices + s x the last expert, where the shared weight s is not 0. A slot is an
expert, or what slots.py says. All give the same numbers to rounding, with gradients for every expert, zeros for one
without tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.deepgemm import is_deepgemm_loadable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sonicmoe import is_sonicmoe_loadable

from llava_compete.errors import UserError
from llava_compete.moe.all_experts import AllExpertsDown, AllExpertsUp
from llava_compete.moe.gated import gated_product
from llava_compete.moe.grouped import DispatchUp, DownCombine, aligned, fits_grouped_mm
from llava_compete.moe.looped import grouped_linear
from llava_compete.moe.pairs import Combine, Dispatch, Pairs
from llava_compete.moe.routers import with_shared
from llava_compete.moe.slots import Slots

# Up to so many bytes of the chosen experts' weights a GPU copies them in about the time of one kernel's launch.
COPIED_WEIGHT_BYTES = 2**25
# A GPU multiplies so many tokens with a matrix in the time that it takes to read it (H100: 295 operations a byte).
TOKENS_OF_A_READ = 128


class ExpertWeights:
    """The packed parameters in the dtype of computation, also under the names that transformers' functions read."""

    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(
        self,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        *,
        activation: str,
        act_fn: nn.Module,
        gated: bool,
        gate_dropout: nn.Module,
        slots: Slots,
    ) -> None:
        self.slots = slots
        self.up = self.up_proj = self.gate_up_proj = up
        self.up_bias = self.up_proj_bias = self.gate_up_proj_bias = up_bias
        self.down = self.down_proj = down
        self.down_bias = self.down_proj_bias = down_bias
        self.num_experts = down.shape[0]
        self.has_gate, self.has_bias = gated, down_bias is not None
        self.act_fn, self.gate_dropout = act_fn, gate_dropout
        # Where a list, `activate` leaves its hidden states here.
        self.heard: list[Tensor] | None = None
        self.config = SimpleNamespace(hidden_act=activation)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.gate_dropout(gated_product(gate_up, self.act_fn, self.config.hidden_act))

    def activate(self, up: Tensor) -> Tensor:
        """Pre-activations [..., M] -> hidden states [..., I]."""
        hidden = self._apply_gate(up) if self.has_gate else self.act_fn(up)
        if self.heard is not None:
            self.heard.append(hidden.detach())
        return hidden

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """All that a chosen expert multiplies with, [E, out, in]."""
        return self.up, self.down

    def fit_grouped_mm(self) -> bool:
        widths = (width for matrix in self.matrices for width in matrix.shape[1:])
        return fits_grouped_mm(self.down.dtype, *widths)

    # Hidden states in each of the ways below.

    def of_pairs(self, x_TD: Tensor, pairs: Pairs) -> Tensor:
        """[P, I], by one product an expert."""
        return self.activate(grouped_linear(Dispatch.apply(x_TD, pairs), self.up, self.up_bias, pairs.ends_E))

    def grouped(
        self, x_TD: Tensor, pairs: Pairs, marks_PE: Tensor | None, has_shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[P, I] by grouped products, and a shared expert's [T, I]."""
        up_PM, up_TM = DispatchUp.apply(x_TD, aligned(self.up), self.up_bias, pairs, marks_PE, has_shared)
        return self.activate(up_PM), self.activate(up_TM) if has_shared else None

    def of_all(self, x_TD: Tensor) -> Tensor:
        """[T, E, I]."""
        return self.activate(AllExpertsUp.apply(x_TD, self.up, self.up_bias))

    def of_chosen(self, x_1D: Tensor, chosen_K: Tensor) -> Tensor:
        """[K, 1, I] of one token."""
        return self.activate(chosen_linear(x_1D.expand(len(chosen_K), 1, -1), self.up, self.up_bias, chosen_K))

    def of_one(self, x_1D: Tensor, expert: int) -> Tensor:
        """[1, I] of one token and one expert."""
        return self.activate(linear_of(x_1D, self.up, self.up_bias, expert))


Function = Callable[[ExpertWeights, Tensor, Tensor, Tensor, float], Tensor]


def choose(requested: str, weights: ExpertWeights, num_tokens: int, num_choices: int, device: torch.device) -> Function:
    """The function for a call.

    `auto` is `grouped_mm` in bfloat16 on CUDA; on a CPU `eager` with gradients and `grouped_mm` without (2 to 16% less
    time from 4 tokens to 32). Few tokens without gradients, as in decoding, have ways of their own. `grouped_mm` falls
    back where rows do not begin at multiples of 16 bytes: on CUDA to `dense`, which does not wait for the device, and
    elsewhere to `eager`. So it does on CUDA in float32 and float16: torch's grouped_mm has no kernel for them and would
    read every expert's number of rows on the host.
    """
    on_cuda, infers = device.type == "cuda", not torch.is_grad_enabled()
    if infers and requested == "auto" and on_cuda and _reads_all_anyway(weights.num_experts, num_tokens, num_choices):
        return dense
    if infers and num_tokens == 1 and requested in ("auto", *FUNCTIONS):
        return one_token
    fits = weights.fit_grouped_mm() and not (on_cuda and weights.down.dtype != torch.bfloat16)
    if requested == "auto":
        requested = "grouped_mm" if on_cuda or infers else "eager"
    if requested == "grouped_mm" and not fits:
        requested = "dense" if on_cuda else "eager"
    return FUNCTIONS[requested] if requested in FUNCTIONS else _of_transformers(requested)


def _reads_all_anyway(num_experts: int, num_tokens: int, num_choices: int) -> bool:
    """Whether decoding by `dense`, a third of the launches, reads hardly more weights: where the tokens' choices touch
    nearly all experts, or, for a copy of the chosen ones is written and read again, one token's a third of them."""
    few = num_tokens <= TOKENS_OF_A_READ
    return few and (num_tokens * num_choices >= 2 * num_experts or 3 * num_choices >= num_experts)


def _with_shared(
    weights: ExpertWeights, choices_TC: Tensor, weights_TC: Tensor, shared: float
) -> tuple[Tensor, Tensor]:
    """All that a token runs and their weights, [T, K] each: a shared expert is one choice more; E for none."""
    if not shared:
        return weights.slots.runs(choices_TC, weights_TC)
    return with_shared(choices_TC, weights.num_experts - 1), with_shared((1 - shared) * weights_TC, shared)


def eager(weights: ExpertWeights, x_TD: Tensor, choices_TC: Tensor, weights_TC: Tensor, shared: float = 0.0) -> Tensor:
    """One product an expert over tokens sorted by expert; reads the experts' numbers of rows on the host."""
    selected_TK, weights_TK = _with_shared(weights, choices_TC, weights_TC, shared)
    pairs = Pairs.sort(selected_TK, weights.num_experts, weights.slots.idle > 0)
    y_PO = grouped_linear(weights.of_pairs(x_TD, pairs), weights.down, weights.down_bias, pairs.ends_E)
    return Combine.apply(y_PO, weights_TK.to(y_PO.dtype), pairs)


def grouped(
    weights: ExpertWeights, x_TD: Tensor, choices_TC: Tensor, weights_TC: Tensor, shared: float = 0.0
) -> Tensor:
    """One grouped product for each layer of the MLP over tokens sorted by expert, and a shared expert's beside it."""
    choices_TC, weights_TC = weights.slots.runs(choices_TC, weights_TC)
    pairs = Pairs.sort(choices_TC, weights.num_experts, weights.slots.idle > 0)
    marks_PE = pairs.marks(weights.down.dtype) if weights.has_bias else None
    h_PI, h_TI = weights.grouped(x_TD, pairs, marks_PE, shared > 0)
    weights_TC = weights_TC.to(h_PI.dtype)
    return DownCombine.apply(h_PI, h_TI, aligned(weights.down), weights.down_bias, weights_TC, pairs, marks_PE, shared)


def dense(weights: ExpertWeights, x_TD: Tensor, choices_TC: Tensor, weights_TC: Tensor, shared: float = 0.0) -> Tensor:
    """Every expert on every token, and weights of 0 where it was not chosen: E / K of the arithmetic, any width."""
    y_ETO = AllExpertsDown.apply(weights.of_all(x_TD), weights.down, weights.down_bias)
    if shared:
        gates_TE = y_ETO.new_zeros(x_TD.shape[0], weights.num_experts)
        gates_TE[:, -1] = shared
        gates_TE = gates_TE.scatter(1, choices_TC, ((1 - shared) * weights_TC).to(y_ETO.dtype))
    else:
        gates_TE = weights.slots.gates(choices_TC, weights_TC, y_ETO.dtype)
    if not torch.is_grad_enabled():
        return (gates_TE[:, None] @ y_ETO.transpose(0, 1))[:, 0]
    return (y_ETO * gates_TE.t()[:, :, None]).sum(0)


def one_token(
    weights: ExpertWeights, x_1D: Tensor, choices_1C: Tensor, weights_1C: Tensor, shared: float = 0.0
) -> Tensor:
    """A single token without gradients, as in interactive decoding: no sort and no dispatch."""
    selected_1K, weights_1K = _with_shared(weights, choices_1C, weights_1C, shared)
    if x_1D.device.type == "cpu":
        return _one_token_on_cpu(weights, x_1D, selected_1K, weights_1K)
    chosen_bytes = selected_1K.numel() * sum(matrix[0].nbytes for matrix in weights.matrices)
    if chosen_bytes > COPIED_WEIGHT_BYTES and weights.fit_grouped_mm() and x_1D.dtype == torch.bfloat16:
        return grouped(weights, x_1D, choices_1C, weights_1C, shared)
    chosen_K = selected_1K[0].clamp(max=weights.num_experts - 1) if weights.slots.idle else selected_1K[0]
    y_K1O = chosen_linear(weights.of_chosen(x_1D, chosen_K), weights.down, weights.down_bias, chosen_K)
    return weights_1K.to(y_K1O.dtype) @ y_K1O[:, 0]


def chosen_linear(x_K1H: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, chosen_K: Tensor) -> Tensor:
    """A row for each of some experts through theirs, [K, 1, M]; copies their matrices."""
    weight_KHM = weight_EMH.index_select(0, chosen_K).transpose(1, 2)
    if bias_EM is None:
        return torch.bmm(x_K1H, weight_KHM)
    return torch.baddbmm(bias_EM.index_select(0, chosen_K)[:, None], x_K1H, weight_KHM)


def linear_of(x_TH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, expert: int) -> Tensor:
    """Through one expert's matrix where it lies."""
    return F.linear(x_TH, weight_EMH[expert], None if bias_EM is None else bias_EM[expert])


def _one_token_on_cpu(weights: ExpertWeights, x_1D: Tensor, selected_1K: Tensor, weights_1K: Tensor) -> Tensor:
    """Products with the packed weights where they lie; a CPU waits for nothing when it reads the choices."""
    outputs = []
    for expert in selected_1K[0].tolist():
        if expert == weights.num_experts:
            outputs.append(x_1D.new_zeros(1, weights.down.shape[1]))
            continue
        outputs.append(linear_of(weights.of_one(x_1D, expert), weights.down, weights.down_bias, expert))
    return weights_1K.to(x_1D.dtype) @ torch.cat(outputs)


FUNCTIONS: dict[str, Function] = {"eager": eager, "grouped_mm": grouped, "dense": dense}


def _of_transformers(name: str) -> Function:
    """transformers' function of that name, with an error of one line where its kernel cannot be had."""
    if name not in ALL_EXPERTS_FUNCTIONS:
        raise UserError(f"experts_implementation: found {name!r}, which this version of transformers does not have")
    function = ALL_EXPERTS_FUNCTIONS[name]

    def run(
        weights: ExpertWeights, x_TD: Tensor, choices_TC: Tensor, weights_TC: Tensor, shared: float = 0.0
    ) -> Tensor:
        if weights.down.shape[1] != x_TD.shape[1]:
            raise UserError(
                f"experts_implementation: {name!r} needs experts whose output is as wide as their input, found "
                f"{x_TD.shape[1]} in and {weights.down.shape[1]} out; use 'auto'"
            )
        if name == "deepgemm" and torch.is_grad_enabled() and weights.down.requires_grad:
            raise UserError("experts_implementation: 'deepgemm' has no gradients; use 'auto' for training")
        selected_TK, weights_TK = _with_shared(weights, choices_TC, weights_TC, shared)
        if weights.slots.idle:  # its functions know of no choice without an expert
            selected_TK = selected_TK.clamp(max=weights.num_experts - 1)
        try:
            return function(weights, x_TD, selected_TK, weights_TK)
        except (ImportError, ValueError) as error:
            raise _cannot_run(name, error) from error

    return run


def check_kernel(name: str) -> None:
    """Refuse an implementation of transformers' whose kernel this machine cannot load, before a model is built.

    Raises:
        UserError: with what the kernel needs.
    """
    try:
        if name == "sonicmoe":
            is_sonicmoe_loadable(raise_error=True)
        elif name == "deepgemm":
            is_deepgemm_loadable(raise_error=True)
    except ImportError as error:
        raise _cannot_run(name, error) from error


def _cannot_run(name: str, error: Exception) -> UserError:
    return UserError(f"experts_implementation: {name!r} cannot run here: {error}")
