"""The bias-balanced router against a float64 reference, and its bias over optimizer steps, saves and upcycling."""

from __future__ import annotations

from pathlib import Path

import torch
from block_kit import make_block, run_step
from slow_moe import route
from tiny import tiny_model

from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.layer_config import MoeLayerConfig

ROUTER = "bias_balanced"


def test_choices_by_p_plus_b_weights_by_p_alone() -> None:
    block = make_block(router=ROUTER)
    block.router.bias_steps.copy_(torch.tensor([300, -300, 0, 120]))
    x = torch.randn(1, 60, 12)
    routing = block.router(x[0])
    tensors = {"router.weight": block.router.weight.double(), "router.bias": 0.001 * block.router.bias_steps.double()}
    moved = 0
    for token in range(60):
        _, probs, choices, weights = route("softmax", tensors, x[0, token].double(), 2)
        assert routing.selected_experts_TK[token].tolist() == choices
        torch.testing.assert_close(routing.routing_weights_TK[token].double(), weights, rtol=1e-5, atol=1e-6)
        moved += choices != probs.topk(2).indices.tolist()
    assert moved > 5
    record = run_step(block, x).record
    assert record.aux_loss == 0.001 * record.losses["router_z_loss"]


def test_the_bias_follows_the_loads_and_survives_bfloat16() -> None:
    router = make_block(router=ROUTER).router
    expected = torch.zeros(4, dtype=torch.float64)
    loads = [torch.tensor(load) for load in ([9.0, 1.0, 5.0, 5.0], [8.0, 4.0, 4.0, 4.0], [1.0, 1.0, 1.0, 17.0])]
    for load in loads * 40:
        router.end_step(load)
        expected += 0.001 * torch.sign(load.double().mean() - load.double())
    assert router.bfloat16().bias_steps.dtype == torch.int32
    torch.testing.assert_close(router.bias_E.double(), expected, rtol=1e-6, atol=0)


def test_it_is_upcycled_saved_and_loaded(tmp_path: Path) -> None:
    model, processor = tiny_model()
    save_checkpoint(model, processor, tmp_path / "dense")
    moe = MoeConfig.model_validate({"language": {"router": ROUTER}, "projector": {"router": ROUTER}})
    upcycle(tmp_path / "dense", tmp_path / "moe", moe)
    upcycled, _ = load_checkpoint(tmp_path / "moe")
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(upcycled(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    router = moe_blocks(upcycled)["language.1"].router
    assert router.bias_steps.tolist() == [0, 0, 0, 0]
    router.end_step(torch.tensor([4.0, 0.0, 2.0, 2.0]))
    save_checkpoint(upcycled, processor, tmp_path / "again")
    again, _ = load_checkpoint(tmp_path / "again", dtype=torch.bfloat16)
    assert moe_blocks(again)["language.1"].router.bias_steps.tolist() == [-1, 1, 0, 0]


def test_its_balance_loss_is_off_unless_asked_for() -> None:
    assert MoeLayerConfig(router=ROUTER).balance_coef == 0
    assert MoeLayerConfig(router=ROUTER, balance_coef=0.02).balance_coef == 0.02
    assert MoeLayerConfig(router="softmax").balance_coef == 0.01
