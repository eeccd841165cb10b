"""Routers that choose among more than their experts: what each slot runs, in every implementation."""

from __future__ import annotations

import pytest
import torch
from block_kit import largest_error, make_block, run_step

from llava_compete.moe.slots import Slots

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 16, "intermediate_size": 32}
ROUTERS = ["tc_moe", "moe_plus_plus"]


def test_slots_run_experts_with_signs_or_nothing() -> None:
    slots = Slots(3, negated=True, idle=2)
    choices, weights = torch.tensor([[0, 5, 7], [3, 2, 6]]), torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 4.0]])
    experts, signed = slots.runs(choices, weights)
    assert experts.tolist() == [[0, 2, 3], [0, 2, 3]]
    assert signed.tolist() == [[0.5, -0.25, 0], [-1, 2, 0]]
    assert slots.gates(choices, weights, torch.float64).tolist() == [[0.5, 0, -0.25], [-1, 0, 2]]
    assert slots.runs_something(choices, weights)[0].tolist() == [[0, 2, 2], [0, 2, 2]]
    plain = Slots(3)
    assert plain.runs(choices, weights)[0] is choices


def steered(router: str, implementation: str, gated: bool = False):
    """A block whose tokens use all kinds of slots: TC-MoE's null slots are rare by their bias."""
    sizes = {**SIZES, "gated": gated, "activation": "silu"}
    block = make_block(
        router=router, num_experts=5, num_experts_per_tok=3, experts_implementation=implementation, sizes=sizes
    )
    if router == "tc_moe":
        with torch.no_grad():
            block.router.weight[-3:] *= 4
            block.router.weight *= 3
    return block


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("gated", [False, True])
def test_implementations_agree(router: str, gated: bool) -> None:
    expected = run_step(steered(router, "eager", gated), X)
    slots, used = steered(router, "eager").router.slots, expected.record.observation.used_TK
    kinds = {"an expert": used < 5, "nothing": used >= slots.first_idle}
    if slots.negated:
        kinds["subtracted"] = (used >= 5) & (used < slots.first_idle)
        experts = (used % 5).masked_fill(used >= slots.first_idle, -1).sort(-1).values
        assert ((experts[:, 1:] == experts[:, :-1]) & (experts[:, 1:] >= 0)).any(), "one expert with both signs"
    assert all(found.any() for found in kinds.values()), kinds
    for implementation in ("grouped_mm", "dense", "batched_mm"):
        other = run_step(steered(router, implementation, gated), X)
        torch.testing.assert_close(other.output, expected.output)
        assert largest_error(other.grads, expected.grads) < 1e-5, implementation


@pytest.mark.parametrize("router", ROUTERS)
def test_one_token_equals_a_row_of_many(router: str) -> None:
    expected = steered(router, "eager")(X)
    for implementation in ("eager", "grouped_mm"):
        block = steered(router, implementation)
        with torch.no_grad():
            torch.testing.assert_close(block(X), expected)
            for row in range(9):
                torch.testing.assert_close(block(X[:1, row : row + 1]), expected[:1, row : row + 1])


@pytest.mark.parametrize("router", ROUTERS)
def test_loads_are_of_slots_and_weights_of_the_log_too(router: str) -> None:
    block = steered(router, "eager")
    record = run_step(block, X).record
    load = record.metrics.load_E
    assert load.shape == (block.router.slots.total,)
    assert int(load.sum()) == 18 * 3
    assert load.tolist() == record.observation.used_TK.flatten().bincount(minlength=len(load)).tolist()
