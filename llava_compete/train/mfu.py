"""Model FLOPs utilisation (MFU): what the model's arithmetic needs over what the devices could do.

Needed operations are counted once, before training, by torch's FLOP counter on the forward and backward of a copy of
the model whose tensors have shapes but no memory. Recomputation under checkpointing and the experts that a competition
adds are left out, as is the habit; attention counts whole, without its causal half, likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.parts import PREFIXES, Part
from llava_compete.train.adapters import with_adapters
from llava_compete.train.config import PartTraining

# Dense bf16 matrix products, FLOP/s, from the makers' data sheets; first match in the device's name.
PEAK_BF16 = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
}


class Flops(NamedTuple):
    """Forward and backward operations of one text or image token in the language model's layers, of one label in its
    head, and of one image, or tile of one, before it."""

    per_token: float
    per_label: float
    per_image: float


class Utilisation(NamedTuple):
    """What MFU is a share of: `devices` devices of `peak` FLOP/s."""

    flops: Flops
    peak: float
    devices: int

    def mfu(self, tokens: int, labels: int, images: int, seconds: float) -> float:
        """Share of the devices' peak that went into the model in a window of `seconds`."""
        flops = self.flops
        done = flops.per_token * tokens + flops.per_label * labels + flops.per_image * images
        return done / (seconds * self.peak * self.devices)


def device_peak(device: torch.device) -> float | None:
    """FLOP/s of one device in bf16, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def count_flops(model: Any, length: int, trainable: Mapping[Part, PartTraining] | None = None) -> Flops:
    """Operations of `model`, with its present `requires_grad` flags, in samples of about `length` tokens.

    trainable: the stage's map, when it has put adapters into the model. Not for use under zero.Init.
    """
    with torch.device("meta"):
        twin = LlavaCompeteForConditionalGeneration(model.config).train()
        with_adapters(twin, trainable or {})
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_front = any(not name.startswith(PREFIXES["language"]) for name in trains)
    width = model.config.text_config.hidden_size
    # The math kernel: every torch version counts its products; in 2.11 a CPU's flash attention counts for nothing.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _fill_with_fakes(twin, trains)
        # Training asks for logits where a label is, and nowhere else.
        _backward(twin.language_head(torch.empty(1, 1, width, requires_grad=bool(trains)), twin.lm_head))
        of_label = counter.get_total_flops()
        tokens = torch.empty(1, length, width, requires_grad=in_front)
        _backward(twin.model(inputs_embeds=tokens, use_cache=False, output_routing=False).last_hidden_state)
        of_text = counter.get_total_flops() - of_label
        tiles = 1
        if twin.vision_tower is not None:
            side = model.config.tower.image_size
            sizes = None if twin.model.tiling is None else [twin.model.tiling.largest]
            tiles = 1 if sizes is None else twin.model.tiling.num_tiles(sizes[0])
            features = twin.get_image_features(torch.empty(tiles, 3, side, side), image_sizes=sizes).pooler_output
            _backward(features if sizes is None else torch.cat(features))
        of_images = counter.get_total_flops() - of_text - of_label
    return Flops(of_text / length, of_label, of_images / tiles)


def _fill_with_fakes(model: nn.Module, trains: set[str]) -> None:
    """Replace meta tensors, which autocast does not know, by fake ones of a CPU; those named in `trains` train."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=torch.float32)
            setattr(module, name, nn.Parameter(fake, requires_grad=f"{prefix}.{name}".lstrip(".") in trains))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _backward(output: torch.Tensor) -> None:
    if output.requires_grad:
        output.sum().backward()
