"""From an image to the tower's pixels, with Pillow and NumPy only: decode (`image_inputs`), then resize and normalise.

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
from llava_compete.vision.image_inputs import load_images
from llava_compete.vision.tower_config import CLIP_MEAN, CLIP_STD, Interpolation, ResizeMode, TowerConfig

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What transformers writes into a saved file beside the settings.
_NOTES = ("image_processor_type", "processor_class", "auto_map")


class LlavaCompeteImageProcessor(BaseImageProcessor):
    """Resizes to `size` x `size` and normalises.

    resize_mode: `pad` fills up to a square with the mean colour, `squash` stretches, `crop` scales the shorter side
    and cuts the centre. These settings belong to the tower: transformers' own options (`do_resize`, `image_mean` and
    the like) are refused, here and in a call, since ignoring them would go unnoticed.
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
        _refuse(sorted(kwargs.keys() - set(_NOTES)))
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

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images of any kind as upright RGB Pillow images, nesting kept; transformers' processor calls this by name."""
        return load_images(image_url_or_urls)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """`images`: one image or any nesting of them -> pixel_values float32 [n, 3, size, size].

        Raises:
            BadImageError: an image that cannot be decoded.
            UserError: an option of transformers' image processors; `image_inputs` lists what an image may be.
        """
        _refuse(sorted(key for key, value in kwargs.items() if value is not None))
        pixels = [self.pixels(image) for image in _flatten(self.fetch_images(images))]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One RGB image, float32 [3, size, size]."""
        array = np.asarray(self._square(image))
        values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
        # A table of the 256 possible values: the same float32 arithmetic as on the whole image, once.
        table = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
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


def _refuse(options: list[str]) -> None:
    if options:
        raise UserError(
            f"image processor: found the option {', '.join(options)}; pictures are prepared as the tower was trained, "
            "so size, mean, std, interpolation and resize_mode of the checkpoint are the only settings"
        )


def _flatten(images: Any) -> list[Image.Image]:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    return [images]
