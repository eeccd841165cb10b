"""One decoder: the pixels of a picture do not depend on the way it comes in, nor do the refusals."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_tokenizer

from llava_compete.errors import UserError
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.vision.image_decoder import BadImageError, open_image
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor

RAMP = np.linspace(0, 1, 20 * 16).reshape(16, 20)


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def oddities() -> dict[str, Image.Image]:
    """Pictures that a plain `convert("RGB")` shows wrongly: turned, transparent, grey of more than 8 bits."""
    turned = photo(20, 16)
    turned.getexif()[0x0112] = 6
    alpha = photo(20, 16).convert("RGBA")
    alpha.putalpha(Image.fromarray((RAMP * 255).astype(np.uint8)))
    grey = {
        "sixteen": Image.fromarray((RAMP * 65535).astype(np.uint16)),
        "int32": Image.fromarray((RAMP * 1e6).astype(np.int32)),
        "float": Image.fromarray(RAMP.astype(np.float32)),
    }
    return {"turned": turned, "alpha": alpha, **grey}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and the address it is served at."""
    folder = tmp_path_factory.mktemp("web")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", oddities())
def test_pixels_do_not_depend_on_the_way_in(kind: str, web: tuple[Path, str]) -> None:
    """By URL, in a conversation or as a Pillow image: the picture of training, which is `open_image` of its file."""
    folder, address = web
    image, path = oddities()[kind], folder / f"{kind}.tiff"
    image.save(path, exif=image.getexif())
    content = path.read_bytes()
    encoded = base64.b64encode(content).decode()
    processor = LlavaCompeteImageProcessor(16, resize_mode="squash")
    expected = processor.pixels(open_image(path))
    assert not np.array_equal(expected, processor.pixels(image.convert("RGB")))
    ways = {
        "path": str(path),
        "Path": path,
        "file URL": path.as_uri(),
        "http URL": f"{address}/{path.name}",
        "bytes": content,
        "base64": encoded,
        "data URL": f"data:image/tiff;base64,{encoded}",
        "Pillow": Image.open(io.BytesIO(content)),
        "decoded": open_image(path),
    }
    for way, given in ways.items():
        assert np.array_equal(processor(given)["pixel_values"][0], expected), way
    chat = LlavaCompeteProcessor(processor, tiny_tokenizer(), num_image_tokens=4)
    for key, way in {"image": "Pillow", "url": "http URL", "path": "path", "base64": "base64"}.items():
        messages = [{"role": "user", "content": [{"type": "image", key: ways[way]}]}]
        inputs = chat.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert np.array_equal(inputs["pixel_values"][0], expected), key
    for way in ("path", "Pillow", "data URL"):
        assert np.array_equal(chat(images=[ways[way]], text="<image>")["pixel_values"][0], expected), way


def test_a_video_in_a_conversation_is_refused_by_name() -> None:
    chat = LlavaCompeteProcessor(LlavaCompeteImageProcessor(8), tiny_tokenizer(), num_image_tokens=4)
    messages = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(UserError, match="a content part of type 'video'"):
        chat.apply_chat_template(messages, tokenize=True)


def test_a_pillow_image_is_left_as_it_was() -> None:
    image = oddities()["turned"]
    LlavaCompeteImageProcessor(16)(image)
    assert (image.size, image.getexif()[0x0112]) == ((20, 16), 6)


def test_bad_pictures_are_named_whatever_the_way_in(tmp_path: Path, web: tuple[Path, str]) -> None:
    processor = LlavaCompeteImageProcessor(8)
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, "JPEG")
    half = buffer.getvalue()[:1500]
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "image_truncated": [half, base64.b64encode(half).decode(), Image.open(io.BytesIO(half))],
        "image_unreadable": [b"<html>", "data:text/html,hello", "data:image/png;base64,@@@", tmp_path / "pipe.png"],
        "image_missing": [str(tmp_path / "gone.png"), f"{web[1]}/gone.png", f"{web[1]}/a b.png", "x!", "!" * 100_000],
        "image_empty": [b"", "", Image.new("RGB", (0, 5))],
    }
    for kind, images in cases.items():
        for image in images:
            with pytest.raises(BadImageError) as caught:
                processor(image)
            assert caught.value.kind == kind
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("bad", [None, 7, {}, np.zeros((4, 4, 3), np.float32), np.zeros((9, 9), np.uint8)])
def test_what_is_no_image_is_named(bad: object) -> None:
    with pytest.raises(UserError, match=r"image( array)?: found"):
        LlavaCompeteImageProcessor(8)([bad])


@pytest.mark.parametrize("option", [{"size": 24}, {"do_resize": False}, {"image_mean": 0.5}, {"device": "cpu"}])
def test_options_that_would_not_be_obeyed_are_refused(option: dict[str, object]) -> None:
    processor = LlavaCompeteImageProcessor(8)
    chat = LlavaCompeteProcessor(processor, tiny_tokenizer(), num_image_tokens=4)
    (name,) = option
    with pytest.raises(UserError, match=f"found the option {name}"):
        processor(photo(9, 9), **option)
    with pytest.raises(UserError, match=f"found the option {name}"):
        chat(images=[photo(9, 9)], text="<image>", **option)
    if name != "size":
        with pytest.raises(UserError, match=f"found the option {name}"):
            LlavaCompeteImageProcessor(**option)
