"""Language pre-training rows: documents tokenised on the fly and packed into full rows of `context` tokens.

Row r of the endless training sequence comes from packing stream r mod `shards`; document d belongs to one stream.
So row r is a pure function of (documents, tokenizer, seed, r): global batch t holds the rows [tB, (t + 1)B) on any
number of ranks, and a rank tokenises only the streams that its rows come from. A row's position in the documents is
written down now and then (JSON lines below the run directory), so that a resumed run starts reading where it stopped
and tokenises nothing twice but the rows since the last mark.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_compete.data.text.config import TextSection
from llava_compete.data.text.sources import Document, digest, read_train, read_validation
from llava_compete.errors import UserError
from llava_compete.files import read_json_lines
from llava_compete.language.piece_ids import piece_encoder

_MARK_EVERY = 64  # rows of a stream between two marks
Encode = Callable[[str], list[int]]


class Position(NamedTuple):
    """Where a stream goes on: token `offset` of document `number` in `epoch` is its next token."""

    epoch: int
    number: int
    offset: int


class Row(NamedTuple):
    """`tokens` [context] and, for each, which of the row's documents it belongs to (0, 1, ...), int64."""

    tokens: list[int]
    documents: list[int]


def encoder(tokenizer: Any) -> Encode:
    """Text to ids, closed by the end token; strings that look like special tokens are plain text."""
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end token (eos_token), which closes a document")

    special = set(tokenizer.all_special_ids)

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if not special.isdisjoint(ids):  # a unigram vocabulary spells "</s>" as the token, whatever it is told
            pieces = piece_encoder(tokenizer)
            (ids,) = pieces.encode(pieces.hide(text))
        return [*ids, end]

    return encode


class PackedStreams:
    """The packing streams `owned` of one rank, over documents read once for all of them.

    `documents(epoch, number)` iterates training documents from a position on. `next_row(stream)` gives the stream's
    next row. `state_dict` and `load_state_dict` carry on exactly.
    """

    def __init__(
        self,
        documents: Callable[[int, int], Iterator[Document]],
        encode: Encode,
        context: int,
        streams: int,
        owned: Collection[int],
    ) -> None:
        self._documents, self._encode, self._context, self._streams = documents, encode, context, streams
        self.rows = dict.fromkeys(owned, 0)
        self.positions = dict.fromkeys(owned, Position(0, 0, 0))
        self._start()

    def _start(self) -> None:
        """Read from the earliest position of any stream on."""
        first = min((position.epoch, position.number) for position in self.positions.values())
        self._reader = self._documents(*first)
        self._waiting: dict[int, deque[Document]] = {stream: deque() for stream in self.positions}
        self._tokens: dict[int, list[int]] = {stream: [] for stream in self.positions}
        self._current: dict[int, Document | None] = dict.fromkeys(self.positions)

    def next_row(self, stream: int) -> Row:
        """The next row of one stream, whose position moves behind it."""
        row = Row([], [])
        piece = 0
        position = self.positions[stream]
        while len(row.tokens) < self._context:
            tokens = self._tokens_at(stream, position)
            taken = tokens[position.offset : position.offset + self._context - len(row.tokens)]
            row.tokens.extend(taken)
            row.documents.extend([piece] * len(taken))
            piece += 1
            current = self._current[stream]
            assert current is not None
            position = Position(current.epoch, current.number, position.offset + len(taken))
            if position.offset == len(tokens):
                position = Position(current.epoch, current.number + 1, 0)
                self._current[stream] = None
        self.positions[stream] = position
        self.rows[stream] += 1
        return row

    def _tokens_at(self, stream: int, position: Position) -> list[int]:
        """Tokens of the stream's document at `position`, or of its next one."""
        if self._current[stream] is None:
            queue = self._waiting[stream]
            while not queue:
                document = next(self._reader)
                # Moved on by one in each epoch, so that every stream gets documents even if there are few.
                owner = (document.number + document.epoch) % self._streams
                if owner in self._waiting and document[:2] >= self.positions[owner][:2]:
                    self._waiting[owner].append(document)
            self._current[stream] = queue.popleft()
            self._tokens[stream] = self._encode(self._current[stream].text)  # type: ignore[union-attr]
        return self._tokens[stream]

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` goes on with the same rows."""
        return {"rows": dict(self.rows), "positions": {stream: list(at) for stream, at in self.positions.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; streams that it does not hold start at their beginning."""
        rows = {int(stream): row for stream, row in state["rows"].items()}
        positions = {int(stream): Position(*at) for stream, at in state["positions"].items()}
        self.rows = {stream: rows.get(stream, 0) for stream in self.rows}
        self.positions = {stream: positions.get(stream, Position(0, 0, 0)) for stream in self.positions}
        self._start()


class TextRows(Dataset):
    """Training rows by number; made for rows in rising order, as the sampler asks for them.

    Items: input_ids, labels, sequence_ids (int64 [context]), length, sample_id. `__len__` is the rows of the run.
    """

    def __init__(
        self, section: TextSection, tokenizer: Any, seed: int, owned: Collection[int], num_rows: int, marks: Path
    ) -> None:
        self.section, self.seed, self.owned, self.num_rows = section, seed, sorted(owned), num_rows
        self.tokenizer = tokenizer
        key = repr((digest(section.train), section.model_dump(mode="json", exclude={"validation"}), seed))
        key += hashlib.blake2b(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
        self.key = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        self.marks = marks
        self._streams: PackedStreams | None = None
        self._process = -1

    def __len__(self) -> int:
        return self.num_rows

    @property
    def counters(self) -> dict[str, int]:
        """Rows left out, by reason: text has no such rows."""
        return {}

    def __getitem__(self, number: int) -> dict[str, Any]:
        stream, row = number % self.section.shards, number // self.section.shards
        if self._streams is None or self._process != os.getpid() or self._streams.rows[stream] > row:
            self._streams = self._open(row)
        streams = self._streams
        while streams.rows[stream] < row:
            self._advance(streams, stream)
        found = self._advance(streams, stream)
        tokens = torch.tensor(found.tokens)
        return {
            "input_ids": tokens,
            "labels": tokens.clone(),
            "sequence_ids": torch.tensor(found.documents),
            "length": len(found.tokens),
            "sample_id": f"text/{number}",
        }

    def _advance(self, streams: PackedStreams, stream: int) -> Row:
        row = streams.next_row(stream)
        if streams.rows[stream] % _MARK_EVERY == 0:
            mark = {"stream": stream, "row": streams.rows[stream], "position": streams.positions[stream]}
            self._mark_file.write(json.dumps(mark) + "\n")
        return row

    def _open(self, row: int) -> PackedStreams:
        """Streams that stand at or before `row`, by the latest marks that any process has left."""
        section, seed = self.section, self.seed
        self._process = os.getpid()
        streams = PackedStreams(
            lambda epoch, number: read_train(section, seed, epoch, number),
            encoder(self.tokenizer),
            section.context,
            section.shards,
            self.owned,
        )
        state = streams.state_dict()
        for stream, marked, position in self._read_marks():
            if stream in state["rows"] and state["rows"][stream] < marked <= row:
                state["rows"][stream], state["positions"][stream] = marked, position
        streams.load_state_dict(state)
        self.marks.mkdir(parents=True, exist_ok=True)
        # One file a process, line by line: a killed run keeps its marks, and no lock is needed.
        path = self.marks / f"{self.key}-{os.uname().nodename}-{self._process}.jsonl"
        self._mark_file = path.open("a", encoding="utf-8", buffering=1)
        return streams

    def _read_marks(self) -> Iterator[tuple[int, int, list[int]]]:
        for path in sorted(self.marks.glob(f"{self.key}-*.jsonl")):
            for mark in read_json_lines(path, may_break_off=True):
                yield mark["stream"], mark["row"], mark["position"]

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's worker: it opens its own streams."""
        state = dict(self.__dict__)
        state.pop("_mark_file", None)
        return state | {"_streams": None}


class HeldOutRows(Dataset):
    """The first `max_validation_rows` full rows of the held-out documents, packed in order; kept in memory.

    `texts`: the documents that the rows were cut from, of the last one only the beginning.
    """

    def __init__(self, section: TextSection, tokenizer: Any) -> None:
        encode, context = encoder(tokenizer), section.context
        tokens: list[int] = []
        documents: list[int] = []
        self.texts: list[str] = []
        for number, text in enumerate(read_validation(section)):
            found = encode(text)
            self.texts.append(text)
            tokens += found
            documents += [number] * len(found)
            if len(tokens) >= context * section.max_validation_rows:
                break
        rows = min(len(tokens) // context, section.max_validation_rows)
        if not rows:
            raise UserError(
                f"validation text: found {len(tokens)} tokens, expected at least one row of {context} (data.context)"
            )
        self.tokens_RN = torch.tensor(tokens[: rows * context]).view(rows, context)
        self.documents_RN = torch.tensor(documents[: rows * context]).view(rows, context)
        self.sources, self.source_names = np.zeros(rows, dtype=np.int32), ("validation",)

    def __len__(self) -> int:
        return len(self.tokens_RN)

    def image_filler(self) -> None:
        """No row has an image, and so none needs a blank one beside it."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        tokens, documents = self.tokens_RN[number], self.documents_RN[number]
        return {
            "input_ids": tokens,
            "labels": tokens.clone(),
            "sequence_ids": documents - documents[0],
            "length": len(tokens),
            "sample_id": f"validation/{number}",
        }


def token_byte_lengths(tokenizer: Any) -> Tensor:
    """Bytes of text that each token id stands for (0 for special tokens), int64 [vocabulary].

    SentencePiece's space before the first word of a document counts as its own.
    """
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    # By what it does: the vocabularies of Llama 2 and Gemma have a letter "Ġ", too.
    byte_level = "Ã" in "".join(tokenizer.tokenize("é"))
    lengths = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, number in tokenizer.get_vocab().items():
        if number in special:
            continue
        if byte_level and number not in added:
            lengths[number] = len(token)  # one character a byte
        elif token.startswith("<0x") and len(token) == 6:
            lengths[number] = 1
        else:
            lengths[number] = len(token.replace("▁", " ").encode())
    return lengths
