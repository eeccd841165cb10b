"""Every way to hand over an image, through the one decoder: by URL or by path, a file gives the same pixels.

An image is a path, a URL (http, https, file, data), base64 text, the bytes of a file, a Pillow image, or a uint8
array or tensor [height, width, 3] or [3, height, width].
"""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from llava_compete.errors import UserError
from llava_compete.vision.image_decoder import BadImageError, Wanted, open_image, upright_rgb

_TIMEOUT_S = 30
_MAX_DOWNLOAD = 200 << 20  # bytes; more is no picture
_MAX_PATH = 4096  # characters of a path on Linux
_SHOWN = 60  # characters of a text that is no image


def load_images(images: Any, wanted: Wanted | None = None) -> Any:
    """One image, or lists and tuples of them to any depth, as RGB Pillow images in lists of the same nesting.

    wanted: as for `open_image`; pixels that come decoded stay as they are.

    Raises:
        BadImageError: a picture that cannot be decoded, named by its path or URL.
        UserError: something that is no image.
    """
    if isinstance(images, list | tuple):
        return [load_images(image, wanted) for image in images]
    return load_image(images, wanted)


def load_image(image: Any, wanted: Wanted | None = None) -> Image.Image:
    """One image of any kind as an upright RGB Pillow image; errors as for `load_images`."""
    if isinstance(image, Image.Image):
        unread = _unread_file(image) if wanted is not None else None
        return upright_rgb(image) if unread is None else open_image(unread, wanted=wanted)
    if isinstance(image, bytes | Path):
        return open_image(image, wanted=wanted)
    if isinstance(image, str):
        return _from_text(image, wanted)
    return upright_rgb(_from_array(image))


def _unread_file(image: Image.Image) -> bytes | None:
    """The bytes of a JPEG that Pillow has opened and not yet decoded."""
    if not isinstance(image, JpegImageFile) or image.fp is None:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return content


def data_url_bytes(url: str) -> bytes | None:
    """The bytes that a `data:` URL holds; None if the text is no such URL.

    Raises:
        BadImageError: a data URL that is not base64 or holds something else than an image.
    """
    if not url.startswith("data:"):
        return None
    head, comma, body = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise BadImageError("image_unreadable", f"{head[:_SHOWN]}: expected data:image/...;base64, and the picture")
    content = _base64(body)
    if content is None:
        raise BadImageError("image_unreadable", f"{head[:_SHOWN]}: not valid base64")
    return content


def _from_text(text: str, wanted: Wanted | None) -> Image.Image:
    if text.startswith(("http://", "https://")):
        return open_image(_download(text), text, wanted)
    if text.startswith("file://"):
        return open_image(Path(urllib.request.url2pathname(urllib.parse.urlparse(text).path)), wanted=wanted)
    content = data_url_bytes(text)
    if content is None and not (len(text) < _MAX_PATH and os.path.lexists(text)):
        content = _base64(text)
    if content is not None:
        return open_image(content, f"base64 image {text[:20]}…", wanted)
    if len(text) >= _MAX_PATH:
        raise BadImageError("image_missing", f"{text[:_SHOWN]}…: neither a path, nor a URL, nor base64")
    return open_image(text, wanted=wanted)


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "llava-compete"})  # some sites refuse the default
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            content: bytes = response.read(_MAX_DOWNLOAD + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise BadImageError("image_missing", f"{url}: cannot be fetched: {error}") from error
    if len(content) > _MAX_DOWNLOAD:
        raise BadImageError("image_too_large", f"{url}: more than {_MAX_DOWNLOAD >> 20} MiB")
    return content


def _from_array(image: Any) -> Image.Image:
    """Arrays and tensors; other dtypes and shapes are refused, for nothing says where their white is."""
    try:
        array = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"image: found {type(image).__name__}, expected {_EXPECTED}") from error
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise UserError(f"image array: found {array.dtype} {array.shape}, expected uint8 [height, width, 3]")
    return Image.fromarray(array if array.shape[-1] == 3 else array.transpose(1, 2, 0))


_EXPECTED = "a path, a URL, base64, bytes, a Pillow image or a uint8 array"
