"""What blocks share: the state of a recomputation is its forward's, copies leave graphs behind, shares of a mean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.losses import balance_loss, router_z_loss
from llava_compete.moe.state import TokenGroups
from llava_compete.moe.terms import ROUTERS

MASKS = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]])


def two_forwards_one_backward(block: SparseMoeBlock, contexts: Any, times: int = 1) -> dict[str, Tensor]:
    """Gradients of a competition on one batch and a router step on another, of as many tokens, then one backward."""
    state, loss = block.state, torch.zeros(())
    state.competition_enabled = True
    block.zero_grad()
    for mask, competing in zip(MASKS, [{block.name}, set()], strict=True):
        x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(int(mask.sum()))).requires_grad_()
        state.begin("language", TokenGroups.from_mask(mask))
        state.competing = frozenset(competing)
        with state.recording():
            y = checkpoint(block, x, use_reentrant=False, context_fn=contexts) if contexts else block(x)
        loss = loss + y.square().mean() + 100 * state.records[block.name].aux_loss
    for _ in range(times):
        loss.backward(retain_graph=True)
    assert not state.competing
    return {name: parameter.grad / times for name, parameter in block.named_parameters()}


@pytest.mark.parametrize("times", [1, 2])
def test_two_forwards_before_one_backward_with_checkpointing(times: int) -> None:
    block = make_block(router="competition")
    expected = two_forwards_one_backward(block, None)
    found = two_forwards_one_backward(block, block.state.checkpoint_contexts, times)
    assert largest_error(found, expected) < 1e-6


def test_a_model_can_be_copied_after_a_step() -> None:
    block = make_block(router="competition")
    x = torch.randn(2, 4, 12)
    step = run_step(block, x, competing=True)
    twin = copy.deepcopy(block)
    assert twin.state is not block.state
    assert twin.state.competing == {block.name}
    assert twin.state.records == {}
    twin.state.competing = frozenset()
    assert block.state.competing == {block.name}
    assert largest_error(run_step(twin, x, competing=True).grads, step.grads) == 0


@pytest.mark.parametrize("competing", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_tokens(router: str, competing: bool) -> None:
    step = run_step(make_block(router=router, num_experts_per_tok=3), torch.zeros(2, 0, 12), competing=competing)
    assert step.output.shape == (2, 0, 12)
    assert all(float(value.detach()) == 0 for value in step.record.losses.values())
    assert all(torch.isfinite(grad).all() for grad in step.grads.values())


def test_unequal_shares_of_sequences() -> None:
    """A mean over sequences in which the first has a share of 1/4 and the second of 3/4, and cuts of it."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(8, 4, generator=generator).softmax(-1)
    choices, shares = probs.topk(2).indices, torch.tensor([[0.25], [0.75]])
    groups = TokenGroups.from_mask(MASKS[0], 1 / shares)
    alone = [TokenGroups.from_mask(mask[None], 1) for mask in MASKS[0]]
    for loss, first, second in ((balance_loss, probs, choices), (router_z_loss, probs.log(), None)):
        whole = loss(first, second, groups) if second is not None else loss(first, groups)
        parts = []
        for index, group in enumerate(alone):
            rows = slice(4 * index, 4 * index + 4)
            parts.append(loss(first[rows], second[rows], group) if second is not None else loss(first[rows], group))
        torch.testing.assert_close(whole, 0.25 * parts[0] + 0.75 * parts[1])
