"""A competition that keeps little for its backward pass and computes the rest again there, in chunks of tokens.

One autograd node with a loop in it rather than a checkpoint for each chunk: a GPU's host would launch three times as
many kernels, for the weights' gradients would be added up outside of the products, and every chunk's small tensors made
one by one. Gradients of the weights are added up over chunks in the weights' dtype. Suffixes as in `all_experts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from llava_compete.moe.all_experts import all_experts_down, all_experts_up, down_input_gradient
from llava_compete.moe.competition import pick_winners, pick_winners_backward, winners_rows


class Recomputation(NamedTuple):
    """activate: pre-activations [T, E, M] to hidden states [T, E, I]; `draws`: whether it draws random numbers."""

    activate: Callable[[Tensor], Tensor]
    draws: bool
    affinity: str
    num_winners: int
    chunk_tokens: int
    keeps_pre_activations: bool


class RecomputedContest(torch.autograd.Function):
    """Tokens x [T, D] through all experts -> the fields of `Picked`. Kept: x, and the pre-activations if so wished."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        up_EMD: Tensor,
        up_bias_EM: Tensor | None,
        down_EOI: Tensor,
        down_bias_EO: Tensor | None,
        how: Recomputation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.how = how
        ctx.random_state = _random_state(x_TD) if how.draws else None
        up_TEM = all_experts_up(x_TD, up_EMD, up_bias_EM) if how.keeps_pre_activations else None
        picked = []
        for tokens in chunks(len(x_TD), how.chunk_tokens):
            chunk_up_TEM = all_experts_up(x_TD[tokens], up_EMD, up_bias_EM) if up_TEM is None else up_TEM[tokens]
            y_ETO = all_experts_down(how.activate(chunk_up_TEM), down_EOI, down_bias_EO)
            picked.append(pick_winners(y_ETO, how.affinity, how.num_winners))
        affinity_TE, winners_TK, won_TKO = (torch.cat(column) for column in zip(*picked, strict=True))
        ctx.save_for_backward(x_TD, up_EMD, up_bias_EM, down_EOI, down_bias_EO, up_TEM, affinity_TE, winners_TK)
        ctx.mark_non_differentiable(winners_TK)
        return affinity_TE, winners_TK, won_TKO

    @staticmethod
    def backward(ctx: Any, grad_affinity_TE: Tensor, _: Tensor, grad_won_TKO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_EMD, up_bias_EM, down_EOI, down_bias_EO, up_TEM, affinity_TE, winners_TK = ctx.saved_tensors
        how: Recomputation = ctx.how
        x_wanted, up_wanted, up_bias_wanted, down_wanted, down_bias_wanted, _ = ctx.needs_input_grad
        up_FD = up_EMD.flatten(0, 1)
        grad_x_TD = torch.empty_like(x_TD) if x_wanted else None
        grad_up_FD = torch.empty_like(up_FD) if up_wanted else None
        grad_down_EOI = torch.empty_like(down_EOI) if down_wanted else None
        grad_up_bias_EM = torch.zeros_like(up_bias_EM) if up_bias_wanted else None
        grad_down_bias_EO = torch.zeros_like(down_bias_EO) if down_bias_wanted else None
        with _replayed(ctx.random_state):
            for tokens in chunks(len(x_TD), how.chunk_tokens):
                kept = 0 if tokens.start == 0 else 1  # how much of a gradient's memory counts: at first it holds noise
                x_CD, rows_CK = x_TD[tokens], winners_rows(winners_TK[tokens])
                up_CEM = all_experts_up(x_CD, up_EMD, up_bias_EM) if up_TEM is None else up_TEM[tokens]
                with torch.enable_grad():
                    up_CEM = up_CEM.detach().requires_grad_()
                    h_CEI = how.activate(up_CEM)
                y_ECO = all_experts_down(h_CEI.detach(), down_EOI, down_bias_EO)
                grads = (grad_affinity_TE[tokens], grad_won_TKO[tokens])
                grad_y_ECO = pick_winners_backward(y_ECO, how.affinity, affinity_TE[tokens], rows_CK, *grads)
                del y_ECO
                if grad_down_EOI is not None:
                    h_ECI = h_CEI.detach().transpose(0, 1)
                    torch.baddbmm(grad_down_EOI, grad_y_ECO.transpose(1, 2), h_ECI, beta=kept, out=grad_down_EOI)
                if grad_down_bias_EO is not None:
                    grad_down_bias_EO += grad_y_ECO.sum(1)
                (grad_up_CEM,) = torch.autograd.grad(h_CEI, up_CEM, down_input_gradient(grad_y_ECO, down_EOI))
                grad_up_CF = grad_up_CEM.flatten(1)
                if grad_up_bias_EM is not None:
                    grad_up_bias_EM += grad_up_CEM.sum(0)
                if grad_up_FD is not None:
                    torch.addmm(grad_up_FD, grad_up_CF.t(), x_CD, beta=kept, out=grad_up_FD)
                if grad_x_TD is not None:
                    torch.mm(grad_up_CF, up_FD, out=grad_x_TD[tokens])
        grad_up_EMD = None if grad_up_FD is None else grad_up_FD.view_as(up_EMD)
        return grad_x_TD, grad_up_EMD, grad_up_bias_EM, grad_down_EOI, grad_down_bias_EO, None


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """At least one, of no tokens where there are none."""
    return (slice(start, start + chunk_tokens) for start in range(0, max(num_tokens, 1), chunk_tokens))


def _random_state(x: Tensor) -> Any:
    return torch.get_rng_state(), x.device.type, *get_device_states(x)


@contextmanager
def _replayed(state: Any) -> Iterator[None]:
    """The generators as they were; afterwards as they are now."""
    if state is None:
        yield
        return
    of_cpu, device_type, devices, states = state
    with torch.random.fork_rng(devices, device_type="cuda" if device_type == "cpu" else device_type):
        torch.set_rng_state(of_cpu)
        set_device_states(devices, states)
        yield
