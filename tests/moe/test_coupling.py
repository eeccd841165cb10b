"""The expert-router coupling loss against loops over experts in float64, with every router, in both kinds of step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from operator_kit import Operators
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_compete.moe.config import MoeConfig
from llava_compete.moe.coupling import coupling_loss, proxies
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.state import TokenGroups
from llava_compete.moe.terms import ROUTERS

X = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(4))
NOISE = 2 * torch.rand(4, 12, generator=torch.Generator().manual_seed(6)) - 1


def slow_coupling(rows: Tensor, noise: Tensor, first: Tensor, alpha: float) -> Tensor:
    """From the paper's equations 1 to 3: `first` [n, I, D] is each expert's first projection."""
    count, total = len(rows), torch.zeros((), dtype=rows.dtype)
    moved = []
    for i in range(count):
        nearest = min(float((rows[i] - rows[j]).detach().norm()) for j in range(count) if j != i)
        moved.append(rows[i] * (1 + nearest / 2 / float(rows[i].detach().norm()) * noise[i]))
    answers = [[(first[j] @ moved[i]).norm() for j in range(count)] for i in range(count)]
    for i in range(count):
        for j in range(count):
            if i != j:
                total = total + (answers[i][j] - alpha * answers[i][i]).clamp(min=0)
                total = total + (answers[j][i] - alpha * answers[i][i]).clamp(min=0)
    return total / count**2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_loss_and_its_gradients(alpha: float, gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, up = torch.randn(4, 6, generator=generator), torch.randn(4, 10, 6, generator=generator)
    noise, num_read = NOISE[:, :6], 5 if gated else 10
    leaves = [tensor.double().requires_grad_() for tensor in (rows, up)]
    expected = slow_coupling(leaves[0], noise.double(), leaves[1][:, :num_read], alpha)
    ours = [tensor.clone().requires_grad_() for tensor in (rows, up)]
    found = coupling_loss(proxies(ours[0], noise), ours[1], num_read, alpha)
    assert float(expected.detach()) > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for grad, theirs in zip(torch.autograd.grad(found, ours), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(grad.double(), theirs, rtol=1e-4, atol=1e-6)


def test_a_proxy_stays_nearer_to_its_row_than_to_any_other() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    moved = proxies(rows, 2 * torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) - 1)
    assert torch.cdist(moved, rows).argmin(-1).tolist() == [0, 1, 2, 3, 4]
    assert not torch.equal(moved, rows)
    assert proxies(rows, None) is rows


def effective_rows(router: str, block: Any) -> Tensor:
    """Of the first routed experts: by what a token is multiplied to give their logits (up to its own length)."""
    parameters = {name: parameter.double() for name, parameter in block.router.named_parameters()}
    if router in ("xmoe", "perturbed_cosine"):
        embeddings = parameters["expert_embeddings"]
        norms = embeddings.detach().norm(dim=1, keepdim=True) + (0.1 if router == "perturbed_cosine" else 0)
        return (1.5 * embeddings / norms) @ parameters["inp_reduction"]
    return parameters["weight"][: 3 if router.startswith("shared") else 4]


@pytest.mark.parametrize(
    ("router", "competing"),
    [*((router, False) for router in ROUTERS if ROUTER_CLASSES[router].has_rows), ("competition", True)],
)
def test_with_every_router(router: str, competing: bool) -> None:
    config = {"router": router, "num_experts_per_tok": 3}
    block = make_block(**config, coupling_coef=0.3, coupling_alpha=0.9)
    rows = effective_rows(router, block)
    block.state.noise[block.name] = noise = NOISE[: len(rows)]
    step = run_step(block, X, competing=competing)
    up = block.experts.up_proj.double()[: len(rows)]
    expected = slow_coupling(rows, noise.double(), up, 0.9)
    torch.testing.assert_close(step.record.losses["coupling_loss"].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    # Beside the other losses, which it leaves as they are.
    plain = make_block(**config)
    without = run_step(plain, X, competing=competing)
    assert torch.equal(step.output, without.output)
    torch.testing.assert_close(step.record.aux_loss, without.record.aux_loss + 0.3 * expected.detach().float())
    names = [name for name, _ in block.named_parameters() if "router" in name or name == "experts.up_proj"]
    parameters = [dict(block.named_parameters())[name] for name in names]
    of_loss = torch.autograd.grad(100 * 0.3 * expected, parameters, allow_unused=True)
    sums = {
        name: without.grads[name] + (0 if grad is None else grad.float())
        for name, grad in zip(names, of_loss, strict=True)
    }
    assert largest_error({name: step.grads[name] for name in names}, sums) < 2e-5
    again = run_step(block, X, competing=competing, through=lambda b, x: checkpoint(b, x, use_reentrant=False))
    assert largest_error(again.grads, step.grads) < 1e-6


def test_micro_batches_share_it_and_evaluation_has_none() -> None:
    block = make_block(router="softmax", coupling_coef=1.0)
    whole = run_step(block, X).record.losses["coupling_loss"]
    parts = []
    for rows, mask in ((X[:1], torch.ones(1, 5)), (X[1:], torch.ones(3, 5))):
        block.state.begin("language", TokenGroups.from_mask(mask, 4))
        with block.state.recording():
            block(rows)
        parts.append(block.state.records[block.name].losses["coupling_loss"])
    assert 0 < float(parts[0]) < float(parts[1])
    torch.testing.assert_close(sum(parts), whole)
    assert "coupling_loss" not in run_step(block.eval(), X).record.losses


def test_its_operators_do_not_grow_with_experts_nor_add_to_a_row_twice() -> None:
    counts = []
    for experts in (4, 64):
        block = make_block(router="softmax", num_experts=experts, coupling_coef=1.0, experts_implementation="dense")
        block.state.noise[block.name] = torch.zeros(experts, 12)
        with Operators() as operators:
            run_step(block, X)
        counts.append(operators.total)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"coupling_alpha": 0.5}, "coupling_alpha: found 0.5 without coupling_coef"),
        ({"coupling_coef": -1.0}, "expected a finite coefficient >= 0, found -1"),
        (
            {"coupling_coef": 1.0, "router": "autonomy"},
            "found with router 'autonomy', which has no rows",
        ),
        (
            {"coupling_coef": 1.0, "num_experts": 2, "router": "shared_softmax"},
            "coupling_coef: found with one routed expert",
        ),
    ],
)
def test_bad_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeLayerConfig.model_validate(config)


def test_not_with_experts_spread_over_ranks() -> None:
    with pytest.raises(ValueError, match=r"found 2 beside language\.coupling_coef"):
        MoeConfig.model_validate({"expert_parallel": 2, "language": {"coupling_coef": 1.0}})
