"""One token, as in interactive decoding: the router's sort alone, one product with each matrix of a chosen expert, and
nothing that only a loss or a statistic reads. Operators are counted on a CPU, and on a GPU that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_kit import make_block
from fake_gpu import fake_gpu, move_to_fake_gpu
from operator_kit import OperatorCounts
from torch import Tensor

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.implementations import FUNCTIONS
from llava_compete.moe.terms import ROUTERS

EXPERTS, CHOSEN = 16, 3
SORTS = {"sort", "argsort", "topk", "kthvalue", "searchsorted", "bucketize", "bincount", "unique", "nonzero"}
DISPATCHES = {"index_put", "index_add", "index_copy", "scatter", "scatter_add", "embedding_bag", "_embedding_bag"}
DISPATCHES |= {"_embedding_bag_forward_only", "_grouped_mm", "_grouped_linear", "grouped_linear"}
# What spreads NaN, or looks for it, for the losses to show.
LOOKS_FOR_NAN = {"isnan", "isinf", "isfinite", "ne", "nan_to_num"}
# Routers whose choice or weights are made of probabilities over all slots; the others' have an order and K weights.
READ_PROBABILITIES = ("xmoe", "perturbed_cosine", "bias_balanced")
WITH_IDLE_SLOTS = ("tc_moe", "moe_plus_plus")  # a choice of one runs no expert, and has no product
SCATTERS_ITS_FREE_EXPERTS = "moe_plus_plus"  # weights of one token over its slots, no rows


class Decoding(OperatorCounts):
    """Also how often each matrix of the experts is multiplied with where it lies, and the widths of softmaxes."""

    def __init__(self, block: SparseMoeBlock) -> None:
        super().__init__()
        self.names = {_place(tensor): name for name, tensor in block.experts.named_parameters() if tensor.ndim == 3}
        self.products: dict[str, int] = dict.fromkeys(self.names.values(), 0)
        self.softmax_widths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv"):
            for matrix in (self.names.get(_place(arg)) for arg in args if isinstance(arg, Tensor)):
                if matrix is not None:
                    self.products[matrix] += 1
        if name in ("_softmax", "_log_softmax", "logsumexp"):
            self.softmax_widths.append(args[0].shape[-1])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def among(self, names: set[str]) -> dict[str, int]:
        counted = {name.rstrip("_"): count for name, count in self.counts.items()}
        return {name: count for name, count in counted.items() if name in names}


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def decode(
    router: str, implementation: str, experts: int = EXPERTS, config: dict[str, Any] | None = None, **sizes: Any
) -> tuple[Decoding, SparseMoeBlock]:
    block = make_block(
        router=router,
        num_experts=experts,
        num_experts_per_tok=CHOSEN,
        experts_implementation=implementation,
        sizes=sizes,
        **(config or {}),
    ).eval()
    x = token(block)
    with torch.no_grad(), Decoding(block) as decoding:
        block(x)
    return decoding, block


def token(block: SparseMoeBlock) -> Tensor:
    return torch.linspace(-1, 1, block.hidden_size)[None]


@pytest.mark.parametrize("gated", [{}, {"gated": True, "bias": False, "activation": "silu"}], ids=["plain", "gated"])
@pytest.mark.parametrize("implementation", ["auto", *FUNCTIONS])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_product_with_each_matrix_of_a_chosen_expert_and_no_dispatch(
    router: str, implementation: str, gated: dict[str, Any]
) -> None:
    decoding, _ = decode(router, implementation, **gated)
    assert decoding.among(SORTS) == {"sort": 1}, "the router's, which finds the K best"
    assert decoding.among(DISPATCHES) == ({"scatter": 1} if router == SCATTERS_ITS_FREE_EXPERTS else {})
    products = set(decoding.products.values())
    assert len(products) == 1, decoding.products
    assert products == {CHOSEN} or (router in WITH_IDLE_SLOTS and max(products) < CHOSEN)


@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_is_computed_that_nobody_reads(router: str) -> None:
    decoding, block = decode(router, "auto")
    over_all = [width for width in decoding.softmax_widths if width >= block.router.num_routed]
    assert len(over_all) == (router in READ_PROBABILITIES), decoding.softmax_widths
    assert decoding.among(LOOKS_FOR_NAN) == {}
    assert not block.state.records
    # The block itself adds nothing to its router and its experts.
    x = token(block)
    with torch.no_grad(), OperatorCounts() as parts:
        routing = block.router(x)
        options = {"shared_weight": routing.shared_weight} if routing.shared_weight else {}
        output = block.experts(x, routing.choices_TC, routing.weights_TC, **routing.begun, **options)
        if block.router.free_experts is not None:
            output = output + block.router.free_experts(x, routing.choices_TC, routing.weights_TC)
    assert decoding.counts == parts.counts
    torch.testing.assert_close(block(x), output)


@pytest.mark.parametrize(
    "config",
    [
        {"coupling_coef": 1.0},
        {"competition_output": "router"},
        {"competition_keeps": "input"},
        {"competition_judge": "loss"},
        {"competition_judge": "loss", "competition_answers": "both"},
    ],
    ids=str,
)
def test_what_only_training_has_costs_a_token_nothing(config: dict[str, Any]) -> None:
    plain, _ = decode("competition", "auto")
    decoding, _ = decode("competition", "auto", config=config)
    assert decoding.counts == plain.counts


@pytest.mark.parametrize("router", [router for router in ROUTERS if router not in WITH_IDLE_SLOTS])
def test_operators_do_not_depend_on_the_number_of_experts(router: str) -> None:
    few, many = (decode(router, "grouped_mm", experts)[0] for experts in (EXPERTS, 4 * EXPERTS))
    assert few.counts == many.counts


@pytest.mark.parametrize("router", ROUTERS)
def test_on_a_gpu_one_batched_product_with_each_matrix_of_all_chosen(router: str) -> None:
    block = make_block(router=router, num_experts=EXPERTS, num_experts_per_tok=CHOSEN).bfloat16().eval()
    with fake_gpu(), torch.no_grad():
        move_to_fake_gpu(block)
        x = torch.empty(1, 1, block.hidden_size, dtype=torch.bfloat16, device="cuda")
        with OperatorCounts() as decoding:
            block(x)
    matrices = sum(tensor.ndim == 3 for tensor in block.experts.parameters())
    assert decoding.counts["baddbmm"] == matrices
    assert decoding.counts["sort"] == 1
    assert decoding.counts["index_select"] == 2 * matrices + block.router.factorises, "matrices, biases, halves"
    assert not {"_grouped_mm", "embedding_bag", "index_put", "index_add", "searchsorted"} & set(decoding.counts)
