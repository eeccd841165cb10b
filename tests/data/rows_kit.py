"""Rows, pictures and sections of the data tests."""

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image

from llava_compete.data.config import DataSection
from llava_compete.vision.image_decoder import open_image


class Resize:
    """Stands in for an image processor: 4 × 4 pixels."""

    def preprocess(self, images):
        return {"pixel_values": np.stack([np.asarray(i.resize((4, 4)), np.float32).transpose(2, 0, 1) for i in images])}


def processor_with(tokenizer):
    return SimpleNamespace(
        tokenizer=tokenizer,
        image_processor=Resize(),
        num_image_tokens=6,
        tiling=None,
        tokens_per_image=lambda sizes: 6,
        open_image=open_image,
    )


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def row(row_id, image="a.png", answer="Red."):
    question = "What color?" if image is None else "<image>\nWhat color?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, **({} if image is None else {"image": image}), "conversations": turns}


def section(tmp_path, *sources, **options):
    return DataSection(sources=list(sources), cache_dir=tmp_path / "cache", **options)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "First"}, {"type": "image"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Two, an <image> each."}]},
]
