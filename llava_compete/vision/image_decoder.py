"""Open any image as upright RGB, or say what is wrong with it.

The one decoder of training, checks, evaluation and chat, so that a model meets the pixels it was trained on. Handles
EXIF orientation, palettes, transparency (over white), CMYK, 16-bit grey, and takes the first frame of an animation. A
picture of more than `MAX_PIXELS` is refused before it is decoded.

A large JPEG may be decoded in draft mode, at a half, a quarter or an eighth of its size, which leaves most of the
arithmetic undone. Its own size, by which tokens are counted, stays known (`full_size`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from llava_compete.errors import UserError

MAX_PIXELS = 100_000_000
_ON_THEIR_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_DRAFT_SCALES = (8, 4, 2)  # libjpeg's
# A draft keeps so many times the size that the picture is then resized to, so that the resize still sees more than it
# shows.
DRAFT_ROOM = 2

Size = tuple[int, int]  # height and width in pixels
# From a picture's size to the largest one that it will be resized to.
Wanted = Callable[[Size], Size]


class BadImageError(UserError):
    """An image that cannot be used; `kind` is the checker's name for the problem."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)  # both, so that it can be sent between processes
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


def open_image(source: str | Path | bytes, name: str | None = None, wanted: Wanted | None = None) -> Image.Image:
    """Decode a path or the bytes of a file to an RGB image; `name` stands for bytes in messages.

    With `wanted` a JPEG of which at least `DRAFT_ROOM` times that size is left is decoded at a half, quarter or eighth
    of its own. The result's `info["source_mode"]` is the file's Pillow mode. Raises `BadImageError` with kind
    image_missing, image_is_a_folder, image_empty, image_unreadable, image_truncated or image_too_large.
    """
    with _opened(source, name) as (image, label):
        if wanted is None or not isinstance(image, JpegImageFile):
            return upright_rgb(image, label, ours=True)
        size = _upright_size(image, label)
        rgb = upright_rgb(_drafted(image, size, wanted(size)), label, ours=True)
        rgb.info["draft"] = (rgb.size, size)
        return rgb


def image_size(source: str | Path | bytes, name: str | None = None) -> Size:
    """Height and width that `open_image` would give, from the file's header alone; errors are the same as far as the
    header shows them."""
    with _opened(source, name) as (image, label):
        return _upright_size(image, label)


def full_size(image: Image.Image) -> Size:
    """Height and width of an upright image, in its file where only a draft of that was decoded."""
    drafted, size = image.info.get("draft", (None, None))
    # What Pillow makes of an image takes its notes along: a part that was cut out is no draft.
    return size if drafted == image.size else (image.height, image.width)


def _upright_size(image: Image.Image, label: str) -> Size:
    width, height = image.size
    _check_size(width, height, label)
    # Of a TIFF Pillow's size is that of the picture as it is shown, before it is read too.
    turned = not isinstance(image, TiffImageFile) and (
        image.getexif().get(ExifTags.Base.Orientation, 1) in _ON_THEIR_SIDE
    )
    return (width, height) if turned else (height, width)


def _drafted(image: JpegImageFile, size: Size, wanted: Size) -> Image.Image:
    """The image, or what it is at the least scale that leaves enough of it."""
    for scale in _DRAFT_SCALES:
        if all(side // scale >= DRAFT_ROOM * least for side, least in zip(size, wanted, strict=True)):
            width, height = image.size
            # Pillow takes the largest scale that leaves this size: this one. The last pixels of a draft stand for the
            # file's padding where they stand for less than half a pixel of the picture.
            image.draft(None, (width // scale, height // scale))
            return image.crop((0, 0, round(width / scale), round(height / scale)))
    return image


@contextmanager
def _opened(source: str | Path | bytes, name: str | None) -> Iterator[tuple[Image.Image, str]]:
    """The file's image, not decoded yet, and what messages call it."""
    label = name or (str(source) if not isinstance(source, bytes) else "embedded image")
    if not source:
        raise BadImageError("image_empty", f"{label or 'image'}: the file has no bytes")
    with _named_errors(label):
        if not isinstance(source, bytes):
            _check_file(Path(source), label)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image, label


def upright_rgb(image: Image.Image, label: str = "image", *, ours: bool = False) -> Image.Image:
    """The RGB image that `open_image` makes of a Pillow image's file; the image itself is not changed, unless it is
    `ours` alone: then a JPEG, or a part cut out of one, comes back without a copy.

    Raises:
        BadImageError: as `open_image`, for an image that Pillow has opened but not yet read, or of no pixels.
    """
    if image.mode == "RGB" and "source_mode" in image.info:  # has been through here
        return image
    with _named_errors(label):
        width, height = image.size
        _check_size(width, height, label)
        image.load()
        mode = image.mode
        if (
            mode == "RGB"
            and "transparency" not in image.info
            and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        ):
            rgb = image if ours and type(image) in (JpegImageFile, Image.Image) else image.copy()
        else:
            rgb = _to_rgb(ImageOps.exif_transpose(image), label)
        rgb.info = {"source_mode": mode}  # and nothing of the file: its orientation would be applied twice
        return rgb


def _check_size(width: int, height: int, label: str) -> None:
    if width < 1 or height < 1:
        raise BadImageError("image_empty", f"{label} of size {width}x{height}: nothing to see")
    if width * height > MAX_PIXELS:
        raise BadImageError("image_too_large", f"{label}: {width}×{height} pixels, at most {MAX_PIXELS:,}")


def _check_file(path: Path, label: str) -> None:
    """Pillow would wait for ever at a pipe, and reports an empty file as one of an unknown kind."""
    if path.is_dir():
        raise BadImageError("image_is_a_folder", f"{label}: a folder, not an image file")
    if not path.is_file():
        if path.exists():
            raise BadImageError("image_unreadable", f"{label}: a pipe or device, not an image file")
        raise BadImageError("image_missing", f"{label}: no such image file")
    if path.stat().st_size == 0:
        raise BadImageError("image_empty", f"{label}: the file has no bytes")


@contextmanager
def _named_errors(label: str) -> Iterator[None]:
    """Whatever Pillow raises becomes a `BadImageError` with a kind; its warnings are kept back."""
    # lmms-eval switches this on for the whole process at import; half a picture would then pass as grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            # Pillow warns about large pictures, odd EXIF and palettes; size is checked, the rest is harmless.
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError("image_too_large", f"{label}: {error}") from error
    except (UnidentifiedImageError, PermissionError) as error:
        raise BadImageError("image_unreadable", f"{label}: not an image that Pillow can open ({error})") from error
    except Exception as error:  # Pillow's decoders meet broken files with nearly any exception
        kind = "image_truncated" if "truncated" in str(error).lower() else "image_unreadable"
        raise BadImageError(kind, f"{label}: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """Any Pillow mode as RGB: transparency over white, grey of more than 8 bits scaled to 8."""
    if image.mode.startswith("I;16"):
        # By the file format's own definition 65535 is white.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_by_range(np.asarray(image, dtype=np.float64), image.mode, label)).convert("RGB")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _by_range(values_HW: np.ndarray, mode: str, label: str) -> np.ndarray:
    """uint8 [H, W]: the smallest value black and the largest white, for 32-bit pixels have no white of their own."""
    low, high = float(values_HW.min()), float(values_HW.max())
    if not np.isfinite([low, high]).all():
        raise BadImageError("image_unreadable", f"{label}: mode {mode} with values that are not finite")
    if low == high:
        raise BadImageError(
            "image_unreadable", f"{label}: mode {mode} with the one value {low:g}, which may be black or white"
        )
    return np.round((values_HW - low) * (255 / (high - low))).astype(np.uint8)
