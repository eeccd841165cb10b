"""A checkpoint by the rules of servers that have no code for it (`server_rules`)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from server_rules import Served
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoProcessor

from llava_compete.errors import UserError
from llava_compete.model.backbone import LlavaCompeteModel
from llava_compete.model.build import save_checkpoint
from llava_compete.model.served import STUB

EVERYWHERE = {"vision": {}, "projector": {}, "language": {"num_experts": 4, "num_experts_per_tok": 2}}
PICTURES = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_checkpoint(*tiny_model(moe=EVERYWHERE), directory)
    return directory


def test_the_processors_own_file_names_its_class(saved: Path) -> None:
    """Where it names none, AutoProcessor takes the tokenizer, and pictures are dropped without a word."""
    written = json.loads((saved / "processor_config.json").read_text())
    assert written["auto_map"] == {"AutoProcessor": "modeling_llava_compete.LlavaCompeteProcessor"}


def test_auto_map_points_to_a_stub_that_has_the_classes(saved: Path) -> None:
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoProcessor", "AutoModel", "AutoModelForImageTextToText"}
    spec = importlib.util.spec_from_file_location(STUB, saved / f"{STUB}.py")
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    classes = {name: getattr(stub, reference.split(".")[1]) for name, reference in auto_map.items()}
    assert classes["AutoModel"] is LlavaCompeteModel
    assert classes["AutoModel"].is_backend_compatible()
    assert all(name in auto_map for name in ("AutoConfig", "AutoModel"))


@pytest.mark.parametrize("attention", ["vllm", "sglang"])
def test_a_server_computes_the_same(saved: Path, attention: str) -> None:
    config = AutoConfig.from_pretrained(saved)
    served = Served(config, load_file(saved / "model.safetensors"), attention)
    layers = config.text_config.num_hidden_layers
    assert served.taken == [f"model.language_model.layers.{layer}.mlp.experts" for layer in range(layers)]

    model, processor = tiny_model(moe=EVERYWHERE)
    texts = ["a <image> b <image>", "how many shapes ?"]
    inputs = [
        processor(text=texts[0], images=PICTURES, return_tensors="pt"),
        processor(text=texts[1], return_tensors="pt"),
    ]
    for given in inputs:
        ids = given["input_ids"][0]
        embeddings = served.embed(ids, given.get("pixel_values"), config.image_token_id)
        # What SGLang hands on to its attention comes along; a row may be longer than the context: many requests.
        extra = {"forward_batch": None, "attention_instances": {}} if attention == "sglang" else {}
        hidden = served.hidden_states(embeddings, torch.arange(len(ids)), **extra)
        with torch.inference_mode():
            expected = model.eval().model(**given).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    many = torch.zeros(config.text_config.max_position_embeddings + 9, config.text_config.hidden_size)
    assert served.hidden_states(many, torch.zeros(len(many), dtype=torch.long)).shape == many.shape


@pytest.mark.parametrize(
    "language",
    [{"hidden_act": "gelu"}, {"mlp_bias": True}, {"model_type": "arcee"}],
    ids=["not SiLU", "biases", "plain"],
)
def test_experts_that_the_servers_kernel_computes_otherwise_stay_ours(language: dict[str, Any]) -> None:
    model, _ = tiny_model(moe=EVERYWHERE, language=language)
    served = Served(model.config, model.state_dict())
    assert not served.taken


def test_experts_outside_the_language_model_stay_ours() -> None:
    model, _ = tiny_model(moe={"vision": {}, "projector": {}})
    assert getattr(model.config.text_config, "num_experts", None) is None
    assert not Served(model.config, model.state_dict()).taken


def test_taken_wrongly_or_competing_is_refused() -> None:
    model, _ = tiny_model(moe=EVERYWHERE)
    model.config.competition_at_inference = True
    with pytest.raises(UserError, match=r"competition_at_inference: found true, expected false under a server"):
        Served(model.config, {})


def test_the_processor_counts_placeholders_and_says_where_they_stand(saved: Path) -> None:
    processor = AutoProcessor.from_pretrained(saved)
    count = processor._get_num_multimodal_tokens(image_sizes=[(30, 20), (10_000, 10_000)])
    assert count["num_image_tokens"] == [processor.num_image_tokens] * 2
    assert count["num_image_patches"] == [1, 1]
    # A server asks for the replacement of each placeholder, and finds the token by its text.
    text = processor.image_token * 2
    inputs = processor(text=text, images=PICTURES, return_text_replacement_offsets=True, return_tensors="pt")
    replacements = [entry["replacement"] for entry in inputs["text_replacement_offsets"][0]]
    ids = [processor.tokenizer.encode(item, add_special_tokens=False) for item in replacements]
    assert ids == [[processor.image_token_id] * processor.num_image_tokens] * 2
    assert processor.tokenizer.encode(processor.image_token, add_special_tokens=False) == [processor.image_token_id]
    assert len(inputs["pixel_values"]) == 2


PARTS: dict[str, list[str]] = {
    "image first": ["image", "What is it?"],
    "two images": ["image", "image", "Which?"],
    "a line begins": ["image", "\nWhat?"],
    "in the middle": ["Is this ", "image", " like ", "image", "?"],
    "images alone": ["image", "image"],
    "empty text": ["image", ""],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_server_renders_a_conversation_as_training_does(parts: list[str]) -> None:
    _, processor = tiny_model()
    content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": content}]
    # Servers render by the tokenizer; our processor puts images on lines of their own first.
    rendered = tiny_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == processor.apply_chat_template(messages, add_generation_prompt=True)
