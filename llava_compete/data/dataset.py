"""Training rows: from Arrow tables to token ids, labels and pixels, one row at a time in the loader's workers.

Caller: `train.run` builds the bundle; the trainer's loader indexes the datasets through `data.sampler` and
`data.collator`. Nothing of the size of the data set is held in Python objects: rows are memory-mapped, indices and
lengths are numpy arrays.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_compete.data.config import DataSection
from llava_compete.data.tables import SourceTable, load_source
from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import EncodedConversation, cut_to_length, encode_conversation
from llava_compete.vision.image_decoder import BadImageError, open_image

_CHARS_PER_TOKEN = 4  # for the sampler's length estimate only
_FIRST_ROWS = 1000  # before so many are read, their rejected share says little


class DataBundle(NamedTuple):
    """What a stage trains and validates on; `digest` changes with the rows, `stats` is for the log."""

    train: ConversationDataset
    validation: ConversationDataset | None
    digest: str
    stats: dict[str, Any]


class ConversationDataset(Dataset):
    """Rows of a mixture.

    Items: input_ids and labels (int64 [N], images expanded), pixel_values (float32 [images, 3, H, W] or None), length
    (tokens), modality (1 = has images), sample_id ("source/id").
    `lengths` (estimated tokens, int32) and `modalities` (int8) are what the sampler needs, without reading rows;
    `sources` (int32) are the places of the rows' sources in `source_names`.
    """

    def __init__(self, tables: list[SourceTable], index: np.ndarray, processor: Any, section: DataSection) -> None:
        """`index` [N, 2] int32: source number (ascending) and row in it."""
        self.tables, self.index, self.processor, self.section = tables, index, processor, section
        self.sources, self.source_names = index[:, 0], tuple(table.section.name for table in tables)
        self._bounds = np.searchsorted(index[:, 0], np.arange(len(tables) + 1))
        self.lengths = np.empty(len(index), dtype=np.int32)
        self.modalities = np.empty(len(index), dtype=np.int8)
        for number, table in enumerate(tables):
            of_source = index[:, 0] == number
            rows = index[of_source, 1]
            images = _images_per_row(table)[rows]
            chars = table.rows.column("chars").to_numpy()[rows]
            self.lengths[of_source] = chars // _CHARS_PER_TOKEN + images * processor.num_image_tokens
            self.modalities[of_source] = images > 0
        # Counted in shared memory, because rows are read in worker processes.
        self._read_rows = multiprocessing.Value("q", 0)
        self._rejected = multiprocessing.Value("q", 0)
        self._bad_images = multiprocessing.Value("q", 0)

    @property
    def counters(self) -> dict[str, int]:
        """Rows replaced so far by this process and its workers: no supervised turn in the limit, and bad images."""
        return {"data/rejected": self._rejected.value, "data/bad_images": self._bad_images.value}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, Any]:
        source = int(self.index[position, 0])
        first, last = self._bounds[source : source + 2].tolist()
        # A row that cannot be used is replaced by the next of its source on this side of the split.
        for offset in range(last - first):
            row = int(self.index[first + (position - first + offset) % (last - first), 1])
            item = self._read(self.tables[source], row)
            if item is not None:
                return item
        raise UserError(f"data source {self.tables[source].section.name!r}: no row can be used")

    def _read(self, table: SourceTable, number: int) -> dict[str, Any] | None:
        """One item, or None if the row must be replaced by the next (and has been counted)."""
        _increment(self._read_rows)
        row = table.rows.row(number)
        sample_id = f"{table.section.name}/{row['id']}"
        try:
            encoded = encode_row(self.processor, json.loads(row["messages"]), self.section.max_length)
        except UserError as error:
            raise UserError(f"row {sample_id}: {error}") from error
        if encoded is None:
            self._count_rejected(sample_id)
            return None
        try:
            pixel_values = load_pixels(self.processor, table, row["images"][: encoded.num_images])
        except BadImageError as error:
            self._count_bad_image(sample_id, error)
            return None
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "pixel_values": pixel_values,
            "length": len(encoded.input_ids),
            "modality": int(encoded.num_images > 0),
            "sample_id": sample_id,
        }

    def _count_rejected(self, sample_id: str) -> None:
        rejected = _increment(self._rejected)
        # A share of the rows read so far, in whatever epoch and on however many ranks; early on, of the first thousand.
        read = max(self._read_rows.value, min(len(self), _FIRST_ROWS))
        if rejected > max(1, self.section.max_rejected_share * read):
            raise UserError(
                f"{rejected} rows keep no answer within data.max_length={self.section.max_length}, "
                f"the last {sample_id}: raise it, or data.max_rejected_share={self.section.max_rejected_share}"
            )

    def _count_bad_image(self, sample_id: str, error: BadImageError) -> None:
        if self.section.on_bad_image == "error":
            raise UserError(f"row {sample_id}: {error}") from error
        if _increment(self._bad_images) > self.section.max_bad_images:
            raise UserError(
                f"more than data.max_bad_images={self.section.max_bad_images} bad images, "
                f"the last: row {sample_id}: {error}"
            )


def _increment(counter: Any) -> int:
    """Add one to a number in shared memory."""
    with counter.get_lock():
        counter.value += 1
        return int(counter.value)


def encode_row(processor: Any, messages: list[dict[str, Any]], max_length: int) -> EncodedConversation | None:
    """Ids and labels, cut after the last answer that fits in `max_length` tokens; None if no answer fits."""
    encoded = encode_conversation(processor.tokenizer, messages, tokens_per_image=processor.num_image_tokens)
    return cut_to_length(encoded, max_length)


def load_pixels(processor: Any, table: SourceTable, images: list[dict[str, Any]]) -> torch.Tensor | None:
    """Decode and preprocess the images of one row: float32 [images, 3, H, W], or None without images."""
    if not images:
        return None
    folder = table.section.images
    opened = [open_image(image["bytes"] if image["path"] is None else folder / image["path"]) for image in images]
    return torch.as_tensor(np.asarray(processor.image_processor.preprocess(opened)["pixel_values"]))


def build_datasets(section: DataSection, processor: Any, seed: int) -> DataBundle:
    """Open all sources, apply weights, caps and the validation split (by hash of the row's id)."""
    tables = [load_source(source, section.cache_dir) for source in section.sources]
    train, validation = [], []
    for number, table in enumerate(tables):
        held_out = _held_out(table, section.validation_fraction)
        rows = np.arange(len(table.rows), dtype=np.int32)
        validation.append(_with_source(number, rows[held_out]))
        train.append(_with_source(number, _weighted(rows[~held_out], table, np.random.default_rng((seed, number)))))
    train_index, validation_index = np.concatenate(train), np.concatenate(validation)
    if len(train_index) == 0:
        raise UserError("data: no row is left for training")
    train_set = ConversationDataset(tables, train_index, processor, section)
    stats = {
        "rows": {table.section.name: len(part) for table, part in zip(tables, train, strict=True)},
        "validation_rows": len(validation_index),
        "rows_with_images": int(train_set.modalities.sum()),
    }
    held_out_set = ConversationDataset(tables, validation_index, processor, section) if len(validation_index) else None
    return DataBundle(train_set, held_out_set, _digest(tables, train_index, validation_index), stats)


def _images_per_row(table: SourceTable) -> np.ndarray:
    chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in table.rows.column("images").chunks]
    return np.concatenate(chunks)


def _held_out(table: SourceTable, fraction: float) -> np.ndarray:
    """bool [rows]: by a hash of the id, so that a row stays on its side when others come or go."""
    if fraction == 0:
        return np.zeros(len(table.rows), dtype=bool)
    ids = table.rows.column("id")
    hashes = (hashlib.blake2b(str(value).encode(), digest_size=8).digest() for value in ids)
    return np.fromiter((int.from_bytes(value) < fraction * 2**64 for value in hashes), bool, len(table.rows))


def _weighted(rows: np.ndarray, table: SourceTable, rng: np.random.Generator) -> np.ndarray:
    """Apply the cap, then the weight: whole copies and a random subset for the rest."""
    if table.section.max_rows is not None and table.section.max_rows < len(rows):
        rows = np.sort(rng.permutation(rows)[: table.section.max_rows])
    copies, rest = divmod(table.section.weight, 1)
    extra = np.sort(rng.permutation(rows)[: round(rest * len(rows))])
    return np.concatenate([np.tile(rows, int(copies)), extra])


def _with_source(number: int, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(rows), number, dtype=np.int32), rows.astype(np.int32)], axis=1)


def _digest(tables: list[SourceTable], *indices: np.ndarray) -> str:
    total = hashlib.sha256()
    for table in tables:
        total.update(f"{table.section.name}\0{table.digest}\0".encode())
    for index in indices:
        total.update(b"|" + index.tobytes())
    return total.hexdigest()
