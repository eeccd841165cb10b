"""What generation with images needs beyond transformers': a check, and images that follow their rows into beams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from llava_compete.model.placeholders import check_counts


class ImageGenerationMixin(GenerationMixin):
    """For a model with `vision_tower` (or None) whose config has `image_token_id` and `num_image_tokens`."""

    config: Any
    vision_tower: Any

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; placeholders without an image are an error here too, where they would pass unseen."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None and self.vision_tower is not None and kwargs.get("pixel_values") is None:
            check_counts(ids == self.config.image_token_id, 0, self.config.num_image_tokens, may_wait=True)
        return super().generate(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row for beams or samples; its images (any number a row) are repeated as a group."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1 and input_ids is not None:
            per_row = (input_ids == self.config.image_token_id).sum(1) // self.config.num_image_tokens
            groups = pixel_values.split(per_row.tolist())
            pixel_values = torch.cat([group for group in groups for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
