"""SparseMoeBlock against slow_moe.py and by properties, in every mode it runs in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from slow_moe import AFFINITIES, forward
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llava_compete.errors import UserError
from llava_compete.moe.competition import affinity
from llava_compete.moe.losses import balance_loss
from llava_compete.moe.metrics import RoutingMetrics
from llava_compete.moe.state import TokenGroups
from llava_compete.moe.terms import ROUTERS

X = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(5))
MASK = torch.ones(3, 7)
MASK[0, 5:], MASK[2, :3] = 0, 0
NAMES = {"inp_reduction": "inp_reduction.weight"}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("balance_over", ["first_choice", "all_choices"])
def test_router_step_equals_slow_version(router: str, balance_over: str) -> None:
    check_against_slow(router, competing=False, balance_over=balance_over)


@pytest.mark.parametrize("name", sorted(AFFINITIES))
def test_competition_step_equals_slow_version(name: str) -> None:
    check_against_slow("competition", competing=True, affinity=name, num_experts_per_tok=3)
    check_against_slow("competition", competing=True, affinity=name, balance_over="all_choices")


def check_against_slow(router: str, competing: bool, **config: Any) -> None:
    output_size = 12 if router == "moe_plus_plus" else 9  # it copies tokens where it keeps their width
    block = make_block(router=router, sizes={"output_size": output_size}, **config)
    step = run_step(block, X, MASK, competing)
    leaves = {f"experts.{name}": parameter for name, parameter in block.experts.named_parameters()}
    leaves |= {f"router.{NAMES.get(name, name)}": parameter for name, parameter in block.router.named_parameters()}
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    x = X.double().requires_grad_()
    settings = {
        "K": block.config.num_experts_per_tok,
        "activation": "gelu",
        "competing": competing,
        "affinity": block.config.affinity,
        "all_choices": block.config.balance_over == "all_choices",
    }
    output, losses = forward(router, leaves, x, MASK, settings)
    aux_loss = sum(coef * losses[name] for name, coef in block.config.loss_coefs(competing).items())
    ((output.square().sum(-1) * MASK).mean() + 100 * aux_loss).backward()
    torch.testing.assert_close(step.output.double(), output, rtol=1e-5, atol=1e-6)
    assert step.record.losses.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(step.record.losses[name].double(), loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.record.aux_loss.double(), aux_loss, rtol=1e-5, atol=1e-7)
    grads = {name.replace("inp_reduction.weight", "inp_reduction"): leaf.grad for name, leaf in leaves.items()}
    assert largest_error({k: v.double() for k, v in step.grads.items()}, {**grads, "x": x.grad}) < 2e-5


@pytest.mark.parametrize("competing", [False, True])
def test_permuting_experts_changes_nothing_else(competing: bool) -> None:
    block, order = make_block(), torch.tensor([2, 0, 3, 1])
    permuted = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in permuted.parameters():
            parameter.copy_(parameter[order])
    ours, theirs = run_step(permuted, X, competing=competing), run_step(block, X, competing=competing)
    torch.testing.assert_close(ours.output, theirs.output)
    torch.testing.assert_close(ours.record.aux_loss, theirs.record.aux_loss)
    torch.testing.assert_close(ours.record.metrics.load_E, theirs.record.metrics.load_E[order])


def test_competition_of_all_experts_is_the_dense_mixture() -> None:
    block = make_block(num_experts_per_tok=4)
    found = block.experts(X.flatten(0, 1))
    everyone = torch.arange(4).expand(21, 4)
    weights = found.contest.affinity_TE / found.contest.affinity_TE.sum(-1, keepdim=True)
    torch.testing.assert_close(found.output_TO, block.experts(X.flatten(0, 1), everyone, weights))


@pytest.mark.parametrize("competing", [False, True])
def test_padding_to_twice_the_length_changes_nothing(competing: bool) -> None:
    block = make_block()
    short = run_step(block, X, MASK, competing)
    padded = torch.cat([X, torch.full_like(X, 3.0)], dim=1)
    mask = torch.cat([MASK, torch.zeros_like(MASK)], dim=1)
    long = run_step(block, padded, mask, competing)
    for name, loss in short.record.losses.items():
        torch.testing.assert_close(long.record.losses[name], loss)
    torch.testing.assert_close(long.record.metrics.vector(), short.record.metrics.vector())


def test_packed_rows_and_micro_batches_give_the_same_means() -> None:
    probs = torch.rand(12, 4).softmax(-1)
    choices = probs.argsort(descending=True)[:, :1]
    rows = TokenGroups.from_mask(torch.tensor([[1] * 5 + [0], [1] * 3 + [0] * 3]))
    packed = TokenGroups.from_ids(torch.tensor([[0] * 5 + [-1] + [1] * 3 + [-1] * 3]), num_local=2)
    expected = balance_loss(probs, choices, rows)
    torch.testing.assert_close(balance_loss(probs, choices, packed), expected)
    cut = [TokenGroups.from_mask(mask[None], num_sequences=2) for mask in rows.sequence_weights_ST.view(2, 2, 6).sum(0)]
    halves = [balance_loss(probs[i * 6 :][:6], choices[i * 6 :][:6], cut[i]) for i in range(2)]
    torch.testing.assert_close(sum(halves), expected)
    assert float(balance_loss(probs, choices, TokenGroups.empty(12))) == 0


def test_uniform_routing_has_balance_one() -> None:
    uniform, choices = torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4
    groups = TokenGroups.from_mask(torch.ones(2, 4))
    assert float(balance_loss(uniform, choices, groups)) == pytest.approx(1)
    everyone = torch.cat([choices, (choices + 1) % 4], dim=1)
    assert float(balance_loss(uniform, everyone, groups)) == pytest.approx(1)


@pytest.mark.parametrize("competing", [False, True])
def test_frozen_experts_get_no_gradient_and_change_no_other(competing: bool) -> None:
    block = make_block(router="competition")
    x = torch.randn(2, 8, 12)
    whole = run_step(block, x, competing=competing).grads
    block.experts.requires_grad_(False)
    block.zero_grad()
    block.state.begin("language", TokenGroups.from_mask(torch.ones(2, 8)))
    x = x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        with block.state.recording():
            output = block(x)
        forward = counter.get_total_flops()
        (output.square().sum(-1).mean() + 100 * block.state.records[block.name].aux_loss).backward()
    assert all(parameter.grad is None for parameter in block.experts.parameters())
    torch.testing.assert_close(x.grad, whole["x"])
    torch.testing.assert_close(block.router.weight.grad, whole["router.weight"])
    # One product backwards for each forwards; the small rest is the router's weight.
    assert counter.get_total_flops() - forward < 1.2 * forward


@pytest.mark.parametrize("chunk", [1, 4, 20, None])
@pytest.mark.parametrize("keeps", ["pre_activations", "input"])
def test_what_a_competition_keeps_changes_no_number(keeps: str, chunk: int | None) -> None:
    whole = run_step(make_block(), X, MASK, competing=True)
    block = make_block(competition_keeps=keeps, competition_chunk_tokens=chunk)
    chunked = run_step(block, X, MASK, competing=True)
    torch.testing.assert_close(chunked.output, whole.output)
    assert largest_error(chunked.grads, whole.grads) < 1e-5
    torch.testing.assert_close(chunked.record.aux_loss, whole.record.aux_loss)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("competing", [False, True])
def test_checkpointing_on_equals_off(competing: bool, chunk: int | None) -> None:
    block = make_block(competition_chunk_tokens=chunk)
    plain = run_step(block, X, MASK, competing)
    recomputed = run_step(block, X, MASK, competing, lambda *args: checkpoint(*args, use_reentrant=False))
    assert largest_error(recomputed.grads, plain.grads) < 1e-6
    torch.testing.assert_close(recomputed.record.metrics.vector(), plain.record.metrics.vector())


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run_step(make_block(), X, through=lambda *args: checkpoint(*args, use_reentrant=True))


def test_tokens_that_nobody_described_are_an_error() -> None:
    block = make_block()
    with block.state.recording(), pytest.raises(RuntimeError, match=r"language\.0: 21 tokens.*none"):
        block(X)
    with torch.no_grad():
        assert block(X).shape == X.shape, "without a recording nothing reads statistics"


@pytest.mark.parametrize("competing", [False, True])
def test_non_finite_numbers_reach_the_output_and_the_loss(competing: bool) -> None:
    for number in (float("nan"), float("inf"), -float("inf")):
        x = X.clone()
        x[1, 2, 3] = number
        step = run_step(make_block(), x, competing=competing)
        assert not step.output[1, 2].isfinite().any()
        assert not step.record.aux_loss.isfinite()
        others = torch.ones(3, 7, dtype=torch.bool)
        others[1, 2] = False
        assert step.output[others].isfinite().all()


def test_routing_weights_stay_exact_where_scores_underflow() -> None:
    """Every sigmoid is 0 in float32, and their ratios are powers of e."""
    block = make_block(router="sigmoid")
    routing = block.router.route(torch.tensor([[-200.0, -199.0, -201.0, -202.0]]))
    assert routing.choices_TC.tolist() == [[1, 0]]
    torch.testing.assert_close(routing.routing_weights_TK, torch.tensor([[1.0, 0.0]]).softmax(-1))


def test_a_single_choice_has_weight_one_and_no_gradient() -> None:
    for router in ("softmax", "sigmoid", "shared_softmax", "shared_sigmoid"):
        shared = router.startswith("shared")
        block = make_block(router=router, num_experts_per_tok=1 + shared)
        routing = block.router(X.flatten(0, 1))
        assert (routing.routing_weights_TK[:, 0] == (0.5 if shared else 1)).all()
        (gradient,) = torch.autograd.grad(routing.routing_weights_TK[:, 0].sum(), block.router.weight)
        assert (gradient == 0).all(), router


@pytest.mark.parametrize(("name", "bias"), [("relu", -1.0), ("l2", 0.0)])
def test_affinities_of_zero_leave_equal_weights(name: str, bias: float) -> None:
    block = make_block(affinity=name)
    with torch.no_grad():
        block.experts.down_proj.zero_()
        block.experts.down_proj_bias.fill_(bias)
    step = run_step(block, X, competing=True)
    torch.testing.assert_close(step.output, torch.full_like(X, bias))
    assert step.record.metrics.dropped == 0
    assert all(gradient.isfinite().all() for gradient in step.grads.values())


@pytest.mark.parametrize("size", [1, 12, 64, 96])
def test_softplus_affinity_is_exact_for_outputs_far_from_zero(size: int) -> None:
    y = torch.randn(50, size, generator=torch.Generator().manual_seed(0))
    for shift in (-80.0, -15.0, 0.0, 15.0, 1000.0):
        exact = torch.nn.functional.softplus((y + shift).double()).mean(-1)
        assert ((affinity("softplus", y + shift) - exact).abs() <= 1e-6 * exact).all(), shift


def test_a_broken_expert_cannot_lose_the_competition_silently() -> None:
    block = make_block()
    with torch.no_grad():
        block.experts.down_proj_bias[1] = -float("inf")
    assert not run_step(block, X, competing=True).output.isfinite().any()


@pytest.mark.parametrize("competing", [False, True])
def test_ties_go_to_the_lowest_expert(competing: bool) -> None:
    block = make_block(num_experts=6, num_experts_per_tok=3)
    with torch.no_grad():
        # Zeros tie exactly; equal rows may not, for a matrix product rounds by a column's place.
        for parameter in block.parameters():
            parameter.zero_()
    load = run_step(block, X, competing=competing).record.metrics.load_E
    assert load.tolist() == [21, 21, 21, 0, 0, 0]


@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_selects_as_float32_outside_a_margin(router: str) -> None:
    block = make_block(router=router, sizes={"hidden_size": 64})
    x = torch.randn(200, 64).bfloat16()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(parameter.bfloat16())
        exact, rounded = block.router(x.float()), block.bfloat16().router(x)
    assert rounded.probs_TR.dtype == torch.float32
    sorted_probs = exact.probs_TR.sort(-1, descending=True).values
    count = exact.choices_TC.shape[1]
    # The norms by which experts choose themselves are of their own products, in their dtype.
    margin, most = (0.02, 0.5) if router == "autonomy" else (1e-5, 0.9)
    clear = (sorted_probs[:, :-1] - sorted_probs[:, 1:])[:, :count].amin(-1) > margin
    assert clear.float().mean() > most
    assert (exact.choices_TC == rounded.choices_TC)[clear].all()


@pytest.mark.parametrize("competing", [False, True])
def test_autocast_keeps_routing_in_float32(competing: bool) -> None:
    block = make_block()
    exact = run_step(block, X, competing=competing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run_step(block, X, competing=competing)
    assert mixed.output.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in mixed.record.losses.values())
    torch.testing.assert_close(mixed.output.float(), exact.output, rtol=0.05, atol=0.05)
    if not competing:
        torch.testing.assert_close(mixed.record.aux_loss, exact.record.aux_loss)


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(UserError, match="dtype"):
        make_block()(X.bfloat16())
    with pytest.raises(UserError, match="activation: found 'gelo'"):
        make_block(sizes={"activation": "gelo"})


def test_dropout_acts_in_training_only() -> None:
    for where in ("hidden_dropout", "output_dropout"):
        block = make_block(sizes={where: 0.5})
        plain = make_block()
        plain.load_state_dict(block.state_dict())
        for competing in (False, True):
            dropped = run_step(block.train(), X, competing=competing).output
            exact = run_step(plain, X, competing=competing).output
            assert not torch.allclose(dropped, exact)
            torch.testing.assert_close(run_step(block.eval(), X, competing=competing).output, exact)


@pytest.mark.parametrize("keeps", ["pre_activations", "input"])
@pytest.mark.parametrize("gated", [False, True])
def test_dropout_is_the_same_in_what_a_competition_computes_again(keeps: str, gated: bool) -> None:
    sizes = {"hidden_dropout": 0.5, "gated": gated}
    steps = []
    for config in ({}, {"competition_keeps": keeps}):
        block = make_block(sizes=sizes, **config).train()
        torch.manual_seed(3)
        steps.append(run_step(block, X, competing=True))
    torch.testing.assert_close(steps[0].output, steps[1].output)
    assert largest_error(steps[0].grads, steps[1].grads) < 1e-5
    # In chunks, numbers are drawn chunk by chunk: along its gradient the output must grow as the gradient says.
    block = make_block(sizes=sizes, competition_keeps=keeps, competition_chunk_tokens=4).train()
    x = X.clone().requires_grad_()

    def objective(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return block.experts(x.flatten(0, 1)).output_TO.square().sum()

    (gradient,) = torch.autograd.grad(objective(x), x)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (objective(x + step) - objective(x - step)) / 2e-2
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_experts_start_alike_with_every_router() -> None:
    """Or a study of routers would also compare their experts' luck. Name and seed make the difference."""
    starts = {router: make_block(router=router).experts.up for router in ROUTERS}
    assert all(torch.equal(start, starts["softmax"]) for start in starts.values())
    after = torch.rand(1)
    make_block(router="xmoe")
    assert torch.equal(torch.rand(1), after), "nor do they move what is drawn after them"
    other_seed, block = make_block(seed=1), make_block()
    block.name = "language.1"
    block.reset_parameters()
    for other in (other_seed, block):
        assert not torch.equal(other.experts.up, starts["softmax"])
        assert not torch.equal(other.experts.up[0], other.experts.up[1])


def test_meta_device_builds_without_memory() -> None:
    with torch.device("meta"):
        block = make_block(sizes={"gated": True, "bias": False})
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        "router.weight": (4, 12),
        "experts.gate_up_proj": (4, 40, 12),
        "experts.down_proj": (4, 12, 20),
    }


def test_metrics_add_up_and_travel_as_a_vector() -> None:
    block = make_block()
    first, second = (run_step(block, X, MASK, competing).record.metrics for competing in (False, True))
    total = RoutingMetrics.from_vector(first.vector() + second.vector())
    torch.testing.assert_close(total.vector(), (first + second).vector())
    summary = total.summary()
    assert sum(summary["expert_load"]) == pytest.approx(1)
    assert summary["dropped"] == 0
    assert 0 <= summary["router_agreement"] <= 1
    assert float(total.tokens) == 2 * float(MASK.sum())
    assert first.summary()["router_agreement"] is None


def test_a_choice_of_no_effect_counts_as_dropped() -> None:
    block = make_block()
    x = torch.full((1, 3, 12), 100.0)
    with torch.no_grad():
        block.router.weight.copy_(torch.arange(4.0)[:, None].expand(4, 12))  # logits 1,200 apart: weights 1 and 0
    metrics = run_step(block, x, torch.tensor([[1, 1, 0]])).record.metrics
    assert metrics.summary()["dropped"] == 2
