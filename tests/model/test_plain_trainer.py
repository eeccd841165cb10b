"""Other people's training loops: Hugging Face's own Trainer, several forwards before a backward, averaged weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_forward import batch, picture
from tiny import tiny_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

MOE = {"vision": {}, "projector": {}, "language": {}}
ROWS = [
    ("a <image> red circle, and that is all", 1),
    ("two", 0),
    ("<image> <image> what", 2),
    ("how many shapes are there ? two shapes", 0),
]


@pytest.fixture(autouse=True)
def no_cuda_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


class _Losses(Trainer):
    """Keeps the loss of each step, before the step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


@pytest.mark.parametrize("rows_each", [1, 2, 4])
def test_the_total_loss_does_not_depend_on_how_the_trainer_cuts_the_batch(rows_each: int, tmp_path: Path) -> None:
    model, processor = tiny_model(moe=MOE)
    model.routing.competing = frozenset({"vision.0", "language.1"})

    def collate(rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        images = [picture(colour) for text, count in rows for colour in ("red", "lime")[:count]]
        return batch(processor, [text for text, _ in rows], images or None)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows_each,
        gradient_accumulation_steps=4 // rows_each,
        max_steps=1,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = _Losses(model=model, args=arguments, train_dataset=ROWS, data_collator=collate)
    trainer.train()
    items = sum(int((collate([row])["labels"][:, 1:] != -100).sum()) for row in ROWS)
    expected = torch.zeros(())
    fresh, _ = tiny_model(moe=MOE)
    fresh.routing.competing = frozenset({"vision.0", "language.1"})
    for row in ROWS:  # each row alone: its own mean losses, by its share of the supervised tokens
        inputs = collate([row])
        output, share = fresh(**inputs), int((inputs["labels"][:, 1:] != -100).sum()) / items
        expected = expected + share * output.loss.detach()
    assert sum(trainer.losses) == pytest.approx(float(expected), rel=1e-5)


def test_two_forwards_before_one_backward_with_checkpointing() -> None:
    gradients = []
    for enable in (False, True):
        model, processor = tiny_model(moe=MOE)
        if enable:
            model.activation_checkpointing_enable()
        loss = torch.zeros(())
        first = batch(processor, ["a <image> red", "two shapes"], [picture()])
        second = batch(processor, ["a <image> red", "two"], [picture("lime")])
        for inputs, competing in ((first, {"vision.1", "language.0"}), (second, set())):
            model.routing.competing = frozenset(competing)
            loss = loss + model(**inputs, use_cache=False).loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_model_can_be_copied_after_a_step() -> None:
    model, processor = tiny_model(moe=MOE)
    model.activation_checkpointing_enable()
    inputs = batch(processor, ["a <image> red", "two"], [picture()])
    model(**inputs, use_cache=False).loss.backward()
    average = copy.deepcopy(model)
    assert average.routing is not model.routing
    losses = [twin(**inputs, use_cache=False).loss for twin in (model, average)]
    assert torch.equal(*losses)
