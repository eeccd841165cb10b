"""Routers' products are float32's to the bit, and keep tokens in the dtype that they came in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_kit import make_block
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from llava_compete.moe.precision import float32_linear
from llava_compete.moe.terms import ROUTERS


def gradients(product: Any, x: Tensor, weight: Tensor, wanted: str) -> list[Tensor]:
    """Output, gradients of those wanted, and gradients of a gradient's size."""
    leaves = {"x": x.clone(), "weight": weight.clone()}
    inputs = [leaves[name].requires_grad_() for name in wanted.split()]
    output = product(*leaves.values())
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first = torch.autograd.grad(output, inputs, cotangent, create_graph=True)
    size = sum(gradient.float().square().sum() for gradient in first)
    return [output, *first, *torch.autograd.grad(size, [*inputs, cotangent], allow_unused=True)]


@pytest.mark.parametrize("wanted", ["x weight", "x", "weight"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_products_and_gradients_are_those_of_a_float32_copy(
    dtypes: tuple[torch.dtype, torch.dtype], wanted: str
) -> None:
    x, weight = torch.randn(33, 24).to(dtypes[0]), torch.randn(5, 24).to(dtypes[1])
    ours = gradients(float32_linear, x, weight, wanted)
    theirs = gradients(lambda x, weight: F.linear(x.float(), weight.float()), x, weight, wanted)
    for found, expected in zip(ours, theirs, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or (found.dtype == expected.dtype and torch.equal(found, expected))


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_keeps_its_tokens_once_and_in_their_own_dtype(router: str) -> None:
    width, tokens = 512, 64
    block = make_block(router=router, sizes={"hidden_size": width}).bfloat16()
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda t: t):
        routing = block.router(x)
        if block.router.free_experts is not None:
            block.router.free_experts(x, routing.choices_TC, routing.weights_TC)
    of_tokens = [tensor for tensor in kept.values() if tensor.shape[:1] == (tokens,)]
    wide = [tensor for tensor in of_tokens if tensor.numel() >= tokens * width]
    # Autonomy's first half has the width of the experts, and is theirs.
    assert [tensor.data_ptr() for tensor in wide] == [x.data_ptr()]


@pytest.mark.slow
@pytest.mark.parametrize("router", ["softmax", "xmoe", "moe_plus_plus"])
def test_a_router_in_bfloat16_compiles_whole_and_learns_the_same(router: str) -> None:
    torch._dynamo.reset()
    block = make_block(router=router).bfloat16()
    x = torch.randn(9, 12, dtype=torch.bfloat16)
    steps = []
    for run in (block.router, torch.compile(block.router, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        routing = run(leaf)
        (routing.weights_TC[:, 0].sum() + routing.logits_TR.square().sum()).backward()
        steps.append([routing.logits_TR, leaf.grad, *(p.grad for p in block.router.parameters() if p.grad is not None)])
    for found, expected in zip(*steps, strict=True):
        torch.testing.assert_close(found, expected)
