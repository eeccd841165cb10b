"""What a block's step asks of a GPU, counted without one: the number of operators does not depend on E, and nothing
sums over repeated rows (operator_kit.py). Eager experts are left out, which are one product an expert by name, and
transformers' `batched_mm`, which copies an expert's matrices for each choice and adds their gradients up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import make_block
from fake_gpu import fake_gpu, move_to_fake_gpu
from operator_counts import count as count_launches
from operator_kit import OperatorCounts, Operators, RepeatedRowsError
from tiny import tiny_model
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from llava_compete.moe import competition as contests
from llava_compete.moe import judged, pairs
from llava_compete.moe.state import TokenGroups
from llava_compete.moe.terms import ROUTERS

SIZES = {"hidden_size": 16, "intermediate_size": 32}
# Of a step in float32 with biases, as a GPU runs it, whose host a launch costs 5 to 15 microseconds.
MOST_OPERATORS = {"router": 90, "competition step": 110, "tc_moe": 130, "moe_plus_plus": 148, "autonomy": 108}
STEPS = [
    *((router, False, implementation) for router in ROUTERS for implementation in ("grouped_mm", "dense")),
    ("competition", True, "grouped_mm"),
]


def count(
    router: str,
    competing: bool,
    implementation: str,
    experts: int,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> tuple[int, int]:
    """Operators of a forward and of a backward of output and auxiliary loss."""
    block = make_block(
        router=router,
        num_experts=experts,
        num_experts_per_tok=3,
        experts_implementation=implementation,
        sizes={**SIZES, **config.pop("sizes", {})},
        **config,
    ).to(dtype)
    block.state.competition_enabled, block.state.competing = True, frozenset({block.name} if competing else ())
    x = torch.randn(2, 32, 16, dtype=dtype, requires_grad=True)
    block.state.begin("language", TokenGroups.from_mask(torch.ones(2, 32)))
    with Operators() as forward, block.state.recording():
        output = block(x)
    cotangent = torch.randn_like(output)
    with Operators() as backward:
        torch.autograd.backward([output, block.state.records[block.name].aux_loss], [cotangent, None])
    return forward.total, backward.total


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pairs, contests, judged):
        monkeypatch.setattr(module, "is_gpu", lambda _: True)


@pytest.mark.parametrize(("router", "competing", "implementation"), STEPS)
def test_the_number_of_operators_does_not_depend_on_the_number_of_experts(
    router: str, competing: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (count(router, competing, implementation, experts) for experts in (4, 64))
    assert few == many
    _as_on_a_gpu(monkeypatch)
    few = count(router, competing, implementation, 4)
    kind = "competition step" if competing else router
    assert sum(few) <= MOST_OPERATORS.get(kind, MOST_OPERATORS["router"])


@pytest.mark.parametrize("sizes", [{"gated": True, "bias": False, "activation": "silu"}, {"output_size": 24}])
@pytest.mark.parametrize("config", [{}, {"affinity": "l2"}, {"competition_keeps": "pre_activations"}])
def test_nor_does_it_for_other_experts_and_competitions(sizes: dict[str, Any], config: dict[str, Any]) -> None:
    config = {**config, "sizes": sizes, "competition_chunk_tokens": 20 if "competition_keeps" in config else None}
    few, many = (count("competition", True, "grouped_mm", experts, **config) for experts in (4, 64))
    assert few == many


@pytest.mark.parametrize(
    "rule", [{"competition_margin": 0.0}, {"competition_contenders": 1}, {"competition_chunk_tokens": 20}], ids=str
)
def test_nor_does_it_where_the_loss_judges(rule: dict[str, Any]) -> None:
    few, many = (count("competition", False, "dense", experts, competition_judge="loss", **rule) for experts in (4, 64))
    # On a CPU the rows of contested experts go through one operator for all of them.
    assert few == many


ON_A_GPU: list[tuple[str, bool, dict[str, Any]]] = [
    *((router, False, {}) for router in ROUTERS),
    ("competition", True, {}),
    ("competition", True, {"competition_keeps": "input", "competition_chunk_tokens": 20}),
    ("competition", True, {"competition_output": "router"}),
    ("competition", False, {"competition_judge": "loss"}),
    ("competition", False, {"competition_judge": "loss", "competition_margin": 0.0}),
    ("competition", False, {"competition_judge": "loss", "competition_answers": "both"}),
    ("softmax", False, {"coupling_coef": 1.0}),
]


@pytest.mark.parametrize(("router", "competing", "config"), ON_A_GPU, ids=str)
def test_nor_for_the_operators_that_a_gpu_runs(
    router: str, competing: bool, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, with sums by gathers and products where a CPU has others: these must not repeat rows either."""
    _as_on_a_gpu(monkeypatch)
    few, many = (count(router, competing, "grouped_mm", experts, torch.bfloat16, **config) for experts in (4, 64))
    assert few == many


def test_inference_computes_nothing_for_statistics() -> None:
    for tokens, most in ((1, 14), (2, 26)):
        block, x = make_block(experts_implementation="grouped_mm", sizes=SIZES), torch.randn(1, tokens, 16)
        with torch.no_grad(), Operators() as operators:
            block(x)
        assert operators.total <= most, operators.counts
        assert operators.counts["sort"] == (1 if tokens == 1 else 2), "the router's, and the tokens' by expert"


@pytest.mark.parametrize("tokens", [1, 8])
def test_decoding_takes_no_more_operators_than_transformers_mixtral_block(tokens: int) -> None:
    """Beside its grouped implementation, as ours is without gradients; its loop over experts takes 42 and more."""
    config = MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    theirs, x = MixtralSparseMoeBlock(config).eval(), torch.randn(tokens, 1, 16)
    torch.nn.init.normal_(theirs.gate.weight)
    gated = {**SIZES, "gated": True, "bias": False, "activation": "silu"}
    ours = make_block(router="softmax", sizes=gated).eval()
    counts = []
    for block in (ours, theirs):
        with torch.no_grad(), OperatorCounts() as operators:
            block(x)
        counts.append(operators.total)
    assert counts[0] <= counts[1] - 4


def test_a_decoded_token_costs_a_mixtures_model_nothing_outside_its_blocks() -> None:
    """Records, losses and statistics are for training: the models differ by what stands in their layers alone."""
    dense, _ = tiny_model(None, tower=None)
    mixture, _ = tiny_model({"language": {"num_experts": 4, "num_experts_per_tok": 2}}, tower=None)
    assert _operators_between_mlps(dense.eval()) == _operators_between_mlps(mixture.eval())


def _operators_between_mlps(model: Any) -> int:
    """Of a decoding step."""
    token, operators, inside = torch.ones(1, 1, dtype=torch.int64), OperatorCounts(), []
    for layer in model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: inside.append(-operators.total))
        layer.mlp.register_forward_hook(lambda *_: inside.append(operators.total))
    with torch.no_grad():
        cache = model(input_ids=token.expand(1, 5), use_cache=True).past_key_values
        with operators:
            model(input_ids=token, past_key_values=cache, use_cache=True)
    assert sum(inside) > 0
    return operators.total - sum(inside)


@pytest.mark.parametrize("experts", [4, 64])
@pytest.mark.parametrize("tokens", [1, 3, 64, 300])
def test_inference_never_waits_for_the_gpu(tokens: int, experts: int) -> None:
    for router in ROUTERS:
        for output_size in (16, 24):
            sizes = {**SIZES, "output_size": output_size}
            block = make_block(router=router, num_experts=experts, sizes=sizes).bfloat16().eval()
            with fake_gpu(), torch.no_grad():
                move_to_fake_gpu(block)
                output = block(torch.empty(1, tokens, 16, dtype=torch.bfloat16, device="cuda"))
            assert output.shape == (1, tokens, output_size)
            assert output.device.type == "cuda"


@pytest.mark.parametrize(
    "repeats",
    [
        lambda x: x[torch.tensor([0, 1, 1])],  # its gradient accumulates
        lambda x: x.index_select(0, torch.tensor([0, 1, 1])),
        lambda x: x.gather(0, torch.tensor([[0, 0], [1, 0], [1, 1]])),
        lambda x: torch.nn.functional.embedding(torch.tensor([0, 1, 1]), x),
    ],
)
def test_repeated_rows_would_be_seen(repeats: Any) -> None:
    x = torch.randn(4, 2, requires_grad=True)
    with pytest.raises(RepeatedRowsError), Operators():
        repeats(x).sum().backward()


def test_distinct_rows_pass() -> None:
    def distinct(x: Tensor) -> Tensor:
        return x[torch.tensor([3, 1])].sum() + x.gather(0, torch.tensor([[0, 2], [1, 0]])).sum()

    x = torch.randn(4, 2, requires_grad=True)
    with Operators():
        distinct(x).backward()


# What a GPU's host launches for one more layer in a micro-batch (operator_counts.py), at most.
LAUNCHES = {
    "softmax": 45,
    "sigmoid": 47,
    "xmoe": 73,
    "perturbed_cosine": 74,
    "shared_softmax": 58,
    "shared_sigmoid": 60,
    "bias_balanced": 50,
    "tc_moe": 84,
    "moe_plus_plus": 101,
    "autonomy": 52,
    "competition": 45,
    "competition step": 75,
}


@pytest.mark.parametrize(("router", "competing"), [*((router, False) for router in ROUTERS), ("competition", True)])
def test_launches_of_a_layer(router: str, competing: bool) -> None:
    few, many = (count_launches(router, competing=competing, layers=layers) for layers in (2, 3))
    assert sum(many) - sum(few) <= LAUNCHES["competition step" if competing else router]
    assert many.records == few.records, "losses and sums of all layers take as many operators as those of two"
