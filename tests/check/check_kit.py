"""Rows, broken pictures and sections of the checker's tests."""

import json
import struct
import zlib

from llava_compete.data.config import DataSection


def turns(question="<image>\nWhat?", answer="That."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(row_id, image="good.png", conversations=None, **extra):
    images = {} if image is None else {"image": image}
    return {"id": row_id, **images, "conversations": turns() if conversations is None else conversations, **extra}


def bomb_png():
    """A valid header that promises 30,000 × 30,000 pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def section_of(tmp_path, images, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    source = {"name": "broken", "path": path, "image_folder": images}
    return DataSection(sources=[source], max_length=150, cache_dir=tmp_path / "cache")
