"""A comparison as Markdown, JSON and a forest plot. Caller: `llava-compete compare`."""

from __future__ import annotations

from pathlib import Path

from llava_compete.evaluation.compare.comparison import LEVEL, Comparison
from llava_compete.evaluation.compare.statistics import Interval
from llava_compete.files import write_json
from llava_compete.report.forest import ForestRow, plot_forest

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
    header += ["p over questions", "Holm", *(["p over questions and seeds", "Holm"] if seeds else [])]
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
            cells += [f"{difference.p_questions:.4f}", f"{comparison.holm_questions[task, name]:.4f}"]
            if difference.p_seeds is not None:
                cells += [f"{difference.p_seeds:.4f}", f"{comparison.holm_seeds[task, name]:.4f}"]
            lines.append(_line(cells))
    return lines


def _notes(comparison: Comparison) -> list[str]:
    """The verdict on the last row (the mean), then what the numbers mean and what to know about the runs."""
    last = list(comparison.rows)[-1]
    seeds = comparison.num_seeds > 1
    apart: list[str] = []
    tied: list[str] = []
    for name, difference in comparison.rows[last].differences.items():
        (apart if comparison.is_apart(last, name) else tied).append(f"{name} ({difference.mean:+.2f})")
    what = "over questions and seeds" if seeds else "over questions, for these trained models only"
    lines = [
        f"On {last}, {what}, corrected p below {LEVEL}: "
        + (f"different from {comparison.baseline}: {', '.join(apart)}. " if apart else "")
        + (f"Not told apart from {comparison.baseline}: {', '.join(tied)}." if tied else ""),
        "",
        "Intervals and p over questions hold the trained models fixed: paired bootstrap and paired permutation of "
        "units (a question, or all about one image), two-sided. "
        + (
            "Intervals and p over questions and seeds add the error of a mean over few trainings: Student's t, its "
            "spread taken from all methods together (two-way analysis of variance, paired by seed). "
            if seeds
            else ""
        )
        + "Holm: corrected over all rows of the table.",
    ]
    return [*lines, *(line for note in comparison.notes for line in ("", note))]


def _interval(interval: Interval | None) -> str:
    return NO_VALUE if interval is None else f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def _published(score: float | None) -> str:
    return NO_VALUE if score is None else f"{score:.2f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
