"""A competition that the loss judges, against slow_judged.py in float64, finite differences, and by properties."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from slow_judged import asked, block_output, judgement, make_expert
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.judged import Judgement
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.train.callbacks.competition import schedules
from llava_compete.train.starting_point import moe_in_force

X = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(5))
MASK = torch.ones(3, 7)
MASK[0, 5:], MASK[2, :3] = 0, 0
EVERYONE = {"competition_margin": 0.0}
GATED = {"gated": True, "bias": False, "activation": "silu"}
RULES: list[dict[str, Any]] = [
    EVERYONE,
    {**EVERYONE, "competition_baseline": "none"},
    {**EVERYONE, "competition_chunk_tokens": 4},
    {"competition_margin": 0.7},
    {**EVERYONE, "competition_contenders": 2},
    {"competition_margin": 0.7, "competition_contenders": 2, "competition_chunk_tokens": 5},
    {"competition_margin": 0.7, "competition_contenders": 1, "competition_baseline": "none"},
]


def judged_block(sizes: dict[str, Any] | None = None, spread: float = 0.3, **rule: Any) -> SparseMoeBlock:
    """Of 5 experts, without auxiliary losses; `spread` brings probabilities near one another: a margin asks some."""
    rule = {"balance_coef": 0.0, "router_z_coef": 0.0, **rule}
    block = make_block(sizes=sizes, num_experts=5, competition_judge="loss", **rule)
    with torch.no_grad():
        block.router.weight.mul_(spread)
    return block


def slow_gradients(block: SparseMoeBlock, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What `run_step` without an auxiliary loss gives, in float64."""
    config, experts = block.config, block.experts
    leaves = {f"experts.{n}": p.detach().double().requires_grad_() for n, p in experts.named_parameters()}
    leaves["router.weight"] = block.router.weight.detach().double().requires_grad_()
    leaves["x"] = x.double().requires_grad_()
    packed = {name.removeprefix("experts."): leaf for name, leaf in leaves.items() if name.startswith("experts")}
    expert = make_expert(packed, experts.activation, experts.has_gate)
    contenders = config.competition_contenders
    rule: dict[str, Any] = {
        "baseline": config.competition_baseline == "output",
        "margin": config.competition_margin,
        "contenders": contenders if isinstance(contenders, int) else None,
    }
    total = torch.zeros((), dtype=torch.float64)
    for token, counts in zip(leaves["x"].flatten(0, 1), mask.flatten(), strict=True):
        logits, count = leaves["router.weight"] @ token, config.num_experts_per_tok
        output = block_output(expert, logits, token, count)
        loss = output.square().sum() * counts / mask.numel()
        (grad,) = torch.autograd.grad(loss, output, retain_graph=True)
        total = total + loss + judgement(expert, logits, token, grad, count, **rule)
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def doubles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("sizes", [{"output_size": 9}, GATED, {**GATED, "bias": True}], ids=["plain", "gated", "both"])
def test_gradients_equal_the_slow_version(rule: dict[str, Any], sizes: dict[str, Any]) -> None:
    block = judged_block(sizes, **rule)
    ours = run_step(block, X, MASK)
    assert largest_error(doubles(ours.grads), slow_gradients(block, X, MASK)) < 2e-5


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "dense", "batched_mm"])
def test_every_implementation_is_judged_alike(name: str) -> None:
    block = judged_block(competition_margin=0.7, experts_implementation=name)
    assert largest_error(doubles(run_step(block, X, MASK).grads), slow_gradients(block, X, MASK)) < 2e-5


def test_a_compiled_layer_is_judged_alike() -> None:
    """The judgement stands outside the graphs, whose gradients must still reach it."""
    torch._dynamo.reset()
    block = judged_block(competition_margin=0.7, competition_answers="both")
    block.experts.answer_means.end_step(torch.randn(5, 13).abs())
    compiled = torch.compile(block, backend="eager")
    exact = run_step(block, X, MASK)
    step = run_step(block, X, MASK, through=lambda _, x: compiled(x))
    torch.testing.assert_close(step.output, exact.output)
    assert largest_error(step.grads, exact.grads) < 1e-5


def test_a_margin_asks_some_and_not_all() -> None:
    """Or the tests above would not tell a margin from none."""
    block = judged_block()
    asks = [asked(block.router.weight.detach() @ token, 2, 0.7, None) for token in X.flatten(0, 1)]
    assert 5 < sum(map(len, asks)) < 50
    assert {len(experts) for experts in asks} >= {0, 1, 2}


def test_the_forward_and_the_experts_gradients_are_the_router_steps() -> None:
    judged = judged_block(competition_margin=0.7, balance_coef=0.01, router_z_coef=0.001)
    plain = make_block(num_experts=5, router="softmax")
    plain.load_state_dict(judged.state_dict())
    ours, theirs = run_step(judged, X, MASK, competing=True), run_step(plain, X, MASK)
    torch.testing.assert_close(ours.output, theirs.output, rtol=0, atol=0)
    assert ours.record.losses == theirs.record.losses
    for name in ours.grads:
        if name.startswith("experts"):
            torch.testing.assert_close(ours.grads[name], theirs.grads[name], rtol=0, atol=0)
    assert (ours.grads["router.weight"] - theirs.grads["router.weight"]).norm() > 0.01 * theirs.grads[
        "router.weight"
    ].norm()


def test_the_judgement_is_the_first_order_change_of_the_loss() -> None:
    """<g, Y_j - y> = (L(y + e d) - L(y - e d)) / 2e with d = Y_j - y, through the rest of a network in float64: beside
    the task's gradient the block's router gets, of each expert j, that number times p_j (delta - p) x."""
    block = judged_block({"output_size": 9}, **EVERYONE)
    unjudged = judged_block({"output_size": 9}, **EVERYONE, competition_rate=0.0)
    generator = torch.Generator().manual_seed(2)
    rest = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    packed = {name: parameter.detach().double() for name, parameter in block.experts.named_parameters()}
    expert = make_expert(packed, "gelu", gated=False)
    for x in torch.randn(3, 12, generator=generator):
        found = torch.zeros(5, 12, dtype=torch.float64)
        for sign, each in ((1, block), (-1, unjudged)):
            rest(each(x[None]).double()).sin().sum().backward()
            found += sign * each.router.weight.grad.double()
            each.zero_grad()
        token = x.double()
        logits = block.router.weight.detach().double() @ token
        y, probs = block_output(expert, logits, token, 2), torch.softmax(logits, 0)
        slopes = torch.zeros(5, dtype=torch.float64)
        for e in asked(logits, 2, 0.0, None):
            step = 1e-5 * (expert(e, token) - y)
            change = (rest(y + step).sin().sum() - rest(y - step).sin().sum()).item() / 2e-5
            slopes += change * probs[e] * (torch.eye(5, dtype=torch.float64)[e] - probs)
        torch.testing.assert_close(found, torch.outer(slopes, token), rtol=1e-4, atol=1e-6)
        assert found.norm() > 1e-3


@pytest.mark.parametrize("rule", [EVERYONE, {"competition_margin": 0.7}], ids=str)
def test_checkpointing_and_frozen_parts_change_nothing(rule: dict[str, Any]) -> None:
    block = judged_block(**rule)
    expected = run_step(block, X, MASK).grads
    again = run_step(block, X, MASK, through=lambda b, x: checkpoint(b, x, use_reentrant=False)).grads
    assert largest_error(again, expected) == 0
    block.experts.requires_grad_(False)
    assert largest_error(run_step(block, X, MASK).grads, {k: expected[k] for k in ("router.weight", "x")}) < 1e-6
    block.router.requires_grad_(False)
    x = X.clone()  # behind a frozen front nothing here requires a gradient
    assert not block(x).requires_grad


@pytest.mark.parametrize("rule", [EVERYONE, {"competition_margin": 0.7}], ids=str)
def test_autocast_gives_the_same_to_its_rounding(rule: dict[str, Any]) -> None:
    block = judged_block({"hidden_size": 12, "intermediate_size": 64}, **rule)
    expected = run_step(block, X, MASK).grads

    def under_autocast(b: SparseMoeBlock, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return b(x)

    rounded = run_step(block, X, MASK, through=under_autocast).grads
    assert largest_error(rounded, expected) < 0.03


def test_padding_is_not_judged_and_cuts_change_nothing() -> None:
    block = judged_block(competition_margin=0.7)
    short = run_step(block, X, MASK).grads
    block.experts.chunk_tokens = 3
    assert largest_error(run_step(block, X, MASK).grads, short) < 1e-5
    changed = torch.where(MASK[..., None] == 0, torch.full_like(X, 3.0), X)
    again = run_step(block, changed, MASK).grads
    assert largest_error({"w": again["router.weight"]}, {"w": short["router.weight"]}) < 1e-5


@pytest.mark.parametrize("rule", [EVERYONE, {"competition_margin": 0.7}], ids=str)
def test_equal_experts_are_judged_alike(rule: dict[str, Any]) -> None:
    """At an upcycled start the term is 0 to rounding; without a baseline it is not."""
    block = judged_block(**rule)
    with torch.no_grad():
        for parameter in block.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    assert run_step(block, X, MASK).grads["router.weight"].norm() < 1e-6
    block.experts.judgement = Judgement(subtracts_output=False, margin=0.0, contenders=None)
    assert run_step(block, X, MASK).grads["router.weight"].norm() > 1e-3


def test_dropout_of_the_experts_does_not_reach_the_questions() -> None:
    """An expert dropped out altogether answers all the same."""
    for gated in (False, True):
        sizes = {"hidden_dropout": 1.0, "gated": gated, "bias": False}
        block = judged_block(sizes, **EVERYONE, competition_baseline="none")
        x = X.clone().requires_grad_()
        output = block(x)
        assert not output.any()
        output.sum().backward()
        assert block.router.weight.grad.norm() > 0


def test_only_layers_that_ask_at_times_have_a_schedule() -> None:
    names = ["vision.0", "vision.1", "projector.0", "language.0", "language.1"]
    judged = {"competition_judge": "loss"}
    parts: dict[str, Any] = {"vision": {}, "projector": judged, "language": {**judged, "competition_rate": 0.5}}
    moe = MoeConfig.model_validate({"competition_warmup_ratio": 0.5, "max_competing_layers": 1, **parts})
    contests, asking = schedules(moe, names, [400])
    assert (contests.layer_names, asking.layer_names) == (("vision.0", "vision.1"), ("language.0", "language.1"))
    assert asking.count() == pytest.approx(400, abs=60)
    assert any(len(asking.layers_at(step)) == 2 for step in range(20)), "neither warm-up nor cap"
    (contests,) = schedules(MoeConfig.model_validate({"vision": {}, "language": judged}), names, [400])
    assert contests.layer_names == ("vision.0", "vision.1")


def test_a_stage_may_change_the_judge_of_its_checkpoint() -> None:
    stored = MoeConfig.model_validate({"language": {"diversity_coef": 0.5}}).model_dump(mode="json")
    judged = _moe_in_force(stored, {"competition_judge": "loss"})
    assert (judged.competition_margin, judged.diversity_coef) == (0.8, None)
    again = MoeConfig(language=judged).model_dump(mode="json")
    assert _moe_in_force(again, {"competition_judge": "loss", "competition_margin": 0.5}).competition_margin == 0.5
    assert _moe_in_force(again, {"competition_judge": "response"}) == MoeLayerConfig()
    taught = _moe_in_force(stored, {"competition_output": "router"})
    assert (taught.competition_output, taught.diversity_coef, taught.distillation_coef) == ("router", None, 0.01)
    means = _moe_in_force(again, {"competition_judge": "loss", "competition_answers": "mean"})
    assert (means.competition_answers, means.competition_margin) == ("mean", None)
    with pytest.raises(ValueError, match="affinity"):
        _moe_in_force(stored, {"competition_judge": "loss", "affinity": "relu"})


def _moe_in_force(stored: dict[str, Any], language: dict[str, Any]) -> MoeLayerConfig:
    changes = MoeConfig.model_validate({"language": language})
    config = SimpleNamespace(moe=changes, stage="sft", model=SimpleNamespace(checkpoint="start"))
    layer = moe_in_force(config, stored).language
    assert layer is not None
    return layer


def test_a_missing_baseline_is_named(caplog: pytest.LogCaptureFixture) -> None:
    part = {"competition_judge": "loss", "competition_baseline": "none"}
    MoeConfig.model_validate({"vision": part, "language": {"competition_judge": "loss"}}).warn_of_moved_starts()
    (record,) = caplog.records
    assert record.getMessage().startswith("moe.vision: competition_baseline none moves the router")


@pytest.mark.parametrize("answers", ["mean", "both"])
def test_means_at_an_upcycled_start_are_named(answers: str, caplog: pytest.LogCaptureFixture) -> None:
    part = {"competition_judge": "loss", "competition_answers": answers}
    MoeConfig.model_validate({"vision": {"competition_judge": "loss"}, "language": part}).warn_of_moved_starts()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"moe.language: competition_answers {answers} moves the router")


def test_a_rate_below_one_follows_the_schedule() -> None:
    always, seldom = judged_block(**EVERYONE), judged_block(**EVERYONE, competition_rate=0.5)
    expected = run_step(always, X, MASK).grads
    assert largest_error(run_step(seldom, X, MASK, competing=True).grads, expected) == 0
    assert largest_error(run_step(seldom, X, MASK, competing=False).grads, expected) > 0.01
    assert largest_error(run_step(always.eval(), X, MASK).grads, expected) > 0.01, "evaluation asks nobody"
