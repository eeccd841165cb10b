"""The gated product and its gradients are autograd's to the bit, without a copy that joins the halves' gradients."""

from __future__ import annotations

import pytest
import torch
from operator_kit import OperatorCounts
from transformers.activations import ACT2FN

from llava_compete.moe.gated import gated_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "swish", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 24)])
def test_product_and_gradient_are_autograds(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    act_fn = ACT2FN[activation]
    x, grad = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 12).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    product = gated_product(ours, act_fn, activation)
    gate, value = theirs.chunk(2, dim=-1)
    expected = act_fn(gate) * value
    with OperatorCounts() as operators:
        product.backward(grad)
    expected.backward(grad)
    assert torch.equal(product, expected)
    assert torch.equal(ours.grad, theirs.grad)
    assert operators.counts["cat"] == (activation == "gelu_pytorch_tanh")
