"""Sizes of the gradients at the router's logits by source, against gradients of each source alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from slow_judged import asked
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.gradients import RouterGradients
from llava_compete.moe.terms import ROUTERS

# One sequence of orthonormal tokens: the squares of the gradient at W x add up to those of the gradient at W.
X = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3))).Q[None]
MASK = torch.ones(1, 12)
MASK[0, 9:] = 0
OFF = {"balance_coef": 0.0, "router_z_coef": 0.0}
NO_DISTILLATION = {**OFF, "distillation_coef": 0.0, "competition_output": "router"}
JUDGED = {"competition_judge": "loss", "competition_margin": 0.0}


def at_router(competing: bool = False, **config: Any) -> Tensor:
    return run_step(make_block(**config), X, MASK, competing).grads["router.weight"]


def measured(block: SparseMoeBlock, competing: bool = False, through: Any = None) -> tuple[dict[str, float], Any]:
    """Sums of squares by source, and the step."""
    block.state.gradients = gradients = RouterGradients()
    step = run_step(block, X, MASK, competing, through)
    block.state.gradients = None
    assert all(layer == block.name for _, layer in gradients.sums)
    assert all(float(tokens) == 9 for _, tokens in gradients.sums.values())
    return {source: float(squares) for (source, _), (squares, _) in gradients.sums.items()}, step


def test_each_source_is_what_it_is_alone() -> None:
    task = at_router(router="softmax", **OFF)
    expected = {
        "task": task,
        "balance": at_router(router="softmax", balance_coef=0.01, router_z_coef=0.0) - task,
        "z": at_router(router="softmax", balance_coef=0.0, router_z_coef=0.001) - task,
    }
    judge = at_router(**JUDGED, **OFF) - task
    distillation = at_router(True, **{**NO_DISTILLATION, "distillation_coef": 0.01}) - task
    for rule, competing, more in (
        ({"router": "softmax"}, False, {}),
        (JUDGED, False, {"judge": judge}),
        ({"competition_output": "router"}, True, {"distillation": distillation}),
    ):
        sums, _ = measured(make_block(**rule), competing)
        sources = expected | more
        assert sums.keys() == sources.keys()
        for source, gradient in sources.items():
            assert sums[source] == pytest.approx(float(gradient.square().sum()), rel=1e-3), source
    # In the paper's competition step the winners are weighed by their responses, so that nothing but it reaches r.
    assert measured(make_block(), competing=True)[0].keys() == {"distillation"}


@pytest.mark.parametrize("router", ROUTERS)
def test_measuring_changes_no_gradient(router: str) -> None:
    config = {"router": router, "num_experts_per_tok": 3}
    sums, step = measured(make_block(**config))
    assert sums.keys() == {"task", "balance", "z"}
    expected = run_step(make_block(**config), X, MASK)
    assert torch.equal(step.output, expected.output)
    assert largest_error(step.grads, expected.grads) < 1e-6
    again, recomputed = measured(make_block(**config), through=lambda b, x: checkpoint(b, x, use_reentrant=False))
    assert again == pytest.approx(sums)
    assert largest_error(recomputed.grads, step.grads) < 1e-6


def test_the_log_says_who_was_asked_and_how_even_the_responses_were() -> None:
    summary = run_step(make_block(**JUDGED), X, MASK).record.metrics.summary()
    assert (summary["asked_share"], summary["response_entropy"]) == (1, None)
    some = {**JUDGED, "num_experts": 5, "competition_margin": 0.9}
    block = make_block(**some)
    asks = [asked(block.router.weight.detach() @ token, 2, 0.9, None) for token in X[0, :9]]
    found = run_step(block, X, MASK).record.metrics.summary()["asked_share"]
    assert found == pytest.approx(sum(map(len, asks)) / 27)
    assert 0 < found < 1
    means = run_step(make_block(**{**JUDGED, "competition_margin": None, "competition_answers": "mean"}), X, MASK)
    assert means.record.metrics.summary()["asked_share"] == 0
    assert run_step(block.eval(), X, MASK).record.metrics.summary()["asked_share"] is None
    contest = run_step(make_block(), X, MASK, competing=True).record
    affinity = contest.contest.affinity_TE.detach()[:9].double().softmax(-1)
    expected = float(-(affinity * affinity.log()).sum(-1).mean())
    assert contest.metrics.summary()["response_entropy"] == pytest.approx(expected, rel=1e-4)


def test_micro_batches_add_up_and_the_losss_scale_is_taken_out() -> None:
    gradients = RouterGradients()
    total, counted = torch.zeros(()), torch.tensor([1.0, 1.0, 0.0])
    for logits in (torch.randn(3, 4), torch.randn(3, 4)):
        view = gradients.view(logits.requires_grad_(), "task", "language.0", counted)
        (8 * gradients.loss(view.square().sum())).backward()
        total += (2 * logits.detach()[:2]).square().sum()
    (root,) = gradients.roots(gradients.sums).values()
    torch.testing.assert_close(root, (total / 4).sqrt())
