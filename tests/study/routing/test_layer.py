"""Runs trained side by side are equal to `SparseMoeBlock`s trained alone: output, auxiliary loss, every gradient."""

import dataclasses

import pytest
import torch

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.study.routing.layer import MoeLayer, Widths
from llava_compete.study.routing.rules import EXPLORED, RULES, Judge, Response

WIDTHS = Widths(num_experts=6, num_chosen=2, hidden=8, intermediate=6)
SEEDS = (3, 4, 5)
ALL_COMPETE = dataclasses.replace(RULES["published"], response=Response(rate=1.0, warmup=0.0))
JUDGED = [rule for rule in RULES.values() if rule.judge and rule.judge.rate == 1 and rule.name not in EXPLORED]
CASES = [RULES[name] for name in ("softmax", "sigmoid", "xmoe", "perturbed_cosine", "shared_softmax", "shared_sigmoid")]
CASES += [
    RULES["bias_balanced"],
    RULES["tc_moe"],
    RULES["moe_plus_plus"],
    RULES["autonomy"],
    RULES["coupled"],
    ALL_COMPETE,
    *JUDGED,
]
BLOCK_NAMES = {"up": "experts.up_proj", "down": "experts.down_proj"}


def block_of(rule, layer, run):
    """The package's block with the parameters of one run."""
    widths = layer.widths
    config = {"num_experts": widths.num_experts, "num_experts_per_tok": widths.num_chosen, "router": rule.router}
    if rule.response or rule.judge:
        config["router"] = "competition"
    if widths.rank:
        config["autonomy_rank"] = widths.rank
    if rule.coupling_coef:
        config["coupling_coef"] = rule.coupling_coef
    if rule.judge:
        judge: Judge = rule.judge
        config |= {
            "competition_judge": "loss",
            "competition_baseline": judge.baseline,
            "competition_answers": judge.answers,
        }
        if judge.answers != "mean":
            config |= {"competition_margin": judge.margin, "competition_contenders": judge.contenders or "all"}
    block = SparseMoeBlock(
        MoeLayerConfig(**config),
        name="language.0",
        state=RoutingState(),
        hidden_size=widths.hidden,
        intermediate_size=widths.intermediate,
        activation="gelu",
        gated=False,
        bias=False,
    )
    with torch.no_grad():
        block.experts.up_proj.copy_(layer.up[run])
        block.experts.down_proj.copy_(layer.down[run].transpose(1, 2))
        for name, value in layer.router.weights.items():
            block.router.get_parameter(name).copy_(value[run])
    return block


@pytest.mark.parametrize("rule", CASES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("sequences", [1, 3])
def test_equal_to_blocks(rule, sequences):
    layer = MoeLayer(rule, WIDTHS, SEEDS, 0, "cpu")
    with torch.no_grad():  # routers far from uniform, so that choices and margins differ by token
        for value in layer.router.weights.values():
            value *= 20
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(SEEDS), 12, WIDTHS.hidden, generator=generator, requires_grad=True)
    pull = torch.randn(x.shape, generator=generator)
    competing = torch.ones(len(SEEDS), dtype=torch.bool) if rule.response or rule.judge else None
    for step in range(2):  # the second with what the first left in the layer
        output = layer(x, sequences=sequences, competing_R=competing)
        ((output.square() * pull).sum((1, 2)) + layer.aux_R).sum().backward()
        if step == 0:
            x.grad = None
            for parameter in layer.parameters:
                parameter.grad = None
    for run in range(len(SEEDS)):
        block = block_of(rule, layer, run)
        block.state.begin("language", TokenGroups.from_mask(torch.ones(sequences, 12 // sequences)))
        block.state.competition_enabled = True
        block.state.competing = {"language.0"} if rule.response else set()
        x_alone = x[run].detach().requires_grad_()
        if rule.coupling_coef:
            block.state.noise["language.0"] = layer.noise_RED[run]
        with block.state.recording():
            if rule.name == "bias_balanced":
                block(x_alone)
                used = block.state.records["language.0"].observation.used_TK
                block.router.end_step(used.flatten().bincount(minlength=6).float())
            if rule.judge and rule.judge.answers != "full":
                block(x_alone)
                block.experts.answer_means.end_step(block.state.answers["language.0"])
            alone = block(x_alone)
        aux = block.state.records["language.0"].aux_loss
        ((alone.square() * pull[run]).sum() + aux).backward()
        close = {"rtol": 2e-4, "atol": 2e-5}
        torch.testing.assert_close(output[run], alone, **close)
        torch.testing.assert_close(layer.aux_R[run], aux, **close)
        torch.testing.assert_close(x.grad[run], x_alone.grad, **close)
        torch.testing.assert_close(layer.up.grad[run], block.experts.up_proj.grad, **close)
        torch.testing.assert_close(layer.down.grad[run].transpose(1, 2), block.experts.down_proj.grad, **close)
        for name, value in layer.router.weights.items():
            torch.testing.assert_close(value.grad[run], block.router.get_parameter(name).grad, **close)
