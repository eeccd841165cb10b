"""LoRA on attention, dense MLPs, packed experts and the tower; merging changes no answer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lora_kit import logits_after_two_steps
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_forward import batch, picture
from tiny import tiny_model
from torch import nn
from torch.func import functional_call

from llava_compete.errors import UserError
from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.model.lora import LoraSettings, add_adapters, merge_adapters
from llava_compete.model.lora_attention import use_for_attention

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
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    assert all(any(part in name for name in names) for part in ("vision_tower", "projector", "self_attn", "mlp"))
    assert (moe is not None) == any("experts" in name for name in names)
    assert not any("router" in name or "lm_head" in name for name in names)
    learned = logits_after_two_steps(adapted, inputs, learning_rate=10.0)
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


class _Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=batch_first)


@pytest.mark.parametrize("batch_first", [True, False])
def test_adapted_attention_is_torchs_with_the_update_added_once(batch_first: bool) -> None:
    """Forward, gradients and merged weights; peft's own adds the output projection's update twice."""
    torch.manual_seed(0)
    plain = _Attention(batch_first)
    config = LoraConfig(target_modules=["attn"], r=2, lora_alpha=6, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(plain), use_for_attention(config))
    lora = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    a_in, b_in, a_out, b_out = (
        next(tensor for name, tensor in lora.items() if which in name and ("out_proj" in name) == out)
        for out in (False, True)
        for which in ("lora_A", "lora_B")
    )
    assert len(lora) == 4
    weights = dict(plain.named_parameters()) | {
        "attn.in_proj_weight": plain.attn.in_proj_weight + 3 * b_in @ a_in,
        "attn.out_proj.weight": plain.attn.out_proj.weight + 3 * b_out @ a_out,
    }
    x = torch.randn(5, 3, 16)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf) if not batch_first else None
    inner = {name.removeprefix("attn."): tensor for name, tensor in weights.items()}
    expected = functional_call(plain.attn, inner, (x, x, x), {"attn_mask": mask})
    found = adapted.base_model.model.attn(x, x, x, attn_mask=mask)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(out[0].square().sum(), list(lora.values())) for out in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    merged = adapted.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    for name, weight in weights.items():
        torch.testing.assert_close(merged.get_parameter(name), weight)


def test_a_forward_leaves_the_frozen_attention_as_it_is() -> None:
    """peft's own rounds the weights of bfloat16 anew in each."""
    model, processor = tiny_model()
    adapted = add_adapters(model.bfloat16(), {"vision": LoraSettings(rank=2, alpha=4)}).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    frozen = {name: (tensor, tensor.clone()) for name, tensor in adapted.named_parameters() if not tensor.requires_grad}
    assert any("in_proj_weight" in name for name in frozen)
    adapted(**batch(processor, ["a <image> red"], [picture()])).loss.backward()
    for name, (tensor, before) in frozen.items():
        assert adapted.get_parameter(name) is tensor, name  # ZeRO-3 knows no other
        assert torch.equal(tensor, before), name
