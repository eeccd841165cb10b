"""The same emoji drawn by four vendors, 64 pixels, with names, groups and tags: 1,376 emoji, 5,504 pictures.

Twitter's and Google's come as PNG, Microsoft's Fluent 3D as WebP, OpenMoji as SVG (drawn by resvg). They are joined by
code point; flags, symbols, skin tones and what a vendor lacks are left out. OpenMoji's table gives names, groups, tags.

    emoji.json                     one entry each: code, emoji, name, group, subgroup, tags, images by vendor
    images/VENDOR/CODE.png         RGBA
    ATTRIBUTION.md                 whom to name when a picture is shown
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.fetch.packages import Package, member, members
from llava_compete.fetch.target import Target

SIZE = 64
NUM_EMOJI = 1376
_LEFT_OUT = ("flags", "symbols", "component", "extras-openmoji", "extras-unicode")
# Vendor -> folder of its pictures in its package.
_FOLDERS = {
    "twitter": "package/img/twitter/64/",
    "google": "package/img/google/64/",
    "fluent": "package/assets/",
    "openmoji": "package/color/svg/",
}
_ATTRIBUTION = """# Attribution

- `images/twitter`: Twemoji, Copyright Twitter, Inc and other contributors, graphics CC-BY 4.0; through
  emoji-datasource-twitter.
- `images/google`: Noto Emoji, Copyright Google Inc., Apache-2.0 (fonts: SIL Open Font License 1.1); through
  emoji-datasource-google.
- `images/fluent`: Fluent Emoji, Copyright Microsoft Corporation, MIT; through @lobehub/fluent-emoji-3d; scaled.
- `images/openmoji` and the names, groups and tags: OpenMoji, the open-source emoji and icon project, CC-BY-SA 4.0;
  drawn at 64 pixels. What is made of these pictures is shared under the same licence.
"""


def _convert(archives: Mapping[str, Path], folder: Path, options: Mapping[str, Any]) -> None:
    table = [
        entry
        for entry in json.loads(member(archives["openmoji"], "package/data/openmoji.json"))
        if entry["group"] not in _LEFT_OUT and not entry["skintone"]
    ]
    wanted = {code_of(entry["hexcode"]) for entry in table}
    draw: dict[str, Callable[[bytes], bytes]] = {"openmoji": _draw_svg, "fluent": _scale}
    found: dict[str, set[str]] = {}
    for vendor in _FOLDERS:
        out = folder / "images" / vendor
        out.mkdir(parents=True)
        found[vendor] = set()
        for name, content in members(archives[vendor], partial(_lies_in, _FOLDERS[vendor])):
            code = code_of(Path(name).stem)
            if code in wanted and code not in found[vendor]:
                (out / f"{code}.png").write_bytes(draw.get(vendor, bytes)(content))
                found[vendor].add(code)
    everywhere = set.intersection(*found.values())
    if len(everywhere) != NUM_EMOJI:
        counts = ", ".join(f"{vendor} {len(codes)}" for vendor, codes in found.items())
        raise UserError(f"emoji: {len(everywhere)} are drawn by all four vendors ({counts}), expected {NUM_EMOJI}")
    for vendor, codes in found.items():
        for code in codes - everywhere:
            (folder / "images" / vendor / f"{code}.png").unlink()
    entries = [_entry(entry) for entry in table if code_of(entry["hexcode"]) in everywhere]
    (folder / "emoji.json").write_text(json.dumps(entries, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "ATTRIBUTION.md").write_text(_ATTRIBUTION, encoding="utf-8")


def _lies_in(folder: str, name: str) -> bool:
    return name.startswith(folder)


def code_of(name: str) -> str:
    """Code points in lower case, without the mark that asks for a coloured picture: vendors write it or not."""
    return "-".join(point for point in name.lower().split("-") if point != "fe0f")


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    code = code_of(entry["hexcode"])
    tags = [tag.strip() for tag in f"{entry['tags']},{entry['openmoji_tags']}".split(",")]
    return {
        "code": code,
        "emoji": entry["emoji"],
        "name": entry["annotation"],
        "group": entry["group"],
        "subgroup": entry["subgroups"],
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
        "images": {vendor: f"images/{vendor}/{code}.png" for vendor in _FOLDERS},
    }


def _draw_svg(content: bytes) -> bytes:
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=SIZE, height=SIZE))


def _scale(content: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as picture:
        picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(buffer, format="PNG")
    return buffer.getvalue()


TARGET = Target(
    summary="1,376 emoji by four vendors, 64 pixels, with names, groups and tags (30 MB)",
    packages={
        "twitter": Package(
            "npm",
            "emoji-datasource-twitter",
            "16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            "MIT (package); pictures CC-BY 4.0",
        ),
        "google": Package(
            "npm",
            "emoji-datasource-google",
            "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "MIT (package); pictures Apache-2.0, fonts SIL OFL 1.1",
        ),
        "fluent": Package(
            "npm",
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT",
        ),
        "openmoji": Package(
            "npm",
            "openmoji",
            "17.0.0",
            "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
            "CC-BY-SA 4.0",
        ),
    },
    convert=_convert,
    modules=("resvg_py",),
)
