"""The head at labelled positions alone: the loss and gradients of all logits, in every family and packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_families import DENSE, family_model
from tiny import tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llava_compete.data.collator import Collator
from llava_compete.parts import IGNORE_INDEX
from llava_compete.train.held_out import validation_loss

LENGTH = 24


def items(supervised: float, lengths: tuple[int, ...] = (LENGTH, 17, 9)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for number, length in enumerate(lengths):
        ids = torch.randint(5, 300, (length,), generator=generator)
        unlabelled = torch.rand(length, generator=generator) >= supervised
        labels = ids.masked_fill(unlabelled, IGNORE_INDEX)
        result.append({"input_ids": ids, "labels": labels, "pixel_values": None, "sample_id": str(number)})
    return result


def step(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients."""
    model.zero_grad()
    output = model(**{key: value for key, value in batch.items() if isinstance(value, Tensor)}, num_items_in_batch=7)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits, grads


def assert_same(model: Any, batch: dict[str, Any]) -> None:
    everywhere = step(model, {key: value for key, value in batch.items() if key != "label_positions"})
    where_labelled = step(model, batch)
    rows, length = batch["input_ids"].shape
    assert everywhere[1].shape[:2] == (rows, length)
    assert where_labelled[1].shape[:2] == (1, len(batch["label_positions"]))
    torch.testing.assert_close(where_labelled[1][0], everywhere[1].flatten(0, 1)[batch["label_positions"]])
    torch.testing.assert_close(where_labelled[0], everywhere[0])
    assert where_labelled[2].keys() == everywhere[2].keys()
    for name, grad in everywhere[2].items():
        torch.testing.assert_close(
            where_labelled[2][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name
        )


@pytest.mark.parametrize("family", DENSE)
def test_loss_and_gradients_are_those_of_all_logits(family: str) -> None:
    """Among them soft-capped and scaled logits: Gemma 2, Cohere, Granite."""
    model, processor = family_model(family)
    assert_same(model, Collator(processor)(items(0.3)))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_experts_and_packing_change_nothing(packed: bool) -> None:
    model, processor = tiny_model({"language": {}}, tower=None)
    model.routing.competing = frozenset({"language.1"})
    batch = Collator(processor, pack_to=32 if packed else None)(items(0.3))
    if packed:
        batch["num_local_sequences"] = 3
    assert_same(model, batch)


def test_without_a_label_the_head_still_runs_and_adds_nothing() -> None:
    model, processor = tiny_model(tower=None)
    called = []
    model.get_output_embeddings().register_forward_hook(lambda *call: called.append(call[2].shape))
    for rows in (items(0.0), []):
        batch = Collator(processor)(rows)
        assert batch["label_positions"].tolist() == [0]
        loss, _, grads = step(model, batch)
        assert float(loss) == 0
        assert set(grads) == {name for name, _ in model.named_parameters()}
        assert all(not grad.any() for grad in grads.values())
    assert [shape[:2] for shape in called] == [(1, 1), (1, 1)]


def test_positions_are_found_on_the_host_and_precede_their_labels() -> None:
    _, processor = tiny_model(tower=None)
    batch = Collator(processor)(items(0.3))
    rows, columns = torch.nonzero(batch["labels"] != IGNORE_INDEX, as_tuple=True)
    assert (columns > 0).all()  # nothing precedes the first token
    assert batch["label_positions"].tolist() == (rows * LENGTH + columns - 1).tolist()


def test_the_products_of_other_positions_are_saved() -> None:
    model, processor = tiny_model(tower=None, language={"vocab_size": 2048})
    batch = Collator(processor)(items(0.2))
    counts = []
    for keys in (batch, {key: value for key, value in batch.items() if key != "label_positions"}):
        with FlopCounterMode(display=False) as counter:
            step(model, keys)
        counts.append(counter.get_total_flops())
    vocabulary, width = model.get_output_embeddings().weight.shape
    saved = batch["input_ids"].numel() - len(batch["label_positions"])
    assert counts[1] - counts[0] == 6 * saved * vocabulary * width


class HeldOut:
    """Rows of one source, as `validation_loss` reads them."""

    source_names = ("all",)

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.sources = self.modalities = np.zeros(len(rows), dtype=np.int8)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def image_filler(self) -> None:
        """No row has an image."""


def test_validation_asks_for_labelled_positions_and_finds_the_same_loss() -> None:
    model, processor = tiny_model(tower=None)
    rows, collate, sizes = HeldOut(items(0.3)), Collator(processor), []
    model.get_output_embeddings().register_forward_hook(lambda *call: sizes.append(call[2].shape[:2].numel()))

    def everywhere(batch: Any) -> dict[str, Any]:
        return {key: value for key, value in collate(batch).items() if key != "label_positions"}

    options: dict[str, Any] = {"batch_size": 2, "device": torch.device("cpu")}
    found = validation_loss(model, rows, collate, **options)
    assert found == pytest.approx(validation_loss(model, rows, everywhere, **options))
    assert sizes[0] + sizes[1] == found["eval_tokens"] < sizes[2] + sizes[3]
