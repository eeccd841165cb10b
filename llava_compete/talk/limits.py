"""What those who ask a server or a page may send, and the one check of a picture that they send."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava_compete.errors import UserError
from llava_compete.vision.image_decoder import image_size, open_image


@dataclass(frozen=True)
class Limits:
    """Of one request: new tokens, pictures, MiB of a picture's file, millions of its pixels."""

    max_new_tokens: int = 1024
    images: int = 8
    image_mib: float = 20.0
    megapixels: float = 50.0

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "images": 0, "image_mib": 0.0, "megapixels": 0.0}
        options = {"images": "max-images", "image_mib": "max-image-mib", "megapixels": "max-megapixels"}
        for key, low in least.items():
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= low):
                option = options.get(key, key.replace("_", "-"))
                raise UserError(f"--{option}: found {value}, expected a number of at least {low:g}")

    @property
    def image_bytes(self) -> int:
        """The largest file of a picture."""
        return int(self.image_mib * 2**20)

    @property
    def body_bytes(self) -> int:
        """The largest request: base64 takes a third more than the pictures, and there is text beside them."""
        return int(self.images * self.image_mib * 2**20 * 4 / 3) + 2**20


def picture_within(content: bytes, limits: Limits, name: str, processor: Any = None) -> Image.Image:
    """The picture in a file's bytes, decoded as in training; its size is read off its header first.

    processor: of the model that sees it; without one it is decoded whole, to be shown too.

    Raises:
        UserError: more bytes or pixels than are allowed, or no picture that can be opened (`BadImageError`).
    """
    if len(content) > limits.image_bytes:
        raise UserError(f"{name}: a picture of {len(content):,} bytes, at most {limits.image_mib:g} MiB")
    height, width = image_size(content, name)
    if width * height > limits.megapixels * 1e6:
        raise UserError(f"{name}: a picture of {width}x{height} pixels, at most {limits.megapixels:g} million")
    return open_image(content, name) if processor is None else processor.open_image(content, name)
