"""What a stage will write: by hand for each kind of engine (real files: test_lora_stage, test_stage_launch)."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from llava_compete.errors import UserError
from llava_compete.train import disk_space
from llava_compete.train.disk_space import Written, check_space, written

FROZEN, TRAINED = 10_000, 2_000


def _arguments(stage: int = 0, **values: Any) -> Any:
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **values)
    if stage:
        arguments.hf_deepspeed_config = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": stage}})
    return arguments


def _model() -> nn.Module:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(100, 100, bias=False), "b": nn.Linear(100, 20, bias=False)})
    model["a"].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("stage", "values", "expected"),
    [
        (0, {}, 4 * 12_000 + 8 * TRAINED),
        (0, {"optim": "adafactor"}, 4 * 12_000),
        (0, {"bf16": True}, 4 * 12_000 + 8 * TRAINED),  # autocast alone
        (0, {"save_only_model": True}, 4 * 12_000),
        (2, {}, 2 * 4 * 12_000 + 12 * TRAINED),
        (2, {"bf16": True}, 2 * 2 * 12_000 + 12 * TRAINED),
        (3, {"bf16": True}, 2 * 12_000 + 2 * FROZEN + 12 * TRAINED),
    ],
)
def test_a_checkpoint_of_full_weights(stage: int, values: dict[str, Any], expected: int) -> None:
    found = written(_model(), _arguments(stage, **values))
    assert found == Written(expected, (2 if stage and values else 4) * 12_000)


@pytest.mark.parametrize(("stage", "copies"), [(0, 8 + 8), (2, 8 + 4 + 12), (3, 8 + 12)])
def test_a_checkpoint_of_adapters_holds_what_trains(stage: int, copies: int) -> None:
    """And peft's own files. A LoRA of a large model was refused for the size of the model."""
    model = get_peft_model(nn.ModuleDict({"a": nn.Linear(100, 100, bias=False)}), LoraConfig(r=3, target_modules=["a"]))
    found = written(model, _arguments(stage))
    assert found == Written(copies * 600, 4 * (10_000 + 600 + 600))


@pytest.mark.parametrize(
    ("steps", "limit", "present", "needed", "all_kept"),
    [
        (500, 2, 0, 30 + 20, 30 + 20),  # one save
        (5_000, 1, 0, 60, 60),  # two at a time
        (5_000, 2, 0, 60, 90),
        (5_000, 2, 2, 30, 30),  # of an earlier start
        (2_000, None, 0, 60, 4 * 30 + 20),
    ],
)
def test_room_is_counted_for_what_is_there_at_a_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: int,
    limit: int | None,
    present: int,
    needed: int,
    all_kept: int,
) -> None:
    found, arguments = Written(30 * 2**30, 20 * 2**30), _arguments(save_steps=500, save_total_limit=limit)
    for number in range(present):
        (tmp_path / f"checkpoint-{number}").mkdir()

    def free(gib: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: SimpleNamespace(free=gib * 2**30))
        check_space(tmp_path, found, arguments, steps)

    with pytest.raises(UserError, match=rf"{needed - 1}\.00 GiB free, training needs about {needed}\.00 GiB"):
        free(needed - 1)
    with caplog.at_level(logging.WARNING, logger=disk_space.__name__):
        free(all_kept)
        assert not caplog.records
        if all_kept > needed:
            free(all_kept - 1)
            assert f"need about {all_kept}.00 GiB" in caplog.text


def test_a_stage_that_saves_nothing_needs_room_for_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    check_space(tmp_path, Written(4 * 2**30, 2**30), _arguments(save_strategy="no"), 100)
    with pytest.raises(UserError, match=r"needs about 2\.00 GiB"):
        check_space(tmp_path, Written(4 * 2**30, 2 * 2**30), _arguments(save_strategy="no"), 100)
