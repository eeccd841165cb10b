"""From an image to the tower's pixels: decode (`image_inputs`), then resize, and in version 1 also normalise.

The same code serves training workers, evaluation and chat. Version 1 is bit-equal to open_clip's own inference
transform for `squash` and `crop`. Versions 2 and 3 hand over uint8, a quarter of the bytes between processes and
devices, and the model normalises; both resize by torch's uint8 kernel (`resizing.py`), version 3 the height alone, and
so stays within 1/255 of open_clip's pixels, where version 2, which is faster, has a value in some 300,000 of a chart at
2/255. S² needs no step here: `size` is that of the largest scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from llava_compete.errors import UserError
from llava_compete.vision.image_decoder import MAX_PIXELS, BadImageError, Size, Wanted, full_size
from llava_compete.vision.image_inputs import load_images
from llava_compete.vision.naflex import NativeSizes, SizedPictures, patch_pixels
from llava_compete.vision.resizing import FILTERS, resized
from llava_compete.vision.tiles import Box, Tiling, tile_pixels
from llava_compete.vision.tower_config import CLIP_MEAN, CLIP_STD, Interpolation, PixelVersion, ResizeMode, TowerConfig

# What transformers writes into a saved file beside the settings.
_NOTES = ("image_processor_type", "processor_class", "auto_map")


class LlavaCompeteImageProcessor(BaseImageProcessor):
    """Resizes to `size` x `size`; normalises, if of version 1 (`tower_config.PixelVersion`).

    resize_mode: `pad` fills up to a square with the mean colour, `squash` stretches, `crop` scales the shorter side
    and cuts the centre. jpeg_draft: large JPEGs are decoded at a part of their size (`image_decoder.open_image`), where
    their files come here; images that come decoded are taken as they are. These settings belong to the tower:
    transformers' own options (`do_resize`, `image_mean` and the like) are refused, here and in a call, since ignoring
    them would go unnoticed.

    tiles: grids that a picture may be cut into (`tiles`). max_patches, pool: pictures at their own proportions
    (`naflex`); `size` is then that of a patch.
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
        jpeg_draft: bool = False,
        max_patches: int | None = None,
        pool: int = 1,
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
        self.jpeg_draft = jpeg_draft
        self.max_patches = max_patches
        self.pool = pool

    @classmethod
    def from_tower(cls, tower: TowerConfig, pool: int = 1) -> LlavaCompeteImageProcessor:
        """The processor that delivers what this tower takes, for a projector that pools `pool` x `pool` features."""
        options: dict[str, Any] = {} if tower.tiles is None else {"tiles": tower.tiles}
        if tower.max_patches is not None:
            options = {"max_patches": tower.max_patches, "pool": pool}
        return cls(**{**tower.preprocess.model_dump(), "size": tower.image_size, **options})

    def tiling(self, side: int) -> SizedPictures | None:
        """How pictures are cut whose tiles become `side` x `side` embeddings, or that keep their own proportions; None
        for pictures of one size."""
        if self.max_patches is not None:
            return NativeSizes(self.size, self.pool, self.max_patches)
        if self.tiles is None:
            return None
        return Tiling(self.size, side, tuple((rows, columns) for rows, columns in self.tiles))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images of any kind as upright RGB Pillow images, nesting kept; transformers' processor calls this by name."""
        return load_images(image_url_or_urls, self.wanted)

    @property
    def wanted(self) -> Wanted | None:
        """What `open_image` needs so that a file's pixels are these settings'; None where it needs nothing."""
        return self._largest if self.jpeg_draft else None

    def _largest(self, picture: Size) -> Size:
        """The largest height and width that a picture is resized to."""
        height, width = self._inside(picture)
        tiling = self.tiling(side=1)
        if tiling is None:
            return height, width
        tiled = tiling.inside(picture)
        return max(height, tiled[0]), max(width, tiled[1])

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
        sizes = [full_size(image) for image in flat]
        return BatchFeature({"pixel_values": tiles, "image_sizes": sizes}, tensor_type=return_tensors)

    def _tiled(self, image: Image.Image, tiling: SizedPictures) -> list[np.ndarray]:
        """The whole picture and its tiles, or its patches."""
        if isinstance(tiling, NativeSizes):
            return list(patch_pixels(image, tiling, self.interpolation))
        return [self.pixels(image), *tile_pixels(image, tiling, self.interpolation)]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One RGB image, [3, size, size]; uint8 or normalised float32, as in `preprocess`."""
        if self.version > 1:
            return self._resized_by_torch(image)
        array = np.asarray(self._resized_by_pillow(image))
        values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
        # A table of the 256 possible values: the same float32 arithmetic as on the whole image, once.
        table = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.stack([table[:, channel][array[..., channel]] for channel in range(3)])

    def box(self, picture: Size) -> Box:
        """Where the square's edges are in a picture's own pixels: beyond its edges by the borders of `pad`, inside by
        what `crop` cuts."""
        height, width = self._inside(picture)
        left, top = self._place(height, width)
        if self.resize_mode != "crop":
            left, top = -left, -top
        across, down = picture[1] / width, picture[0] / height
        return left * across, top * down, (left + self.size) * across, (top + self.size) * down

    def _resized_by_torch(self, image: Image.Image) -> np.ndarray:
        height, width = self._inside(full_size(image))
        pixels = resized(image, height, width, self.interpolation, exact_width=self.version == 3)
        left, top = self._place(height, width)
        if self.resize_mode == "crop":
            return _own(pixels[:, top : top + self.size, left : left + self.size])
        if self.resize_mode == "squash":
            return _own(pixels)
        canvas = np.empty((3, self.size, self.size), np.uint8)
        canvas[:] = np.array(self._border, np.uint8)[:, None, None]
        canvas[:, top : top + height, left : left + width] = pixels.numpy()
        return canvas

    def _resized_by_pillow(self, image: Image.Image) -> Image.Image:
        height, width = self._inside(full_size(image))
        left, top = self._place(height, width)
        image = image.resize((width, height), FILTERS[self.interpolation])
        if self.resize_mode == "crop":
            return image.crop((left, top, left + self.size, top + self.size))
        if self.resize_mode == "squash":
            return image
        canvas = Image.new("RGB", (self.size, self.size), self._border)
        canvas.paste(image, (left, top))
        return canvas

    def _inside(self, picture: Size) -> Size:
        """Height and width that a picture is resized to, before it is padded or cut.

        Raises:
            BadImageError: with `crop`, a picture so long and thin that it would not fit into memory.
        """
        size, (height, width) = self.size, picture
        if self.resize_mode == "squash":
            return size, size
        if self.resize_mode == "pad":
            # Resized before it is padded: the border needs no arithmetic.
            side = max(width, height)
            return max(1, round(height * size / side)), max(1, round(width * size / side))
        short, long = sorted((width, height))
        longer = int(size * long / short)
        if longer * size > MAX_PIXELS:
            text = f"image of {width}x{height} pixels: so thin that the square cut out of it would show nothing of it"
            raise BadImageError("image_too_small", text)
        return (longer, size) if width <= height else (size, longer)

    def _place(self, height: int, width: int) -> tuple[int, int]:
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


def _own(pixels: Tensor) -> np.ndarray:
    """The array [3, H, W] in its own order and memory."""
    return np.ascontiguousarray(pixels.numpy())


def _flatten(images: Any) -> list[Image.Image]:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    return [images]
