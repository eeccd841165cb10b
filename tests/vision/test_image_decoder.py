"""Any image file becomes upright RGB with the right colours, or an error with a name."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava_compete.vision.image_decoder import BadImageError, full_size, image_size, open_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_pixels(left=RED, right=GREEN):
    image = Image.new("RGB", (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    return image


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise
    content = saved(two_pixels(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    image = open_image(content)
    assert image.size == (16, 32)
    assert (image.getpixel((8, 2)), image.getpixel((8, 30))) == (RED, GREEN)
    # By the header alone tokens are counted, before the picture is decoded.
    assert image_size(content) == full_size(image) == (32, 16)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "WEBP")]
)
def test_modes_keep_their_colours(mode, kind):
    content = saved(two_pixels().convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = open_image(content)
    assert (image.mode, image.getpixel((2, 2)), image.getpixel((30, 2))) == ("RGB", RED, GREEN)


def test_cmyk():
    image = open_image(saved(two_pixels(WHITE, RED).convert("CMYK"), "TIFF"))
    assert (image.getpixel((2, 2)), image.getpixel((30, 2))) == (WHITE, RED)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode):
    image = open_image(saved(Image.new(mode, (8, 8), 0 if mode == "L" else (0,) * len(mode)), "PNG"))
    assert image.getpixel((0, 0)) == WHITE


def test_palette_with_a_transparent_colour():
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert open_image(saved(palette, "PNG", transparency=0)).getpixel((0, 0)) == WHITE


def test_sixteen_bit_grey_is_scaled():
    values = np.array([[0, 32768, 65535]], dtype=np.uint16).repeat(4, 0)
    image = open_image(saved(Image.fromarray(values), "PNG"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


@pytest.mark.parametrize(("dtype", "white"), [(np.int32, 4095), (np.int32, 70_000), (np.float32, 1), (np.float32, 255)])
def test_32_bit_grey_is_scaled_by_its_range(dtype, white):
    image = open_image(saved(Image.fromarray((np.array([[0, 0.5, 1]] * 4) * white).astype(dtype)), "TIFF"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, pytest.approx(127, abs=1), 255]


@pytest.mark.parametrize("values", [[3, 3], [0, float("nan")], [0, float("inf")]])
def test_32_bit_grey_without_a_range_is_refused(values):
    content = saved(Image.fromarray(np.array([values] * 4, np.float32)), "TIFF")
    with pytest.raises(BadImageError, match="mode F") as caught:
        open_image(content)
    assert caught.value.kind == "image_unreadable"


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN)]
    image = open_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == RED


@pytest.mark.parametrize("tolerant", [False, True])
def test_bad_files_are_named(tmp_path, monkeypatch, tolerant):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # True: what importing lmms-eval does
    jpeg = saved(Image.effect_noise((64, 64), 50), "JPEG")
    cases = {"image_empty": b"", "image_unreadable": b"<html>", "image_truncated": jpeg[: len(jpeg) // 2]}
    for kind, content in cases.items():
        path = tmp_path / f"{kind}.jpg"
        path.write_bytes(content)
        for source in (path, content):
            with pytest.raises(BadImageError) as caught:
                open_image(source)
            assert caught.value.kind == kind
            assert source is content or str(path) in str(caught.value)
    # Pillow's reader of this format raises NotImplementedError.
    dds = bytearray(saved(Image.new("RGBA", (8, 8)), "DDS"))
    dds[80:84] = bytes(4)
    with pytest.raises(BadImageError, match="NotImplementedError"):
        open_image(bytes(dds))
    for kind, path in {"image_missing": tmp_path / "gone.png", "image_is_a_folder": tmp_path}.items():
        with pytest.raises(BadImageError) as caught:
            open_image(path)
        assert caught.value.kind == kind
