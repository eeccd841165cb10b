"""torch.compile of a block: no graph break in a router step, no compiling again, competitions right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step

from llava_compete.moe.terms import ROUTERS

X = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(5))
MASK = torch.ones(3, 7)


@pytest.mark.parametrize(
    ("router", "backend"),
    [
        *((router, "eager") for router in ROUTERS),
        pytest.param("competition", "inductor", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_router_step_compiles_without_a_graph_break(router: str, backend: str) -> None:
    torch._dynamo.reset()
    block = make_block(router=router, sizes={"hidden_size": 16, "intermediate_size": 32})
    x = torch.randn(2, 9, 16)
    exact = run_step(block, x)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    step = run_step(block, x, through=lambda _, x: compiled(x))
    torch.testing.assert_close(step.output, exact.output, rtol=1e-4, atol=1e-5)
    assert largest_error(step.grads, exact.grads) < 1e-4


def test_other_layers_competitions_do_not_compile_a_router_step_again() -> None:
    torch._dynamo.reset()
    block = make_block(sizes={"hidden_size": 16, "intermediate_size": 32})
    for layer in range(12):
        block.state.join(f"language.{layer}")
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer in range(1, 12):

            def step(block: Any, x: torch.Tensor, layer: int = layer) -> torch.Tensor:
                block.state.competing = frozenset({f"language.{layer}"} if layer % 4 else ())
                return compiled(x)

            run_step(block, torch.randn(2, 9, 16), through=step)


def test_own_competition_is_right_in_a_compiled_layer() -> None:
    torch._dynamo.reset()
    block = make_block()
    compiled = torch.compile(block, backend="eager")
    for competing in (False, True, False, True):
        exact = run_step(block, X, MASK, competing)
        step = run_step(block, X, MASK, competing, through=lambda _, x: compiled(x))
        assert largest_error(step.grads, exact.grads) < 1e-5
