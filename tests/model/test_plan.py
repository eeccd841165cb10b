"""`plan`: the published size of the paper's recipe, every recipe on the meta device, and agreement with real steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from llava_compete.cli import main
from llava_compete.config import read_yaml
from llava_compete.errors import UserError
from llava_compete.model.config import ModelSection
from llava_compete.model.meta_step import simulate
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.plan import architecture, plan, read_recipe, state_memory

CONFIGS = Path(__file__).parents[2] / "configs"
REAL = sorted(
    path
    for name in ("phi35_siglip", "phi35_siglip_lm", "qwen3_siglip2", "vicuna7b_clip336")
    for path in (CONFIGS / name).glob("*.yaml")
)
MOE = {"vision": {}, "projector": {}, "language": {}}


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses_and_builds_on_the_meta_device(path: Path) -> None:
    recipe = read_recipe(path, [])
    with torch.device("meta"):
        model = LlavaCompeteForConditionalGeneration(recipe.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (recipe.config.moe is not None) == (path.stem in ("upcycle", "sft"))


def test_the_papers_recipe_has_5_1_billion_parameters(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", str(CONFIGS / "phi35_siglip" / "sft.yaml"), "--gpus", "8", "--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert facts["parameters"]["total"] == pytest.approx(5.1e9, rel=0.01)
    assert facts["parameters"]["trainable"] == facts["parameters"]["total"]
    assert facts["parameters"]["parts"]["language"]["total"] == pytest.approx(3.82e9, rel=0.001)
    assert facts["parameters"]["active"] < facts["parameters"]["total"]
    assert facts["bytes_per_gpu"]["zero3"]["total"] < facts["bytes_per_gpu"]["zero0"]["total"] / 7.9
    assert facts["bytes_per_gpu"]["competition_step_extra"] > 0


def tiny(device: str, moe: dict[str, Any] | None, hidden: int = 64) -> LlavaCompeteForConditionalGeneration:
    model, _ = tiny_model(moe=moe, language={"hidden_size": hidden, "intermediate_size": 128, "num_hidden_layers": 3})
    return model if device == "cpu" else model.to("meta")


@pytest.mark.parametrize("moe", [None, {"language": {}}, MOE], ids=["dense", "language", "all"])
@pytest.mark.parametrize("competing", [frozenset(), frozenset({"language.1"})], ids=["router", "competition"])
def test_activations_and_flops_agree_with_a_real_step(moe: Any, competing: frozenset[str]) -> None:
    if competing and moe is None:
        pytest.skip("a dense model has no competition")
    model = tiny("cpu", moe)
    model.routing.competing = competing
    rows, length = 2, 100
    ids = torch.randint(5, 200, (rows, length))
    ids[:, :16] = model.config.image_token_id
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, pixel_values=torch.randn(rows, 3, 28, 28), labels=ids).loss.backward()
    cost = simulate(tiny("meta", moe), rows, length, rows, competing)
    assert cost.activations == pytest.approx(sum(seen.values()), rel=0.15)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_model_states_agree_with_an_optimizer_step() -> None:
    model = tiny("cpu", None)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(5, 200, (2, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    state = state_memory(count, count, torch.float32, 0, 1)
    assert state.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert state.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    measured = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values() if value.ndim)
    assert state.optimizer == measured


def test_demo_recipe_and_missing_checkpoint(tmp_path: Path) -> None:
    result = plan(CONFIGS / "demo" / "pretrain_align.yaml", [], 2, 8)
    assert result.total.total == result.total.trainable
    assert result.largest_micro_batch[2]["with_checkpointing"] > 0
    path = tmp_path / "sft.yaml"
    section = ModelSection(checkpoint=tmp_path / "none")
    with pytest.raises(UserError, match=r"does not exist, and no recipe in .* writes it"):
        architecture(path, section)


def test_frozen_parts_are_not_trainable() -> None:
    path = CONFIGS / "vicuna7b_clip336" / "pretrain_align.yaml"
    assert read_yaml(path)["trainable"]["language"] == "frozen"
    recipe = read_recipe(path, [])
    assert recipe.trainable == {"vision": "frozen", "projector": "full", "language": "frozen"}
