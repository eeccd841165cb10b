"""Regional compilation: layers train alike, and a router's step and a competition are whole graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny import TOWER, tiny_model
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.moe.block import moe_blocks
from llava_compete.train.compiled_layers import compile_layers, refuse_zero_3


@pytest.fixture
def counters() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def gradients(model: Any, batch: dict[str, Tensor], competes: bool) -> dict[str, Tensor]:
    model.zero_grad()
    model.routing.competing = frozenset(moe_blocks(model) if competes else ())
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# A minute on a busy machine: with a tower, whose layers compile too, and with the judgement.
WHOLE = pytest.param({"competition_judge": "loss"}, TOWER, marks=pytest.mark.slow, id="judged by the loss")


@pytest.mark.parametrize(("rule", "tower"), [pytest.param({}, None, id="competition"), WHOLE])
def test_compiled_layers_train_alike_in_whole_graphs(rule: dict[str, Any], tower: Any, counters: Any) -> None:
    layer = {"num_experts": 4, "num_experts_per_tok": 2, **rule}
    moe = {"language": layer} if tower is None else {"vision": layer, "language": layer}
    model, _ = tiny_model(moe, language={"num_hidden_layers": 1}, tower=tower)
    model.train()
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if tower is not None:
        ids[:, 1:17] = model.config.image_token_id
        batch["labels"][:, 1:17] = -100
        batch["pixel_values"] = torch.randn(2, 3, 28, 28)
    plain = [gradients(model, batch, competes) for competes in (False, True)]
    names = list(model.state_dict())
    layers = compile_layers(model, "eager", None)
    assert len(layers) == (1 if tower is None else 1 + len(model.vision_tower.trunk.transformer.resblocks))
    assert list(model.state_dict()) == names
    compiled = [gradients(model, batch, competes) for competes in (False, True)]
    for one, other in zip(plain, compiled, strict=True):
        assert one.keys() == other.keys()
        for name, grad in one.items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] >= len(layers)
    # The judgement is an island of its own in each layer; nothing else stands outside the graphs.
    outside = [reason for reason in counters["graph_break"] if not (rule and "PackedExperts._judged" in reason)]
    assert outside == []


def test_zero_3_is_refused() -> None:
    refuse_zero_3(2)
    with pytest.raises(UserError, match=r"training\.torch_compile: found layers under ZeRO-3"):
        refuse_zero_3(3)
