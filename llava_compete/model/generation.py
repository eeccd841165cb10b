"""What generation with images needs beyond transformers': a check, and images that follow their rows into beams."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from llava_compete.model.placeholders import check_counts


class ImageGenerationMixin(GenerationMixin):
    """For a model with `vision_tower` (or None), and `image_lengths` for the features of each of its images."""

    config: Any
    vision_tower: Any
    image_lengths: Any

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; placeholders without an image are an error here too, where they would pass unseen."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None and self.vision_tower is not None and kwargs.get("pixel_values") is None:
            check_counts(ids == self.config.image_token_id, [], may_wait=True)
        return super().generate(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row for beams or samples; its images (any number a row) are repeated as a group."""
        given = {key: model_kwargs.pop(key, None) for key in ("pixel_values", "image_sizes")}
        if given["pixel_values"] is not None and expand_size > 1 and input_ids is not None:
            placeholders = (input_ids == self.config.image_token_id).sum(1).tolist()
            given = self._repeat_images(placeholders, expand_size, **given)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {key: value for key, value in given.items() if value is not None}

    def _repeat_images(
        self, placeholders: list[int], count: int, pixel_values: Tensor, image_sizes: Any
    ) -> dict[str, Any]:
        """The images of each row, `count` times, the rows' numbers of placeholders telling which are whose."""
        tiles, lengths = self.image_lengths(pixel_values, image_sizes)
        chosen, first = [], 0
        for wanted in placeholders:
            last = first
            while wanted > 0 and last < len(lengths):
                wanted -= lengths[last]
                last += 1
            chosen += list(range(first, last)) * count
            first = last
        starts = [0, *accumulate(tiles)]
        pixels = torch.cat([pixel_values[starts[image] : starts[image + 1]] for image in chosen])
        sizes = None if image_sizes is None else torch.as_tensor(image_sizes)[chosen]
        return {"pixel_values": pixels, "image_sizes": sizes}
