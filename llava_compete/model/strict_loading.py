"""What `from_pretrained` of ours adds to transformers': strict weights, and quantisation where it can work."""

from __future__ import annotations

from typing import Any

from llava_compete.errors import UserError


def spare_from_quantization(quantization: Any) -> None:
    """Keep bitsandbytes on the language model's linear layers.

    It replaces linear layers: torch's attention in the tower reads its output projection's weight directly, and packed
    experts are parameters and not layers.
    """
    skipped = getattr(quantization, "llm_int8_skip_modules", [])
    if skipped is None:
        quantization.llm_int8_skip_modules = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def refuse_offloaded_tower(device_map: dict[str, Any]) -> None:
    """Raise a `UserError` where a device map leaves the tower's weights off the device that computes (see
    `_no_split_modules`); anything else may be offloaded."""
    hosts = {"disk"} if all(place in ("cpu", "disk") for place in device_map.values()) else {"cpu", "disk"}
    for name, place in device_map.items():
        if place in hosts and name in ("", "model", "model.vision_tower"):
            raise UserError(
                f"device_map: the vision tower is offloaded to {place}, which works for any other part; allow more "
                "max_memory, or choose smaller weights with dtype or quantization_config"
            )
