"""One score for each independent unit of a benchmark, such that their weighted mean is the benchmark's score.

lmms-eval's per-sample lines differ by task; everything that follows (summaries, bootstrap, tests) needs plain numbers.
A unit is a question, or, where a benchmark scores several questions together, that group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from llava_compete.errors import UserError


class Unit(NamedTuple):
    """One unit's result.

    Attributes:
        id: names the unit within its task; runs are joined on it.
        score: between 0 and 1.
        weight: share of the unit in the benchmark's score, relative to the others.
        type: question type, or None.
        answer: what the model said (several answers joined by a line break).
        target: what was expected.
    """

    id: str
    score: float
    weight: float
    type: str | None
    answer: str
    target: str


def weighted_mean(units: Iterable[Unit]) -> float:
    """The benchmark's score, between 0 and 1."""
    units = list(units)
    return sum(unit.score * unit.weight for unit in units) / sum(unit.weight for unit in units)


def score_samples(task: str, samples: list[dict[str, Any]]) -> list[Unit]:
    """Units of a task from lmms-eval's per-sample lines."""
    if not samples:
        raise UserError(f"task {task!r}: no samples")
    return _UNITS.get(task, _each_sample)(task, samples)


def _each_sample(task: str, samples: list[dict[str, Any]]) -> list[Unit]:
    """A unit a document, scored by the first of its entries that is a score."""
    units = []
    for sample in samples:
        entry = next((sample[key] for key in sample if key not in _NOT_SCORES and _is_score(sample[key])), None)
        if entry is None:
            raise UserError(f"task {task!r}, document {sample['doc_id']}: no per-sample score among {sorted(sample)}")
        kind = entry.get("type") if isinstance(entry, dict) else None
        name = entry.get("id", sample["doc_id"]) if isinstance(entry, dict) else sample["doc_id"]
        units.append(Unit(str(name), _value(entry), 1.0, kind, _answer(sample), str(sample.get("target"))))
    return units


def _by_image_and_category(task: str, samples: list[dict[str, Any]]) -> list[Unit]:
    """MME: two questions an image; an image counts its accuracy and whether both are right, each category alike."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        entry = sample.get("mme_perception_score") or sample["mme_cognition_score"]
        groups[entry["category"], entry["question_id"]].append(sample)
    images_in: dict[str, int] = defaultdict(int)
    for category, _ in groups:
        images_in[category] += 1
    units = []
    for (category, name), members in groups.items():
        scores = [(member.get("mme_perception_score") or member["mme_cognition_score"])["score"] for member in members]
        mean = sum(scores) / len(scores)
        score = (mean + float(all(scores))) / 2
        units.append(Unit(f"{category}/{name}", score, 1 / images_in[category], category, *_joined(members)))
    return units


def _joined(members: list[dict[str, Any]]) -> tuple[str, str]:
    return "\n".join(map(_answer, members)), "\n".join(str(member.get("target")) for member in members)


_UNITS: dict[str, Callable[[str, list[dict[str, Any]]], list[Unit]]] = {"mme": _by_image_and_category}
# Entries of a per-sample line that lmms-eval itself writes.
_NOT_SCORES = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input",
    "input_media",
}  # fmt: skip


def _is_score(entry: Any) -> bool:
    return isinstance(entry, int | float) or (isinstance(entry, dict) and isinstance(entry.get("score"), int | float))


def _value(entry: Any) -> float:
    return float(entry["score"] if isinstance(entry, dict) else entry)


def _answer(sample: dict[str, Any]) -> str:
    answer = sample.get("filtered_resps", "")
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer if isinstance(answer, str) else str(answer)
