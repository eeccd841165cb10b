"""How fast rows become batches: samples/s by number of workers, time by step, and a plain per-row loop beside it.

Every version of the pixels (`vision/tower_config.py`) reads the same rows: version 1, Pillow's path, is what the others
are compared with. Beside them what one GPU would take: images/s of a real model at a good utilisation. Input is
made on the spot: 640×480 JPEGs of photograph-like content, conversations of three turns and about 120 words, a
byte-level BPE. The rival does what LLaVA's dataset does: the whole JSON in memory, one image after the other through
transformers' image processor, labels from tokenising each turn again.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil

from llava_compete.bench.train import PAPER, build
from llava_compete.data.collator import Collator
from llava_compete.data.config import DataSection, SourceSection
from llava_compete.data.dataset import ConversationDataset, build_datasets
from llava_compete.language.chat_encoding import encode_conversation
from llava_compete.language.templates import set_chat_template
from llava_compete.language.tokenizer import train_byte_level_bpe
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.parts import IGNORE_INDEX
from llava_compete.plan.step_cost import simulate
from llava_compete.train.mfu import PEAK_BF16
from llava_compete.vision.image_decoder import open_image
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor
from llava_compete.vision.tower_config import LATEST_PIXELS, PixelVersion

NUM_IMAGES = 64
ROUNDS = 3
BATCH_SIZE = 16
TARGET_SIZE = 224
IMAGE_TOKENS = 256
VERSIONS: tuple[PixelVersion, ...] = (1, 2, 3)
PHOTOGRAPH = (3072, 2304)  # 7 megapixels
# What the GPU is assumed to reach of its peak, and the model that it trains.
GPU, GPU_MFU, GPU_MODEL = "H100", 0.45, PAPER
WORDS = ["the", "a", "red", "small", "wooden", "table", "with", "two", "people", "standing", "near", "an", "old", "car"]


def run_bench(folder: Path, num_rows: int, workers: tuple[int, ...]) -> dict[str, Any]:
    """Measure in `folder` (scratch). Rates are samples/s; times are milliseconds of processor time a sample, which what
    else runs on the machine disturbs less, and the least of a few rounds, of which the first also warms up.
    `pillow_over` is Pillow's time over that of each version."""
    torch.set_num_threads(1)
    rows = make_rows(folder, num_rows)
    assert GPU_MODEL.tower is not None
    sizes = (TARGET_SIZE, GPU_MODEL.tower.image_size)
    processors = {(size, version): processor_for(rows, size, version) for size in sizes for version in VERSIONS}
    source = SourceSection(name="bench", path=folder / "rows.json")
    section = DataSection(sources=[source], cache_dir=folder / "cache")
    sets = {key: build_datasets(section, processor, seed=0).train for key, processor in processors.items()}
    collators = {key: Collator(processor) for key, processor in processors.items()}
    plain = PlainDataset(folder / "rows.json", processors[TARGET_SIZE, LATEST_PIXELS])
    rates = {
        f"{size} pixels, version {version}": {f"workers_{n}": _rate(data, collators[size, version], n) for n in workers}
        for (size, version), data in sets.items()
    }
    rounds = [{key: steps(data, processors[key], collators[key]) for key, data in sets.items()} for _ in range(ROUNDS)]
    by_step = {
        f"{size} pixels, version {version}": {
            step: min(times[size, version][step] for times in rounds) for step in rounds[0][size, version]
        }
        for size, version in sets
    }
    totals = {name: sum(times.values()) for name, times in by_step.items()}
    a_worker = rates[f"{sizes[1]} pixels, version {LATEST_PIXELS}"][f"workers_{max(workers)}"] / max(workers)
    return {
        "rows": num_rows,
        "samples_per_second": rates,
        "plain_loop_samples_per_second": {f"workers_{n}": _rate(plain, Collator(plain.processor), n) for n in workers},
        "milliseconds_by_step": by_step,
        "pillow_over": {
            name: round(totals[f"{name.split(',')[0]}, version 1"] / total, 2) for name, total in totals.items()
        },
        "large_photographs": photographs(),
        "gpu": {
            "model": f"{GPU_MODEL.name}, {GPU_MODEL.length} tokens and one image a sample, {GPU} at {GPU_MFU:.0%} MFU",
            "images_per_second": round(images_of_a_gpu(), 1),
            "workers": max(workers),
            "samples_per_second_a_worker": a_worker,
        },
    }


def table(by_step: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a table: each version's steps, what decoding is of their sum, and Pillow's path (version 1) over the
    sum; over the sum without the resize too, which no way of resizing could exceed."""
    steps = list(next(iter(by_step.values())))
    lines = [f"| pixels | {' | '.join(steps)} | sum, ms | decoding | version 1 over it | without any resize |"]
    lines.append("| --- " * (len(steps) + 5) + "|")
    for name, times in by_step.items():
        total, pillow = sum(times.values()), sum(by_step[f"{name.split(',')[0]}, version 1"].values())
        cells = [f"{times[step]:.2f}" for step in steps]
        cells += [f"{total:.2f}", f"{times['decode'] / total:.0%}", f"{pillow / total:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {pillow / (total - times['resize']):.2f} |")
    return lines


def photographs(side: int = PHOTOGRAPH[0]) -> dict[str, Any]:
    """Decoding and resizing of a large JPEG, whole by Pillow's path and ours, and in draft mode: milliseconds of
    processor time."""
    width, height = side, side * PHOTOGRAPH[1] // PHOTOGRAPH[0]
    buffer = io.BytesIO()
    photograph(width, height, np.random.default_rng(0)).save(buffer, "JPEG", quality=90)
    content = [buffer.getvalue()]
    found: dict[str, Any] = {"size": [width, height], "to": TARGET_SIZE}
    ways: tuple[tuple[str, PixelVersion, bool], ...] = (
        ("pillow", 1, False),
        ("whole", LATEST_PIXELS, False),
        ("draft", LATEST_PIXELS, True),
    )
    for name, version, draft in ways:
        processor = LlavaCompeteImageProcessor(TARGET_SIZE, resize_mode="pad", version=version, jpeg_draft=draft)
        seconds = [_timed(partial(processor.preprocess, content))[1] for _ in range(5)]
        found[name] = round(1000 * min(seconds), 2)
    return found


def images_of_a_gpu() -> float:
    """Images/s that one GPU trains on, by the operations that `plan` counts."""
    with torch.device("meta"):
        model = build("softmax", GPU_MODEL, torch.device("meta"))
    flops = simulate(model, 1, GPU_MODEL.length, 1, frozenset()).flops
    return GPU_MFU * PEAK_BF16[GPU] / flops


def make_rows(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Write images and LLaVA JSON; return the rows."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(NUM_IMAGES):
        photograph(640, 480, rng).save(folder / f"{index}.jpg", quality=90)
    words = random.Random(0)

    def text(count: int) -> str:
        return " ".join(words.choices(WORDS, k=count)).capitalize() + "."

    rows = []
    for index in range(num_rows):
        turns = []
        for turn in range(3):
            turns.append({"from": "human", "value": ("<image>\n" if turn == 0 else "") + text(10)})
            turns.append({"from": "gpt", "value": text(30)})
        rows.append({"id": str(index), "image": f"{index % NUM_IMAGES}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


def photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Smooth structure plus some noise, which compresses like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def steps(dataset: ConversationDataset, processor: Any, collate: Collator, count: int = 100) -> dict[str, float]:
    """Milliseconds of processor time a sample of each step, one after the other in this process."""
    table = dataset.tables[0]
    folder = table.section.images
    numbers = range(min(count, len(table.rows)))
    read = _timed(lambda: [table.rows.row(number) for number in numbers])
    images = _timed(lambda: [open_image(folder / row["images"][0]["path"]) for row in read[0]])
    pixels = _timed(lambda: [processor.image_processor.preprocess([image]) for image in images[0]])
    encode = _timed(
        lambda: [
            encode_conversation(processor.tokenizer, json.loads(row["messages"]), tokens_per_image=IMAGE_TOKENS)
            for row in read[0]
        ]
    )
    items = [dataset[number] for number in numbers]
    batches = _timed(lambda: [collate(items[at : at + BATCH_SIZE]) for at in range(0, len(items), BATCH_SIZE)])
    # What a worker does with a finished batch: its tensors go into memory that the trainer shares.
    handed = _timed(lambda: [ForkingPickler.dumps(batch) for batch in batches[0]])
    names = ("read", "decode", "resize", "tokenise", "collate", "hand over")
    return {
        name: round(1000 * result[1] / len(numbers), 3)
        for name, result in zip(names, (read, images, pixels, encode, batches, handed), strict=True)
    }


class PlainDataset(Dataset):
    """A per-row loop in the style of LLaVA's dataset, for comparison only."""

    def __init__(self, path: Path, processor: LlavaCompeteProcessor) -> None:
        self.rows, self.processor = json.loads(path.read_text()), processor
        self.folder, self.tokenizer = path.parent, processor.tokenizer
        self.image_id = processor.image_token_id
        # transformers' processor as it comes: sizes and statistics of CLIP at 224 pixels.
        self.image_processor = CLIPImageProcessorPil()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = Image.open(self.folder / row["image"]).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        pixels = self.image_processor.preprocess(square, return_tensors="pt")["pixel_values"]
        ids: list[int] = []
        labels: list[int] = []
        prompt = ""
        for turn in row["conversations"]:
            role = {"human": "user", "gpt": "assistant"}[turn["from"]]
            prompt += f"<|im_start|>{role}\n{turn['value']}<|im_end|>\n"
            whole = self.tokenizer(prompt).input_ids
            new = whole[len(ids) :]
            labels += new if role == "assistant" else [IGNORE_INDEX] * len(new)
            ids = whole
        at = ids.index(self.image_id)
        ids[at : at + 1] = [self.image_id] * IMAGE_TOKENS
        labels[at : at + 1] = [IGNORE_INDEX] * IMAGE_TOKENS
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixel_values": pixels,
            "sample_id": row["id"],
        }


def processor_for(
    rows: list[dict[str, Any]], size: int = TARGET_SIZE, version: PixelVersion = LATEST_PIXELS
) -> LlavaCompeteProcessor:
    """A tokenizer trained on the rows, and an image processor to `size` pixels that pads to a square as LLaVA does."""
    texts = (turn["value"] for row in rows[:200] for turn in row["conversations"])
    tokenizer = train_byte_level_bpe(texts, vocab_size=1000)
    set_chat_template(tokenizer, "chatml")
    image_processor = LlavaCompeteImageProcessor(size=size, resize_mode="pad", version=version)
    return LlavaCompeteProcessor(image_processor, tokenizer, num_image_tokens=IMAGE_TOKENS)


def _rate(dataset: Dataset, collate: Collator, workers: int) -> float:
    """Samples/s over one epoch after the first batch, which waits for the workers to start."""
    loader: DataLoader = DataLoader(dataset, BATCH_SIZE, num_workers=workers, collate_fn=collate)
    batches: Iterator[Any] = iter(loader)
    next(batches)
    start = time.perf_counter()
    samples = sum(len(batch["sample_ids"]) for batch in batches)
    return round(samples / (time.perf_counter() - start), 1)


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    # Processor time: what else runs on the machine does not count.
    start = time.process_time()
    result = action()
    return result, time.process_time() - start
