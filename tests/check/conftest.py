"""Pictures, whole and broken, and the text side of the checker."""

import io

import numpy as np
import pytest
from check_kit import bomb_png
from PIL import Image
from tokenizers_for_tests import make_tokenizer

from llava_compete.check.row_checks import TextSide


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "good.png")
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[:-400])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    (folder / "bomb.png").write_bytes(bomb_png())
    (folder / "folder.jpg").mkdir()
    Image.new("RGB", (3, 40)).save(folder / "tiny.png")
    Image.new("RGB", (600, 10)).save(folder / "strip.png")
    Image.new("CMYK", (40, 40)).save(folder / "cmyk.jpg")
    return folder


@pytest.fixture(scope="module")
def text_side():
    return TextSide(make_tokenizer("byte_bpe", "chatml"), num_image_tokens=16)
