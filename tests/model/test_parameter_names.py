"""Checkpoints and adapters with the parameter names of before 0.2.0 are read as those of today."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from llava_compete.model.checkpoint import load_checkpoint, read_weight_headers, save_checkpoint
from llava_compete.model.lora import LoraSettings, add_adapters, merge_adapters
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.config import MoeConfig
from llava_compete.plan.info import describe

# As version 0.1.0 wrote them: tower and projector at the top, the whole causal LM under `language_model`.
BEFORE = (
    (r"^model\.vision_tower", "vision_tower"),
    (r"^model\.multi_modal_projector", "projector"),
    (r"^model\.language_model", "language_model.model"),
    (r"^lm_head", "language_model.lm_head"),
)


def before(name: str) -> str:
    for pattern, replacement in BEFORE:
        name = re.sub(pattern, replacement, name)
    return name


def age(directory: Path) -> None:
    """Rewrite a checkpoint's weights with the names of before."""
    file = directory / "model.safetensors"
    save_file({before(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def test_old_checkpoints_load_describe_upcycle_and_are_saved_with_the_names_of_today(tmp_path: Path) -> None:
    model, processor = tiny_model()
    save_checkpoint(model, processor, tmp_path / "old")
    names = set(load_file(tmp_path / "old" / "model.safetensors"))
    age(tmp_path / "old")
    assert not names & set(load_file(tmp_path / "old" / "model.safetensors"))
    ids = torch.arange(5, 12)[None]
    expected = model.eval()(input_ids=ids).logits
    again, _ = load_checkpoint(tmp_path / "old")
    assert torch.equal(again(input_ids=ids).logits, expected)
    assert set(read_weight_headers(tmp_path / "old")) == names
    assert describe(tmp_path / "old")
    upcycle(tmp_path / "old", tmp_path / "moe", MoeConfig.model_validate({"language": {}}))
    torch.testing.assert_close(load_checkpoint(tmp_path / "moe")[0](input_ids=ids).logits, expected)
    again.save_pretrained(tmp_path / "new")
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == names


def test_old_adapters_merge_as_new_ones(tmp_path: Path) -> None:
    model, processor = tiny_model(moe={"language": {}})
    save_checkpoint(model, processor, tmp_path / "base")
    adapted = add_adapters(model, {"vision": LoraSettings(rank=2), "language": LoraSettings(rank=2)})
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    for adapter in ("new", "old"):
        adapted.save_pretrained(tmp_path / adapter)
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    for key in ("target_modules", "target_parameters"):
        config[key] = [before(name) for name in config[key]]
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {before(name): value for name, value in config[key].items()}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    file, prefix = tmp_path / "old" / "adapter_model.safetensors", "base_model.model."
    old = {prefix + before(name.removeprefix(prefix)): tensor for name, tensor in load_file(file).items()}
    save_file(old, file, {"format": "pt"})
    for adapter in ("new", "old"):
        merge_adapters(tmp_path / adapter, tmp_path / f"merged_{adapter}", tmp_path / "base")
    merged = [load_file(tmp_path / f"merged_{adapter}" / "model.safetensors") for adapter in ("new", "old")]
    plain = load_file(tmp_path / "base" / "model.safetensors")
    assert merged[0].keys() == merged[1].keys() == plain.keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in plain)
    assert any(not torch.equal(merged[0][name], plain[name]) for name in plain if "experts" in name)
