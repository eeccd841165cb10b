"""Stages with adapters in this process: resume, the merged result, and parts that train in full beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_kit import assert_same_curve, at_step, fail, run_stage_here
from safetensors.torch import load_file, save_file
from stage_kit import stage_config, tiny_moe, write_data

from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import load_for_inference
from llava_compete.model.build import load_checkpoint
from llava_compete.model.lora import merge_adapters
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.config import MoeConfig
from llava_compete.parts import part_of
from llava_compete.train import run
from llava_compete.train.disk_space import Written

FRESH = {"moe": tiny_moe(), "deepspeed": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def _kinds(model: torch.nn.Module) -> set[str]:
    """Names of the classes of peft's base layers."""
    return {type(module).__name__ for name, module in model.named_modules() if name.endswith("base_layer")}


def _tensors(folder: Path) -> list[torch.Tensor]:
    return [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]


def test_lora_resume_equals_straight(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = run_stage_here(
        stage_config("pretrain_align", data, tmp_path / "start", training={"max_steps": 1}, deepspeed=None)
    )

    def stage(name: str, micro: int) -> dict[str, Any]:
        return stage_config(
            "pft",
            data,
            tmp_path / name,
            model={"checkpoint": str(start)},
            trainable={"projector": "full", "language": {"mode": "lora", "lora_rank": 2}},
            training={
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": 8 // micro,
                "save_steps": 4,
            },
            deepspeed=None,
        )

    expected: list[Written] = []
    monkeypatch.setattr(run, "check_space", lambda *arguments: expected.append(arguments[1]))
    straight = run_stage_here(stage("straight", 8))
    checkpoint = max(straight.glob("checkpoint-*"))
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    held = [*_tensors(checkpoint), *(tensor for state in states for tensor in state.values())]
    assert sum(tensor.nbytes for tensor in held) == pytest.approx(expected[0].checkpoint, rel=0.01)
    result = [*_tensors(straight), *_tensors(straight / "adapter")]
    assert sum(tensor.nbytes for tensor in result) == pytest.approx(expected[0].result, rel=0.01)
    at_step(monkeypatch, 5, fail)
    with pytest.raises(KeyboardInterrupt):
        run_stage_here(stage("broken", 2))
    assert_same_curve(straight, run_stage_here(stage("broken", 2)))


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_lora_stage_writes_a_plain_merged_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None
) -> None:
    training = {"max_steps": 2}
    start = run_stage_here(stage_config("pretrain_align", data, tmp_path / "start", training=training, deepspeed=None))
    trainable = {"projector": "full", "language": {"mode": "lora", "lora_rank": 2}}
    model = {"checkpoint": str(start), "quantization": quantization}
    layers: set[str] = set()
    at_step(monkeypatch, 1, lambda callback: layers.update(_kinds(callback.trainer.core_model)))
    tuned = run_stage_here(
        stage_config(
            "pft", data, tmp_path / "lora", model=model, trainable=trainable, training=training, deepspeed=None
        )
    )
    before, after = load_file(start / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"projector", "language"}
    assert (tuned / "adapter" / "adapter_config.json").is_file()
    assert load_checkpoint(tuned)[0].config.stage == "pft"
    assert ("Linear4bit" in layers) == (quantization is not None)


def test_adapters_carry_what_trained_in_full_beside_them(data: Path, tmp_path: Path) -> None:
    """The final adapter and that of a checkpoint, merged or put on for an evaluation, are the stage's own result."""
    training = {"max_steps": 2, "save_steps": 1, "learning_rate": 0.01}
    dense = run_stage_here(
        stage_config("pretrain_align", data, tmp_path / "dense", training={"max_steps": 1}, deepspeed=None)
    )
    start = tmp_path / "start"
    upcycle(dense, start, MoeConfig.model_validate({"language": {}}))
    moe = {"competition_rate": 0.5, "competition_warmup_ratio": 0}
    trainable = {"projector": "full", "language": {"mode": "lora", "lora_rank": 2}}
    config = stage_config("sft", data, tmp_path / "lora", trainable=trainable, training=training, deepspeed=None)
    tuned = run_stage_here(config | {"model": {"checkpoint": str(start)}, "moe": moe})
    expected, before = load_file(tuned / "model.safetensors"), load_file(start / "model.safetensors")
    in_full = [name for name in expected if "projector" in name or name.endswith(".router.weight")]
    assert len(in_full) > 4
    for name in in_full:
        assert not torch.allclose(expected[name], before[name], atol=1e-4), name
    for adapter in (tuned / "adapter", tuned / "checkpoint-2"):
        merge_adapters(adapter, tmp_path / f"merged-{adapter.name}", start)
        merged = load_file(tmp_path / f"merged-{adapter.name}" / "model.safetensors")
        evaluated, _ = load_for_inference(str(start), torch.device("cpu"), adapter=str(adapter))
        for found in (merged, evaluated.state_dict()):
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=f"{adapter.name}: {name}")
    foreign = shutil.copytree(tuned / "adapter", tmp_path / "foreign")
    save_file({"no.such.weight": torch.zeros(2)}, foreign / "trained.safetensors")
    with pytest.raises(UserError, match=r"foreign: trained\.safetensors has 1 unknown, such as no\.such\.weight"):
        load_for_inference(str(start), torch.device("cpu"), adapter=str(foreign))
    with pytest.raises(UserError, match="not an adapter directory"):
        load_for_inference(str(start), torch.device("cpu"), adapter=str(start))
