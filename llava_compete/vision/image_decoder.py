"""Open any image file as upright RGB, or say what is wrong with it.

The one decoder of training, checks, evaluation and chat. Handles EXIF orientation, palettes, transparency (over
white), CMYK, 16-bit grey, and takes the first frame of an animation. A picture of more than `MAX_PIXELS` is refused
before it is decoded.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from llava_compete.errors import UserError

MAX_PIXELS = 100_000_000


class BadImageError(UserError):
    """An image that cannot be used; `kind` is the checker's name for the problem."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)  # both, so that it can be sent between processes
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Decode a path or the bytes of a file to an RGB image; `name` stands for bytes in messages.

    The result's `info["source_mode"]` is the file's Pillow mode. Raises `BadImageError` with kind image_missing,
    image_is_a_folder, image_empty, image_unreadable, image_truncated or image_too_large.
    """
    label = name or (str(source) if not isinstance(source, bytes) else "embedded image")
    if isinstance(source, bytes):
        stream: io.BytesIO | Path = io.BytesIO(source)
    else:
        stream = Path(source)
    # lmms-eval switches this on for the whole process at import; half a picture would then pass as grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            # Pillow warns about large pictures, odd EXIF and palettes; size is checked below, the rest is harmless.
            warnings.simplefilter("ignore")
            with Image.open(stream) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImageError("image_too_large", f"{label}: {width}×{height} pixels, at most {MAX_PIXELS:,}")
                image.load()
                mode = image.mode
                ImageOps.exif_transpose(image, in_place=True)
                upright = to_rgb(image)
                upright.info = {"source_mode": mode}
                return upright
    except (BadImageError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise BadImageError("image_missing", f"{label}: no such image file") from error
    except Image.DecompressionBombError as error:
        raise BadImageError("image_too_large", f"{label}: {error}") from error
    except IsADirectoryError as error:
        raise BadImageError("image_is_a_folder", f"{label}: a folder, not an image file") from error
    except (UnidentifiedImageError, PermissionError) as error:
        if source == b"" or (isinstance(stream, Path) and os.access(stream, os.R_OK) and stream.stat().st_size == 0):
            raise BadImageError("image_empty", f"{label}: the file has no bytes") from error
        raise BadImageError("image_unreadable", f"{label}: not an image that Pillow can open ({error})") from error
    except Exception as error:  # Pillow's decoders meet broken files with nearly any exception
        kind = "image_truncated" if "truncated" in str(error).lower() else "image_unreadable"
        raise BadImageError(kind, f"{label}: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB: transparency over white, 16-bit grey scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.nan_to_num(np.asarray(image)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
