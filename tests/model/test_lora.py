"""LoRA on attention, dense MLPs, packed experts and the tower; merging changes no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_forward import batch, picture
from tiny import tiny_model

from llava_compete.errors import UserError
from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.model.lora import LoraSettings, add_adapters, merge_adapters

ALL = {part: LoraSettings(rank=2, alpha=4) for part in ("vision", "projector", "language")}


@pytest.mark.parametrize("moe", [None, {"vision": {}, "projector": {}, "language": {"layers": [1]}}])
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's remarks on tied embeddings and torch's attention
def test_adapters_learn_and_merge_exactly(moe: dict | None, tmp_path: Path) -> None:
    model, processor = tiny_model(moe=moe)
    save_checkpoint(model, processor, tmp_path / "base")
    model, processor = load_checkpoint(tmp_path / "base")
    adapted = add_adapters(model, ALL).train()
    inputs = batch(processor, ["a <image> red", "how many shapes"], [picture()])
    before = adapted(**inputs).logits.detach()
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    assert all(any(part in name for name in names) for part in ("vision_tower", "projector", "self_attn", "mlp"))
    assert (moe is not None) == any("experts" in name for name in names)
    assert not any("router" in name or "lm_head" in name for name in names)
    optimizer = torch.optim.SGD(trainable, lr=10.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**inputs).loss.backward()
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        learned = adapted(**inputs).logits
    assert not torch.allclose(learned, before, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_checkpoint(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, learned, rtol=0, atol=1e-5)
    assert merged.config.stage == "merge"
    with pytest.raises(UserError, match="not empty"):
        merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    save_checkpoint(*tiny_model(language={"hidden_size": 64}), tmp_path / "other")
    with pytest.raises(UserError, match=r"adapter: does not fit .*other: "):
        merge_adapters(tmp_path / "adapter", tmp_path / "none", tmp_path / "other")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"adapter: lacks 1 of its tensors, such as {lost}"):
        merge_adapters(tmp_path / "adapter", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bad_lora_settings() -> None:
    model, _ = tiny_model(moe={"language": {}})
    with pytest.raises(UserError, match=r"lora_dropout: found 0\.1, expected 0"):
        add_adapters(model, {"language": LoraSettings(dropout=0.1)})
    with pytest.raises(UserError, match="not an adapter directory"):
        merge_adapters("/nowhere", "/tmp/out")
