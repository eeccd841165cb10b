"""What a step sends: the bytes that `moe/parallel.py` sends as counted, and closed forms of collectives by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llava_compete.cli import main
from llava_compete.moe import passages
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.parallel import ExpertRanks
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.plan.cluster import (
    Cluster,
    Layer,
    Sent,
    Weights,
    collective,
    contest,
    days,
    judgement,
    passage,
    reductions,
    step,
    travel,
)
from llava_compete.plan.plan import plan

sys.path.append(str(Path(__file__).parents[1] / "moe"))
from group_kit import of_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
TWO = Cluster(nodes=2, gpus_per_node=4, link=100.0, network=10.0, peak=1000.0, efficiency=0.5)
TOKENS, WIDTH, OUTPUT = 6, 12, 20


def _sent(config: dict[str, Any], competing: bool) -> int:
    """Bytes of tokens, outputs, affinities and gradients that this rank sends in one step, itself included."""
    torch.manual_seed(0)
    layer = MoeLayerConfig.model_validate({"num_experts": 4, "num_experts_per_tok": 2, **config})
    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "output_size": OUTPUT, "activation": "gelu"}
    block = SparseMoeBlock(layer, name="language.0", state=RoutingState(), gated=False, bias=False, **sizes)
    block.experts.spread(ExpertRanks(4, dist.group.WORLD))
    block.state.competition_enabled, block.state.competing = True, frozenset({block.name} if competing else ())
    block.state.begin("language", TokenGroups.from_mask(torch.ones(1, TOKENS), 2))
    found, flight, mail = [], passages.Flight.__init__, passages._Mail.send

    def counted(self: Any, rows: torch.Tensor, *where: Any, **how: Any) -> None:
        found.append(rows.nbytes)  # what one rank sends to all, or all to one: on average so much of each
        (flight if isinstance(self, passages.Flight) else mail)(self, rows, *where, **how)

    passages.Flight.__init__ = passages._Mail.send = counted
    try:
        with block.state.recording():
            output = block(torch.randn(1, TOKENS, WIDTH, requires_grad=True))
        (output.square().sum() + block.state.records[block.name].aux_loss).backward()
    finally:
        passages.Flight.__init__, passages._Mail.send = flight, mail
    return sum(found)


def test_passages_of_tokens_are_those_that_are_sent() -> None:
    """Over two ranks; what a rank keeps for itself is half of what it shares out evenly."""
    judged = {"competition_judge": "loss", "competition_margin": 0.0}
    shared = {"router": "shared_softmax"}
    cases = [({"router": "softmax"}, False), ({}, True), (judged, False), (shared, False)]
    found = torch.tensor(of_ranks(2, lambda rank: [_sent(*case) for case in cases])).double().mean(0)
    pair = Cluster(1, 2)
    layer = Layer("language", TOKENS, WIDTH, OUTPUT, 2, 4, 4, judged=True)
    lends = Layer("language", TOKENS, WIDTH, OUTPUT, 1, 4, 4, judged=False, lent=8 * (WIDTH + OUTPUT))
    expected = [
        travel(layer, 2, False, pair),
        contest(layer, 2, False, pair),
        travel(layer, 2, False, pair) + judgement(layer, 2, pair),
        travel(lends, 2, False, pair),
    ]
    assert [2 * one.inside for one in expected] == found.tolist()
    assert all(one.beyond == 0 for one in expected)


def test_collectives_and_passages_by_hand() -> None:
    assert collective(80.0, 8, 1, TWO) == Sent(80 * 3 / 4, 80 / 2 / 4)  # each machine gets half, by four network cards
    assert collective(80.0, 4, 2, TWO) == Sent(80 / 2, 80 / 2 / 2)  # two in each machine
    assert collective(80.0, 2, 4, TWO) == Sent(0.0, 40.0)  # one in each
    assert collective(80.0, 1, 8, TWO) == Sent()
    assert passage(80.0, 4, TWO) == Sent(60.0, 0.0)
    assert passage(80.0, 8, TWO) == Sent(30.0, 40.0)
    assert TWO.seconds(Sent(200.0, 10.0)) == 2
    assert days(1000.0, 10, 864.0) == 1


@pytest.mark.parametrize(("stage", "gradients", "weights"), [(0, 2, 0), (1, 2, 1), (2, 6, 1), (3, 3, 6)])
def test_reductions_by_stage(stage: int, gradients: int, weights: int) -> None:
    """Of 3 micro-batches: how often they travel."""
    all_train = Weights(80, 80, 0, 0)
    once = collective(80.0, 8, 1, TWO)
    assert reductions(all_train, stage, 1, 3, TWO) == {"gradients": once * gradients, "weights": once * weights}


def test_spread_experts_are_reduced_over_their_copies() -> None:
    half = Weights(160, 160, 80, 80)
    sent = reductions(half, 1, 4, 1, TWO)["weights"]
    assert sent == collective(80.0, 8, 1, TWO) + collective(20.0, 2, 4, TWO)


def test_a_step_waits_for_what_does_not_fit_beside_its_arithmetic() -> None:
    slow = Weights(8000, 8000, 0, 0)
    options: dict[str, Any] = {"spread": 1, "accumulation": 1, "checkpointing": False}
    two = step(TWO, slow, [], 8 * 500.0 * 3, zero_stage=2, **options)
    assert two.seconds["arithmetic"] == 3
    sent = 8000 / 2 / 4 / 10.0
    assert two.seconds["waiting for links"] == 2 * sent - 3 * 2 / 3
    assert two.seconds["new weights"] == sent
    three = step(TWO, slow, [], 8 * 500.0 * 3, zero_stage=3, **options)
    assert three.total == 3 * sent


def test_spreading_experts_leaves_fewer_of_them_on_a_gpu() -> None:
    path, cluster = CONFIGS / "demo" / "sft.yaml", Cluster(1, 8)
    whole, spread = (plan(path, [f"moe.expert_parallel={size}"], cluster, 80.0) for size in (1, 4))
    freed = round(whole.weights.experts * 3 / 4)
    assert whole.states[2].weights - spread.states[2].weights == freed
    assert spread.states[2].optimizer == whole.states[2].optimizer
    assert spread.states[3] == whole.states[3]
    assert spread.step().seconds["tokens"] > whole.step().seconds["tokens"] == 0
    assert spread.step(competing=True).sent["tokens"].inside > spread.step().sent["tokens"].inside


def test_the_command_says_what_a_cluster_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    command = [
        "plan",
        str(CONFIGS / "phi35_siglip" / "sft.yaml"),
        "--gpus",
        "16",
        "--tokens",
        "1e9",
        "--json",
        str(path),
    ]
    assert main([*command, "moe.expert_parallel=4"]) == 0
    facts = json.loads(path.read_text())
    assert (facts["cluster"]["nodes"], facts["cluster"]["gpus_per_node"]) == (2, 8)
    assert 0 < facts["mfu"] < facts["cluster"]["efficiency"]
    assert facts["steps"]["competition"]["total"] > facts["steps"]["router"]["total"]
    assert "days of router steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "3"], "--nodes: found 3, expected a divisor of --gpus 8"),
        (["--network", "0"], "--network: found 0, expected a number above 0"),
        (["--efficiency", "1.5"], "--efficiency: found 1.5, expected a share above 0, at most 1"),
        (["moe.expert_parallel=3"], "expert_parallel: found 3, expected a divisor of vision.num_experts = 4"),
        (["--gpus", "6", "moe.expert_parallel=4"], "found 4, expected a divisor of the number of ranks, 6"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "phi35_siglip" / "sft.yaml"), "--gpus", "8", *arguments]) == 2
    assert message in capsys.readouterr().err
