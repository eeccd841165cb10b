"""What `data check` leaves behind: the table of problems, the JSON report, and files of good and bad rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from llava_compete.check.check import CheckReport, Problem
from llava_compete.check.clean_rows import with_image_paths
from llava_compete.check.row_checks import PROBLEMS
from llava_compete.data.config import SourceSection
from llava_compete.data.records import RecordError
from llava_compete.errors import UserError
from llava_compete.files import write_json


def problem_table(report: CheckReport) -> Table:
    """One line a kind, errors first: how often, and the first records."""
    table = Table("problem", "", "rows", "first records", title="Problems")
    for kind in sorted(report.counts, key=lambda kind: (not PROBLEMS[kind][0], -report.counts[kind])):
        first = "\n".join(map(_record_line, report.first[kind]))
        severity = "[red]error[/red]" if PROBLEMS[kind][0] else "warning"
        table.add_row(kind, severity, f"{report.counts[kind]:,}", _plain(first))
    return table


def _record_line(problem: Problem) -> str:
    where = problem.source if problem.row is None else f"{problem.source}/{problem.id[:40]} (row {problem.row})"
    return f"{where}: {problem.message}"


def source_table(report: CheckReport) -> Table:
    """One line a source: rows, images and tokens."""
    table = Table("source", "rows", "good", "images", "text only", "tokens a row", "image tokens", "learnt", "longest")
    for name, source in report.sources.items():
        mean = source.tokens / max(source.rows, 1)
        share = f"{source.image_tokens / max(source.tokens, 1):.0%}"
        learnt = f"{source.supervised_tokens / max(source.tokens, 1):.0%}"
        numbers = [source.rows, source.good_rows, source.images, source.text_only_rows]
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{mean:.0f}", share, learnt, f"{source.max_tokens:,}")
    return table


def write_report(report: CheckReport, path: Path) -> None:
    """Everything as JSON: totals by source, and for each kind its meaning, count and first records."""
    problems = {
        kind: {
            "severity": "error" if PROBLEMS[kind][0] else "warning",
            "meaning": PROBLEMS[kind][1],
            "rows": count,
            "first": [item._asdict() for item in report.first[kind]],
        }
        for kind, count in sorted(report.counts.items())
    }
    content = {
        "errors": report.num_errors,
        "sources": {name: asdict(source) for name, source in report.sources.items()},
        "problems": problems,
    }
    with _one_line(path):
        write_json(path, content)


class RowWriter:
    """Writes good rows and bad rows (with `reasons`) as JSON lines while the check runs; a context manager.

    With several sources each gets files of its own, named FILE.<source>.jsonl. Every row goes to one of the two:
    warnings alone keep it good. Files are there, if need be empty, once the check is through.

    A written row is as good as the row it was: `clean_rows` keeps its image paths right and writes embedded images out.
    """

    def __init__(self, clean: Path | None, bad: Path | None, sources: list[SourceSection]) -> None:
        self._paths: dict[tuple[str, str], Path] = {}  # by (clean or bad, source)
        for kind, base in {"clean": clean, "bad": bad}.items():
            if base is None:
                continue
            if base.suffix != ".jsonl":
                raise UserError(f"{base}: found {base.suffix!r}, expected a name that ends in .jsonl")
            for source in sources:
                name = f"{base.stem}.{source.name}{base.suffix}" if len(sources) > 1 else base.name
                self._paths[kind, source.name] = base.with_name(name)
        prepare_outputs(self._paths.values(), sources)
        self._open: dict[Path, TextIO] = {}

    def __enter__(self) -> RowWriter:
        for path in self._paths.values():
            with _one_line(path):
                self._open[path] = _partial(path).open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        whole = kind is None
        try:
            for path, file in self._open.items():
                with _one_line(path):
                    file.close()  # writes the rest
                    if whole:
                        _partial(path).replace(path)
        finally:
            for path in self._open:
                _partial(path).unlink(missing_ok=True)

    def __call__(self, source: SourceSection, raw: Any, problems: list[Problem]) -> None:
        """The sink of `check_data`."""
        reasons = [f"{item.kind}: {item.message}" for item in problems if PROBLEMS[item.kind][0]]
        path = self._paths.get(("bad" if reasons else "clean", source.name))
        if path is None:
            return
        with _one_line(path):
            row = raw.text if isinstance(raw, RecordError) else with_image_paths(raw, source, path)
            content = {"row": row, "reasons": reasons} if reasons else row
            # ASCII: a row with half a surrogate pair comes back as it was.
            self._open[path].write(json.dumps(content, default=str) + "\n")


def prepare_outputs(targets: Iterable[Path], sources: list[SourceSection]) -> None:
    """Make the folders of files to be written; `UserError` if one is a data source, named twice or cannot be made."""
    # Not `Path.resolve`, which raises at links that lead in a circle.
    taken = {
        os.path.realpath(path)
        for source in sources
        for path in (source.path if isinstance(source.path, list) else [source.path])
    }
    for path in targets:
        if os.path.realpath(path) in taken:
            raise UserError(f"{path}: this is a data source or another output; write to another file")
        taken.add(os.path.realpath(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: its folder cannot be made: {error.strerror}") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: {'a folder' if path.is_dir() else 'its folder is not writable'}")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def _partial(path: Path) -> Path:
    """Beside the file, with the process's number: two checks that write one file must not write into each other's."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", r"\[")
