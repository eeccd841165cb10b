"""Training masks made without a look at values: the loss and gradients of transformers' own masks, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_families import DENSE, family_model
from tiny import tiny_model
from torch import Tensor
from transformers import masking_utils

from llava_compete.data.collator import Collator
from llava_compete.parts import IGNORE_INDEX

LENGTHS = (40, 23, 31)


def batch_of(processor: Any, packed: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(5, 300, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.5, IGNORE_INDEX)
        items.append({"input_ids": ids, "labels": labels, "pixel_values": None, "sample_id": str(number)})
    batch = Collator(processor, pack_to=64 if packed else None)(items)
    return {key: value for key, value in batch.items() if key != "sample_ids"}


def step(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=7, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("looked at values of a mask or of position ids")


def assert_same(model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patches:
        patches.setattr("llava_compete.model.backbone.without_waiting", lambda _, __, given, ___: given)
        expected = step(model, batch)
    with monkeypatch.context() as patches:
        patches.setattr(masking_utils, "fast_all", refuse)
        patches.setattr(masking_utils, "find_packed_sequence_indices", refuse)
        found = step(model, batch)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        tolerance = 1e-5 * float(grad.abs().max())
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", DENSE)
def test_padded_rows_of_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = family_model(family)
    assert_same(model, batch_of(processor, packed=False), monkeypatch)


# A running state would pass from sample to sample: packing such a model is refused (test_own_experts.py).
@pytest.mark.parametrize("family", [name for name in DENSE if name != "qwen3_5_text"])
def test_packed_rows_of_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = family_model(family)
    batch = batch_of(processor, packed=True)
    assert len(batch["input_ids"]) < len(LENGTHS)
    assert_same(model, {**batch, "num_local_sequences": len(LENGTHS)}, monkeypatch)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_checkpointing_recomputes_the_same_and_warns_of_nothing(
    packed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = tiny_model({"language": {}}, tower=None)
    batch = {**batch_of(processor, packed), "num_local_sequences": len(LENGTHS)}
    plain = step(model, batch)
    model.activation_checkpointing_enable()
    caplog.clear()
    recomputed = step(model, batch)
    assert not caplog.records
    torch.testing.assert_close(recomputed[0], plain[0])
    for name, grad in plain[1].items():
        torch.testing.assert_close(recomputed[1][name], grad, msg=name)
