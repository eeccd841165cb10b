"""Running means that answer in the place of experts, against slow_judged.py in float64, and what must not move them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import largest_error, run_step
from slow_judged import SlowMeans, block_output, judgement, make_expert
from test_judged import GATED, MASK, X, doubles, judged_block
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.state import TokenGroups

MEAN = {"competition_answers": "mean"}
BOTH = {"competition_answers": "both", "competition_margin": 0.7}
RULES: list[dict[str, Any]] = [
    MEAN,
    {**MEAN, "competition_baseline": "none", "competition_chunk_tokens": 4},
    BOTH,
    {**BOTH, "competition_contenders": 1, "competition_chunk_tokens": 5},
]
SIZES = [{"output_size": 9}, GATED, {**GATED, "bias": True}]
STEPS = [X, X.flip(0) * 1.3, X - 0.5]


def without_expert_4(block: SparseMoeBlock, x: Tensor) -> Tensor:
    """MASK without the tokens that choose it."""
    with torch.no_grad():
        chosen = block.router(x.flatten(0, 1)).selected_experts_TK == 4
    return MASK * ~chosen.any(-1).view(MASK.shape)


def slow_expert(block: SparseMoeBlock) -> Any:
    packed = {name: parameter.detach().double() for name, parameter in block.experts.named_parameters()}
    return make_expert(packed, block.experts.activation, block.experts.has_gate)


def hear(slow: SlowMeans, block: SparseMoeBlock, x: Tensor, mask: Tensor) -> None:
    for token, counts in zip(x.double().flatten(0, 1), mask.flatten(), strict=True):
        if counts:
            slow.hear(slow_expert(block), block.router.weight.detach().double() @ token, token, 2)


def end_step(block: SparseMoeBlock) -> None:
    block.experts.answer_means.end_step(block.state.answers[block.name])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=["plain", "gated", "both"])
def test_means_and_gradients_equal_the_slow_version(rule: dict[str, Any], sizes: dict[str, Any]) -> None:
    block, slow = judged_block(sizes, **rule), SlowMeans()
    expert, asks = slow_expert(block), rule["competition_answers"] == "both"
    for number, x in enumerate(STEPS):
        mask = MASK if number == 2 else without_expert_4(block, x)
        router = block.router.weight.detach().double().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for token, counts in zip(x.double().flatten(0, 1), mask.flatten(), strict=True):
            logits = router @ token
            output = block_output(expert, logits, token, 2)
            loss = output.square().sum() * counts / mask.numel()
            (grad,) = torch.autograd.grad(loss, output, retain_graph=True)
            how: dict[str, Any] = {"baseline": "competition_baseline" not in rule, "asks": asks, "means": slow.means}
            how |= {"margin": rule.get("competition_margin", 0.0), "contenders": rule.get("competition_contenders")}
            total = total + loss + judgement(expert, logits, token, grad, 2, **how)
        (expected,) = torch.autograd.grad(total, router)
        step = run_step(block, x, mask)
        assert largest_error({"w": step.grads["router.weight"].double()}, {"w": expected}) < 2e-5
        hear(slow, block, x, mask)
        slow.end_step()
        end_step(block)
        means = block.experts.answer_means
        assert means.mean_EO is not None
        assert means.seen_E is not None
        assert means.seen_E.tolist() == [e in slow.means for e in range(5)]
        assert bool(means.seen_E[4]) == (number == 2)
        assert int(means.seen_E.sum()) >= 3
        for e, mean in slow.means.items():
            torch.testing.assert_close(means.mean_EO[e].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["grouped_mm", "dense"])
def test_every_kernel_is_heard_alike(kernel: str) -> None:
    block = judged_block(**MEAN)
    run_step(block, X, MASK)
    expected = block.state.answers[block.name]
    block.experts.implementation = kernel
    run_step(block, X, MASK)
    torch.testing.assert_close(block.state.answers[block.name], expected, rtol=1e-5, atol=1e-5)


def test_only_tokens_that_count_are_heard_and_once() -> None:
    """Not in a recomputation, not padding, no dummy image, nothing in evaluation; micro-batches add up."""
    block = judged_block(**MEAN)
    run_step(block, X, MASK)
    whole = block.state.answers[block.name]
    assert float(whole[:, -1].sum()) == 2 * float(MASK.sum())
    changed = torch.where(MASK[..., None] == 0, torch.full_like(X, 3.0), X)
    run_step(block, changed, MASK, through=lambda b, x: checkpoint(b, x, use_reentrant=False))
    torch.testing.assert_close(block.state.answers[block.name], whole, rtol=1e-5, atol=1e-6)
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        run_step(block, X[rows], MASK[rows])
        parts.append(block.state.answers[block.name])
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)
    block.state.begin("language", TokenGroups.empty(21))
    with block.state.recording():
        block(X)
    assert not block.state.answers[block.name].any()
    run_step(block.eval(), X, MASK)
    assert not block.state.answers


def test_a_step_judges_by_the_means_of_the_steps_before() -> None:
    """Without any, nobody answers, and the router learns from the task alone; checkpointing changes nothing."""
    block = judged_block(**MEAN)
    task = judged_block(competition_answers="full", competition_rate=0.0)
    first = run_step(block, X, MASK).grads
    assert largest_error(first, run_step(task, X, MASK).grads) == 0
    end_step(block)
    second = run_step(block, X, MASK).grads
    assert largest_error({"w": second["router.weight"]}, {"w": first["router.weight"]}) > 0.01
    again = run_step(block, X, MASK, through=lambda b, x: checkpoint(b, x, use_reentrant=False)).grads
    assert largest_error(again, second) == 0


def test_means_are_no_weights_and_stay_float32() -> None:
    block = judged_block(**BOTH)
    run_step(block, X, MASK)
    end_step(block)
    assert not any("mean" in name for name in block.state_dict())
    state = block.bfloat16().experts.answer_means.state()
    assert {name: tensor.dtype for name, tensor in state.items()} == {"mean": torch.float32, "seen": torch.bool}
    twin = judged_block(**BOTH).bfloat16()
    twin.experts.answer_means.load(state)
    grads = [run_step(each, X.bfloat16(), MASK).grads for each in (block, twin)]
    assert largest_error(doubles(grads[0]), doubles(grads[1])) == 0
