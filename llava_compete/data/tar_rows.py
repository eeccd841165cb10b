"""Rows of a WebDataset-like tar: members of one base name, side by side, are a row.

`KEY.json` holds the turns and `KEY.jpg` (or KEY.0.jpg, KEY.1.jpg ...) the images, those that its `image` or `images`
names in its order, if it names any; `KEY.txt` in place of turns is a caption. Any other member is a key of the row,
which `records` refuses or names as ignored. Read by hand: `datasets` refuses a tar in which some rows have an image and
some have none, and Python's `tarfile` takes a damaged header for the end of the archive.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_compete.data.json_rows import shallow
from llava_compete.data.row_errors import RecordError, first_filled
from llava_compete.data.row_turns import TURNS
from llava_compete.data.strict_json import UNDECODABLE, distinct, undecodable
from llava_compete.parts import IMAGE_TOKEN

# Also of pictures that not every Pillow opens: as a picture that cannot be decoded each is named, and not lost.
_IMAGE_SUFFIXES = (
    "jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2", "jxl",
)  # fmt: skip
# What a row with such a member has beside its pictures.
_OTHER_MEDIA = {
    **dict.fromkeys(("mp4", "webm", "mkv", "avi", "mov"), "video"),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a"), "audio"),
}
_END = 2 * tarfile.BLOCKSIZE  # zero bytes that close an archive


def read_tar(file: Path) -> Iterator[Any]:
    """One row after another; raises what `tarfile` does, also where the archive does not end properly."""
    key, parts = "", dict[str, bytes]()
    with tarfile.open(file) as tar:
        for member in tar:
            if member.isdir() or member.name.rpartition("/")[2].startswith("._"):  # macOS's own notes on a file
                continue
            stream = tar.extractfile(member)  # of a link, the file that it stands for
            if stream is None:
                raise tarfile.ReadError(f"{member.name} is neither a file nor a folder")
            next_key, suffix = _key_and_suffix(member.name)
            # The same name twice is another row of that key, not a newer version of it.
            if parts and (next_key != key or suffix in parts):
                yield _row(file, key, parts)
                parts = {}
            key = next_key
            parts[suffix] = stream.read()
        _check_end(tar)
    if parts:
        yield _row(file, key, parts)


def _check_end(tar: tarfile.TarFile) -> None:
    """An archive ends with two blocks of zeros and nothing behind them but zeros.

    A flipped bit in a header, a block lost to zeros, a file cut between two members, and two archives joined with `cat`
    all look like the end to `tarfile`; the rows behind would be lost without a word.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    found = 0
    while chunk := tar.fileobj.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise tarfile.ReadError(f"no member's header at byte {tar.offset}, but data behind it")
        found += len(chunk)
    if found < _END:
        raise tarfile.ReadError(f"{found} bytes of zeros at the end, expected at least {_END}: the archive is cut off")


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _image_order(suffix: str) -> tuple[int, str]:
    """KEY.2.jpg comes before KEY.10.jpg."""
    number = suffix.partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() else -1, suffix


def _row(file: Path, key: str, parts: dict[str, bytes]) -> Any:
    pictures = [name for name in sorted(parts, key=_image_order) if _kind(name) in _IMAGE_SUFFIXES]
    content: Any = {}
    if "json" in parts:
        try:
            content = shallow(json.loads(parts["json"], object_pairs_hook=distinct), f"{file}: {key}.json")
        except UNDECODABLE as error:
            return undecodable(f"{file}: {key}.json", error, parts["json"].decode(errors="backslashreplace"))
        if not isinstance(content, dict):
            return content
        if named := _named(key, content, pictures):
            pictures = named
            content = {name: value for name, value in content.items() if name not in ("image", "images")}
    others = [name for name in parts if name not in pictures and name != "json"]
    if not any(content.get(name) for name in TURNS):
        if "txt" not in parts:
            return RecordError("no_conversation", f"{file}: {key} has no .json file with the turns and no .txt file")
        others.remove("txt")
        if not pictures:
            beside = f", found {', '.join(others)}" if others else ""
            return RecordError("image_missing", f"{file}: {key}.txt is a caption without a picture beside it{beside}")
        # Beside a caption the .json holds facts about the picture (width, address), as img2dataset writes them.
        content = {"conversations": _caption(parts["txt"], len(pictures))}
    beside_turns = {_OTHER_MEDIA.get(_kind(name), name): f"{len(parts[name])} bytes" for name in others}
    embedded = [{"bytes": parts[name], "path": None} for name in pictures]
    row = {**beside_turns, "id": key.rpartition("/")[2], **content}
    return {**row, "image": embedded} if embedded else row


def _named(key: str, content: dict[str, Any], pictures: list[str]) -> list[str]:
    """The suffixes of the pictures that the .json lists by the names of their files, or by these suffixes; empty where
    one of its names is that of no member."""
    listed = first_filled(content, "image", "images")
    known = {name.lower(): suffix for suffix in pictures for name in (f"{key}.{suffix}".rpartition("/")[2], suffix)}
    names = map(str, listed if isinstance(listed, list) else [listed])
    found = [known.get(name.rpartition("/")[2].lower()) for name in names]
    named = [suffix for suffix in found if suffix is not None]
    return named if len(named) == len(found) else []


def _kind(suffix: str) -> str:
    return suffix.rsplit(".", 1)[-1]


def _caption(text: bytes, images: int) -> list[dict[str, str]]:
    """A caption as LLaVA's first stage has them: the picture, then the text."""
    answer = text.decode("utf-8", "surrogateescape").rstrip("\r\n")
    return [{"from": "human", "value": "\n".join([IMAGE_TOKEN] * images)}, {"from": "gpt", "value": answer}]
