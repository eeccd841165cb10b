"""What may be the language model: the text part of multimodal checkpoints, keys a model reads beside its config's
fields; and what may not, refused by name before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LANGUAGE, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, BertConfig, MambaConfig, T5Config

from llava_compete.errors import UserError
from llava_compete.language.config import LanguageModelSection
from llava_compete.language.sources import text_config_of
from llava_compete.model.build import build_model
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.section import ModelSection

TEXT = {key: value for key, value in LANGUAGE.items() if key not in ("model_type", "tie_word_embeddings")}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# Of each multimodal model a tiny config, whose text part the tests take out.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "llama4": {
        "text_config": {**TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "pad_token_id": 0},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14, "vision_output_dim": 16}
        | {"projector_input_dim": 16, "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8},
    },
    "qwen3_5": {
        "text_config": {**TEXT, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2}
        | {"out_hidden_size": 32, "num_position_embeddings": 16},
    },
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own_head"])
@pytest.mark.parametrize("model_type", sorted(MULTIMODAL))
def test_the_text_part_of_a_multimodal_checkpoint(model_type: str, tied: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(model_type, **MULTIMODAL[model_type], tie_word_embeddings=tied)
    config.text_config.vocab_size = len(tokenizer)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    whole.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    section = ModelSection.model_validate(
        {"language_model": {"name": str(tmp_path / "whole")}, "chat_template": "chatml"}
    )
    model, processor = build_model(section, None, seed=0)
    assert model.config.text_config.model_type == config.text_config.model_type
    save_checkpoint(model, processor, tmp_path / "saved")
    ids = processor.tokenizer(["how many shapes are there ?"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        for part in (model.eval(), load_checkpoint(tmp_path / "saved")[0]):
            torch.testing.assert_close(part(input_ids=ids).logits[..., : len(tokenizer)], expected)


def test_a_head_in_the_files_is_kept_though_the_config_ties_it(tmp_path: Path) -> None:
    """As Mistral Small 3.1: the default of its config ties the head, the files hold another one."""
    test_the_text_part_of_a_multimodal_checkpoint("mistral3", False, tmp_path)
    path = tmp_path / "whole" / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    section = ModelSection.model_validate(
        {"language_model": {"name": str(tmp_path / "whole")}, "chat_template": "chatml"}
    )
    model, processor = build_model(section, None, seed=0)
    assert not model.config.tie_word_embeddings
    save_checkpoint(model, processor, tmp_path / "again", state_dict=model.state_dict())
    ids = torch.arange(5, 15)[None]
    before, after = (load_checkpoint(tmp_path / name)[0](input_ids=ids).logits for name in ("saved", "again"))
    assert torch.equal(before, after)


def inline(**config: Any) -> Any:
    return text_config_of(LanguageModelSection(config=config))


def test_head_dim_where_the_model_reads_it() -> None:
    for model_type in ("mistral", "granite", "olmo2", "cohere", "qwen2_moe"):
        assert inline(model_type=model_type, head_dim=24).head_dim == 24
    model, _ = tiny_model(language={"model_type": "granite", "head_dim": 24})
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert [shape for name, shape in shapes.items() if name.endswith("layers.0.self_attn.q_proj.weight")] == [(96, 32)]
    with pytest.raises(UserError, match=r"unknown key 'language_model\.config\.head_dims'"):
        inline(model_type="granite", head_dims=24)
    with pytest.raises(UserError, match=r"unknown key 'language_model\.config\.head_dim' for a gpt2 model"):
        inline(model_type="gpt2", head_dim=24)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, r"a 'bert' model in which a token sees later ones"),
        ({"model_type": "roberta", "is_decoder": False}, r"a 'roberta' model in which a token sees later ones"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, r"a 'gemma3_text' .* sees later ones"),
        ({"model_type": "mamba"}, r"a 'mamba' model does not take position_ids, past_key_values"),
        ({"model_type": "bloom"}, r"a 'bloom' model does not take position_ids"),
        ({"model_type": "t5"}, r"a 't5' model, expected a causal LM"),
        ({"model_type": "clip"}, r"a 'clip' model, expected a causal LM"),
        ({"model_type": "gemma3n_text"}, r"a 'gemma3n_text' model whose layers read token ids"),
        ({"model_type": "gemma4_text"}, r"a 'gemma4_text' model whose layers read token ids"),
        ({"model_type": "deepseek_v4"}, r"a 'deepseek_v4' model whose layers read token ids"),
        ({"model_type": "qwen4_exp_text"}, r"a 'qwen4_exp_text' model whose layers read token ids"),
    ],
)
def test_what_cannot_be_the_text_part_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"language_model\.config: " + message):
        inline(**config)


def test_decoders_of_those_families_are_taken() -> None:
    assert inline(model_type="bert", is_decoder=True).is_decoder
    assert inline(model_type="gemma4_text", hidden_size_per_layer_input=0).hidden_size_per_layer_input == 0
    assert not inline(model_type="gpt_neox").is_decoder


@pytest.mark.parametrize("config", [BertConfig(), MambaConfig(), T5Config()])
def test_named_models_are_refused_by_their_config_alone(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)  # no weights are there to read
    with pytest.raises(UserError, match=rf"language_model\.name: {tmp_path}: a '{config.model_type}' model"):
        text_config_of(LanguageModelSection(name=str(tmp_path)))
