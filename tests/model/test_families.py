"""Every row of the family table on built models with all parameters random: text logits are those of transformers' own
model, bit for bit, and the upcycled model answers as the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LANGUAGE, tiny_model
from transformers import AutoModelForCausalLM

from llava_compete.errors import UserError
from llava_compete.language.families import FAMILIES
from llava_compete.language.templates import TEMPLATES
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.plan.info import describe

SMALL = {key: value for key, value in LANGUAGE.items() if key not in ("model_type", "tie_word_embeddings")}
LINEAR_ATTENTION = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Per family, what its real models' configs differ by; None takes a key of `SMALL` away.
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "arcee": {"mlp_bias": True},
    "cohere": {"pad_token_id": 0, "tie_word_embeddings": True},
    "cohere2": {"pad_token_id": 0, "tie_word_embeddings": True, "sliding_window": 16},
    "ernie4_5": {"pad_token_id": 0, "head_dim": 16, "use_bias": True},
    "exaone4": {"sliding_window": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "glm": {"pad_token_id": 0, "head_dim": 16},
    "glm4": {"pad_token_id": 0, "head_dim": 16},
    "gpt_neox": {"num_key_value_heads": None},
    "granite": {"mlp_bias": True, "logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama": {"mlp_bias": True, "tie_word_embeddings": True},
    "ministral": {"head_dim": 16, "sliding_window": 16},
    "ministral3": {"head_dim": 16, "max_position_embeddings": 262144},
    "mistral": {"sliding_window": 16},
    "nemotron": {"mlp_bias": True, "head_dim": 16},
    "olmo": {"pad_token_id": 0, "clip_qkv": 1.0},
    "olmo2": {"pad_token_id": 0},
    "olmo3": {"pad_token_id": 0, "sliding_window": 16},
    "phi3": {"pad_token_id": 0, "sliding_window": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_5_text": LINEAR_ATTENTION,
    "seed_oss": {"head_dim": 16, "mlp_bias": True, "residual_dropout": 0.25},
    "smollm3": {"pad_token_id": 0, "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "starcoder2": {"sliding_window": 16},
}
# Families with experts of their own, in place of which ours cannot come.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OWN_EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2}
    | {"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    | {"qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, "shared_expert_intermediate_size": 16, **LINEAR_ATTENTION},
}
WITHOUT_ROW: dict[str, dict[str, Any]] = {
    "gpt2": {**dict.fromkeys(SMALL), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {**dict.fromkeys(SMALL), "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
    | {"max_position_embeddings": 256},
}
IDS = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(2))
DENSE = [name for name, family in FAMILIES.items() if family.mlp is not None]


def family_model(family: str) -> tuple[Any, Any]:
    """A tiny model of a family in eval mode, every parameter of its language model random, norms and biases too."""
    values = {**SMALL, "model_type": family, **(FAMILY_OPTIONS | OWN_EXPERTS | WITHOUT_ROW)[family]}
    model, processor = tiny_model(language=values)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (model.language_model, model.lm_head):
            for parameter in part.parameters():
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval(), processor


def test_every_row_has_a_test_and_templates_that_exist() -> None:
    assert set(FAMILY_OPTIONS) == set(DENSE)
    assert {name for family in FAMILIES.values() for name in family.templates} <= set(TEMPLATES)


def own_logits(model: Any) -> torch.Tensor:
    """What transformers' own class, with the weights of `model`, answers to `IDS`."""
    plain = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    plain.base_model.load_state_dict(model.language_model.state_dict())
    plain.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    return plain(input_ids=IDS).logits


@pytest.mark.parametrize("family", DENSE)
def test_text_logits_are_the_models_own_and_the_upcycled_ones(family: str, tmp_path: Path) -> None:
    model, processor = family_model(family)
    with torch.no_grad():
        own = own_logits(model)
        assert torch.equal(model(input_ids=IDS).logits, own)
        save_checkpoint(model, processor, tmp_path / "dense")
        upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"language": {}}))
        upcycled = load_checkpoint(tmp_path / "moe")[0]
        torch.testing.assert_close(upcycled(input_ids=IDS).logits, own, rtol=1e-5, atol=1e-5)
    assert list(moe_blocks(upcycled)) == ["language.0", "language.1"]


@pytest.mark.parametrize("family", WITHOUT_ROW)
def test_language_models_without_a_row(family: str) -> None:
    """Dense ones of any family answer as transformers' own, packed too."""
    model, _ = family_model(family)
    with torch.no_grad():
        own = own_logits(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, own, rtol=1e-5, atol=1e-5)
        ranks = torch.tensor([[0] * 40 + [1] * 40])
        packed = model(input_ids=IDS.reshape(1, 80), sequence_ids=ranks).logits
        torch.testing.assert_close(packed.reshape(own.shape), own, rtol=1e-5, atol=1e-5)
        written = model.generate(IDS[:, :8], max_new_tokens=2, do_sample=False, eos_token_id=None, suppress_tokens=None)
    assert written.shape == (2, 10)


def test_the_dense_mlps_dropout_is_the_blocks() -> None:
    dropouts = {"seed_oss": 0.25, "llama": 0.0}
    for family, rate in dropouts.items():
        values = {**SMALL, "model_type": family, **FAMILY_OPTIONS[family]}
        model, _ = tiny_model(language=values, moe={"language": {}})
        block = moe_blocks(model)["language.0"]
        assert getattr(block.output_dropout, "p", 0.0) == rate


@pytest.mark.parametrize("original", [False, True], ids=["names of ours", "the family's names"])
@pytest.mark.parametrize("family", OWN_EXPERTS)
def test_language_models_with_experts_of_their_own(family: str, original: bool, tmp_path: Path) -> None:
    """Their logits; and `info` and `upcycle`, of another part, read files that hold their experts one by one."""
    model, processor = family_model(family)
    with torch.no_grad():
        own = own_logits(model)
        assert torch.equal(model(input_ids=IDS).logits, own)
        save_checkpoint(model, processor, tmp_path / "dense")
        model.save_pretrained(tmp_path / "dense", save_original_format=original)
        assert describe(tmp_path / "dense")["parameters"]["total"] == sum(p.numel() for p in model.parameters())
        upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"vision": {}}))
        upcycled = load_checkpoint(tmp_path / "moe")[0]
        assert torch.equal(upcycled(input_ids=IDS).logits, own)
    assert list(moe_blocks(upcycled)) == ["vision.0", "vision.1"]
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    lost = next(name for name in weights if "experts" in name or "input_linear" in name)
    del weights[lost]
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"dense: weights do not fit config\.json: (missing|mismatched) "):
        upcycle(tmp_path / "dense", tmp_path / "none", MoeConfig.model_validate({"vision": {}}))


def test_experts_of_its_own_cannot_become_ours() -> None:
    with pytest.raises(UserError, match=r"moe\.language: a 'mixtral' model has experts of its own"):
        tiny_model(language={"model_type": "mixtral"}, moe={"language": {}})
