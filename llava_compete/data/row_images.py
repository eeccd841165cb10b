"""The images of a row: what its image fields and content parts refer to, in the order in which the text shows them."""

from __future__ import annotations

import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from llava_compete.data.row_errors import RecordError, first_filled, first_value, shown
from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import images_before
from llava_compete.parts import IMAGE_TOKEN
from llava_compete.vision.image_inputs import data_url_bytes

Image = str | bytes
_MAX_PATH = 4096  # characters of a path on Linux
_INLINE = ("image", "path", "url", "base64", "image_url")


def row_images(row: Mapping[str, Any]) -> list[Image]:
    """`image` or `images`: a path, an embedded file ({"bytes", "path"}), a data URL, or a list of them."""
    found = first_filled(row, "image", "images")
    if found is None or found == "":
        return []
    return [image_reference(item) for item in (found if isinstance(found, list | tuple) else [found])]


def image_reference(item: Any) -> Image:
    """One image: the bytes of its file, or its path (relative to the source's image folder).

    Raises:
        RecordError: anything else. A training run fetches nothing, so an http address is an error here.
    """
    if isinstance(item, Mapping) and isinstance(item.get("bytes"), bytes):
        return item["bytes"]
    found = first_value(item, "path", "url") if isinstance(item, Mapping) else item
    if isinstance(found, bytes):
        return found
    if not isinstance(found, str) or not found.strip():
        raise RecordError("image_reference_invalid", f"image: found {shown(item)}, expected a path or embedded bytes")
    if found.startswith(("http://", "https://")):
        raise RecordError("image_reference_invalid", f"image: found the address {shown(found)}; download it first")
    if len(found) > _MAX_PATH and not found.startswith("data:"):
        raise RecordError(
            "image_reference_invalid",
            f"image: found a text of {len(found):,} characters, {shown(found)}, expected a path or a data URL; what is "
            "base64 goes behind data:image/png;base64,",
        )
    if found.startswith("file://"):
        return urllib.request.url2pathname(urllib.parse.urlparse(found).path)
    try:
        content = data_url_bytes(found)
    except UserError as error:
        raise RecordError("image_reference_invalid", f"image: {error}") from error
    return found if content is None else content


def image_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A content part of type image or image_url: with its own `image`, with an `index` into the row's, or bare."""
    inline = first_value(part, *_INLINE)
    if inline is not None:
        if part.get("base64") is inline and isinstance(inline, str) and not inline.startswith("data:"):
            inline = f"data:image/any;base64,{inline}"
        return {"type": "image", "image": image_reference(inline)}
    index = part.get("index")
    if index is None:
        return {"type": "image"}
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise RecordError("image_reference_invalid", f"image part: found index {shown(index)}, expected 0, 1, ...")
    return {"type": "image", "index": index}


def in_reading_order(messages: list[dict[str, Any]], images: list[Image]) -> tuple[list[Image], bool]:
    """Images as the text shows them, and whether nothing said where, so that they were put before the first question.

    Leaves bare image parts in `messages`.

    Raises:
        RecordError: places and images do not match.
    """
    places = [part for message in messages for part in message["content"] if part["type"] == "image"]
    inline = [part.pop("image") for part in places if "image" in part]
    indices = [part.pop("index") for part in places if "index" in part]
    if inline:
        if images or len(inline) != len(places):
            raise RecordError("placeholders_do_not_match", "some images are inside the content parts and some are not")
        return inline, False
    if indices:
        if len(indices) != len(places) or set(indices) != set(range(len(images))):
            raise RecordError(
                "placeholders_do_not_match",
                f"image parts with the indices {shown(indices)} in {len(places)} places for {len(images)} images",
            )
        return [images[index] for index in indices], False
    question = next((message for message in messages if message["role"] == "user"), None)
    if images and not places and question is not None:
        question["content"] = images_before(len(images), question["content"])
        return images, True
    if len(places) != len(images):
        kind = "placeholder_without_image" if not images else "placeholders_do_not_match"
        raise RecordError(kind, f"{len(places)} placeholders {IMAGE_TOKEN} for {len(images)} images")
    return images, False


def images_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """LLaVA's own rule (`preprocess_multimodal`): the images of a turn go before its text, a line break between.

    The text around a placeholder loses its white space: "What is this?\\n<image>" becomes "<image>\\nWhat is this?".
    """
    moved = []
    for message in messages:
        images = sum(part["type"] == "image" for part in message["content"])
        if images:
            text = "".join(part.get("text", "") for part in message["content"]).strip()
            message = {**message, "content": images_before(images, [{"type": "text", "text": text}] if text else [])}
        moved.append(message)
    return moved
