"""Parts of a checkpoint that three ranks read under ZeRO-3, put together, against a plain load."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from launch_kit import train_launched
from safetensors.torch import load_file
from stage_kit import fresh_model, read_metrics
from tiny import tiny_model
from torch import Tensor

from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.model.checkpoint import read_weight_headers
from llava_compete.model.lora import TRAINED
from llava_compete.model.unread import load_unread
from llava_compete.parts import Part
from llava_compete.train import streaming
from llava_compete.train.adapters import with_adapters
from llava_compete.train.config import PartTraining
from llava_compete.train.sharded_start import is_unread, partition
from llava_compete.train.starting_point import HANDOVER

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("moe", "model")]
from group_kit import of_ranks
from start_kit import named, save_language_model, save_tower

RANKS = 3
ADAPTED: dict[Part, PartTraining] = {"vision": PartTraining(mode="lora"), "language": PartTraining(mode="lora")}
CONFIG: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "experts": {"moe": {"vision": EXPERTS, "projector": EXPERTS, "language": {**EXPERTS, "router": "bias_balanced"}}},
    "tied": {"language": {"tie_word_embeddings": True}},
}


def parts(directory: Path, half: bool, rank: int) -> Any:
    """The model of which this rank has its part alone."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.manual_seed(rank if rank else 0)  # what is in no file is rank 0's
    found = load_unread(directory, torch.float32)
    assert found is not None
    model = with_adapters(found[0], ADAPTED)
    assert is_unread(model)
    partition(model, {**CONFIG, "bf16": {"enabled": half}})
    assert not is_unread(model)
    return model


def whole(directory: Path, half: bool, rank: int) -> dict[str, Any]:
    """The model of all ranks' parts, and how many numbers this one holds."""
    model = parts(directory, half, rank)
    held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    values: dict[str, Any] = {**dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().clone()
    return {"held": held, **values}


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param.split()[0])
    save_checkpoint(*tiny_model(**KINDS[request.param]), path)
    return path


@cache
def plain(directory: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = with_adapters(load_checkpoint(directory)[0], ADAPTED)
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


@pytest.mark.parametrize("half", [False, True])
def test_parts_of_all_ranks_are_the_plain_load(directory: Path, half: bool) -> None:
    ranks = of_ranks(RANKS, lambda rank: whole(directory, half, rank))
    expected = plain(directory)
    total = sum(tensor.numel() for name, tensor in expected.items() if not name.endswith(("inv_freq", "bias_steps")))
    for found in ranks:
        assert found.pop("held") <= total / RANKS + len(expected)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            assert torch.equal(found[name], tensor.to(torch.bfloat16) if half and is_parameter else tensor), name


def saved(directory: Path, half: bool, out: Path, rank: int) -> None:
    model = parts(directory, half, rank)
    wrong = [name for name, one in streaming._held(model) if (one.whole() is None) != (rank > 0)]
    assert not wrong
    streaming.stream_trained(model, dict(model.named_parameters()), out, 2**14)


@pytest.mark.parametrize("half", [False, True])
def test_parts_are_joined_on_rank_0_alone_and_saved(directory: Path, half: bool, tmp_path: Path) -> None:
    of_ranks(RANKS, lambda rank: saved(directory, half, tmp_path, rank))
    found, expected = read_weight_headers(tmp_path, TRAINED), plain(directory)
    parameters = {name for name, tensor in expected.items() if isinstance(tensor, torch.nn.Parameter)}
    assert found.keys() == parameters
    for name, facts in found.items():
        assert torch.equal(facts.whole(), expected[name].to(torch.bfloat16) if half else expected[name]), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_stage_that_began_with_parts_goes_on_as_if_it_had_not_stopped(
    data: Path, reference: Path, tmp_path: Path, adapted: bool
) -> None:
    """ZeRO-3 from a checkpoint directory, stopped at step 2 of 4."""
    lora = {"mode": "lora", "lora_rank": 2}
    trainable = {"trainable": {"vision": lora, "projector": "full", "language": lora}} if adapted else {}
    changes: dict[str, Any] = {"training": {"max_steps": 4, "save_steps": 2}, "deepspeed": "zero3", **trainable}

    def run(name: str) -> Path:
        return train_launched(data, tmp_path, name, 4, 1, model={"checkpoint": str(reference)}, **changes)

    straight = run("straight")
    shutil.copytree(straight / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = run("again")
    assert (again / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("joined", [False, True], ids=["random", "joined, with adapters"])
def test_a_new_model_that_ranks_read_in_parts_trains_as_one_that_each_built(
    data: Path, tmp_path: Path, joined: bool
) -> None:
    """ZeRO-3 against ZeRO-2, where every rank builds the model whole."""
    model, trainable = fresh_model(), {}
    if joined:
        language, tower = save_language_model(tmp_path / "language"), save_tower(tmp_path / "tower", pickled=False)
        model = named(tower, language).model_dump(mode="json", exclude_unset=True)
        trainable = {"trainable": {"vision": "full", "projector": "full", "language": {"mode": "lora", "lora_rank": 2}}}
        model |= {"chat_template": "plain"}  # of which adapters would not train new tokens
    runs = {
        zero: train_launched(
            *(data, tmp_path, zero, 4, 1),
            **{"stage": "pft", "model": model, "deepspeed": zero, "training": {"max_steps": 2}, **trainable},
        )
        for zero in ("zero2", "zero3")
    }
    for whole, parts in zip(*(read_metrics(out) for out in runs.values()), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    expected, found = (load_file(out / "model.safetensors") for out in runs.values())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert (runs["zero3"] / "config.json").read_bytes() == (runs["zero2"] / "config.json").read_bytes()
    assert not (runs["zero3"] / HANDOVER).exists()
