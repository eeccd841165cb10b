"""From a Pillow image to the tower's pixels, with Pillow and NumPy only.

The same code serves training workers, evaluation and chat. For `squash` and `crop` the result is bit-equal to
open_clip's own inference transform. S² needs no step here: `size` is that of the largest scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from llava_compete.errors import UserError
from llava_compete.vision.image_decoder import to_rgb
from llava_compete.vision.tower_config import CLIP_MEAN, CLIP_STD, Interpolation, ResizeMode, TowerConfig

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class LlavaCompeteImageProcessor(BaseImageProcessor):
    """Resizes to `size` x `size` and normalises.

    resize_mode: `pad` fills up to a square with the mean colour, `squash` stretches, `crop` scales the shorter side
    and cuts the centre.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    valid_kwargs = ImagesKwargs

    def __init__(
        self,
        size: int = 224,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "squash",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size
        self.mean = list(mean)
        self.std = list(std)
        self.interpolation = interpolation
        self.resize_mode = resize_mode

    @classmethod
    def from_tower(cls, tower: TowerConfig) -> LlavaCompeteImageProcessor:
        """The processor that delivers what this tower takes."""
        return cls(**{**tower.preprocess.model_dump(), "size": tower.image_size})

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """`images`: one image or any nesting of them (Pillow, H x W x 3 uint8 arrays, paths, URLs) -> pixel_values
        float32 [n, 3, size, size]."""
        pixels = [self.pixels(image) for image in _flatten(self.fetch_images(_as_pil(images)))]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image, float32 [3, size, size]."""
        if image.width < 1 or image.height < 1:
            raise UserError(f"image of size {image.width}x{image.height}: nothing to see")
        square = self._square(to_rgb(image))
        values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
        # A table of the 256 possible values: the same float32 arithmetic as on the whole image, once.
        table = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        array = np.asarray(square)
        return np.stack([table[:, channel][array[..., channel]] for channel in range(3)])

    def _square(self, image: Image.Image) -> Image.Image:
        size, resample = self.size, _FILTERS[self.interpolation]
        width, height = image.size
        if self.resize_mode == "squash":
            return image.resize((size, size), resample)
        if self.resize_mode == "pad":
            # Resized before it is padded: the border needs no arithmetic.
            side = max(width, height)
            new_width, new_height = (max(1, round(length * size / side)) for length in (width, height))
            canvas = Image.new("RGB", (size, size), tuple(int(channel * 255) for channel in self.mean))
            place = ((size - new_width) // 2, (size - new_height) // 2)
            canvas.paste(image.resize((new_width, new_height), resample), place)
            return canvas
        short, long = sorted((width, height))
        longer = int(size * long / short)
        new_width, new_height = (size, longer) if width <= height else (longer, size)
        image = image.resize((new_width, new_height), resample)
        left, top = round((new_width - size) / 2), round((new_height - size) / 2)
        return image.crop((left, top, left + size, top + size))


def _as_pil(images: Any) -> Any:
    """Arrays and tensors (H x W x 3 or 3 x H x W, uint8) become Pillow images; nesting is kept."""
    if isinstance(images, list | tuple):
        return [_as_pil(image) for image in images]
    if isinstance(images, str | Image.Image):
        return images
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise UserError(f"image array: found {array.dtype} {array.shape}, expected uint8 [height, width, 3]")
    return Image.fromarray(array if array.shape[-1] == 3 else array.transpose(1, 2, 0))


def _flatten(images: Any) -> list[Image.Image]:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    return [images]
