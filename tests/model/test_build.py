"""A model put together from named parts: every weight in its place, strict, and nothing run that was not asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_forward import picture
from tiny import LANGUAGE, TOWER, tiny_model, tiny_section, tiny_tokenizer
from tower_kit import ROTARY, open_clip_tower
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, CLIPConfig, LlamaConfig, LlamaForCausalLM

from llava_compete.errors import UserError
from llava_compete.language.templates import read_template, set_chat_template
from llava_compete.model.build import apply_moe_settings, build_model, build_unread
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.section import ModelSection
from llava_compete.moe.config import MoeConfig

SMALL = {key: value for key, value in LANGUAGE.items() if key != "model_type"}


@pytest.fixture
def language(tmp_path: Path) -> Path:
    """A directory with a causal LM and a tokenizer that knows neither the placeholder nor chatml, like the hub's."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(**SMALL, vocab_size=len(tokenizer) - 1)
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def section(name: Path, **changes: Any) -> ModelSection:
    values = {"vision_tower": {"config": TOWER}, "language_model": {"name": str(name)}, "chat_template": "chatml"}
    return ModelSection.model_validate({**values, **changes})


def test_named_parts_keep_their_weights(language: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    visual = open_clip_tower(TOWER, seed=5)
    weights = {f"visual.{key}": value.contiguous() for key, value in visual.state_dict().items()}
    save_file(weights, tmp_path / "tower.safetensors")
    tower = {"config": TOWER, "pretrained": str(tmp_path / "tower.safetensors")}
    with caplog.at_level(logging.INFO, logger="llava_compete"):
        model, processor = build_model(section(language, vision_tower=tower), None, seed=0)
    assert "new parts with random weights: projector" in caplog.text
    assert "vocabulary grows from" in caplog.text
    assert model.language_model.config._attn_implementation == "sdpa"
    for name, value in model.vision_tower.trunk.state_dict().items():
        assert torch.equal(value, weights[f"visual.{name}"])
    plain = AutoModelForCausalLM.from_pretrained(language).eval()
    ids = processor.tokenizer(["how many shapes"], return_tensors="pt")["input_ids"]
    size = plain.config.vocab_size
    assert torch.equal(model.eval()(input_ids=ids).logits[..., :size], plain(input_ids=ids).logits)
    save_checkpoint(model, processor, tmp_path / "saved")
    again, _ = load_checkpoint(tmp_path / "saved")
    inputs = processor(text=["a <image> red"], images=[picture()], return_tensors="pt")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("tower", [TOWER, ROTARY], ids=["open_clip", "EVA"])
def test_a_new_model_in_bfloat16_is_as_exact_as_a_loaded_one(
    language: Path, tmp_path: Path, tower: dict[str, Any], unread: bool
) -> None:
    """Above all in its rotary frequencies, which tell the language model where a token stands."""
    made = section(language, vision_tower={"config": tower}, dtype="bfloat16")
    model, processor = build_model(made, None, seed=0)
    save_checkpoint(model, processor, tmp_path / "saved")
    if unread:
        model, _ = build_unread(made, None, 0, None, tmp_path / "handed", makes=True)
    loaded, _ = load_checkpoint(tmp_path / "saved", dtype=torch.bfloat16)
    buffers = dict(loaded.named_buffers())
    assert buffers["model.language_model.rotary_emb.inv_freq"].dtype == torch.float32
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0, msg=name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_end_token_that_also_pads_is_learnt() -> None:
    """As in Llama 3, SmolLM2 and all that have no token for padding alone."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model, _ = build_model(tiny_section(tower=None), None, 0, tokenizer=tokenizer)
    assert model.get_input_embeddings().get_parameter("weight").abs().sum(-1).all()
    ids = torch.tensor([[40, 50, tokenizer.eos_token_id, 60, 70]])
    model(input_ids=ids, labels=ids).loss.backward()
    learnt = model.get_input_embeddings().get_parameter("weight").grad.abs().sum(-1)
    assert (learnt[ids[0, :-1]] > 0).all()


def test_a_language_model_that_lacks_a_tensor_is_refused(language: Path) -> None:
    weights = load_file(language / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {name: value for name, value in weights.items() if name != key},
        language / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=f"lm: weights do not fit config.json: missing {key}"):
        build_model(section(language), None, seed=0)
    save_file({**weights, key: torch.zeros(3, 3)}, language / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"mismatched {key} \[3, 3\] \(expected \[48, 32\]\)"):
        build_model(section(language), None, seed=0)
    (language / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"language_model\.name: .*lm: "):
        build_model(section(language), None, seed=0)


def test_bad_language_models_are_named(language: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"model_type": "lama"}, r"model_type: unknown 'lama'; such as .*llama"),
        ({"hiden_size": 3}, r"unknown key 'language_model\.config\.hiden_size'.* did you mean 'hidden_size'\?"),
        ({"hidden_size": "x"}, r"language_model\.config: .*'hidden_size' expected int, got str"),
        ({"num_attention_heads": 3}, r"language_model\.config: .*not a multiple of the number of attention heads"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_model(language=changes)
    with pytest.raises(UserError, match=r"language_model\.name: .*nowhere"):
        build_model(section(tmp_path / "nowhere"), None, seed=0)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match=r"clip: a 'clip.*' model, expected a causal LM"):
        build_model(section(tmp_path / "clip"), None, seed=0)
    with pytest.raises(UserError, match="experts of a pretrained model come from `llava-compete upcycle`"):
        build_model(section(language), MoeConfig.model_validate({"language": {}}), seed=0)
    changed = {"name": str(language), "config": {"model_type": "llama", "hidden_size": 64}}
    with pytest.raises(UserError, match=r"hidden_size: found 64, but .*lm has 32"):
        build_model(section(language, language_model=changed), None, seed=0)
    for file in language.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"tokenizer: .*lm"):
        build_model(section(language), None, seed=0)


CONFIGURATION = """
from transformers import LlamaConfig
class StrangeConfig(LlamaConfig):
    model_type = "strange"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_strange import StrangeConfig
class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def test_remote_code_runs_only_where_it_is_trusted(
    language: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (language / "configuration_strange.py").write_text(CONFIGURATION)
    (language / "modeling_strange.py").write_text(MODELING)
    config = json.loads((language / "config.json").read_text())
    config["model_type"] = "strange"
    config["auto_map"] = {
        "AutoConfig": "configuration_strange.StrangeConfig",
        "AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM",
    }
    (language / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"'strange' needs Python code of its own \(configuration_strange\.StrangeConfig"
    ):
        build_model(section(language), None, seed=0)
    assert "strange" not in CONFIG_MAPPING
    try:
        model, processor = build_model(section(language, trust_remote_code=True), None, seed=0)
        assert "trust_remote_code: running configuration_strange.StrangeConfig, modeling_strange." in caplog.text
        assert type(model.language_head.causal).__name__ == "StrangeForCausalLM"
        save_checkpoint(model, processor, tmp_path / "saved")
        CONFIG_MAPPING._extra_content.pop("strange")  # a new process knows nothing of it
        with pytest.raises(UserError, match=r"saved: model type 'strange' needs Python code of its own"):
            load_checkpoint(tmp_path / "saved")
        again, _ = load_checkpoint(tmp_path / "saved", trust_remote_code=True)
        ids = torch.arange(5, 10)[None]
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    finally:
        CONFIG_MAPPING._extra_content.pop("strange", None)


def test_flash_attention_that_is_not_installed_is_said(language: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("may be installed")
    with pytest.raises(UserError, match=r"model\.attention: flash_attention_2 needs a CUDA GPU and its package"):
        build_model(section(language, attention="flash_attention_2"), None, seed=0)


def test_a_later_stage_may_set_another_chat_template(tmp_path: Path) -> None:
    """LLaVA-1.5: captions with `plain`, then Vicuna's conversation; answers end where the new template's turns do."""
    model, processor = tiny_model()
    set_chat_template(processor.tokenizer, "plain")
    processor.chat_template = processor.tokenizer.chat_template
    save_checkpoint(model, processor, tmp_path)
    section = ModelSection.model_validate({"checkpoint": tmp_path, "chat_template": "chatml"})
    model, processor = build_model(section, None, seed=0)
    assert processor.tokenizer.chat_template == processor.chat_template == read_template("chatml")
    ends = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    assert model.generation_config.eos_token_id == sorted(ends)


def test_a_stage_may_let_the_loss_judge_a_checkpoint_of_the_papers_competition() -> None:
    layer = {"num_experts": 4, "num_experts_per_tok": 2}
    model, _ = tiny_model({"language": layer})
    judged, _ = tiny_model({"language": {**layer, "competition_judge": "loss", "competition_margin": 0.0}})
    ids = torch.arange(5, 15)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for name, parameter in model.named_parameters() if "router" in name]

    plain = gradients()
    apply_moe_settings(model, MoeConfig.model_validate(judged.config.moe))
    of_changed = gradients()
    model.load_state_dict(judged.state_dict())
    assert not torch.equal(plain[0], of_changed[0])
    model, expected = judged, of_changed
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected, strict=True))
