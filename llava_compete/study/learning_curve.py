"""Error against the number of samples n: a student on a teacher of known experts, each rule beside softmax.

Every run takes the same number of steps, whatever its n: only the number of different samples changes. The teachers are
those of the routing study, so competition meets truths that are gated as it gates, and others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_compete.errors import UserError
from llava_compete.evaluation.compare.statistics import paired_t
from llava_compete.files import read_json, write_figure, write_json
from llava_compete.study.routing.rules import RULES
from llava_compete.study.routing.tasks import TASKS, Task
from llava_compete.study.routing.teacher import Gate, TeacherStudent
from llava_compete.study.routing.training import train

SIZES = (250, 500, 1000, 2000, 4000, 8000)
DEFAULT_RULES = ("softmax", "published", "judge_c80")


@dataclass(frozen=True)
class Settings:
    """Teacher's gate, rules (softmax is always the first), sizes n, and runs at each."""

    gate: Gate
    rules: tuple[str, ...] = DEFAULT_RULES
    sizes: tuple[int, ...] = SIZES
    seeds: int = 20

    def __post_init__(self) -> None:
        if unknown := [rule for rule in self.rules if rule not in RULES]:
            raise UserError(f"--rules: found {unknown[0]!r}, expected some of {', '.join(RULES)}")
        if self.seeds < 2:
            raise UserError(f"--seeds: found {self.seeds}, expected at least 2, for rules are compared over seeds")


def run(settings: Settings, out: Path, device: str) -> dict[str, Any]:
    """Train what is missing (one file a rule and size in `out`/runs), then the curve as plain data."""
    rules = tuple(dict.fromkeys(("softmax", *settings.rules)))
    cells = [(rule, size) for size in settings.sizes for rule in rules]
    scores, prices = {}, {}
    for rule, size in tqdm(cells, desc="learning curve", unit="cell"):
        path = out / "runs" / f"{settings.gate}-{rule}-n{size}-seeds{settings.seeds}.json"
        if not path.is_file():
            task = _task(settings.gate, size)
            seeds = range(settings.seeds)
            found = train(task, RULES[rule], seeds, [task.rate] * settings.seeds, task.steps, device)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found._asdict())
        kept = read_json(path)
        scores[rule, size], prices[rule, size] = np.array(kept["scores"]), float(np.mean(kept["prices"]))
    points = []
    for size in settings.sizes:
        point: dict[str, Any] = {"n": size}
        for rule in rules:
            point[rule] = {
                "error": float(scores[rule, size].mean()),
                "by_seed": scores[rule, size].tolist(),
                "price": prices[rule, size],
            }
            if rule != "softmax":
                test = paired_t(scores[rule, size] - scores["softmax", size])
                point[rule] |= {"difference": test.mean, "interval": test.interval, "p": test.p}
        points.append(point)
    return {"gate": settings.gate, "rules": rules, "seeds": settings.seeds, "points": points}


def _task(gate: Gate, size: int) -> Task:
    build = functools.partial(TeacherStudent, gate=gate, samples=size)
    return replace(TASKS[f"teacher_{gate}_1000"], name=f"teacher_{gate}_{size}", build=build)


def draw(result: dict[str, Any], path: Path) -> None:
    """Error against n, a line a rule, and the paired differences to softmax with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = [point["n"] for point in result["points"]]
    for rule in result["rules"]:
        cells = [point[rule] for point in result["points"]]
        left.plot(sizes, [cell["error"] for cell in cells], "o-", ms=4, label=rule)
        if rule != "softmax":
            means = [cell["difference"] for cell in cells]
            halves = [(cell["interval"][1] - cell["interval"][0]) / 2 if cell["interval"] else 0 for cell in cells]
            right.errorbar(sizes, means, halves, fmt="o-", ms=4, capsize=3, label=rule)
    left.set(xscale="log", yscale="log", xlabel="samples n", ylabel="error / variance")
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    right.axhline(0, color="grey", lw=0.8)
    right.set(xscale="log", xlabel="samples n", ylabel="error minus softmax's, paired by seed")
    for axis in (left, right):
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())  # its labels lie on those of the sizes
    figure.suptitle(f"a teacher gated by {result['gate']}, {result['seeds']} seeds")
    left.legend()
    right.legend()
    write_figure(path, figure, dpi=120)
    plt.close(figure)


def describe(result: dict[str, Any], command: str) -> str:
    """Markdown: the table, and where a rule's interval excludes 0."""
    rules = result["rules"]
    lines = [
        f"# Learning curve: a teacher gated by {result['gate']}",
        "",
        f"`{command}`: {result['seeds']} seeds, each a teacher, its data and a start.",
        "",
        "Error over variance on new inputs, and the difference to softmax with the 95% interval of a paired t by seed.",
        "All take as many steps; *price*: experts' arithmetic beyond softmax's, from the smallest n to the largest.",
        "",
        "| n | " + " | ".join(RULES[rule].title for rule in rules) + " |",
        "| --- |" + " --- |" * len(rules),
    ]
    for point in result["points"]:
        cells = [f"{point[rule]['error']:.4f}{_difference(point[rule])}" for rule in rules]
        lines.append(f"| {point['n']:,} | " + " | ".join(cells) + " |")
    lines.append("")
    for rule in rules[1:]:
        apart = [f"{point['n']:,}" for point in result["points"] if _excludes_zero(point[rule])]
        where = f"excludes 0 at n = {'; '.join(apart)}" if apart else "excludes 0 at no n"
        first, last = (100 * result["points"][at][rule]["price"] for at in (0, -1))
        lines.append(f"{RULES[rule].title}: price {first:+.0f}% to {last:+.0f}%; the interval {where}.")
    return "\n".join([*lines, ""])


def _difference(cell: dict[str, Any]) -> str:
    if "difference" not in cell:
        return ""
    low, high = cell["interval"] or (cell["difference"], cell["difference"])
    return f" ({cell['difference']:+.4f} [{low:+.4f}, {high:+.4f}])"


def _excludes_zero(cell: dict[str, Any]) -> bool:
    return cell["interval"] is not None and not cell["interval"][0] <= 0 <= cell["interval"][1]
