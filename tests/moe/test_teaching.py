"""A competition that only teaches (`competition_output: router`): the router step, and a distillation beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from slow_judged import make_expert
from test_judged import MASK, X
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_compete.moe.block import SparseMoeBlock

OUTPUT = {"competition_output": "router"}


def distillation_gradient(block: SparseMoeBlock, affinity: str) -> tuple[Tensor, Tensor]:
    """Of the distillation's two terms, times 100, at the router and at x, by plain autograd in float64."""
    packed = {name: parameter.detach().double() for name, parameter in block.experts.named_parameters()}
    expert = make_expert(packed, block.experts.activation, block.experts.has_gate)
    router, x = block.router.weight.detach().double().requires_grad_(), X.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for sequence, mask in zip(x, MASK, strict=True):
        for token in sequence[mask > 0]:
            outputs = torch.stack([expert(e, token.detach()) for e in range(4)])
            s = torch.nn.functional.softplus(outputs).mean(-1) if affinity == "softplus" else outputs.norm(dim=-1)
            squared = ((router @ token).softmax(0) - s.softmax(0)).square()
            loss = 0.01 * squared.mean() + 0.01 * 0.1 * squared[s.topk(2).indices].mean()
            total = total + 100 * loss / mask.sum() / len(x)
    total.backward()
    return router.grad, x.grad


@pytest.mark.parametrize("affinity", ["softplus", "l2"])
@pytest.mark.parametrize("rule", [{}, {"competition_chunk_tokens": 4}], ids=str)
@pytest.mark.parametrize(
    "sizes", [{"output_size": 9}, {"gated": True, "bias": False, "activation": "silu"}], ids=["plain", "gated"]
)
def test_it_is_the_router_step_and_a_distillation(affinity: str, rule: dict[str, Any], sizes: dict[str, Any]) -> None:
    """No gradient reaches an expert from the competition, and x gets the distillation's through the router alone."""
    block = make_block(sizes=sizes, affinity=affinity, **OUTPUT, **rule)
    plain = make_block(sizes=sizes, router="softmax")
    step, router_step = run_step(block, X, MASK, competing=True), run_step(plain, X, MASK)
    torch.testing.assert_close(step.output, router_step.output, rtol=0, atol=0)
    of_router, of_x = distillation_gradient(block, affinity)
    expected = {**router_step.grads, "router.weight": router_step.grads["router.weight"] + of_router.float()}
    expected["x"] = router_step.grads["x"] + of_x.float()
    assert largest_error(step.grads, expected) < 2e-5
    for name in step.grads:
        if name.startswith("experts"):
            assert torch.equal(step.grads[name], router_step.grads[name])
    again = run_step(block, X, MASK, True, lambda b, x: checkpoint(b, x, use_reentrant=False))
    assert largest_error(again.grads, step.grads) == 0


def test_what_it_records() -> None:
    block = make_block(**OUTPUT)
    record = run_step(block, X, MASK, competing=True).record
    contest = run_step(make_block(), X, MASK, competing=True).record
    router_step = run_step(block, X, MASK).record
    assert record.losses.keys() == {*router_step.losses, "distillation_loss", "winner_distillation_loss"}
    for name in ("distillation_loss", "winner_distillation_loss"):
        torch.testing.assert_close(record.losses[name], contest.losses[name])
    for name, value in router_step.losses.items():
        assert torch.equal(record.losses[name], value)
    coefs = block.config.loss_coefs(competing=True)
    torch.testing.assert_close(record.aux_loss, sum(coefs[name] * value for name, value in record.losses.items()))
    assert torch.equal(record.metrics.load_E, router_step.metrics.load_E), "the experts that ran are the router's"
    torch.testing.assert_close(record.metrics.recall_sum, contest.metrics.recall_sum)


def test_dropout_does_not_reach_the_responses_and_broken_experts_show() -> None:
    sizes = {"hidden_dropout": 0.5}
    dropped, exact = make_block(sizes=sizes, **OUTPUT).train(), make_block(**OUTPUT)
    losses = [run_step(block, X, MASK, competing=True).record.losses for block in (dropped, exact)]
    assert torch.equal(losses[0]["distillation_loss"], losses[1]["distillation_loss"])
    with torch.no_grad():
        exact.experts.down_proj[3, 0, 0] = float("inf")
    assert not run_step(exact, X, MASK, competing=True).record.aux_loss.isfinite()


def test_evaluation_by_competition_still_takes_the_winners() -> None:
    taught, papers = make_block(**OUTPUT).eval(), make_block().eval()
    ours, theirs = (run_step(block, X, MASK, competing=True) for block in (taught, papers))
    assert torch.equal(ours.output, theirs.output)
    assert not torch.equal(ours.output, run_step(taught, X, MASK).output)
