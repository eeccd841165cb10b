"""Is this data fit to train on? Every row, every image, in parallel, before a GPU is rented.

Each problem has a kind (`row_checks.PROBLEMS`), an error or a warning; nothing is dropped silently: good and bad rows
can be handed to a sink, the bad ones with their reasons.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple

from llava_compete.check.row_checks import PROBLEMS, RowFacts, TextSide, check_row
from llava_compete.data.config import DataSection, SourceSection
from llava_compete.data.source_files import SourceError, file_digests, read_rows, source_digest, source_files
from llava_compete.data.tables import cache_folder
from llava_compete.errors import UserError
from llava_compete.processes import end_with_parent

CHUNK_ROWS = 64
FIRST_RECORDS = 3
FIRST_FIELDS = 10
_MESSAGE = 300  # characters of a message that are kept


class Problem(NamedTuple):
    """One thing found in one row, or (`row` None) in a source as a whole."""

    kind: str
    source: str
    row: int | None
    id: str
    message: str


@dataclass
class SourceReport:
    """Totals over the rows of one source; token numbers are of rows that encode, after the cut."""

    digest: str = ""  # empty: no file could be opened
    rows: int = 0
    good_rows: int = 0
    images: int = 0
    text_only_rows: int = 0
    turns: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    image_tokens: int = 0
    max_tokens: int = 0


@dataclass
class CheckReport:
    """The result of `check_data`."""

    sources: dict[str, SourceReport] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # rows by kind of problem
    first: dict[str, list[Problem]] = field(default_factory=dict)

    @property
    def num_errors(self) -> int:
        return sum(count for kind, count in self.counts.items() if PROBLEMS[kind][0])

    def is_good(self, source: str) -> bool:
        """Whether a source was read to its end and all its rows are good."""
        totals = self.sources[source]
        return bool(totals.rows) and totals.good_rows == totals.rows

    def add(self, found: list[Problem]) -> None:
        """The problems of one row; those of one kind count once."""
        self.counts.update({problem.kind for problem in found})
        for problem in found:
            shown = self.first.setdefault(problem.kind, [])
            if problem.kind == "field_ignored":  # it stands in every row: each key is shown once
                new, limit = all(item.message != problem.message for item in shown), FIRST_FIELDS
            else:
                new, limit = all(item[:3] != problem[:3] for item in shown), FIRST_RECORDS
            if new and len(shown) < limit:
                shown.append(problem)


RowSink = Callable[[SourceSection, Any, list[Problem]], None]


def check_data(
    section: DataSection,
    text_side: TextSide | None,
    workers: int = 2,
    progress: Callable[[int], Any] = lambda rows: None,
    sink: RowSink | None = None,
) -> CheckReport:
    """Check all rows of all sources in `workers` processes (0: in this one).

    `sink` is called with every raw row and its problems (none: a good row), in file order.
    """
    report = CheckReport()
    memory = cache_folder(section.cache_dir) / "digests"
    for source in section.sources:
        totals = report.sources[source.name] = SourceReport()
        seen: dict[bytes, bytes] = {}
        try:
            files = source_files(source.path)
            totals.digest = source_digest(files, file_digests(files, memory))
            rows = _checked_rows(source, text_side, section.max_length, workers)
            for number, (raw, facts) in enumerate(rows):
                found = [Problem(kind, source.name, number, facts.id, _one_line(text)) for kind, text in facts.problems]
                found += _duplicates(seen, facts, source.name, number)
                report.add(found)
                _add_up(totals, facts, good=not any(PROBLEMS[problem.kind][0] for problem in found))
                if sink is not None:
                    sink(source, raw, found)
                progress(1)
            if totals.rows == 0:
                raise SourceError(f"{source}: no rows")
        except SourceError as error:
            report.add([Problem("file_unreadable", source.name, None, "", _one_line(str(error)))])
    return report


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MESSAGE else line[:_MESSAGE] + "…"


def _checked_rows(
    source: SourceSection, text_side: TextSide | None, max_length: int, workers: int
) -> Iterator[tuple[Any, RowFacts]]:
    """Rows in file order with their facts; with processes, a few chunks are under way at a time."""
    rows = enumerate(read_rows(source.path))
    if workers == 0:
        for number, raw in rows:
            yield raw, check_row(source, raw, number, text_side, max_length)
        return
    waiting: deque[tuple[list[tuple[int, Any]], Future[list[RowFacts]]]] = deque()
    # Forked workers share the tokenizer; nothing here has started threads that hold locks.
    with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (source, text_side, max_length)) as pool:
        while True:
            chunk = list(islice(rows, CHUNK_ROWS))
            if chunk:
                waiting.append((chunk, pool.submit(_check_chunk, chunk)))
            while waiting and (not chunk or len(waiting) > 2 * workers):
                checked, future = waiting.popleft()
                yield from zip((raw for _, raw in checked), _facts(future, checked, source), strict=True)
            if not chunk:
                return


def _facts(future: Future[list[RowFacts]], checked: list[tuple[int, Any]], source: SourceSection) -> list[RowFacts]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        first, last = checked[0][0], checked[-1][0]
        raise UserError(
            f"{source}: a worker died near rows {first} to {last} (out of memory, or a picture that "
            "crashes its decoder); --workers 1 narrows it down"
        ) from error


def _duplicates(seen: dict[bytes, bytes], facts: RowFacts, source: str, number: int) -> list[Problem]:
    if not facts.has_id:
        return []
    key = hashlib.blake2b(facts.id.encode(), digest_size=8).digest()
    earlier = seen.setdefault(key, facts.content_hash)
    if earlier is facts.content_hash:
        return []
    kind = "duplicate_row" if earlier == facts.content_hash else "duplicate_id"
    return [Problem(kind, source, number, facts.id, PROBLEMS[kind][1])]


def _add_up(totals: SourceReport, facts: RowFacts, good: bool) -> None:
    totals.rows += 1
    totals.good_rows += good
    totals.images += facts.images
    totals.text_only_rows += good and facts.images == 0
    totals.turns += facts.turns
    totals.tokens += facts.tokens
    totals.supervised_tokens += facts.supervised
    totals.image_tokens += facts.image_tokens
    totals.max_tokens = max(totals.max_tokens, facts.tokens)


# --- in the workers ---------------------------------------------------------------------------------------------

# Set once in each worker process: sending a tokenizer with every chunk would cost more than the check.
_job: tuple[SourceSection, TextSide | None, int] | None = None


def _start_worker(source: SourceSection, text_side: TextSide | None, max_length: int) -> None:
    global _job
    end_with_parent()
    _job = (source, text_side, max_length)


def _check_chunk(chunk: list[tuple[int, Any]]) -> list[RowFacts]:
    assert _job is not None
    source, text_side, max_length = _job
    return [check_row(source, raw, number, text_side, max_length) for number, raw in chunk]
