"""What a first study of the same designs found, and which of our numbers lie outside its intervals.

It was another program on a GPU, of which only this summary is left. Rules minus softmax with half of the 95% interval;
scores of softmax and of the controls without one.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from llava_compete.study.routing.results import Runs, Scores, half_width
from llava_compete.study.routing.teacher import Gate, own_share

# Task, rule: mean and half width, at the task's learning rate. Facts: 40 seeds on 8 tasks (12 of contested experts and
# next ones), 24 on 24 tasks; teachers 30; bytes 8.
DIFFERENCES: dict[str, dict[str, tuple[float, float]]] = {
    "facts_8": {
        "published": (-5.9, 0.5),
        "distil_only": (0.2, 0.3),
        "judge_all": (3.7, 0.6),
        "judge_all_none": (1.6, 0.5),
        "judge_mean": (2.5, 0.6),
        "judge_c95": (0.6, 0.8),
        "judge_c80": (1.4, 0.5),
        "judge_c50": (2.4, 0.4),
        "judge_next1": (1.4, 0.6),
        "judge_next1_none": (1.2, 1.0),
        "judge_next2": (1.9, 0.7),
        "judge_next2_none": (1.6, 0.9),
        "judge_rate20": (1.0, 0.4),
        "judge_rate5": (0.2, 0.4),
    },
    "facts_24": {
        "published": (-5.0, 0.5),
        "distil_only": (0.1, 0.4),
        "judge_all": (2.5, 0.5),
        "judge_all_none": (1.0, 0.6),
        "judge_mean": (1.4, 0.4),
    },
    "teacher_competition_1000": {
        "published": (-0.005, 0.003),
        "judge_all": (-0.0185, 0.0042),
        "judge_all_none": (-0.0176, 0.0045),
        "judge_mean": (-0.0088, 0.0042),
        "judge_mean_none": (-0.0092, 0.0031),
        "judge_c95": (-0.0018, 0.0036),
        "judge_c80": (-0.0136, 0.0045),
        "judge_c50": (-0.0195, 0.0044),
        "judge_c50_none": (-0.0190, 0.0045),
        "judge_next1": (-0.0100, 0.0032),
        "judge_next1_none": (-0.0111, 0.0038),
        "judge_next2": (-0.0145, 0.0039),
        "judge_next2_none": (-0.0141, 0.0041),
        "always": (-0.014, 0.007),
    },
    "teacher_competition_8000": {
        "judge_all": (-0.016, 0.004),
        "judge_all_none": (-0.016, 0.004),
        "judge_mean": (-0.010, 0.004),
    },
    "teacher_softmax_1000": {
        "judge_all": (-0.032, 0.020),
        "judge_all_none": (-0.042, 0.020),
        "judge_mean": (-0.021, 0.015),
    },
    "teacher_softmax_8000": {
        "published": (0.009, 0.010),
        "judge_all": (-0.013, 0.016),
        "judge_all_none": (-0.022, 0.016),
        "judge_mean": (0.001, 0.014),
        "judge_mean_none": (-0.008, 0.014),
        "judge_c95": (-0.008, 0.013),
        "judge_c80": (-0.035, 0.015),
        "judge_c50": (-0.030, 0.016),
        "judge_c50_none": (-0.025, 0.016),
        "judge_next1": (-0.023, 0.013),
        "judge_next1_none": (-0.028, 0.012),
        "judge_next2": (-0.029, 0.013),
        "judge_next2_none": (-0.035, 0.013),
    },
    "teacher_clusters_1000": {"published": (0.008, 0.002)},
    "teacher_clusters_8000": {
        "published": (0.008, 0.002),
        "judge_all": (-0.0026, 0.0019),
        "judge_c80": (-0.0036, 0.0016),
        "judge_c50": (-0.0041, 0.0018),
        "judge_c50_none": (-0.0035, 0.0017),
    },
    "bytes": {
        "published": (0.011, 0.018),
        "distil_only": (-0.002, 0.007),
        "judge_all": (-0.020, 0.018),
        "judge_all_none": (-0.024, 0.012),
        "judge_mean": (0.006, 0.015),
        "judge_c80": (0.0015, 0.0116),
    },
}
SCORES: dict[str, dict[str, float]] = {
    "facts_8": {
        "softmax": 86.8,
        "random": 18.0,
        "fixed": 69.0,
        "dense_active": 35.6,
        "dense_all": 90.2,
        "dense_all_start": 90.2,
    },
    "facts_24": {
        "softmax": 65.1,
        "random": 14.7,
        "fixed": 48.8,
        "dense_active": 25.8,
        "dense_all": 71.4,
        "dense_all_start": 71.4,
    },
    "teacher_competition_1000": {"softmax": 0.287},
    "teacher_competition_8000": {"softmax": 0.236},
    "teacher_softmax_1000": {"softmax": 0.287},
    "teacher_softmax_8000": {"softmax": 0.182},
    "teacher_clusters_1000": {"softmax": 0.046},
    "teacher_clusters_8000": {"softmax": 0.035},
    "bytes": {"softmax": 3.493, "random": 3.667, "dense_active": 3.553, "dense_all": 3.425},
}


class Beside(NamedTuple):
    """A number of ours beside the first study's; both halves are None for scores. `outside`: of the first study's own
    interval; `apart`: further from it than both intervals allow, taken as independent. `pooled`: an error over the
    variance about one mean of all coordinates, which a competition's winners lift, in place of each one's own."""

    rule: str
    ours: float
    theirs: float
    half: float | None
    their_half: float | None
    pooled: bool = False

    @property
    def outside(self) -> bool:
        return self.their_half is not None and abs(self.ours - self.theirs) > self.their_half

    @property
    def apart(self) -> bool:
        if self.half is None or self.their_half is None:
            return False
        return abs(self.ours - self.theirs) > math.hypot(self.half, self.their_half)


def beside(runs: Runs, task: str) -> list[Beside]:
    """Of the rules that ran on a task at its learning rate: differences first, then scores."""
    rows = {row.rule: row for row in runs.rows(task)}
    design = task.removeprefix("wide_")
    found = []
    for rule, (theirs, their_half) in DIFFERENCES.get(design, {}).items():
        if rule in rows and (test := rows[rule].samples) is not None:
            found.append(Beside(rule, test.mean, theirs, half_width(test), their_half))
    scores = SCORES.get(design, {})
    # It does not say how its dense layers started, nor how tasks were fixed.
    for rule, same in (("dense_all_start", "dense_all"), ("fixed_evenly", "fixed")):
        if same in scores:
            scores = {**scores, rule: scores[same]}
    for rule, score in scores.items():
        if rule not in rows:
            continue
        found.append(Beside(rule, rows[rule].score, score, None, None))
        if design.startswith("teacher"):
            found.append(Beside(rule, _pooled(runs.scores(task, rule), design), score, None, None, pooled=True))
    return found


def _pooled(scores: Scores, task: str) -> float:
    gate, samples = task.split("_")[1:]
    shares = [own_share(seed, cast("Gate", gate), int(samples)) for seed in scores]
    return sum(score * share for score, share in zip(scores.values(), shares, strict=True)) / len(scores)
