"""Weights where DeepSpeed lays them: all parameters end to end in one flat buffer, so that what stands behind a router
of an odd size begins between multiples of 16 bytes. A GPU's grouped product refuses such rows; a CPU's takes them, so a
dispatch mode refuses them here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from llava_compete.moe import judged
from llava_compete.moe.block import SparseMoeBlock

BYTES = 16
SIZES = {"hidden_size": 16, "intermediate_size": 32, "output_size": 24}
COSINE = ("xmoe", "perturbed_cosine")
GATED = {**SIZES, "gated": True, "bias": False, "activation": "silu"}


class AlignedProducts(TorchDispatchMode):
    """Raises where a row of a grouped product begins elsewhere than at a multiple of 16 bytes; counts the products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_grouped_mm":
            self.count += 1
            for matrix in args[:2]:
                starts = (matrix.storage_offset(), *(stride for stride in matrix.stride() if stride != 1))
                assert not any(start * matrix.element_size() % BYTES for start in starts), (starts, matrix.dtype)
        return func(*args, **(kwargs or {}))


def end_to_end(block: SparseMoeBlock) -> SparseMoeBlock:
    """As ZeRO-1 and 2 do it, by the same functions of torch."""
    parameters = list(block.parameters())
    flat = _flatten_dense_tensors([parameter.detach() for parameter in parameters])
    for parameter, place in zip(parameters, _unflatten_dense_tensors(flat, parameters), strict=True):
        parameter.data = place
    return block


def with_odd_parameter(block: SparseMoeBlock) -> SparseMoeBlock:
    """One element more before the experts, as another module's would be."""
    block.router.register_parameter("odd", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    return block


def is_between(tensor: Tensor) -> bool:
    return tensor.storage_offset() * tensor.element_size() % BYTES > 0


@pytest.mark.parametrize("sizes", [SIZES, GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("router", [*COSINE, "shared_softmax", "tc_moe", "moe_plus_plus", "autonomy"])
def test_rows_of_grouped_products_are_aligned_wherever_the_weights_lie(router: str, sizes: dict[str, Any]) -> None:
    def block() -> SparseMoeBlock:
        # E = 2 mod 4: a cosine router has 3 x 16 + 6 x 3 elements, 36 bytes beyond a multiple of 16 in bfloat16.
        config = {"router": router, "num_experts": 6, "num_experts_per_tok": 3, "sizes": sizes}
        made = make_block(experts_implementation="grouped_mm", **config)
        return (made if router in COSINE else with_odd_parameter(made)).bfloat16()

    x = torch.randn(2, 9, 16).bfloat16()
    laid = end_to_end(block())
    assert any(is_between(parameter) for parameter in laid.experts.parameters() if parameter.ndim == 3)
    with AlignedProducts() as products:
        found = run_step(laid, x)
    assert products.count >= 6, "two products forwards, four backwards"
    expected = run_step(block(), x)
    torch.testing.assert_close(found.output, expected.output)
    as_float = [{name: grad.float() for name, grad in step.grads.items()} for step in (found, expected)]
    assert largest_error(*as_float) < 0.01


def test_so_are_those_of_the_losss_judgement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "is_gpu", lambda _: True)
    block = make_block(num_experts=6, competition_judge="loss", experts_implementation="grouped_mm", sizes=GATED)
    block = end_to_end(with_odd_parameter(block).bfloat16())
    with AlignedProducts() as products:
        run_step(block, torch.randn(2, 9, 16).bfloat16())
    assert products.count >= 8


def test_a_row_elsewhere_would_be_seen() -> None:
    weight = torch.zeros(2 * 16 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 16, 16)
    with AlignedProducts(), pytest.raises(AssertionError):
        torch.nn.functional.grouped_mm(
            torch.zeros(4, 16, dtype=torch.bfloat16), weight, offs=torch.tensor([2, 4], dtype=torch.int32)
        )
