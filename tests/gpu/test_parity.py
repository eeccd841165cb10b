"""Every router and both steps on the device, in float32 and bfloat16, against the slow version in float64 on the CPU.

Weights and inputs are numbers that bfloat16 holds exactly, and tokens whose choice hangs on rounding are left out, so
that only arithmetic differs. Each test records its largest relative error for scripts/gpu_check.sh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block
from slow_moe import AFFINITIES, expert, forward, route, route_ternary
from torch import Tensor, nn
from transformers.activations import ACT2FN

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.state import TokenGroups
from llava_compete.moe.terms import ROUTERS

pytestmark = pytest.mark.gpu

WIDTH, HIDDEN, SEQUENCES, LENGTH = 64, 96, 2, 24
CASES = [*((router, False) for router in ROUTERS), ("competition", True)]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
ACTIVATION = "gelu"


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().bfloat16().double()


def _leaves(block: SparseMoeBlock) -> dict[str, Tensor]:
    """The block's parameters under the names of slow_moe.py, float64."""
    names = {"inp_reduction": "inp_reduction.weight"}
    leaves = {f"experts.{name}": parameter for name, parameter in block.experts.named_parameters()}
    leaves |= {f"router.{names.get(name, name)}": parameter for name, parameter in block.router.named_parameters()}
    return {name: _rounded(leaf).requires_grad_() for name, leaf in leaves.items()}


def _clear_tokens(block: SparseMoeBlock, competing: bool, count: int) -> Tensor:
    """Tokens [count, D] whose first choice and whose last are each ahead of the next by 2% of the scores' spread."""
    generator = torch.Generator().manual_seed(1)
    leaves = {name: leaf.detach() for name, leaf in _leaves(block).items()}
    router, chosen = block.config.router, block.config.num_experts_per_tok - block.config.router.startswith("shared")
    tokens: list[Tensor] = []
    while len(tokens) < count:
        x = _rounded(torch.randn(WIDTH, generator=generator))
        if competing:
            outputs = [expert(leaves, index, x, ACT2FN[ACTIVATION]) for index in range(block.config.num_experts)]
            scores = torch.stack([AFFINITIES["softplus"](y) for y in outputs])
        elif router == "tc_moe":  # chooses by its probabilities, for its logits are biased after the product
            scores = route_ternary(leaves, x, chosen)[1].log()
        else:
            scores = route(router, leaves, x, chosen)[0]
        ordered = scores.sort(descending=True).values
        gaps = (ordered[:-1] - ordered[1:])[[0, chosen - 1]]
        if gaps.min() > 0.02 * (ordered[0] - ordered[-1]):
            tokens.append(x)
    return torch.stack(tokens)


def _reference(block: SparseMoeBlock, x: Tensor, mask: Tensor, competing: bool) -> dict[str, Tensor]:
    """Output, auxiliary loss and gradients by the slow version."""
    leaves = _leaves(block)
    x = x.clone().requires_grad_()
    settings = {
        "K": block.config.num_experts_per_tok,
        "activation": ACTIVATION,
        "competing": competing,
        "affinity": "softplus",
        "all_choices": False,
    }
    output, losses = forward(block.config.router, leaves, x, mask, settings)
    coefs = block.config.loss_coefs(competing)
    aux_loss = torch.stack([coef * losses[name] for name, coef in coefs.items()]).sum()
    _objective(output, aux_loss).backward()
    grads = {name.replace("inp_reduction.weight", "inp_reduction"): leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), "aux_loss": aux_loss.detach(), "grad x": x.grad, **_named(grads)}


def _on_device(block: SparseMoeBlock, x: Tensor, mask: Tensor, competing: bool, dtype: torch.dtype) -> dict[str, Any]:
    device = next(block.parameters()).device
    state = block.state
    state.competition_enabled, state.competing = True, frozenset({block.name} if competing else ())
    x = x.to(device, dtype).requires_grad_()
    state.begin("language", TokenGroups.from_mask(mask.to(device)))
    with state.recording():
        output = block(x)
    aux_loss = state.records[block.name].aux_loss
    _objective(output, aux_loss).backward()
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    found = {"output": output.detach(), "aux_loss": aux_loss.detach(), "grad x": x.grad, **_named(grads)}
    return {name: tensor.cpu().double() for name, tensor in found.items()}


def _objective(output: Tensor, aux_loss: Tensor) -> Tensor:
    """Large enough an auxiliary loss that an error in it shows in every gradient."""
    return output.to(aux_loss.dtype).square().sum(-1).mean() + 100 * aux_loss


def _named(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"grad {name}": grad for name, grad in grads.items()}


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("router", "competing"), CASES)
def test_a_step_equals_float64_on_the_cpu(
    device: torch.device,
    record_property: Callable[[str, object], None],
    router: str,
    competing: bool,
    dtype: torch.dtype,
) -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "activation": ACTIVATION}
    # K = 3: with 2, a shared router's one routed choice has weight 1 and no gradient.
    block = make_block(router=router, num_experts_per_tok=3, sizes=sizes)
    x = _clear_tokens(block, competing, SEQUENCES * LENGTH).view(SEQUENCES, LENGTH, WIDTH)
    mask = torch.ones(SEQUENCES, LENGTH)
    mask[1, LENGTH // 2 :] = 0
    expected = _reference(block, x, mask, competing)
    found = _on_device(_placed(block, device, dtype), x, mask, competing, dtype)
    error = largest_error(found, expected)
    record_property("error", error)
    record_property("bound", BOUNDS[dtype])
    assert error < BOUNDS[dtype]


def _placed(block: SparseMoeBlock, device: torch.device, dtype: torch.dtype) -> SparseMoeBlock:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(_rounded(parameter))
    placed: nn.Module = block.to(device, dtype)
    assert isinstance(placed, SparseMoeBlock)
    return placed
