"""The emoji of four vendors joined by code point, from packages of two pictures made here."""

import io
import json
import sys
import tarfile
import types

import pytest
from PIL import Image

from llava_compete.errors import UserError
from llava_compete.fetch import emoji

TABLE = [
    {"emoji": "A", "hexcode": "2600-FE0F", "group": "travel-places", "annotation": "sun", "tags": "bright, rays"},
    {"emoji": "B", "hexcode": "1F600", "group": "smileys-emotion", "annotation": "grin", "tags": "face"},
    {"emoji": "C", "hexcode": "1F1EA", "group": "flags", "annotation": "flag", "tags": ""},
]


def picture(kind):
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 10, 10, 255)).save(buffer, format=kind)
    return buffer.getvalue()


def package(path, files):
    with tarfile.open(path, "w:gz") as tarball:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tarball.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Packages with both emoji in four spellings of their code points; SVGs are not drawn."""
    resvg = types.SimpleNamespace(svg_to_bytes=lambda svg_string, width, height: picture("PNG"))
    monkeypatch.setitem(sys.modules, "resvg_py", resvg)
    monkeypatch.setattr(emoji, "NUM_EMOJI", 2)
    rest = {"subgroups": "x", "openmoji_tags": "face, bright", "skintone": ""}
    png, webp, svg = picture("PNG"), picture("WEBP"), b"<svg/>"
    files = {
        "twitter": {"package/img/twitter/64/2600-fe0f.png": png, "package/img/twitter/64/1f600.png": png},
        "google": {"package/img/google/64/2600.png": png, "package/img/google/64/1f600.png": png},
        "fluent": {"package/assets/2600-fe0f.webp": webp, "package/assets/1f600.webp": webp},
        "openmoji": {
            "package/data/openmoji.json": json.dumps([{**entry, **rest} for entry in TABLE]).encode(),
            "package/color/svg/2600.svg": svg,
            "package/color/svg/1F600.svg": svg,
            "package/color/svg/1F1EA.svg": svg,
        },
    }
    return {vendor: package(tmp_path / f"{vendor}.tgz", content) for vendor, content in files.items()}


def test_vendors_are_joined_by_code_point(archives, tmp_path):
    emoji.TARGET.convert(archives, tmp_path / "out", {})
    entries = json.loads((tmp_path / "out" / "emoji.json").read_text())
    assert [(entry["code"], entry["name"]) for entry in entries] == [("2600", "sun"), ("1f600", "grin")]
    assert entries[0]["tags"] == ["bright", "rays", "face"]
    for entry in entries:
        assert list(entry["images"]) == ["twitter", "google", "fluent", "openmoji"]
        for path in entry["images"].values():
            with Image.open(tmp_path / "out" / path) as drawn:
                assert (drawn.format, drawn.size) == ("PNG", (64, 64))
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 8


def test_an_emoji_that_one_vendor_lacks_is_an_error(archives, tmp_path):
    package(archives["fluent"], {"package/assets/1f600.webp": picture("WEBP")})
    counts = "twitter 2, google 2, fluent 1, openmoji 2"
    with pytest.raises(UserError, match=rf"1 are drawn by all four vendors \({counts}\), expected 2"):
        emoji.TARGET.convert(archives, tmp_path / "out", {})
