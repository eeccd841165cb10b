"""Tiny random models of transformers' own Llava classes, saved as the llava-hf repositories are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny import LANGUAGE, tiny_tokenizer
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

SIGLIP = "siglip_vision_model"
TEXTS = ["a <image> red circle", "how many <image> shapes"]
# As the template of llava-hf's 1.5 models: contents are parts, and nothing ends an answer but a space.
LLAVA_1_5 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As those of its ChatML models: parts, and a token behind each turn.
CHATML_PARTS = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def clip_config(**options: Any) -> CLIPVisionConfig:
    values = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**values, "image_size": 28, "patch_size": 7, "projection_dim": 16, **options})


def siglip_config(**options: Any) -> SiglipVisionConfig:
    """Of width 768, the smallest that timm has; two blocks on four patches."""
    values = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12}
    return SiglipVisionConfig(**{**values, "image_size": 32, "patch_size": 16, "vision_use_head": False, **options})


def siglip_tower() -> dict[str, Any]:
    """The same tower as open_clip's config."""
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 32, "timm_pool": "", "timm_proj": "none"}
    return {"embed_dim": 768, "vision_cfg": vision}


def make_llava(
    tokenizer: Any,
    vision: Any = None,
    text: dict[str, Any] | None = None,
    model: type[Any] = LlavaForConditionalGeneration,
    config: type[Any] = LlavaConfig,
    **options: Any,
) -> Any:
    """A model of random weights, biases and norms too."""
    torch.manual_seed(0)
    vision = vision or clip_config()
    values = {key: value for key, value in {**LANGUAGE, **(text or {})}.items() if value is not None}
    whole = config(
        vision_config=vision,
        text_config=AutoConfig.for_model(values.pop("model_type"), **values, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>") or 0,
        **{"vision_feature_select_strategy": "full" if vision.model_type == SIGLIP else "default", **options},
    )
    built = model(whole).eval()
    randomize(built)
    return built


def randomize(model: Any) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5)


def picture_processor(vision: Any) -> Any:
    size = vision.image_size
    if vision.model_type == SIGLIP:
        return SiglipImageProcessor(size={"height": size, "width": size})
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def llava_hf(directory: Path, **options: Any) -> Any:
    """Save a model with its processor; returns the model."""
    tokenizer = tiny_tokenizer()
    built = make_llava(tokenizer, **options)
    built.save_pretrained(directory)
    vision, siglip = built.config.vision_config, built.config.vision_config.model_type == SIGLIP
    LlavaProcessor(
        picture_processor(vision), tokenizer, patch_size=vision.patch_size,
        vision_feature_select_strategy="full" if siglip else "default",
        num_additional_image_tokens=0 if siglip else 1, chat_template=CHATML_PARTS,
    ).save_pretrained(directory)  # fmt: skip
    return built


def pictures(count: int = 2) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    arrays = [torch.randint(0, 256, (46, 60, 3), generator=generator, dtype=torch.uint8) for _ in range(count)]
    return [Image.fromarray(array.numpy()) for array in arrays]
