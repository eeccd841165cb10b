"""Every way to run the chosen experts gives eager's numbers and gradients, at all widths and shapes of experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_kit import largest_error, make_block, run_step
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from llava_compete.errors import UserError
from llava_compete.moe import competition, pairs
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.implementations import (
    FUNCTIONS,
    Function,
    check_kernel,
    choose,
    dense,
    eager,
    grouped,
    one_token,
)
from llava_compete.moe.terms import ROUTERS

OURS = ("grouped_mm", "dense")
SIZES = {"hidden_size": 16, "intermediate_size": 32}


WIDTHS = [*itertools.product(OURS, (16, 24)), ("batched_mm", 16)]  # transformers' functions need O = D


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("router", ["softmax", "shared_softmax"])
@pytest.mark.parametrize(("implementation", "output_size"), WIDTHS)
def test_implementations_agree(implementation: str, router: str, output_size: int, bias: bool, gated: bool) -> None:
    sizes = {**SIZES, "gated": gated, "bias": bias, "activation": "silu", "output_size": output_size}
    x = torch.randn(2, 9, 16)
    config = {"router": router, "num_experts": 5, "num_experts_per_tok": 3, "sizes": sizes}
    expected = run_step(make_block(experts_implementation="eager", **config), x)
    other = run_step(make_block(experts_implementation=implementation, **config), x)
    torch.testing.assert_close(other.output, expected.output)
    assert largest_error(other.grads, expected.grads) < 1e-5


@pytest.mark.parametrize("router", ["softmax", "shared_softmax"])
@pytest.mark.parametrize("implementation", ["eager", *OURS])
@pytest.mark.parametrize("frozen", ["experts.up_proj", "experts.down_proj_bias", "router.weight", "experts"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(implementation: str, frozen: str, router: str) -> None:
    block = make_block(router=router, num_experts_per_tok=3, experts_implementation=implementation, sizes=SIZES)
    x = torch.randn(2, 9, 16)
    expected = run_step(block, x).grads
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    step = run_step(block, x)
    assert not any(name.startswith(frozen) for name in step.grads)
    assert largest_error(step.grads, {name: expected[name] for name in step.grads}) < 1e-6


@pytest.mark.parametrize(
    ("implementation", "competing"), [("eager", False), ("grouped_mm", False), ("dense", False), ("auto", True)]
)
def test_of_frozen_experts_neither_tokens_nor_hidden_states_are_kept(implementation: str, competing: bool) -> None:
    """As autograd does it for a linear layer; their gradients alone would read them."""
    kept = []
    for trains in (True, False):
        block = make_block(experts_implementation=implementation, sizes=SIZES)
        block.experts.requires_grad_(trains)
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            run_step(block, torch.randn(2, 9, 16), competing=competing)
        kept.append(sum(storages.values()))
    assert kept[0] - kept[1] >= 2 * 18 * (16 + 32), "the two chosen experts' rows"


@pytest.mark.parametrize("implementation", ["eager", *OURS, "batched_mm"])
def test_expert_without_tokens_has_a_gradient_of_zeros(implementation: str) -> None:
    block = make_block(experts_implementation=implementation, sizes=SIZES)
    x = torch.rand(2, 9, 16)
    with torch.no_grad():
        block.router.weight[3] = -9.0
    step = run_step(block, x)
    assert step.record.metrics.load_E[3] == 0
    for name, parameter in block.experts.named_parameters():
        assert (step.grads[f"experts.{name}"][3] == 0).all(), name
        assert (step.grads[f"experts.{name}"][:3] != 0).any(), name
        assert parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("competing", [False, True])
def test_what_a_gpu_runs_gives_a_cpus_numbers(
    competing: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make_block(experts_implementation="grouped_mm", num_experts_per_tok=3, sizes=SIZES).to(dtype)
    x = torch.randn(2, 9, 16).to(dtype)
    expected = run_step(block, x, competing=competing)
    monkeypatch.setattr(pairs, "is_gpu", lambda _: True)
    monkeypatch.setattr(competition, "is_gpu", lambda _: True)
    step = run_step(block, x, competing=competing)
    limit = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(step.output, expected.output, rtol=limit, atol=limit)
    grads = [{name: grad.float() for name, grad in found.grads.items()} for found in (step, expected)]
    assert largest_error(*grads) < limit


@pytest.mark.parametrize("implementation", ["eager", *OURS])
def test_bfloat16_is_near_float32(implementation: str) -> None:
    sizes = {**SIZES, "output_size": 24}
    block = make_block(experts_implementation=implementation, sizes=sizes).bfloat16()
    exact = make_block(experts_implementation="eager", sizes=sizes)
    exact.load_state_dict(block.state_dict())
    x = torch.randn(2, 9, 16).bfloat16()
    ours, theirs = run_step(block, x), run_step(exact, x.float())
    assert ours.output.dtype == torch.bfloat16
    assert largest_error({"output": ours.output.float()}, {"output": theirs.output}) < 0.01
    grads = {name: grad.float() for name, grad in ours.grads.items()}
    assert largest_error(grads, theirs.grads) < 0.02


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("output_size", [16, 24])
def test_without_gradients_few_tokens_equal_rows_of_many(output_size: int, bias: bool, gated: bool) -> None:
    """One token has a way of its own, grouped products another than with gradients."""
    sizes = {**SIZES, "gated": gated, "bias": bias, "activation": "silu", "output_size": output_size}
    config = {"num_experts": 5, "num_experts_per_tok": 3, "sizes": sizes}
    for router in ("softmax", "shared_sigmoid"):
        x = torch.randn(6, 16)
        expected = make_block(router=router, experts_implementation="eager", **config)(x)
        for implementation in ("eager", *OURS):
            block = make_block(router=router, experts_implementation=implementation, **config)
            with torch.no_grad():
                torch.testing.assert_close(block(x), expected)
                for row in range(6):
                    torch.testing.assert_close(block(x[row : row + 1]), expected[row : row + 1])


def chosen(block: SparseMoeBlock, tokens: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Function:
    """The function that a call of the block's experts takes."""
    experts = block.experts
    num_choices = block.config.num_experts_per_tok
    return choose(experts.implementation, experts._weights(dtype), tokens, num_choices, torch.device(device))


def test_the_choice_of_an_implementation() -> None:
    odd, even = {"hidden_size": 20, "intermediate_size": 30}, {**SIZES, "output_size": 24}
    assert chosen(make_block(sizes=even), 5) is eager
    assert chosen(make_block(sizes=even), 5, "cuda") is grouped
    assert chosen(make_block(sizes=odd), 5, "cuda") is dense
    assert chosen(make_block(sizes=even), 5, "cuda", torch.float32) is dense, "torch has no grouped kernel for float32"
    explicit = {"experts_implementation": "grouped_mm"}
    assert chosen(make_block(sizes=odd, **explicit), 5) is eager
    assert chosen(make_block(sizes=even, **explicit), 5) is grouped


@torch.no_grad()
def test_the_choice_of_an_implementation_at_inference() -> None:
    few, many = make_block(sizes=SIZES), make_block(num_experts=64, sizes=SIZES)
    assert chosen(few, 5) is chosen(few, 500) is chosen(few, 500, "cuda") is grouped
    assert chosen(few, 1, "cuda") is chosen(few, 32, "cuda") is dense, "nearly all experts are read"
    assert chosen(many, 64, "cuda") is dense
    assert chosen(many, 63, "cuda") is grouped
    assert chosen(many, 1, "cuda") is one_token
    for implementation in ("auto", *FUNCTIONS):
        assert chosen(make_block(experts_implementation=implementation, sizes=SIZES), 1) is one_token


STEPS = [*((router, False) for router in ROUTERS), ("competition", True)]


@pytest.mark.parametrize("implementation", OURS)
@pytest.mark.parametrize(("router", "competing"), STEPS)
def test_bfloat16_keeps_no_float32_row_of_a_choice(router: str, competing: bool, implementation: str) -> None:
    """Routing weights multiply in the activations' dtype, and routers keep tokens in theirs. In float32 a step keeps
    numbers by expert; the output, [T, O], is this test's loss's."""
    block = make_block(router=router, num_experts_per_tok=3, experts_implementation=implementation, sizes=SIZES)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.extend([tensor.numel()] if tensor.dtype == torch.float32 else [])
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run_step(block.bfloat16(), torch.randn(2, 9, 16).bfloat16(), competing=competing)
    assert max(kept) <= 2 * 9 * 16, "of 3 choices each would be three times as much"


@pytest.mark.parametrize("gated", [False, True])
def test_the_flop_counter_sees_the_grouped_products(gated: bool) -> None:
    """As many as K dense MLPs, and a little for the bias's columns."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "gated": gated, "activation": "silu"}
    block = make_block(experts_implementation="grouped_mm", sizes=sizes)
    with FlopCounterMode(display=False) as counter:
        run_step(block, torch.randn(2, 64, 64))
    dense = 3 * 2 * (2 * 128) * 96 * 64 * (3 if gated else 2)
    assert dense <= counter.get_total_flops() < 1.15 * dense


def test_a_kernel_that_is_not_there_is_an_error_of_one_line() -> None:
    gated = {**SIZES, "gated": True, "bias": False, "activation": "silu"}
    block = make_block(experts_implementation="sonicmoe", sizes=gated)
    with pytest.raises(UserError, match="experts_implementation: 'sonicmoe' cannot run here") as raised:
        block(torch.randn(2, 9, 16))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError) as before:
        check_kernel("sonicmoe")
    assert str(before.value) == str(raised.value)
    with pytest.raises(UserError, match="'deepgemm' cannot run here"):
        check_kernel("deepgemm")
    for implementation in ("auto", *FUNCTIONS, "batched_mm"):
        check_kernel(implementation)
    deepgemm = make_block(experts_implementation="deepgemm", sizes=gated)
    with pytest.raises(UserError, match="'deepgemm' has no gradients"):
        deepgemm(torch.randn(2, 9, 16))
    with torch.no_grad(), pytest.raises(UserError, match="experts_implementation: 'deepgemm' cannot run here"):
        deepgemm(torch.randn(2, 9, 16))
    wide = make_block(experts_implementation="batched_mm", sizes={**SIZES, "output_size": 24})
    with pytest.raises(UserError, match="16 in and 24 out"):
        wide(torch.randn(2, 9, 16))
