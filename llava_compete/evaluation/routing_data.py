"""Rows on which routing is measured, and what each of their tokens is.

A row comes from a test table (parquet with image, question and answer) or from anything that a stage trains on. It is
run with its answers, as in training, so that every token of question and answer is seen once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_compete.config import parse_config, read_yaml
from llava_compete.data.collator import Collator, on_device
from llava_compete.data.config import DataSection, SourceSection
from llava_compete.data.dataset import prepare_images
from llava_compete.data.tables import load_source
from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import encode_conversation, images_before
from llava_compete.parts import IGNORE_INDEX
from llava_compete.vision.image_decoder import BadImageError, full_size, open_image

# What a token of the text is. Decoding writes answers; all else is read at once before, in the prefill.
TOKEN_CLASSES = ("image", "question", "answer")


class Row(NamedTuple):
    """One conversation: messages as the chat template takes them, its pictures in reading order, and these as files."""

    id: str
    source: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    files: Sequence[bytes | Path] = ()

    @property
    def question(self) -> str:
        """All that is said before the last answer."""
        return "\n".join(_text(message) for message in self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last answer."""
        return _text(self.messages[-1])

    def first_exchange(self) -> Row:
        """The row up to its first answer, with the pictures shown until then."""
        end = next(n for n, message in enumerate(self.messages) if message["role"] == "assistant") + 1
        parts = (message["content"] for message in self.messages[:end])
        shown = sum(part["type"] == "image" for content in parts if not isinstance(content, str) for part in content)
        return self._replace(messages=self.messages[:end], images=self.images[:shown], files=self.files[:shown])


class Rows:
    """The rows of some files, opened one by one; `limit` of each file at most, evenly spread over it."""

    def __init__(self, paths: Sequence[Path], image_folder: Path | None = None, limit: int | None = None) -> None:
        self._arguments = (tuple(paths), image_folder, limit)
        self._sources: list[tuple[str, Any, np.ndarray]] = []
        for name, table in (pair for path in paths for pair in _open(path, image_folder)):
            chosen = np.arange(len(table))
            if limit is not None and limit < len(table):
                chosen = np.linspace(0, len(table) - 1, limit).round().astype(int)
            self._sources.append((name, table, chosen))
        names = [name for name, _, _ in self._sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two files of data are called {twice[0]!r}: their tokens could not be kept apart")

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return Rows, self._arguments

    @property
    def sources(self) -> list[str]:
        return [name for name, _, _ in self._sources]

    def __len__(self) -> int:
        return sum(len(chosen) for _, _, chosen in self._sources)

    def halves(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ascending numbers of rows: of each file the first half of them, and the second."""
        halves: tuple[list[int], list[int]] = ([], [])
        start = 0
        for _, _, chosen in self._sources:
            mine = [number for number in numbers if start <= number < start + len(chosen)]
            middle = (len(mine) + 1) // 2
            halves[0].extend(mine[:middle])
            halves[1].extend(mine[middle:])
            start += len(chosen)
        return halves

    def __getitem__(self, number: int) -> Row:
        for name, table, chosen in self._sources:
            if number < len(chosen):
                return _read(table, name, int(chosen[number]))
            number -= len(chosen)
        raise IndexError(number)


class _TestTable:
    """A parquet table of an lmms-eval task of ours: embedded pictures (image, or a list images), question, answer."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        columns = _columns(path)
        expected = ("images" if "images" in columns else "image", "question", "answer")
        if missing := [name for name in expected if name not in columns]:
            raise UserError(f"{path}: columns {', '.join(columns)}; expected also {', '.join(missing)}")
        self._table = pq.read_table(path)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, source: str, number: int) -> Row:
        row = self._table.slice(number, 1).to_pylist()[0]
        files = [image["bytes"] for image in row.get("images") or [row["image"]]]
        images = [open_image(file) for file in files]
        messages = [
            {"role": "user", "content": images_before(len(images), [{"type": "text", "text": row["question"]}])},
            {"role": "assistant", "content": row["answer"]},
        ]
        return Row(str(row.get("id", number)), source, messages, images, files)


class _TrainingTable:
    """Any file or folder that a stage trains on."""

    def __init__(self, section: SourceSection) -> None:
        self._table = load_source(section)

    def __len__(self) -> int:
        return len(self._table.rows)

    def read(self, source: str, number: int) -> Row:
        row = self._table.rows.row(number)
        folder = self._table.section.images
        files = [image["bytes"] if image["path"] is None else folder / image["path"] for image in row["images"]]
        images = [open_image(file) for file in files]
        return Row(str(row["id"]), source, self._table.messages(row), images, files)


def _open(path: Path, image_folder: Path | None) -> Iterator[tuple[str, _TestTable | _TrainingTable]]:
    """The tables of a path by their names; a YAML file is a stage's, and has several sources."""
    if not path.exists():
        raise UserError(f"{path}: no such data (a test table, anything that a stage trains on, or a stage's YAML)")
    if path.suffix in (".yaml", ".yml"):
        content = read_yaml(path)
        if not isinstance(content.get("data"), dict):
            raise UserError(f"{path}: no section `data`, found {', '.join(content) or 'nothing'}")
        section = parse_config(DataSection, content["data"], source=f"{path}: data")
        yield from ((source.name, _TrainingTable(source)) for source in section.sources)
    elif path.suffix == ".parquet" and "question" in _columns(path):
        yield path.stem, _TestTable(path)
    else:
        yield path.stem, _TrainingTable(SourceSection(name="data", path=path, image_folder=image_folder))


def _columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error


def _read(table: _TestTable | _TrainingTable, source: str, number: int) -> Row:
    try:
        return table.read(source, number)
    except BadImageError as error:
        raise UserError(f"{source}, row {number}: {error}") from error


def encode_row(row: Row, processor: Any) -> dict[str, Any]:
    """A row as the collator takes it: input_ids, labels, pixel_values, sample_id."""
    # For the model as its settings decode them, which need not be as they are shown.
    images = [processor.open_image(file) for file in row.files] if row.files and _drafts(processor) else row.images
    counts = processor.tokens_per_image(map(full_size, images))
    encoded = encode_conversation(processor.tokenizer, row.messages, tokens_per_image=counts)
    return {
        "input_ids": torch.tensor(encoded.input_ids),
        "labels": torch.tensor(encoded.labels),
        **prepare_images(processor, images),
        "sample_id": f"{row.source}/{row.id}",
    }


def _drafts(processor: Any) -> bool:
    return processor.image_processor is not None and processor.image_processor.jpeg_draft


def to_batch(rows: Sequence[Row], processor: Any, device: torch.device) -> dict[str, Any]:
    """The model's inputs for some rows, with labels, padded on the right."""
    return on_device(Collator(processor)([encode_row(row, processor) for row in rows]), device)


def token_classes(batch: dict[str, Tensor], image_token_id: int | None) -> Tensor:
    """int64 [B, N]: place in TOKEN_CLASSES of each token; padding counts as a question's."""
    classes = torch.full_like(batch["input_ids"], TOKEN_CLASSES.index("question"))
    classes[batch["labels"] != IGNORE_INDEX] = TOKEN_CLASSES.index("answer")
    if image_token_id is not None:
        classes[batch["input_ids"] == image_token_id] = TOKEN_CLASSES.index("image")
    return classes


def batches_of(rows: Rows, size: int, numbers: Sequence[int] | None = None) -> Iterator[list[Row]]:
    """Some of the rows (default: all) in lists of `size`."""
    order = range(len(rows)) if numbers is None else numbers
    for start in range(0, len(order), size):
        yield [rows[number] for number in order[start : start + size]]


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content).strip()
