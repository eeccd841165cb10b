"""A decoded picture in torch's hands without a copy, and torch's uint8 antialias kernel for its resize.

The kernel does as Pillow does (first the width, then the height, each rounded to uint8) with weights of 16 bits where
Pillow's have 22. Where rows of pixels are alike, as in a chart, the first pass may thus round a whole column of values
the other way, and the negative lobes of the bicubic filter make more than one level of it in the second: 2 to 4 values
in a million of such pictures are 2/255 from Pillow's. With `exact_width` Pillow does the first pass, and nothing is
more than 1/255 away; that takes up to four times as long, still less than Pillow alone.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def resized(
    image: Image.Image, height: int, width: int, mode: Literal["bicubic", "bilinear"], *, exact_width: bool = False
) -> Tensor:
    """An RGB image as uint8 [3, height, width]; maybe a view of the image's own memory, not to be written to."""
    if exact_width and width != image.width:
        image = image.resize((width, image.height), FILTERS[mode])
    pixels_1CHW = pixels_of(image)
    if (image.height, image.width) != (height, width):
        pixels_1CHW = F.interpolate(pixels_1CHW, size=(height, width), mode=mode, antialias=True)
    return pixels_1CHW[0, :3]


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image's pixels, uint8 [1, C, H, W] in the memory order of [1, H, W, C], in which the kernel is fastest.

    C is 4 where they lie as Pillow has them, in fours whose last byte says nothing (lent through pyarrow, where that is
    installed and the image is one block of memory: up to 16 MB); else 3, of a copy. Not to be written to.
    """
    arrow = _arrow()
    if arrow is not None and hasattr(image, "__arrow_c_array__"):  # since Pillow 11.2.1
        try:
            flat = torch.from_dlpack(arrow.array(image).flatten())
            return flat.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
        except ValueError:  # in several blocks
            pass
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@cache
def _arrow() -> ModuleType | None:
    try:
        import pyarrow
    except ImportError:  # only training and evaluation need it
        return None
    return pyarrow
