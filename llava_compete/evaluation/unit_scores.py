"""One score for each independent unit of a benchmark, such that their weighted mean is the benchmark's score.

lmms-eval's per-sample lines differ by task; everything that follows (summaries, bootstrap, tests) needs plain numbers.
A unit is a question, or, where a benchmark scores several questions together, that group. A new benchmark whose lines
hold a number, or a dictionary with a `score`, needs nothing here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llava_compete.errors import UserError
from llava_compete.files import read_json_lines, write_json_lines

Sample = dict[str, Any]
# Entries of a per-sample line that lmms-eval itself writes.
_NOT_SCORES = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input",
    "input_media", "member", "group",
}  # fmt: skip


class Unit(NamedTuple):
    """One unit's result.

    Attributes:
        id: names the unit within its task; runs are joined on it.
        score: between 0 and 1.
        weight: share of the unit in the benchmark's score, relative to the others.
        type: question type, or None.
        answer: what the model said (several answers joined by a line break).
        target: what was expected.
        group: units of one group are not independent (questions about one image), or None.
    """

    id: str
    score: float
    weight: float
    type: str | None
    answer: str
    target: str
    group: str | None = None


def weighted_mean(units: Iterable[Unit]) -> float:
    """The benchmark's score, between 0 and 1."""
    units = list(units)
    return sum(unit.score * unit.weight for unit in units) / sum(unit.weight for unit in units)


def standard_error(units: Iterable[Unit]) -> float | None:
    """Standard error of the benchmark's score over groups of units, which are independent; None for a single group.

    That of a ratio of sums (Cochran, Sampling Techniques, section 6.4), since groups weigh differently.
    """
    units = list(units)
    mean = weighted_mean(units)
    excess: dict[str, float] = defaultdict(float)
    for unit in units:
        excess[unit.id if unit.group is None else unit.group] += (unit.score - mean) * unit.weight
    if len(excess) < 2:
        return None
    scale = len(excess) / (len(excess) - 1)
    return math.sqrt(scale * sum(value**2 for value in excess.values())) / sum(unit.weight for unit in units)


def write_units(directory: Path, task: str, units: Iterable[Unit]) -> None:
    """Write samples/TASK.jsonl of an evaluation directory, a line a unit."""
    write_json_lines(directory / "samples" / f"{task}.jsonl", (unit._asdict() for unit in units))


def read_units(directory: Path, task: str) -> list[Unit]:
    """Read samples/TASK.jsonl; lines that are not units, and scores that are no numbers, are a `UserError`."""
    path = directory / "samples" / f"{task}.jsonl"
    try:
        units = [Unit(**line) for line in read_json_lines(path)]
        wrong = next(
            (u for u in units if not (math.isfinite(u.score) and math.isfinite(u.weight) and u.weight > 0)), None
        )
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: not per-sample scores ({error}); evaluate again") from error
    if wrong is not None:
        raise UserError(f"{path}: {wrong.id}: score {wrong.score}, weight {wrong.weight}; expected numbers, weight > 0")
    return units


def score_samples(task: str, samples: list[Sample]) -> list[Unit]:
    """Units of a task from lmms-eval's per-sample lines; lines without a score (left to a judge) are a `UserError`."""
    if not samples:
        raise UserError(f"task {task!r}: no samples")
    return _UNITS.get(task, _each_sample)(task, samples)


def _each_sample(task: str, samples: list[Sample]) -> list[Unit]:
    """A unit a document, scored by the first of its entries that is a score."""
    units = []
    for sample in samples:
        entry = next((sample[key] for key in sample if key not in _NOT_SCORES and _is_score(sample[key])), None)
        if entry is None:
            raise UserError(f"task {task!r}, document {sample['doc_id']}: no per-sample score among {sorted(sample)}")
        details = entry if isinstance(entry, dict) else {"score": entry}
        name = str(details.get("id", sample["doc_id"]))
        if "member" in sample:  # a task of a group, whose documents are numbered on their own
            name = f"{sample['member']}/{name}"
        kind = details.get("type", sample.get("member"))
        target, group = str(sample.get("target")), sample.get("group")
        units.append(Unit(name, float(details["score"]), 1.0, kind, _answer(sample), target, group))
    return units


def _mme(task: str, samples: list[Sample]) -> list[Unit]:
    """Two questions an image: a unit is an image, half its accuracy and half whether both are right; the 14 categories
    count alike. The mean is (perception + cognition) / 2800."""
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        entry = _mme_entry(sample)
        groups[entry["category"], entry["question_id"]].append(sample)
    images = Counter(category for category, _ in groups)
    units = []
    for (category, name), members in groups.items():
        scores = [_mme_entry(member)["score"] for member in members]
        score = (sum(scores) / len(scores) + float(all(scores))) / 2
        units.append(_joined(f"{category}/{name}", score, 1 / images[category], category, members))
    return units


def _mme_entry(sample: Sample) -> dict[str, Any]:
    return sample.get("mme_perception_score") or sample["mme_cognition_score"]


def _mmbench(task: str, samples: list[Sample]) -> list[Unit]:
    """A question counts if it is right under all rotations of its options; lmms-eval's rules read the letter."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample["gpt_eval_score"]["index"] % 1_000_000].append(sample)
    units = []
    for index, members in sorted(groups.items()):
        rows = [member["gpt_eval_score"] for member in members]
        answers = {row["index"]: row["answer"] for row in rows}
        right = mmbench_evaluator.eval_sub_data(pd.DataFrame(rows), answers, static_only=True)
        units.append(_joined(str(index), float(right), 1.0, rows[0]["category"], members))
    return units


def _mmmu(task: str, samples: list[Sample]) -> list[Unit]:
    """Lines hold the parsed answer; lmms-eval's own function says whether it is right."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    units = []
    for sample in samples:
        entry = sample["mmmu_acc"]
        _, found = evaluate_mmmu([entry])
        units.append(_joined(entry["id"], float(found["acc"]), 1.0, entry["subdomain"], [sample]))
    return units


def _mmstar(task: str, samples: list[Sample]) -> list[Unit]:
    """The score is the mean over finer categories, whatever their sizes."""
    sizes = Counter(sample["average"]["l2_category"] for sample in samples)
    return [
        _joined(str(entry["question_id"]), float(entry["score"]), 1 / sizes[entry["l2_category"]],
                entry["l2_category"], [sample])
        for sample in samples for entry in [sample["average"]]
    ]  # fmt: skip


def _seedbench_2_plus(task: str, samples: list[Sample]) -> list[Unit]:
    """Lines hold the letter that was read and the right one."""
    units = []
    for sample in samples:
        entry = sample["seedbench_2_plus_all"]
        right = entry["pred"].lower().strip() == entry["answer"].lower().strip()
        units.append(_joined(str(entry["question_id"]), float(right), 1.0, None, [sample]))
    return units


_UNITS: dict[str, Callable[[str, list[Sample]], list[Unit]]] = {
    "mme": _mme,
    "mmbench_en_dev": _mmbench,
    "mmbench_en_dev_static": _mmbench,
    "mmmu_val": _mmmu,
    "mmstar": _mmstar,
    "seedbench_2_plus": _seedbench_2_plus,
}


def _joined(name: str, score: float, weight: float, kind: str | None, members: list[Sample]) -> Unit:
    answers = "\n".join(map(_answer, members))
    targets = "\n".join(str(member.get("target")) for member in members)
    return Unit(name, score, weight, kind, answers, targets, members[0].get("group"))


def _is_score(entry: Any) -> bool:
    return isinstance(entry, int | float) or (isinstance(entry, dict) and isinstance(entry.get("score"), int | float))


def _answer(sample: Sample) -> str:
    answer = sample.get("filtered_resps", "")
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, list) and all(map(_is_likelihood, answer)):
        # The option that lmms-eval takes for chosen, by number as in `target`: it compares negative logarithms.
        return str(min(range(len(answer)), key=lambda option: float(answer[option][0])))
    return answer if isinstance(answer, str) else str(answer)


def _is_likelihood(response: Any) -> bool:
    """A pair of a summed negative log-likelihood and whether it is greedy; strings in lmms-eval's files."""
    return isinstance(response, list | tuple) and len(response) == 2 and str(response[1]) in ("True", "False")
