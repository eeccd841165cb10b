"""JSON lines written step by step (`run/metrics.jsonl`, `run/answers.jsonl`), with every step once, resumed or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_compete.files import write_text


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add one line for each record, each with its `step`; JSON has no NaN and no infinity, they become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(_finite(record), ensure_ascii=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def cut_after(path: Path, step: int) -> None:
    """Drop the lines past `step`, which a run that goes on from there writes again, and what a kill left half written.

    The file is replaced as a whole, so a kill in here loses nothing.
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    kept = "".join(f"{line}\n" for line in text.split("\n") if _belongs(line, step))
    if kept != text:
        write_text(path, kept)


def _belongs(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line).get("step", math.inf) <= step)
    except json.JSONDecodeError:
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
