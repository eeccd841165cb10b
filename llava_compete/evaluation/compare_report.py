"""A comparison as Markdown, JSON and a forest plot. Caller: `llava-compete compare`."""

from __future__ import annotations

from pathlib import Path

from llava_compete.evaluation.compare import Comparison
from llava_compete.evaluation.statistics import Interval
from llava_compete.inspect.forest import ForestRow, plot_forest
from llava_compete.manifest import write_json

NO_VALUE = "–"


def write_comparison(comparison: Comparison, directory: Path, command: str) -> list[Path]:
    """Write comparison.md, comparison.json and comparison.png into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"comparison.{suffix}" for suffix in ("md", "json", "png")]
    paths[0].write_text(to_markdown(comparison, command), encoding="utf-8")
    write_json(paths[1], {"command": command, **comparison.to_json()})
    rows = [
        ForestRow(task, name, difference.mean, difference.over_questions, difference.over_seeds)
        for task, row in comparison.rows.items()
        for name, difference in row.differences.items()
    ]
    plot_forest(rows, comparison.baseline, paths[2])
    return paths


def to_markdown(comparison: Comparison, command: str) -> str:
    """Scores, differences and what they amount to, in words."""
    lines = ["# Comparison", "", f"    {command}", "", *_scores(comparison), "", *_differences(comparison), ""]
    lines += [*_notes(comparison), "", "![differences with 95% intervals](comparison.png)", ""]
    return "\n".join(lines)


def _scores(comparison: Comparison) -> list[str]:
    published = list(comparison.published)
    header = ["benchmark", "units", *comparison.methods, *(f"published: {name}" for name in published)]
    lines = ["## Scores (percent)", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for task, row in comparison.rows.items():
        cells = [task, str(row.num_units)]
        for name in comparison.methods:
            deviation = row.deviations[name]
            cells.append(f"{row.scores[name]:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else ""))
        cells += [_published(comparison.published[name].get(task)) for name in published]
        lines.append(_line(cells))
    if comparison.num_seeds > 1:
        lines += ["", f"Mean ± standard deviation over {comparison.num_seeds} training seeds."]
    if published:
        lines += ["", "Published columns are as printed by their authors: another model, one run each, no interval."]
    return lines


def _differences(comparison: Comparison) -> list[str]:
    seeds = comparison.num_seeds > 1
    header = ["benchmark", "method", "difference", "95% over questions"]
    header += ["95% over questions and seeds"] if seeds else []
    header += ["p", "p (Holm)", *(["p over runs"] if seeds else [])]
    lines = [
        f"## Differences to {comparison.baseline} (points)",
        "",
        _line(header),
        _line(["---", "---", *["---:"] * (len(header) - 2)]),
    ]
    for task, row in comparison.rows.items():
        for name, difference in row.differences.items():
            cells = [task, name, f"{difference.mean:+.2f}", _interval(difference.over_questions)]
            cells += [_interval(difference.over_seeds)] if seeds else []
            cells += [f"{difference.p_questions:.4f}", f"{comparison.holm_p[task, name]:.4f}"]
            cells += [NO_VALUE if difference.p_runs is None else f"{difference.p_runs:.3f}"] if seeds else []
            lines.append(_line(cells))
    return lines


def _notes(comparison: Comparison) -> list[str]:
    last = list(comparison.rows)[-1]
    apart: list[str] = []
    tied: list[str] = []
    for name, difference in comparison.rows[last].differences.items():
        interval = difference.over_seeds or difference.over_questions
        (apart if interval.low > 0 or interval.high < 0 else tied).append(f"{name} ({difference.mean:+.2f})")
    what = "over questions and seeds" if comparison.num_seeds > 1 else "over questions, for these trained models only"
    return [
        f"On {last}, 95% {what}: "
        + (f"different from {comparison.baseline}: {', '.join(apart)}. " if apart else "")
        + (f"Not told apart from {comparison.baseline}: {', '.join(tied)}." if tied else ""),
        "",
        "Intervals over questions resample the questions (paired bootstrap) and hold the trained models fixed; those "
        "over questions and seeds add the spread of the training seeds (Student's t). p: paired permutation over "
        "questions, two-sided, corrected by Holm's method over all rows of the table."
        + (" p over runs: exact permutation of which runs belong to which method." if comparison.num_seeds > 1 else ""),
    ]


def _interval(interval: Interval | None) -> str:
    return NO_VALUE if interval is None else f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def _published(score: float | None) -> str:
    return NO_VALUE if score is None else f"{score:.2f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
