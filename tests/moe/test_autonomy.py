"""Autonomy-of-Experts: experts of both kinds by loops, how a dense projection is cut, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.moe.autonomy import factorise
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.layer_config import MoeLayerConfig

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 16, "intermediate_size": 32, "activation": "silu", "output_size": 24}


def make(implementation: str, gated: bool, bias: bool = False, **config: Any) -> Any:
    sizes = {**SIZES, "gated": gated, "bias": bias}
    config = {"router": "autonomy", "num_experts": 5, "num_experts_per_tok": 3, "autonomy_rank": 8, **config}
    return make_block(experts_implementation=implementation, sizes=sizes, **config)


def slow(block: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Output and norms, as the paper's algorithm 2 has them for one token after another; float64."""
    leaves = {name: parameter.double() for name, parameter in block.named_parameters()}
    low, high, up = (leaves[f"{name}_proj"] for name in ("router.low", "experts.gate", "experts.up"))
    rows, norms = [], []
    for x in x_TD.double():
        cache = [low[i] @ x for i in range(5)]
        p = torch.stack([torch.sqrt((c * c).sum()) for c in cache])
        chosen = sorted(range(5), key=lambda i: -float(p[i].detach()))[:3]
        whole = sum(torch.exp(p[i]) for i in chosen)
        row = torch.zeros(24, dtype=torch.float64)
        for i in chosen:
            wide = high[i] @ cache[i]
            hidden = wide / (1 + torch.exp(-wide)) * (up[i] @ x)
            row = row + torch.exp(p[i]) / whole * (leaves["experts.down_proj"][i] @ hidden)
        rows.append(row)
        norms.append(p)
    return torch.stack(rows), torch.stack(norms)


def test_gated_experts_equal_the_papers_algorithm() -> None:
    block = make("eager", gated=True, balance_coef=0.0)
    step = run_step(block, X)
    for parameter in block.parameters():
        parameter.grad = None
    output, norms = slow(block, X.flatten(0, 1))
    torch.testing.assert_close(step.output.flatten(0, 1).double(), output.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.record.routing.logits_TR.double(), norms, rtol=1e-5, atol=1e-5)
    output.square().sum(-1).mean().backward()
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    assert largest_error({name: step.grads[name] for name in grads}, grads) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_implementations_agree(gated: bool, bias: bool) -> None:
    expected = run_step(make("eager", gated, bias), X)
    for implementation in ("grouped_mm", "dense"):
        other = run_step(make(implementation, gated, bias), X)
        torch.testing.assert_close(other.output, expected.output)
        assert largest_error(other.grads, expected.grads) < 1e-5, implementation
    block = make("auto", gated, bias)
    with torch.no_grad():
        for row in range(9):
            torch.testing.assert_close(block(X[:1, row : row + 1]), expected.output[:1, row : row + 1])


def test_only_what_chooses_is_computed_for_all_and_nothing_twice() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    block = make("eager", gated=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(X)
    low, rest = 5 * 8 * 16, 3 * (32 * 8 + 32 * 16 + 24 * 32)
    assert counter.get_total_flops() == 2 * 18 * (low + rest)


def test_the_balance_loss_reads_all_norms_and_there_is_no_z_loss() -> None:
    block = make("eager", gated=True, balance_over="all_choices")
    assert (block.config.balance_coef, block.config.router_z_coef) == (0.01, 0.0)
    record = run_step(block, X).record
    losses = []
    for norms, choices in zip(record.routing.logits_TR.split(9), record.routing.choices_TC.split(9), strict=True):
        share = choices.flatten().bincount(minlength=5) / 27
        losses.append(5 * (norms.softmax(-1).mean(0) * share).sum())
    torch.testing.assert_close(record.losses["balance_loss"], torch.stack(losses).mean().detach())


@pytest.mark.parametrize(("rows", "columns"), [(24, 16), (16, 24)])
def test_factors_of_full_rank_give_the_projection_and_each_expert_other_norms(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    full = factorise(weight, 16, 4, torch.Generator().manual_seed(0))
    assert full.cut == 0
    torch.testing.assert_close(full.high_EIH @ full.low_EHD, weight.expand(4, -1, -1), rtol=0, atol=3e-6)
    x = torch.randn(200, columns, generator=torch.Generator().manual_seed(1))
    norms = (x @ full.low_EHD.transpose(1, 2)).norm(dim=-1)
    assert (norms.argmax(0).bincount(minlength=4) > 20).all()
    # As large as those of a new layer.
    assert float(norms.square().mean()) == pytest.approx(16 / 3, rel=0.1)
    low = factorise(weight, 6, 4, torch.Generator().manual_seed(0))
    found = (low.high_EIH[2] @ low.low_EHD[2] - weight).norm() / weight.norm()
    values = torch.linalg.svdvals(weight.double())
    assert low.cut == pytest.approx(float(found), rel=1e-4)
    assert low.cut == pytest.approx(float(values[6:].norm() / values.norm()))


def test_a_projection_of_zeros_has_factors() -> None:
    factors = factorise(torch.zeros(6, 4), 4, 2, torch.Generator().manual_seed(0))
    assert factors.cut == 0
    assert all(torch.isfinite(part).all() for part in factors[:2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"router": "softmax", "autonomy_rank": 4}, "autonomy_rank: router 'softmax' has no such rank"),
        ({"router": "autonomy", "autonomy_rank": 0}, "greater than or equal to 1"),
        (
            {"router": "autonomy", "experts_implementation": "batched_mm"},
            "expected one of auto, eager, grouped_mm, dense",
        ),
        ({"router": "autonomy", "affinity": "l2"}, "affinity: router 'autonomy' has no such term"),
    ],
)
def test_bad_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeLayerConfig.model_validate(config)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"moe\.language\.autonomy_rank: found 17, expected at most 16"):
        make("eager", gated=True, autonomy_rank=17)
    layer = {"language": {"router": "autonomy"}, "expert_parallel": 2}
    with pytest.raises(ValueError, match="expert_parallel: found 2 beside router 'autonomy' in language, expected 1"):
        MoeConfig.model_validate(layer)
