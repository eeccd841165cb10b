"""Every row of the family table on built models with all parameters random: text logits are those of transformers' own
model, bit for bit, and the upcycled model answers as the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LANGUAGE, tiny_model
from transformers import AutoModelForCausalLM

from llava_compete.errors import UserError
from llava_compete.language.families import FAMILIES
from llava_compete.language.templates import TEMPLATES
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig

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
DENSE = [name for name, family in FAMILIES.items() if family.mlp is not None]


def family_model(family: str) -> tuple[Any, Any]:
    """A tiny model of a family in eval mode, every parameter of its language model random, norms and biases too."""
    values = {**SMALL, "model_type": family, **FAMILY_OPTIONS[family]}
    model, processor = tiny_model(language=values)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval(), processor


def test_every_row_has_a_test_and_templates_that_exist() -> None:
    assert set(FAMILY_OPTIONS) == set(DENSE)
    assert {name for family in FAMILIES.values() for name in family.templates} <= set(TEMPLATES)


@pytest.mark.parametrize("family", DENSE)
def test_text_logits_are_the_models_own_and_the_upcycled_ones(family: str, tmp_path: Path) -> None:
    model, processor = family_model(family)
    plain = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    plain.base_model.load_state_dict(model.language_model.state_dict())
    plain.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = plain(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, own)
        save_checkpoint(model, processor, tmp_path / "dense")
        upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"language": {}}))
        upcycled = load_checkpoint(tmp_path / "moe")[0]
        torch.testing.assert_close(upcycled(input_ids=ids).logits, own, rtol=1e-5, atol=1e-5)
    assert list(moe_blocks(upcycled)) == ["language.0", "language.1"]


def test_the_dense_mlps_dropout_is_the_blocks() -> None:
    dropouts = {"seed_oss": 0.25, "llama": 0.0}
    for family, rate in dropouts.items():
        values = {**SMALL, "model_type": family, **FAMILY_OPTIONS[family]}
        model, _ = tiny_model(language=values, moe={"language": {}})
        block = moe_blocks(model)["language.0"]
        assert getattr(block.output_dropout, "p", 0.0) == rate


def test_experts_of_its_own_cannot_become_ours() -> None:
    with pytest.raises(UserError, match=r"moe\.language: a 'mixtral' model has experts of its own"):
        tiny_model(language={"model_type": "mixtral"}, moe={"language": {}})
