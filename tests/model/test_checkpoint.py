"""Checkpoint directories: self-contained, strict, bit-equal after a reload; every kind of damage is one clear error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_forward import picture
from tiny import TOWER, tiny_model
from tower_kit import ROTARY, TIMM
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)

from llava_compete.errors import UserError
from llava_compete.model import LlavaCompeteConfig, LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor
from llava_compete.model.build import load_checkpoint, save_checkpoint

MOE = {"vision": {}, "projector": {}, "language": {}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(*tiny_model(moe=MOE), tmp_path / "saved")
    return tmp_path / "saved"


def run(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(text=["a <image> red"], images=[picture()], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"tower": {**TOWER, "quick_gelu": True}, "scales": (1, 2), "select": "cls_patch", "feature_layer": -1},
        {"tower": {**TOWER, "vision_cfg": {**TOWER["vision_cfg"], "ls_init_value": 0.1}}},
        {"tower": TIMM, "preprocess": {"resize_mode": "pad", "interpolation": "bilinear"}},
        {"tower": ROTARY},
        {"language": {"tie_word_embeddings": True}},
        {"projector": "mlp3x_gelu"},
        {"projector": "linear"},
    ],
    ids=[
        "plain",
        "quick-gelu-scales-class",
        "layer-scale",
        "timm",
        "rotary",
        "tied",
        "deep-projector",
        "linear-projector",
    ],
)
def test_reload_gives_bit_equal_pixels_and_logits(section: dict[str, Any], tmp_path: Path) -> None:
    model, processor = tiny_model(**section)
    with torch.no_grad():
        for parameter in model.vision_tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_checkpoint(model, processor, tmp_path)
    again, processor_again = load_checkpoint(tmp_path)
    image = picture("blue", (31, 57))
    assert torch.equal(
        processor(text="<image>", images=image, return_tensors="pt")["pixel_values"],
        processor_again(text="<image>", images=image, return_tensors="pt")["pixel_values"],
    )
    assert torch.equal(run(model, processor), run(again, processor_again))
    assert again.config.vision_config == model.config.vision_config
    ties = {id(again.get_input_embeddings().weight), id(again.get_output_embeddings().weight)}
    assert len(ties) == (1 if section.get("language") else 2)


def test_auto_classes_and_a_text_only_model(saved: Path, tmp_path: Path) -> None:
    assert type(AutoConfig.from_pretrained(saved)) is LlavaCompeteConfig
    assert type(AutoProcessor.from_pretrained(saved)) is LlavaCompeteProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(saved)) is LlavaCompeteForConditionalGeneration
    model, processor = tiny_model(tower=None, moe={"language": {}})
    save_checkpoint(model, processor, tmp_path / "text")
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    _, loaded = load_checkpoint(tmp_path / "text")
    inputs = loaded(text=["how many"], return_tensors="pt")
    assert torch.equal(causal.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert causal.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert loaded.image_processor is None


def test_the_directorys_name_decides_nothing(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "llava-lora-mpt-moe-v1.5-7b")
    assert torch.equal(run(*load_checkpoint(saved)), run(*load_checkpoint(tmp_path / "llava-lora-mpt-moe-v1.5-7b")))


def test_missing_and_unexpected_keys_are_errors(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    key = "model.language_model.layers.1.mlp.experts.down_proj"
    save_file(
        {name: value for name, value in weights.items() if name != key}, saved / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=f"weights do not fit config.json: missing {key}"):
        load_checkpoint(saved)
    with pytest.raises(UserError, match=f"missing {key}"):
        AutoModelForImageTextToText.from_pretrained(saved)
    save_file(
        {**weights, "model.multi_modal_projector.extra": torch.zeros(2)}, saved / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"unexpected model\.multi_modal_projector\.extra"):
        load_checkpoint(saved)
    save_file({**weights, key: torch.zeros(2, 2)}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"mismatched .*down_proj \[2, 2\] \(expected \[4, 32, 48\]\)"):
        AutoModelForImageTextToText.from_pretrained(saved)


def test_damaged_and_foreign_directories(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint directory"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a checkpoint directory \(it has no config.json\)"):
        load_checkpoint(tmp_path)
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged"):
        load_checkpoint(saved)
    with pytest.raises(UserError, match="saved: truncated or damaged"):
        AutoModelForImageTextToText.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_checkpoint(saved)
    (saved / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="model type 'llava', expected 'llava_compete'"):
        load_checkpoint(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a valid JSON object"):
        load_checkpoint(saved)


def test_sharded_and_missing_shard(tmp_path: Path) -> None:
    model, processor = tiny_model()
    save_checkpoint(model, processor, tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert torch.equal(run(*load_checkpoint(tmp_path)), run(model, processor))
    (tmp_path / files[0]).unlink()
    with pytest.raises(UserError, match=f"{files[0]}: missing"):
        load_checkpoint(tmp_path)


def test_the_umask_says_who_may_read_the_weights(tmp_path: Path) -> None:
    """safetensors makes its files for their owner alone, and a checkpoint beside them would be of no use to a group."""
    before = os.umask(0o027)
    try:
        save_checkpoint(*tiny_model(), tmp_path, max_shard_size="100KB")
    finally:
        os.umask(before)
    files = list(tmp_path.iterdir())
    assert sum(file.suffix == ".safetensors" for file in files) > 1
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o640" for file in files}


def test_tied_tensors_are_stored_once_also_when_gathered(tmp_path: Path) -> None:
    model, processor = tiny_model(language={"tie_word_embeddings": True})
    gathered = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}  # as ZeRO-3 does
    save_checkpoint(model, processor, tmp_path, state_dict=gathered)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(run(*load_checkpoint(tmp_path)), run(model, processor))


def test_precision_and_device_map(saved: Path, tmp_path: Path) -> None:
    model, processor = load_checkpoint(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(run(model, processor)).all()
    placed, _ = load_checkpoint(saved, device_map="auto")
    assert torch.equal(run(placed, processor), run(*load_checkpoint(saved)))
    tower = "model.vision_tower"
    parts = {tower: "cpu", "model.multi_modal_projector": "disk", "model.language_model": "disk", "lm_head": "disk"}
    offloaded, _ = load_checkpoint(saved, device_map=parts, offload_folder=tmp_path)
    assert torch.equal(run(offloaded, processor), run(*load_checkpoint(saved)))
    with pytest.raises(UserError, match="vision tower is offloaded to disk"):
        load_checkpoint(saved, device_map={**parts, tower: "disk"}, offload_folder=tmp_path)


def test_grown_vocabulary_survives(tmp_path: Path) -> None:
    model, processor = tiny_model(language={"tie_word_embeddings": True})
    processor.tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    save_checkpoint(model, processor, tmp_path)
    again, tokenizer = load_checkpoint(tmp_path)
    assert again.config.text_config.vocab_size == len(tokenizer.tokenizer)
    assert torch.equal(run(again, tokenizer), run(model, processor))


def test_history_and_moe_settings_are_in_config_json(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "llava_compete"
    assert config["moe"]["language"]["router"] == "competition"
    assert config["vision_config"]["preprocess"]["size"] == 28
    assert (config["stage"], config["parents"]) == ("initial", [])


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantized_loading_spares_the_experts_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: str
) -> None:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' CPU kernel for bf16 takes rows of whole 64-element blocks only.
    saved = tiny_model(moe={"language": {}}, language={"hidden_size": 64, "intermediate_size": 128})
    save_checkpoint(*saved, tmp_path)
    with caplog.at_level("WARNING", logger="llava_compete"):
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True})
        )
    processor = saved[1]
    assert "the packed experts of language stay unquantised" in caplog.text
    kinds: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        kinds.setdefault(name.removeprefix("model.").split(".")[0], set()).add(type(module).__name__)
    quantized = {"Linear4bit", "Linear8bitLt"}
    assert kinds["language_model"] & quantized
    assert not (kinds["vision_tower"] | kinds["multi_modal_projector"]) & quantized
    experts = {name: tensor for name, tensor in saved[0].state_dict().items() if ".experts." in name}
    assert experts
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in experts.items())
    assert torch.isfinite(run(model, processor)).all()
