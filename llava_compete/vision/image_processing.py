"""From an image to the tower's pixels: decode (`image_inputs`), then resize, and in version 1 also normalise.

The same code serves training workers, evaluation and chat. Version 1 is bit-equal to open_clip's own inference
transform for `squash` and `crop`. Version 2 hands over uint8, a quarter of the bytes between processes and devices, and
resizes by torch's uint8 kernel, in a quarter of Pillow's time and within 2/255 of it (1/255 but for one value in some
thousands: both round between the two passes, and Pillow weighs more finely); the model normalises. S² needs no step
here: `size` is that of the largest scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from llava_compete.errors import UserError
from llava_compete.vision.image_inputs import load_images
from llava_compete.vision.tiles import Box, Size, Tiling, tile_pixels
from llava_compete.vision.tower_config import CLIP_MEAN, CLIP_STD, Interpolation, PixelVersion, ResizeMode, TowerConfig

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What transformers writes into a saved file beside the settings.
_NOTES = ("image_processor_type", "processor_class", "auto_map")


class LlavaCompeteImageProcessor(BaseImageProcessor):
    """Resizes to `size` x `size`; normalises, if of version 1 (`tower_config.PixelVersion`).

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
        version: PixelVersion = 1,
        tiles: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse(sorted(kwargs.keys() - set(_NOTES)))
        super().__init__(**kwargs)
        self.size = size
        self.mean = list(mean)
        self.std = list(std)
        self.interpolation = interpolation
        self.resize_mode = resize_mode
        self.version = version
        self.tiles = None if tiles is None else [list(grid) for grid in tiles]

    @classmethod
    def from_tower(cls, tower: TowerConfig) -> LlavaCompeteImageProcessor:
        """The processor that delivers what this tower takes."""
        tiles = {} if tower.tiles is None else {"tiles": tower.tiles}
        return cls(**{**tower.preprocess.model_dump(), "size": tower.image_size, **tiles})

    def tiling(self, side: int) -> Tiling | None:
        """How pictures are cut whose tiles become `side` x `side` embeddings; None for pictures of one size."""
        if self.tiles is None:
            return None
        return Tiling(self.size, side, tuple((rows, columns) for rows, columns in self.tiles))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images of any kind as upright RGB Pillow images, nesting kept; transformers' processor calls this by name."""
        return load_images(image_url_or_urls)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """`images`: one image or any nesting of them -> pixel_values [n, 3, size, size], uint8 in version 2 and
        normalised float32 in version 1. With tiles n counts those of all images, the whole picture first, and
        `image_sizes` [images, 2] are the pictures' own heights and widths.

        Raises:
            BadImageError: an image that cannot be decoded.
            UserError: an option of transformers' image processors; `image_inputs` lists what an image may be.
        """
        _refuse(sorted(key for key, value in kwargs.items() if value is not None))
        flat = _flatten(self.fetch_images(images))
        tiling = self.tiling(side=1)
        if tiling is None:
            pixels = [self.pixels(image) for image in flat]
            return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
        tiles = [tile for image in flat for tile in self._tiled(image, tiling)]
        sizes = [(image.height, image.width) for image in flat]
        return BatchFeature({"pixel_values": tiles, "image_sizes": sizes}, tensor_type=return_tensors)

    def _tiled(self, image: Image.Image, tiling: Tiling) -> list[np.ndarray]:
        """The whole picture and its tiles."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return [self.pixels(image), *tile_pixels(pixels, tiling, self.interpolation)]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One RGB image, [3, size, size]; uint8 or normalised float32, as in `preprocess`."""
        if self.version == 2:
            return self._resized_by_torch(image)
        array = np.asarray(self._resized_by_pillow(image))
        values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
        # A table of the 256 possible values: the same float32 arithmetic as on the whole image, once.
        table = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.stack([table[:, channel][array[..., channel]] for channel in range(3)])

    def box(self, picture: Size) -> Box:
        """Where the square's edges are in a picture's own pixels: beyond its edges by the borders of `pad`, inside by
        what `crop` cuts."""
        height, width = picture
        resized = self._resized(width, height)
        left, top = self._place(*resized)
        if self.resize_mode != "crop":
            left, top = -left, -top
        across, down = width / resized[0], height / resized[1]
        return left * across, top * down, (left + self.size) * across, (top + self.size) * down

    def _resized_by_torch(self, image: Image.Image) -> np.ndarray:
        width, height = self._resized(*image.size)
        # A view [1, 3, H, W] of the picture's own memory order, for which the kernel is vectorised.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        if (width, height) != image.size:
            pixels = F.interpolate(pixels, size=(height, width), mode=self.interpolation, antialias=True)
        left, top = self._place(width, height)
        if self.resize_mode == "crop":
            return pixels[0, :, top : top + self.size, left : left + self.size].numpy()
        if self.resize_mode == "squash":
            return pixels[0].numpy()
        canvas = np.empty((3, self.size, self.size), np.uint8)
        canvas[:] = np.array(self._border, np.uint8)[:, None, None]
        canvas[:, top : top + height, left : left + width] = pixels[0].numpy()
        return canvas

    def _resized_by_pillow(self, image: Image.Image) -> Image.Image:
        width, height = self._resized(*image.size)
        left, top = self._place(width, height)
        image = image.resize((width, height), _FILTERS[self.interpolation])
        if self.resize_mode == "crop":
            return image.crop((left, top, left + self.size, top + self.size))
        if self.resize_mode == "squash":
            return image
        canvas = Image.new("RGB", (self.size, self.size), self._border)
        canvas.paste(image, (left, top))
        return canvas

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before padding or cutting."""
        size = self.size
        if self.resize_mode == "squash":
            return size, size
        if self.resize_mode == "pad":
            # Resized before it is padded: the border needs no arithmetic.
            side = max(width, height)
            return max(1, round(width * size / side)), max(1, round(height * size / side))
        short, long = sorted((width, height))
        longer = int(size * long / short)
        return (size, longer) if width <= height else (longer, size)

    def _place(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the resized picture on the canvas (pad), or of the square in it (crop)."""
        if self.resize_mode == "crop":
            return round((width - self.size) / 2), round((height - self.size) / 2)
        return (self.size - width) // 2, (self.size - height) // 2

    @property
    def _border(self) -> tuple[int, ...]:
        return tuple(int(channel * 255) for channel in self.mean)


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
