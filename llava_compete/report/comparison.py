"""A comparison as Markdown, JSON and a forest plot."""

from __future__ import annotations

from pathlib import Path

from llava_compete.evaluation.compare.comparison import Comparison, Difference
from llava_compete.evaluation.compare.statistics import LEVEL, Interval
from llava_compete.files import write_json, write_text
from llava_compete.report.forest import ForestRow, plot_forest

NO_VALUE = "–"


def write_comparison(comparison: Comparison, directory: Path, command: str) -> list[Path]:
    """Write comparison.md, comparison.json and comparison.png into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"comparison.{suffix}" for suffix in ("md", "json", "png")]
    write_text(paths[0], to_markdown(comparison, command))
    write_json(paths[1], {"command": command, **comparison.to_json()})
    rows = [
        ForestRow(task, name, difference.mean, difference.over_questions, difference.over_seeds)
        for task, row in comparison.rows.items()
        for name, difference in row.differences.items()
    ]
    apart = [name for name in comparison.methods[1:] if comparison.is_apart(name)]
    plot_forest(rows, comparison.baseline, paths[2], comparison.margin, first=comparison.primary, apart=apart)
    return paths


def to_markdown(comparison: Comparison, command: str) -> str:
    """Scores, differences, what they amount to in words, and what so many runs can tell at all."""
    lines = ["# Comparison", "", f"    {command}", "", *_scores(comparison), "", *_differences(comparison), ""]
    lines += [*_verdict(comparison), *_power(comparison), *(line for note in comparison.notes for line in ("", note))]
    return "\n".join([*lines, "", "![differences with 95% intervals](comparison.png)", ""])


def _scores(comparison: Comparison) -> list[str]:
    published = list(comparison.published)
    header = ["benchmark", "units", *comparison.methods, *(f"published: {name}" for name in published)]
    lines = ["## Scores (percent)", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for task, row in comparison.rows.items():
        cells = [task, str(row.num_units)]
        for name in comparison.methods:
            deviation = row.deviation(name)
            cells.append(f"{row.score(name):.2f}" + (f" ± {deviation:.2f}" if deviation is not None else ""))
        cells += [_number(comparison.published[name].get(task), ".2f") for name in published]
        lines.append(_line(cells))
    if comparison.num_seeds > 1:
        lines += ["", f"Mean ± standard deviation over {comparison.num_seeds} training seeds."]
    if published:
        lines += ["", "Published columns are as printed by their authors: another model, one run each, no interval."]
    return lines


def _differences(comparison: Comparison) -> list[str]:
    header = ["benchmark", "method", "difference"]
    header += ["95% over seeds", "p"] if comparison.num_seeds > 1 else ["p over questions"]
    header += ["Holm", *(["p equivalent", "Holm"] if comparison.margin else []), "95% over questions"]
    lines = [
        f"## Differences to {comparison.baseline} (points)",
        "",
        _line(header),
        _line(["---", "---", *["---:"] * (len(header) - 2)]),
    ]
    for task, row in comparison.rows.items():
        lines += [_line(_cells(comparison, task, name, found)) for name, found in row.differences.items()]
    return lines


def _cells(comparison: Comparison, task: str, name: str, difference: Difference) -> list[str]:
    judged = task == comparison.primary
    cells = [task, name, f"{difference.mean:+.2f}"]
    cells += [_interval(difference.over_seeds)] if comparison.num_seeds > 1 else []
    cells += [_number(difference.p, ".4f"), _number(comparison.holm.get(name) if judged else None, ".4f")]
    if comparison.margin:
        equivalent = comparison.holm_equivalent.get(name) if judged else None
        cells += [_number(difference.p_equivalent, ".4f"), _number(equivalent, ".4f")]
    return [*cells, _interval(difference.over_questions)]


def _verdict(comparison: Comparison) -> list[str]:
    """The verdict on the primary row, then what the numbers mean."""
    apart: list[str] = []
    equal: list[str] = []
    open_: list[str] = []
    for name, difference in comparison.rows[comparison.primary].differences.items():
        place = apart if comparison.is_apart(name) else equal if comparison.is_equivalent(name) else open_
        place.append(f"{name} ({difference.mean:+.2f})")
    several = comparison.num_seeds > 1
    what = f"over {comparison.num_seeds} seeds" if several else "over questions, for these trained models only"
    words = [f"On {comparison.primary}, {what}, corrected p below {LEVEL}:"]
    words += [f"different from {comparison.baseline}: {', '.join(apart)}."] if apart else []
    words += [f"Within {comparison.margin:g} points of {comparison.baseline}: {', '.join(equal)}."] if equal else []
    words += [f"Not told apart from {comparison.baseline}: {', '.join(open_)}."] if open_ else []
    meaning = (
        "Over seeds: if both trainings were repeated; Student's t on each method's own differences, paired by seed. "
        "Over questions: if these very models met other questions; it says nothing of another training. "
        if several
        else "With one seed nothing can be said of the methods, only of these two models: paired permutation and "
        "bootstrap of units (a question, or all about one image). "
    )
    equivalent = (
        "p equivalent: two one-sided tests against the margin. "
        if comparison.margin is not None
        else "Not told apart is not equal: give --margin to test for that. "
        if several
        else ""
    )
    holm = f"Holm: corrected over the methods on {comparison.primary}, the one row that is judged."
    return [" ".join(words), "", meaning + equivalent + holm]


def _power(comparison: Comparison) -> list[str]:
    """What differences so many seeds find."""
    table = comparison.detectable()
    if not table:
        return []
    seeds = list(next(iter(table.values())))
    header = ["method", "deviation", *(f"{number} seeds" for number in seeds)]
    lines = [
        "",
        f"## True difference on {comparison.primary} that is found with a power of 80% (points)",
        "",
        _line(header),
        _line(["---", *["---:"] * (len(header) - 1)]),
    ]
    for name, by_seeds in table.items():
        deviation = comparison.rows[comparison.primary].differences[name].deviation
        lines.append(_line([name, _number(deviation, ".2f"), *(f"{by_seeds[number]:.2f}" for number in seeds)]))
    return [
        *lines,
        "",
        f"From the standard deviation of the paired differences over these {comparison.num_seeds} seeds, itself known "
        "to a factor of 2 or 3 where they are few; at the level of Holm's strictest step.",
    ]


def _interval(interval: Interval | None) -> str:
    return NO_VALUE if interval is None else f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def _number(value: float | None, form: str) -> str:
    return NO_VALUE if value is None else format(value, form)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
