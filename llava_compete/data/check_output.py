"""What `data check` leaves behind: the table of problems, the JSON report, and files of good and bad rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from llava_compete.data.check import CheckReport, Problem
from llava_compete.data.config import SourceSection
from llava_compete.data.row_checks import PROBLEMS
from llava_compete.errors import UserError


def problem_table(report: CheckReport) -> Table:
    """One line a kind, errors first: how often, and the first records."""
    table = Table("problem", "", "rows", "first records", title="Problems")
    for kind in sorted(report.counts, key=lambda kind: (not PROBLEMS[kind][0], -report.counts[kind])):
        first = "\n".join(f"{item.source}/{item.id} (row {item.row}): {item.message}" for item in report.first[kind])
        severity = "[red]error[/red]" if PROBLEMS[kind][0] else "warning"
        table.add_row(kind, severity, f"{report.counts[kind]:,}", _plain(first))
    return table


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class RowWriter:
    """Writes good rows and bad rows (with `reasons`) as JSON lines while the check runs; a context manager.

    With several sources each gets files of its own, named FILE.<source>.jsonl. A row is an error's row or a good one:
    warnings alone keep it good.
    """

    def __init__(self, clean: Path | None, bad: Path | None, sources: list[SourceSection]) -> None:
        for path in filter(None, (clean, bad)):
            if path.suffix != ".jsonl":
                raise UserError(f"{path}: found {path.suffix!r}, expected a name that ends in .jsonl")
            if any(path.resolve() == source.path.resolve() for source in sources):
                raise UserError(f"{path}: this is a data source; write to another file")
        self._paths = {"clean": clean, "bad": bad}
        self._by_source = len(sources) > 1
        self._open: dict[Path, TextIO] = {}

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._open.values():
            file.close()

    def __call__(self, source: SourceSection, raw: Any, problems: list[Problem]) -> None:
        """The sink of `check_data`."""
        reasons = [f"{item.kind}: {item.message}" for item in problems if PROBLEMS[item.kind][0]]
        base = self._paths["bad" if reasons else "clean"]
        if base is None:
            return
        path = base.with_name(f"{base.stem}.{source.name}{base.suffix}") if self._by_source else base
        if path not in self._open:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[path] = path.open("w", encoding="utf-8")
        content = {"row": raw, "reasons": reasons} if reasons else raw
        self._open[path].write(json.dumps(content, ensure_ascii=False, default=_not_json) + "\n")


def _not_json(value: Any) -> str:
    if isinstance(value, bytes):
        raise UserError("--write-clean and --write-bad write JSON lines, which cannot hold embedded images")
    return str(value)


def _plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", r"\[")
