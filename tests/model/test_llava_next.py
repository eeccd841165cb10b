"""A model of tiles against transformers' LLaVA-NeXT of the same random weights: embeddings, logits, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import LANGUAGE, TOWER, tiny_model
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from llava_compete.errors import UserError
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.config import MoeConfig
from llava_compete.vision.image_decoder import BadImageError
from llava_compete.vision.tiles import LLAVA_NEXT_GRIDS

TILED: dict[str, Any] = {"tiles": {}, "language": {"max_position_embeddings": 1024}}
SIZES = [(40, 90), (28, 28), (150, 61)]


def pictures(sizes: Any = tuple(SIZES)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def tiled() -> Any:
    model, processor = tiny_model(**TILED)
    return model.eval(), processor


def prompts(sizes: list[tuple[int, int]]) -> tuple[list[str], list[Image.Image]]:
    texts = [f"<|im_start|>user\n<image>\nwhat colour {'is the circle ' * n}?<|im_end|>\n" for n in range(len(sizes))]
    return texts, pictures(tuple(sizes))


def llava_next(model: Any) -> Any:
    """transformers' own model, with the weights of ours under its names."""
    vision, text = TOWER["vision_cfg"], model.config.text_config
    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "gelu",
        },
        text_config=text.to_dict(),
        image_token_index=model.config.image_token_id,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[rows * 28, columns * 28] for rows, columns in LLAVA_NEXT_GRIDS],
    )
    reference = LlavaNextForConditionalGeneration(config).eval()
    weights = reference.state_dict()
    for name, value in model.state_dict().items():
        for one, tensor in renamed(name, value).items():
            assert weights[one].shape == tensor.shape, one
            weights[one] = tensor
    reference.load_state_dict(weights)
    return reference


def renamed(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    name = name.replace("model.multi_modal_projector.mlp.up_proj", "model.multi_modal_projector.linear_1")
    name = name.replace("model.multi_modal_projector.mlp.down_proj", "model.multi_modal_projector.linear_2")
    name = name.replace("model.multi_modal_projector.image_newline", "model.image_newline")
    if not name.startswith("model.vision_tower."):
        return {name: value}
    name = name.removeprefix("model.vision_tower.trunk.")
    for ours, theirs in (
        ("conv1.", "embeddings.patch_embedding."),
        ("class_embedding", "embeddings.class_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("ln_pre.", "pre_layrnorm."),
        ("transformer.resblocks.", "encoder.layers."),
        (".attn.out_proj.", ".self_attn.out_proj."),
        (".ln_1.", ".layer_norm1."),
        (".ln_2.", ".layer_norm2."),
        (".mlp.c_fc.", ".mlp.fc1."),
        (".mlp.c_proj.", ".mlp.fc2."),
    ):
        name = name.replace(ours, theirs)
    prefix = "model.vision_tower."
    if ".attn.in_proj_" not in name:
        return {prefix + name: value}
    layer, kind = name.split(".attn.in_proj_")
    parts = zip("qkv", value.chunk(3), strict=True)
    return {f"{prefix}{layer}.self_attn.{part}_proj.{kind}": tensor for part, tensor in parts}


def test_logits_and_answers_are_those_of_llava_next(tiled: Any) -> None:
    model, processor = tiled
    reference = llava_next(model)
    texts, images = prompts(SIZES)
    for text, image in zip(texts, images, strict=True):
        inputs = processor(images=[image], text=text, return_tensors="pt")
        pixels = inputs["pixel_values"].float()
        mean, std = (torch.tensor(getattr(processor.image_processor, key))[:, None, None] for key in ("mean", "std"))
        theirs = {**inputs, "pixel_values": (pixels / 255 - mean) / std}
        with torch.no_grad():
            found, expected = model(**inputs).logits, reference(**theirs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False, suppress_tokens=None)
    assert torch.equal(answer, reference.generate(**theirs, max_new_tokens=5, do_sample=False, eos_token_id=None))


def test_a_batch_of_mixed_sizes_answers_as_each_row_alone(tiled: Any) -> None:
    model, processor = tiled
    texts, images = prompts(SIZES)
    two = f"{texts[0]}{texts[1]}"  # one row of two pictures
    rows = [(texts[2], [images[2]]), (two, images[:2]), ("hello", [])]
    both = processor(
        images=[image for _, row in rows for image in row],
        text=[text for text, _ in rows],
        return_tensors="pt",
        padding=True,
    )
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers = model.generate(**both, **options)[:, -4:]
    for (text, row), answer in zip(rows, answers, strict=True):
        alone = processor(images=row or None, text=text, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **options)[0, -4:], answer)
    assert processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"] == [
        processor(images=[image], text=text)["input_ids"][0].count(processor.image_token_id)
        for text, image in zip(texts, images, strict=True)
    ]


def test_the_chat_call_counts_each_pictures_tokens(tiled: Any) -> None:
    _, processor = tiled
    content = [{"type": "image", "image": image} for image in pictures()]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "which ?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    tiling = processor.tiling
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == sum(map(tiling.num_tokens, SIZES))
    assert inputs["image_sizes"].tolist() == [list(size) for size in SIZES]
    assert len(inputs["pixel_values"]) == sum(map(tiling.num_tiles, SIZES))


@pytest.mark.parametrize(("pool", "norm"), [(1, False), (2, True)])
def test_upcycled_and_saved_it_answers_the_same(pool: int, norm: bool, tmp_path: Path) -> None:
    model, processor = tiny_model(tiles={"max": 2}, pool=pool, norm=norm, language={"max_position_embeddings": 1024})
    inputs = processor(images=pictures(), text="<image> a <image> b <image>", return_tensors="pt")
    save_checkpoint(model.eval(), processor, tmp_path / "dense")
    layer = {"num_experts": 3, "num_experts_per_tok": 2}
    upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"projector": layer, "vision": layer}))
    expected = model(**inputs).logits
    for name in ("dense", "moe"):
        loaded, again = load_checkpoint(tmp_path / name)
        assert again.tiling == processor.tiling == loaded.config.tiling
        torch.testing.assert_close(loaded.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_each_picture_is_one_sequence_of_the_routing_losses() -> None:
    layer = {"num_experts": 3, "num_experts_per_tok": 2}
    model, processor = tiny_model(moe={"vision": layer, "projector": layer}, **TILED)
    model.train()
    one_by_one = [processor(images=[image], text="<image>", return_tensors="pt") for image in pictures()]
    together = processor(images=pictures(), text="<image><image><image>", return_tensors="pt")
    count = dict.fromkeys(("vision", "projector", "language"), torch.tensor(3.0))
    alone = [model.model(**inputs, num_sequences_in_batch=count).aux_losses for inputs in one_by_one]
    found = model.model(**together, num_sequences_in_batch=count).aux_losses
    for part in ("vision", "projector"):
        torch.testing.assert_close(found[part], sum(losses[part] for losses in alone), rtol=1e-4, atol=1e-6)


def test_a_text_alone_reaches_every_parameter_of_the_front() -> None:
    model, processor = tiny_model(**TILED)
    inputs = processor(text="what ?", return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    front = {name: p.grad for name, p in model.named_parameters() if "vision_tower" in name or "projector" in name}
    assert "model.multi_modal_projector.image_newline" in front
    assert all(grad is not None and not grad.any() for grad in front.values())


def test_bad_input_is_one_line(tiled: Any, tmp_path: Path) -> None:
    model, processor = tiled
    inputs = processor(images=pictures(), text="<image><image><image>", return_tensors="pt")
    sizes = inputs.pop("image_sizes")
    with pytest.raises(UserError, match="image_sizes: missing"):
        model(**inputs)
    with pytest.raises(UserError, match=r"pixel_values: found 11 tiles, but 2 image\(s\) of image_sizes make 7"):
        model(**inputs, image_sizes=sizes[:2])
    with pytest.raises(BadImageError, match="20000x1 pixels: so thin"):
        processor(images=pictures([(1, 20000)]), text="<image>")
    save_checkpoint(model, processor, tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    del weights["model.multi_modal_projector.image_newline"]
    save_file(weights, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="image_newline"):
        load_checkpoint(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["vision_config"]["tiles"]
    assert LANGUAGE["max_position_embeddings"] == 256
