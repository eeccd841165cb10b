"""What a gated MLP makes of gate and value side by side, [..., 2 I]: act(gate) * value, [..., I].

Autograd would join the gradients of both halves by a copy of their size, 5% of a CPU's step; here each half is written
where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SILU = ("silu", "swish")


def gated_product(gate_up: Tensor, act_fn: Callable[[Tensor], Tensor], activation: str) -> Tensor:
    """`act_fn` is the function that transformers knows as `activation`."""
    # torch.compile writes no half of a tensor in place, and needs no help to leave the copy out.
    if activation in SILU and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SiluProduct.apply(gate_up, act_fn)
    gate, value = gate_up.chunk(2, dim=-1)
    return act_fn(gate) * value


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, act_fn: Callable[[Tensor], Tensor]) -> Tensor:
        gate, value = gate_up.detach().chunk(2, dim=-1)  # what hooks of a module expect where nothing is recorded
        active = act_fn(gate)
        ctx.save_for_backward(gate_up, active)
        return active * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gate_up, active = ctx.saved_tensors
        gate, value = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        of_gate, of_value = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, active, out=of_value)
        torch.mul(grad, value, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return grad_gate_up, None
