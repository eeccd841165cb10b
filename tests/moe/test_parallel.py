"""A block whose experts are spread over ranks against the same block on one process over all the ranks' tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from block_kit import make_block
from group_kit import of_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_compete.moe import passages
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.parallel import ExpertRanks
from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.state import TokenGroups
from llava_compete.moe.terms import ROUTERS

LENGTH, WIDTH = 5, 12
JUDGED = {"competition_judge": "loss", "competition_margin": 0.0}
GATED = {"gated": True, "bias": False, "activation": "silu", "output_size": 16}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One layer and step; `bias` is added to the tokens' first coordinate, which chooses experts.

    is_dummy: the first rank's row is padding alone, as a dummy picture's.
    """

    config: dict[str, Any] = field(default_factory=dict)
    competing: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)
    bias: float = 0.0
    recomputed: bool = False
    is_dummy: bool = False


ROUTED = {
    router: Case({"router": router, "num_experts_per_tok": 3})
    for router in ROUTERS
    if not ROUTER_CLASSES[router].factorises  # their experts are not spread
}
CASES = {
    **ROUTED,
    "grouped": Case({"experts_implementation": "grouped_mm"}, sizes=GATED),
    "dense": Case({"experts_implementation": "dense"}),
    "one choice": Case({"router": "softmax", "num_experts_per_tok": 1}),
    "all to one expert": Case({"router": "softmax", "num_experts_per_tok": 1}, bias=100.0),
    "contest": Case(competing=True),
    "contest of gated experts": Case({"affinity": "l2"}, competing=True, sizes=GATED),
    "contest with more winners than experts here": Case({"num_experts_per_tok": 3}, competing=True),
    "contest that keeps its input": Case({"competition_chunk_tokens": 4}, competing=True),
    "contest that keeps pre-activations": Case({"competition_keeps": "pre_activations"}, competing=True),
    "contest won by one rank": Case(competing=True, bias=100.0),
    "contest that teaches": Case({"competition_output": "router", "competition_chunk_tokens": 4}, competing=True),
    "judged": Case(JUDGED),
    "judged, some asked": Case({**JUDGED, "competition_margin": 0.9, "competition_chunk_tokens": 4}, sizes=GATED),
    "judged, one asked": Case({**JUDGED, "competition_contenders": 1, "competition_baseline": "none"}),
    "judged by means": Case({"competition_judge": "loss", "competition_answers": "mean"}),
    "judged by means for the rest": Case({**JUDGED, "competition_margin": 0.9, "competition_answers": "both"}),
    "a dummy": Case({"router": "softmax"}, is_dummy=True),
    "a dummy in a contest": Case(competing=True, is_dummy=True),
    "a dummy in a judgement": Case({**JUDGED, "competition_answers": "both"}, is_dummy=True),
    "recomputed router step": Case({"router": "softmax"}, recomputed=True),
    "recomputed contest": Case(competing=True, recomputed=True),
    "recomputed judgement": Case({**JUDGED, "competition_answers": "both"}, recomputed=True),
}


def make(case: Case) -> SparseMoeBlock:
    block = make_block(sizes=case.sizes, **case.config)
    with torch.no_grad():
        if case.config.get("competition_judge"):
            block.router.weight.mul_(0.1)  # or nobody but the chosen is contested
            said_EP = torch.randn(4, case.sizes.get("output_size", WIDTH) + 1)
            said_EP[:, -1] = torch.tensor([3.0, 1.0, 2.0, 0.0])
            block.experts.answer_means.end_step(said_EP)
        if case.bias:
            block.router.weight[:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
            block.experts.up[:2, :, 0] = 1
            block.experts.down_proj[:2] = block.experts.down_proj[:2].abs()
    return block


def data(case: Case, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens [B, N, D] and mask of each rank; the ranks have different numbers of rows."""
    x = torch.randn(2 * ranks + 1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    x[..., 0] += case.bias
    mask = torch.ones(x.shape[:2])
    mask[0, 0 if case.is_dummy else 3 :] = 0
    rows = [1, *[2] * (ranks - 2), 2 * ranks + 1 - 2 * (ranks - 2) - 1]
    return list(zip(x.split(rows), mask.split(rows), strict=True))


def step(block: SparseMoeBlock, x: Tensor, mask: Tensor, sequences: int, case: Case) -> dict[str, Tensor]:
    """Forward and backward of the outputs' squares and the auxiliary loss, enlarged: its coefficients are small."""
    state = block.state
    state.competition_enabled, state.competing = True, frozenset({block.name} if case.competing else ())
    x = x.clone().requires_grad_()
    through: Callable[..., Tensor] = block
    if case.recomputed:
        contexts = state.checkpoint_contexts

        def through(x: Tensor) -> Tensor:
            return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    state.begin("language", TokenGroups.from_mask(mask, sequences))
    with state.recording():
        output = through(x)
    aux_loss = state.records[block.name].aux_loss
    loss = (output.square().sum(-1) * mask).sum() / 50 + 50 * aux_loss
    loss.backward()
    found = {f"grad {name}": parameter.grad for name, parameter in block.named_parameters()}
    record = state.records[block.name]
    found |= {"output": output.detach(), "grad x": x.grad, "loss": loss.detach(), "sums": record.metrics.vector()}
    return found | {f"answers {name}": sums for name, sums in state.answers.items()}


def together(case: Case, ranks: int) -> dict[str, Tensor]:
    """On one process."""
    x, mask = (torch.cat(column) for column in zip(*data(case, ranks), strict=True))
    return step(make(case), x, mask, len(x), case)


def spread(case: Case, ranks: int, rank: int) -> dict[str, Tensor]:
    """This rank's part; sums over ranks where a rank has a part of the sum."""
    block, mine = make(case), data(case, ranks)
    experts = ExpertRanks(block.config.num_experts, dist.group.WORLD)
    block.experts.spread(experts)
    found = step(block, *mine[rank], sum(len(x) for x, _ in mine), case)
    for name, tensor in found.items():
        if name in ("loss", "sums") or name.startswith(("answers", "grad router")):
            dist.all_reduce(tensor)
    return found


@pytest.mark.parametrize("name", ["all to one expert", "contest won by one rank"])
def test_cases_that_send_all_tokens_to_one_rank_do(name: str) -> None:
    load_E = together(CASES[name], 2)["sums"][1:5]
    assert load_E[:2].sum() == load_E.sum() > 0


def watched(rank: int) -> list[str]:
    """What one rank begins, waits for and computes in a step of a shared router, in order."""
    found: list[str] = []
    begin, wait = passages.Flight.__init__, passages.Flight.wait

    def begins(self: passages.Flight, rows: Tensor, *where: Any) -> None:
        begin(self, rows, *where)
        found.append("begin")

    def waits(self: passages.Flight) -> Tensor:
        found.append("wait")
        return wait(self)

    def computes(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append("product")
        output.register_hook(lambda _: found.append("gradient"))

    case = Case({"router": "shared_softmax", "num_experts_per_tok": 3})
    block, mine = make(case), data(case, 2)
    block.experts.spread(ExpertRanks(4, dist.group.WORLD))
    block.experts.act_fn.register_forward_hook(computes)
    passages.Flight.__init__, passages.Flight.wait = begins, waits  # type: ignore[method-assign]
    step(block, *mine[rank], 5, case)
    return found


def test_the_shared_expert_runs_while_rows_travel() -> None:
    """On both ways, forwards and backwards; between the two run the experts that rows have come to."""
    forwards = ["begin", "product", "wait", "product", "begin", "product", "wait"]
    backwards = ["begin", "gradient", "wait", "gradient", "begin", "gradient", "wait"]
    for found in of_ranks(2, watched):
        assert found == forwards + backwards


def errors(case: Case, ranks: int, parts: list[dict[str, Tensor]]) -> dict[str, float]:
    expected, found = together(case, ranks), {}
    assert expected.keys() == parts[0].keys()
    for name in expected:
        pieces = [part[name] for part in parts]
        whole = name.startswith("grad experts") or name in ("output", "grad x")
        found[name] = torch.cat(pieces) if whole else pieces[0]
    return {
        name: float((found[name] - right).norm() / right.norm().clamp(min=1e-6)) for name, right in expected.items()
    }


@pytest.fixture(scope="module", params=[2, 4])
def parts(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank found in every case: they are forked once. Four hold one expert each."""
    ranks: int = request.param
    return of_ranks(ranks, lambda rank: {name: spread(case, ranks, rank) for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_outputs_losses_and_gradients_are_those_of_one_process(
    parts: list[dict[str, dict[str, Tensor]]], name: str
) -> None:
    found = errors(CASES[name], len(parts), [part[name] for part in parts])
    assert max(found.values()) <= TOLERANCE, found
