"""Training rows: from Arrow tables to token ids, labels and pixels, one row at a time in the loader's workers.

Nothing of the size of the data set is held in Python objects: rows are memory-mapped, indices and lengths are numpy
arrays. Length and modality in the index are the table's, good enough to group rows by; what a row really holds, once
turns are cut or a bad image is skipped, only its item says.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from llava_compete.data.config import DataSection
from llava_compete.data.mixture import Mixture
from llava_compete.data.page_words import Word, check_inside, from_json
from llava_compete.data.picture_sizes import picture_sizes
from llava_compete.data.tables import SourceTable, cache_folder, load_source
from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import EncodedConversation, cut_to_length, encode_conversation
from llava_compete.parts import IGNORE_INDEX, IMAGE_TOKEN
from llava_compete.vision.image_decoder import BadImageError, Size, image_size

_CHARS_PER_TOKEN = 4  # for the sampler's length estimate only
_FIRST_ROWS = 1000  # before so many are read, their rejected share says little


class DataBundle(NamedTuple):
    """What a stage trains and validates on.

    `mixture` says which rows of `train` an epoch shows, `digest` changes with all of it, `stats` is for the log.
    """

    train: ConversationDataset
    validation: ConversationDataset | None
    mixture: Mixture
    digest: str
    stats: dict[str, Any]


class ConversationDataset(Dataset):
    """Rows of a mixture.

    Items: input_ids and labels (int64 [N], images expanded), pixel_values ([images, 3, H, W] or None), length
    (tokens), modality (1 = has images), sample_id ("source/id"). Of images in tiles pixel_values are [tiles, 3, H, W],
    and image_sizes lists each image's height and width.
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
            images, chars = table.rows.images_per_row()[rows], table.rows.chars()[rows]
            self.lengths[of_source] = chars // _CHARS_PER_TOKEN + _image_tokens(processor, table, section, rows)
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

    def with_words(self) -> np.ndarray:
        """int [n]: positions of the rows that have the words of their page."""
        found = [table.rows.with_words()[self.index[self.sources == n, 1]] for n, table in enumerate(self.tables)]
        return np.flatnonzero(np.concatenate(found))

    def page_words(self, position: int) -> tuple[Size, list[Word]] | None:
        """Height and width of a row's only picture and the words on it; None for a bad image that is passed over.

        Raises:
            UserError: a word outside the picture, or a bad image where these end the run.
        """
        table, row, sample_id = self._row(position)
        try:
            return _words(table, row)
        except BadImageError as error:
            self._count_bad_image(sample_id, error)
            return None
        except UserError as error:
            raise UserError(f"row {sample_id}: {error}") from error

    def pictures(self, position: int) -> dict[str, Any] | None:
        """The pictures of a row as its item has them, whatever its text; None for a bad image that is passed over."""
        table, row, sample_id = self._row(position)
        try:
            return load_images(self.processor, table, row["images"])
        except BadImageError as error:
            self._count_bad_image(sample_id, error)
            return None

    def _row(self, position: int) -> tuple[SourceTable, dict[str, Any], str]:
        source, number = self.index[position].tolist()
        table = self.tables[source]
        row = table.rows.row(number)
        return table, row, f"{table.section.name}/{row['id']}"

    def image_filler(self) -> dict[str, Any] | None:
        """An item of one blank image and nothing to learn, which brings the vision tower into a batch without images.

        None if no row of this data set has an image.
        """
        if not self.modalities.any():
            return None
        blank = Image.new("RGB", (8, 8))
        count = self.processor.tokens_per_image([(blank.height, blank.width)])
        count = count if isinstance(count, int) else count[0]
        placeholders = [self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * count
        return {
            "input_ids": torch.tensor(placeholders),
            "labels": torch.full((len(placeholders),), IGNORE_INDEX),
            **prepare_images(self.processor, [blank]),
            "length": len(placeholders),
            "modality": 1,
            "sample_id": "",
        }

    def _read(self, table: SourceTable, number: int) -> dict[str, Any] | None:
        """One item, or None if the row must be replaced by the next (and has been counted)."""
        _increment(self._read_rows)
        row = table.rows.row(number)
        sample_id = f"{table.section.name}/{row['id']}"
        try:
            if row["page_words"]:
                _words(table, row)  # read, so that training refuses what the check does
            counts = self.processor.tokens_per_image(_sizes(table, row["images"]))
            encoded = encode_row(self.processor, table.messages(row), self.section.max_length, counts)
        except BadImageError as error:
            self._count_bad_image(sample_id, error)
            return None
        except UserError as error:
            raise UserError(f"row {sample_id}: {error}") from error
        if encoded is None:
            self._count_rejected(sample_id)
            return None
        try:
            pictures = load_images(self.processor, table, row["images"][: encoded.num_images])
        except BadImageError as error:
            self._count_bad_image(sample_id, error)
            return None
        return {
            # By way of NumPy, which reads a list several times faster than torch does.
            "input_ids": torch.from_numpy(np.array(encoded.input_ids, np.int64)),
            "labels": torch.from_numpy(np.array(encoded.labels, np.int64)),
            **pictures,
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


def encode_row(
    processor: Any, messages: list[dict[str, Any]], max_length: int, tokens_per_image: int | list[int]
) -> EncodedConversation | None:
    """Ids and labels, cut after the last answer that fits in `max_length` tokens; None if nothing to learn fits."""
    tokenizer = processor.tokenizer
    encoded = encode_conversation(tokenizer, messages, tokens_per_image=tokens_per_image)
    cut = cut_to_length(tokenizer, messages, encoded, max_length, tokens_per_image)
    return cut if cut is not None and cut.labels.count(IGNORE_INDEX) < len(cut.labels) else None


def load_images(processor: Any, table: SourceTable, images: list[dict[str, Any]]) -> dict[str, Any]:
    """Decode and preprocess the images of one row, as an item has them."""
    return prepare_images(processor, [processor.open_image(source) for source in _files(table, images)])


def prepare_images(processor: Any, images: list[Image.Image]) -> dict[str, Any]:
    """pixel_values, None without images; with tiles image_sizes too."""
    if not images:
        return {"pixel_values": None}
    prepared = processor.image_processor.preprocess(images)
    return {**prepared, "pixel_values": torch.as_tensor(np.asarray(prepared["pixel_values"]))}


def _files(table: SourceTable, images: list[dict[str, Any]]) -> list[Any]:
    """The bytes or the path of each image."""
    folder = table.section.images
    return [image["bytes"] if image["path"] is None else folder / image["path"] for image in images]


def _sizes(table: SourceTable, images: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Height and width of each image, read only where they are asked for."""
    return map(image_size, _files(table, images))


def _words(table: SourceTable, row: dict[str, Any]) -> tuple[Size, list[Word]]:
    """Height and width of a row's only picture and the words on it, none of them outside."""
    (size,) = _sizes(table, row["images"])
    words = from_json(row["page_words"])
    check_inside(words, size)
    return size, words


def _image_tokens(processor: Any, table: SourceTable, section: DataSection, rows: np.ndarray) -> np.ndarray:
    """Tokens of the images of each of these rows: int [len(rows)]."""
    per_row = table.rows.images_per_row()
    if processor.tiling is None or not per_row.any():
        return per_row[rows] * processor.num_image_tokens
    sizes, inverse = np.unique(picture_sizes(table, cache_folder(section.cache_dir)), axis=0, return_inverse=True)
    tokens = np.array([_tokens_or_none(processor, size) for size in sizes.tolist()])[inverse.reshape(-1)]
    of_rows = np.concatenate([[0], np.cumsum(tokens)])[np.concatenate([[0], np.cumsum(per_row)])]
    return np.diff(of_rows)[rows]


def _tokens_or_none(processor: Any, size: list[int]) -> int:
    """0 for a picture that cannot be used, which is named where its row is read."""
    try:
        return processor.tiling.num_tokens((size[0], size[1])) if min(size) else 0
    except BadImageError:
        return 0


def build_datasets(section: DataSection, processor: Any, seed: int) -> DataBundle:
    """Open all sources, apply caps, the validation split (by hash of the row's id) and the weights of an epoch."""
    tables = [load_source(source, section.cache_dir) for source in section.sources]
    train, validation = [], []
    for number, table in enumerate(tables):
        held_out = _held_out(table, section.validation_fraction)
        rows = np.arange(len(table.rows), dtype=np.int32)
        validation.append(_with_source(number, rows[held_out]))
        train.append(_with_source(number, _capped(rows[~held_out], table, np.random.default_rng((seed, number)))))
    train_index, validation_index = np.concatenate(train), np.concatenate(validation)
    weights = [source.weight for source in section.sources]
    mixture = Mixture(train_index[:, 0], weights, seed)
    if len(mixture) == 0:
        raise UserError("data: no row is left for training")
    for number, (source, part) in enumerate(zip(section.sources, train, strict=True)):
        if len(part) and not mixture.rows_of(number):
            raise UserError(
                f"data source {source.name!r}: weight {source.weight} of {len(part)} rows is less than half a row"
            )
    train_set = ConversationDataset(tables, train_index, processor, section)
    stats = {
        "rows": {source.name: mixture.rows_of(number) for number, source in enumerate(section.sources)},
        "validation_rows": len(validation_index),
        "rows_with_images": int(train_set.modalities[mixture.epoch(0)].sum()),
    }
    held_out_set = ConversationDataset(tables, validation_index, processor, section) if len(validation_index) else None
    digest = _digest(tables, train_index, validation_index)
    return DataBundle(train_set, held_out_set, mixture, digest, stats)


def _held_out(table: SourceTable, fraction: float) -> np.ndarray:
    """bool [rows]: by a hash of the id, so that a row stays on its side when others come or go."""
    if fraction == 0:
        return np.zeros(len(table.rows), dtype=bool)
    hashes = (hashlib.blake2b(value.encode(), digest_size=8).digest() for value in table.rows.ids())
    return np.fromiter((int.from_bytes(value) < fraction * 2**64 for value in hashes), bool, len(table.rows))


def _capped(rows: np.ndarray, table: SourceTable, rng: np.random.Generator) -> np.ndarray:
    limit = table.section.max_rows
    return rows if limit is None or limit >= len(rows) else np.sort(rng.permutation(rows)[:limit])


def _with_source(number: int, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(rows), number, dtype=np.int32), rows.astype(np.int32)], axis=1)


def _digest(tables: list[SourceTable], *indices: np.ndarray) -> str:
    total = hashlib.sha256()
    for table in tables:
        section = table.section
        total.update(f"{section.name}\0{table.digest}\0{section.weight}\0{section.images_first}\0".encode())
    for index in indices:
        total.update(b"|" + index.tobytes())
    return total.hexdigest()
