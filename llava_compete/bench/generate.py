"""Generation speed: our model, dense and with experts, against transformers' own Llava of the same size, in one run.

All have random weights, the same tower, projector and language model sizes, and answer the same batch: an image, a
prompt, then exactly `new_tokens` greedy tokens. A mixture of experts of the size does K experts' arithmetic a token
and reads up to E experts' weights, so it stands beside dense models of both: MLPs K times and E times as wide.
Rounds take turns, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_compete.errors import UserError
from llava_compete.language.templates import set_chat_template
from llava_compete.language.tokenizer import train_byte_level_bpe
from llava_compete.model.build import build_model
from llava_compete.model.devices import usable_device
from llava_compete.model.section import ModelSection
from llava_compete.moe.config import MoeConfig

IMAGE_SIZE, PATCH_SIZE = 112, 14
EXPERTS, CHOSEN = 4, 2
LLAVA, DENSE, SAME_ACTIVE, SAME_BYTES, MOE = (
    "transformers Llava", "dense", "dense, same active width", "dense, same bytes", "moe",
)  # fmt: skip


STATIC = ", static cache"


@dataclass(frozen=True)
class Size:
    """One size for all models; the default is small enough for a CPU and large enough to be bound by arithmetic."""

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 8
    heads: int = 8
    vision_hidden: int = 256
    vision_layers: int = 6
    vocabulary: int = 4096


@dataclass(frozen=True)
class Speed:
    """Generated tokens/s over the batch: median and slowest of the rounds; parameters of the model."""

    tokens_per_second: float
    slowest: float
    parameters: int


def bench_generate(
    size: Size,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    device: str,
    dtype: str,
    static_cache: bool = False,
) -> dict[str, Any]:
    """Speeds by model, each relative to transformers' Llava of the dense size, and of the mixture to each dense one.

    static_cache: also the same models with a static cache, whose steps transformers compiles to CUDA graphs on a GPU.
    """
    num_image_tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2
    if prompt_tokens <= num_image_tokens:
        raise UserError(
            f"--prompt-tokens: found {prompt_tokens}, expected more than the {num_image_tokens} of an image"
        )
    for name, number in (("batch-size", batch_size), ("new-tokens", new_tokens), ("rounds", rounds)):
        if number < 1:
            raise UserError(f"--{name}: found {number}, expected at least 1")
    usable_device(device)
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    models = {
        LLAVA: _llava(size),
        DENSE: _ours(size, None),
        SAME_ACTIVE: _ours(_widened(size, CHOSEN), None),
        SAME_BYTES: _ours(_widened(size, EXPERTS), None),
        MOE: _ours(size, _moe()),
    }
    models = {name: model.to(device, torch_dtype).eval() for name, model in models.items()}
    image_token = models[DENSE].config.image_token_id
    ids = torch.randint(300, size.vocabulary, (batch_size, prompt_tokens), device=device)
    ids[:, 1 : 1 + num_image_tokens] = image_token
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=torch_dtype),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    runs = {name: partial(model.generate, **inputs) for name, model in models.items()}
    if static_cache:
        for name in (LLAVA, DENSE, MOE):
            runs[f"{name}{STATIC}"] = partial(models[name].generate, **inputs, cache_implementation="static")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            times[name].append(_timed(run, device))
    tokens = batch_size * new_tokens
    speeds = {
        name: Speed(
            round(tokens / statistics.median(seconds[1:]), 1),
            round(tokens / max(seconds[1:]), 1),
            sum(parameter.numel() for parameter in models[name.removesuffix(STATIC)].parameters()),
        )
        for name, seconds in times.items()
    }
    reference, mixture = speeds[LLAVA].tokens_per_second, speeds[MOE].tokens_per_second
    return {
        "speeds": speeds,
        "relative": {name: round(speed.tokens_per_second / reference, 3) for name, speed in speeds.items()},
        "moe_over": {name: round(mixture / speeds[name].tokens_per_second, 3) for name in models if name != MOE},
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "device": device,
        "dtype": dtype,
    }


def _timed(run: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _moe() -> MoeConfig:
    return MoeConfig.model_validate({"language": {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN}})


def _widened(size: Size, times: int) -> Size:
    return replace(size, intermediate=size.intermediate * times)


def _language(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 2048,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": False,
    }


def _ours(size: Size, moe: MoeConfig | None) -> Any:
    tower = {
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "width": size.vision_hidden,
        "layers": size.vision_layers, "head_width": 64,
    }  # fmt: skip
    section = ModelSection.model_validate(
        {
            "vision_tower": {"config": {"embed_dim": size.vision_hidden, "vision_cfg": tower}},
            "language_model": {"config": {"model_type": "llama", **_language(size)}},
            "tokenizer": {"train_on": "data"},
            "chat_template": "chatml",
        }
    )
    tokenizer = train_byte_level_bpe(["a b c"], vocab_size=300)
    set_chat_template(tokenizer, "chatml")
    model, _ = build_model(section, moe, seed=0, tokenizer=tokenizer)
    return model


def _llava(size: Size) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=4 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_hidden // 64,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=size.vision_hidden,
    )
    # The ids of our own tokenizer, so that both read the same batch: 0 pad, 1 end, 2 image.
    text = LlamaConfig(**_language(size), pad_token_id=0, eos_token_id=1)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-2)
    )
