"""Table and figure of the routing study, from its runs' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_compete.evaluation.compare.statistics import PairedT
from llava_compete.files import write_figure
from llava_compete.study.routing import first_study
from llava_compete.study.routing.results import Row, Runs, half_width
from llava_compete.study.routing.rules import RULES
from llava_compete.study.routing.sources import origins
from llava_compete.study.routing.tasks import TASKS


def to_json(runs: Runs, command: str) -> dict[str, Any]:
    """Every run's score, and the rows of the table."""
    rows = [_plain(row) for task in runs.tasks() for times in runs.rates(task) for row in runs.rows(task, times)]
    content = {"command": command, "rows": rows, "runs": runs.files}
    return content | {"byte_sources": origins()} if "bytes" in runs.tasks() else content


def _plain(row: Row) -> dict[str, Any]:
    content = row._asdict()
    for key in ("samples", "arithmetic", "best"):
        test: PairedT | None = content[key]
        content[key] = test and {"mean": test.mean, "interval": test.interval and list(test.interval), "p": test.p}
    return content


def describe(runs: Runs, command: str, finished: bool) -> str:
    """Markdown: a table a task, at the task's learning rate; then the best rates where several ran."""
    lines = [
        "# Do routers differ?",
        "",
        f"`{command}`" + ("" if finished else " (stopped before its end: the tables say which seeds each rule has)"),
        "",
        "Each rule minus softmax, paired by seed: same data, order and start; ± is half of the 95% interval of a",
        "paired t. *Equal samples*: as many steps. *Equal arithmetic*: softmax has as many more steps as the rule",
        "costs in experts' arithmetic (price: from the measured share of experts asked; attention, embeddings and head",
        "are not in it). Intervals are not corrected for the number of rules: of 20 that do nothing, one excludes 0.",
    ]
    for name in runs.tasks():
        task = TASKS[name]
        better = "higher" if task.higher_is_better else "lower"
        lines += [
            "",
            f"## {task.title}",
            "",
            f"{task.unit}, {better} is better; {task.steps:,} steps, learning rate {task.rate:g}.",
            *([f"Sources: {', '.join(f'{key} ({value})' for key, value in origins().items())}."] * (name == "bytes")),
            "",
            "| rule | seeds | score | price | equal samples | equal arithmetic |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {RULES[row.rule].title} | {row.seeds} | {_number(row.score, name)} | {_price(row.price)} | "
            f"{_test(row.samples, name)} | {_test(row.arithmetic, name)} |"
            for row in runs.rows(name)
        ]
        lines += _by_rate(runs, name)
    return "\n".join([*lines, *_beside_the_first_study(runs), ""])


def _beside_the_first_study(runs: Runs) -> list[str]:
    """What a first study found, rule by rule; nothing where no rule is in it."""
    lines = [
        "",
        "## Beside a first study",
        "",
        "The same designs in another program, whose summary is in `llava_compete/study/routing/first_study.py`: minus",
        "softmax at equal samples, then scores, which have no interval there. *Outside*: of its interval; *apart*:",
        "further from it than both intervals allow; of 20 that are alike, one is.",
        "",
        "| task | rule | here | there | |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = [(name, row) for name in runs.tasks() for row in first_study.beside(runs, name)]
    for name, row in rows:
        score = row.their_half is None
        here, there = (_number(value, name) if score else _signed(value, name) for value in (row.ours, row.theirs))
        if not score:
            here += "" if row.half is None else f" ± {_number(row.half, name)}"
            there += f" ± {_number(row.their_half or 0.0, name)}"
        verdict = "apart" if row.apart else "outside" if row.outside else "" if score else "agrees"
        title = RULES[row.rule].title + (", variance about one mean" if row.pooled else "")
        lines.append(f"| {TASKS[name].title} | {title} | {here} | {there} | {verdict} |")
    return lines if rows else []


def _by_rate(runs: Runs, task: str) -> list[str]:
    """Equal learning rates, then the best of each rule, which is chosen on these very runs."""
    rates = runs.rates(task)
    if len(rates) < 2:
        return []
    rows = {times: {row.rule: row for row in runs.rows(task, times)} for times in rates}
    lines = ["", "| rule | " + " | ".join(f"x{times:g}" for times in rates) + " | best rate: minus softmax's best |"]
    lines.append("| --- |" + " --- |" * (len(rates) + 1))
    for rule in RULES:
        found = [rows[times].get(rule) for times in rates]
        if not any(found[1:]):
            continue
        cells = []
        for row in found:
            if row is None:
                cells.append("-")
            else:
                cells.append(_number(row.score, task) if rule == "softmax" else _test(row.samples, task))
        last = next(row for row in found if row is not None)
        best = f"x{last.best_rate:g}" + ("" if rule == "softmax" else f": {_test(last.best, task)}")
        lines.append(f"| {RULES[rule].title} | " + " | ".join(cells) + f" | {best} |")
    return lines


def _digits(task: str) -> int:
    return 1 if TASKS[task].higher_is_better else 4


def _number(value: float, task: str) -> str:
    return f"{value:.{_digits(task)}f}"


def _signed(value: float, task: str) -> str:
    return f"{value:+.{_digits(task)}f}"


def _price(price: float) -> str:
    return f"{100 * price:+.0f}%" if abs(price) > 0.0005 else "0"


def _test(test: PairedT | None, task: str) -> str:
    """Bold where the interval excludes 0."""
    if test is None:
        return "-"
    half = half_width(test)
    if half is None:
        return _signed(test.mean, task)
    text = f"{_signed(test.mean, task)} ± {_number(half, task)}"
    return f"**{text}**" if abs(test.mean) > half else text


def draw(runs: Runs, path: Path) -> None:
    """A panel a task: each rule minus softmax with its interval, at equal samples and at equal arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = runs.tasks()
    columns = min(3, len(names))
    height = max(len(runs.rows(name)) for name in names)
    shape = (-(-len(names) // columns), columns)
    size = (1.5 + 4.5 * columns, (1.2 + 0.26 * height) * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        rows = [row for row in runs.rows(name) if row.samples is not None]
        for shift, key, colour in ((0.15, "samples", "tab:blue"), (-0.15, "arithmetic", "tab:orange")):
            tests = [(place, getattr(row, key)) for place, row in enumerate(reversed(rows))]
            shown = [(place + shift, test.mean, half_width(test) or 0.0) for place, test in tests if test is not None]
            if shown:
                places, means, halves = zip(*shown, strict=True)
                axis.errorbar(means, places, xerr=halves, fmt="o", ms=3, color=colour, label=f"equal {key}")
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_yticks(range(len(rows)), [row.rule for row in reversed(rows)], fontsize=7)
        # Controls are far away: what is near softmax would not be seen beside them.
        axis.set_xscale("symlog", linthresh=5 if TASKS[name].higher_is_better else 0.05)
        axis.set_title(f"{TASKS[name].title}: {TASKS[name].unit} minus softmax", fontsize=9)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes.flat[0].legend(fontsize=7)
    write_figure(path, figure, dpi=120)
    plt.close(figure)
