"""Model FLOPs utilisation (MFU): what the model's arithmetic needs over what the devices could do.

Needed operations are counted once, on the meta device, by torch's FLOP counter on the model's own forward and
backward (recomputation under checkpointing and the experts that a competition adds are left out, as is the habit).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.plan.step_cost import simulate
from llava_compete.train.adapters import with_adapters
from llava_compete.train.config import Part, PartTraining

# Dense bf16 matrix products, FLOP/s, from the makers' data sheets; first match in the device's name.
PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
}


class Flops(NamedTuple):
    """Forward and backward operations of one text or image token in the language model, and of one image before it."""

    per_token: float
    per_image: float


def device_peak(device: torch.device) -> float | None:
    """FLOP/s of one device in bf16, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def count_flops(model: Any, length: int, trainable: Mapping[Part, PartTraining] | None = None) -> Flops:
    """Operations of `model`, with its present `requires_grad` flags, for samples of about `length` tokens.

    trainable: the stage's map, when it has put adapters into the model.
    """
    with torch.device("meta"):
        twin = LlavaCompeteForConditionalGeneration(model.config).train()
        with_adapters(twin, trainable or {})
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(flags[name])
    images = 0 if model.config.tower is None else 1
    short = simulate(twin, 1, length, images, frozenset()).flops
    long = simulate(twin, 1, 2 * length, images, frozenset()).flops
    per_token = (long - short) / length
    return Flops(per_token, max(short - length * per_token, 0.0))


def mfu(flops: Flops, tokens: int, images: int, seconds: float, peak: float, devices: int) -> float:
    """Share of the devices' peak that went into the model in a window of `seconds`."""
    return (flops.per_token * tokens + flops.per_image * images) / (seconds * peak * devices)
