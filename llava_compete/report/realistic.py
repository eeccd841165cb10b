"""The closing report of the realistic run: scores by question type, forgetting, cost, and answers beside pictures.

Every number is read from what the stages wrote: answers and scores from eval_*/samples, perplexity from perplexity_*/
summary.json, wall time from stages/*, memory from */run/metrics.jsonl. Nothing with a picture in it leaves the folder:
answers.html holds them under their own licences.
"""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from llava_compete.errors import UserError
from llava_compete.evaluation.compare.questions import Benchmark, question_intervals
from llava_compete.evaluation.unit_scores import Unit, read_units
from llava_compete.files import read_json, write_json, write_text
from llava_compete.report.quickstart import read_log

# Column -> folder of its evaluation; the last is judged against the others.
MODELS = {"dense parent": "eval_pft", "upcycled, step 0": "eval_upcycle", "after sft": "eval_sft"}
TEXT_MODELS = {"language model alone": "pretrain_align", "dense parent": "pft", "after sft": "sft"}
TRAINING_STAGES = ("pretrain_align", "pft", "sft")
MAX_FORGETTING = 1.05
SAMPLES_OF_A_TYPE = 4
COMMON_ANSWERS = 6
_RESAMPLES = 10_000


def collect(directory: Path) -> dict[str, Any]:
    """Everything that metrics.json holds, from the files of a finished run."""
    units = {name: _units(directory / folder) for name, folder in MODELS.items()}
    last = list(MODELS)[-1]
    rows = []
    for task, kind in sorted({(task, unit.type or "") for task, found in units[last].items() for unit in found}):
        chosen = {name: [u for u in found[task] if u.type == kind] for name, found in units.items() if task in found}
        rows.append({"task": task, "type": kind, **_row(chosen, last), "answers": _common(chosen[last])})
    perplexity = {
        name: _read(directory / f"perplexity_{stage}" / "summary.json")["perplexity"]["perplexity"]
        for name, stage in TEXT_MODELS.items()
    }
    marks = sorted((directory / "stages").glob("*"), key=lambda path: path.stat().st_mtime)
    logs = {stage: read_log(directory / stage) for stage in TRAINING_STAGES}
    return {
        "rows": rows,
        "perplexity": perplexity,
        "perplexity_ratio": perplexity[last] / perplexity["language model alone"],
        "seconds": {m.name: float(m.read_text().split()[1]) for m in marks if m.suffix != ".started"},
        "peak_memory_gib": {stage: max(step["memory_gib"] for step in log.steps) for stage, log in logs.items()},
    }


def _units(folder: Path) -> dict[str, list[Unit]]:
    return {task: read_units(folder, task) for task in _read(folder / "summary.json")["tasks"]}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: missing; the run has not finished (run scripts/realistic.sh again)")
    return read_json(path)


def _row(by_model: dict[str, list[Unit]], last: str) -> dict[str, Any]:
    """Scores of one question type by model; the last one's interval (Wilson) and its paired differences (bootstrap)."""
    units = by_model[last]
    right = round(sum(unit.score for unit in units))
    interval = stats.binomtest(right, len(units)).proportion_ci(0.95, method="wilson")
    answers = Counter(unit.target for unit in units)
    row: dict[str, Any] = {
        "n": len(units),
        "chance": 1 / len(answers),  # a guess among the answers that occur
        "blind": max(answers.values()) / len(units),
        "interval": [float(interval.low), float(interval.high)],
        "scores": {name: sum(unit.score for unit in found) / len(found) for name, found in by_model.items()},
        "differences": {},
    }
    row["above_blind"] = row["interval"][0] > row["blind"]
    by_id = {unit.id: unit.score for unit in units}
    for name, found in by_model.items():
        if name != last:
            if {unit.id for unit in found} != set(by_id):
                raise UserError(f"{name}: answered other questions than {last}; evaluate both again")
            scores = np.array([[[unit.score for unit in found]], [[by_id[unit.id] for unit in found]]])
            (low, high) = question_intervals([Benchmark(scores, np.ones(len(found)))], _RESAMPLES)[0]
            row["differences"][name] = [float(scores[1].mean() - scores[0].mean()), low, high]
    return row


def _common(units: Sequence[Unit]) -> list[tuple[str, int, int]]:
    """The most frequent answers: text, how many of them are right, how many there are."""
    given = Counter(unit.answer for unit in units)
    right = Counter(unit.answer for unit in units if unit.score == 1)
    return [(answer, right[answer], count) for answer, count in given.most_common(COMMON_ANSWERS)]


def write_report(directory: Path, pictures: Sequence[Path]) -> None:
    """Write metrics.json, report.md and answers.html into `directory`, print the table. `pictures`: the test tables."""
    metrics = collect(directory)
    write_json(directory / "metrics.json", metrics)
    console = Console()
    markdown = ["# Realistic run", "", "Written by `bash scripts/realistic.sh`.", ""]
    for title, header, rows in _sections(metrics):
        table = Table(*header, title=title, title_justify="left")
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
        lines = [_line(header), _line(["---"] * len(header)), *map(_line, rows)]
        markdown += [f"## {title}", "", *lines, ""]
    write_text(directory / "report.md", "\n".join([*markdown, *_verdict(metrics), ""]))
    console.print("\n".join(_verdict(metrics)))
    write_text(directory / "answers.html", answers_page(directory, pictures))
    console.print(f"Written: {directory}/metrics.json, report.md, answers.html")


def _sections(metrics: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    names = list(MODELS)
    header = ["test", "type", "n", "chance", "blind", *names, "95%", *(f"sft - {name} (95%)" for name in names[:-1])]
    rows = []
    for row in metrics["rows"]:
        scores = [f"{row['scores'][name]:.2f}" if name in row["scores"] else "" for name in names]
        low, high = row["interval"]
        found = [row["differences"].get(name) for name in names[:-1]]
        apart = [f"{d[0]:+.2f} ({d[1]:+.2f} to {d[2]:+.2f})" if d else "" for d in found]
        cells = [row["task"], row["type"], str(row["n"]), f"{row['chance']:.2f}", f"{row['blind']:.2f}", *scores]
        rows.append([*cells, f"{low:.2f} to {high:.2f}" + ("" if row["above_blind"] else " *"), *apart])
    yield "Accuracy by question type (* does not lie above the best blind answer)", header, rows
    said = [
        [row["task"], row["type"], "; ".join(f"{a} ({r} of {n})" for a, r, n in row["answers"])]
        for row in metrics["rows"]
    ]
    yield f"Most frequent answers {names[-1]} (right ones of all with that answer)", ["test", "type", "answers"], said
    text = [[name, f"{value:.2f}"] for name, value in metrics["perplexity"].items()]
    yield "Perplexity of held-out English", ["model", "perplexity"], text
    memory = metrics["peak_memory_gib"]
    cost = [
        [name, f"{s:.0f}", f"{memory[name]:.2f}" if name in memory else ""] for name, s in metrics["seconds"].items()
    ]
    yield "Cost", ["stage", "seconds", "peak GiB a process"], cost


def _verdict(metrics: dict[str, Any]) -> list[str]:
    rows, ratio = metrics["rows"], metrics["perplexity_ratio"]
    above = sum(row["above_blind"] for row in rows)
    kept = "within" if 1 / MAX_FORGETTING <= ratio <= MAX_FORGETTING else "NOT within"
    return [
        f"{above} of {len(rows)} question types lie above the best blind answer with their whole 95% interval.",
        f"Perplexity after sft is {ratio:.3f} of the language model's alone, {kept} 5%.",
        f"Seconds in all: {sum(metrics['seconds'].values()):.0f}.",
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def answers_page(directory: Path, pictures: Sequence[Path]) -> str:
    """One HTML page: some questions of each type with their pictures and what each model answered."""
    import pyarrow.parquet as pq

    answers = {name: _units(directory / folder) for name, folder in MODELS.items()}
    body = []
    for path in pictures:
        task = path.stem.removesuffix("_test")
        shown: Counter[str] = Counter()
        said = {name: {u.id: u for u in found.get(task, [])} for name, found in answers.items()}
        body.append(f"<h2>{task}</h2><table><tr><th>pictures<th>question<th>expected<th>{'<th>'.join(MODELS)}</tr>")
        for row in pq.read_table(path).to_pylist():
            shown[row["type"]] += 1
            if shown[row["type"]] <= SAMPLES_OF_A_TYPE:
                body.append(_html_row(row, [found.get(row["id"]) for found in said.values()]))
        body.append("</table>")
    return _PAGE.format(body="\n".join(body))


def _html_row(row: dict[str, Any], units: Sequence[Unit | None]) -> str:
    images = "".join(
        f'<img width=64 src="data:image/png;base64,{base64.b64encode(image["bytes"]).decode()}">'
        for image in row["images"]
    )
    cells = "".join(
        f'<td class="{"right" if unit.score else "wrong"}">{html.escape(unit.answer)}' if unit else "<td>"
        for unit in units
    )
    return f"<tr><td>{images}<td>{html.escape(row['question'])}<td>{html.escape(row['answer'])}{cells}</tr>"


_PAGE = """<!doctype html><meta charset="utf-8"><title>Answers of the realistic run</title>
<style>body {{font-family: sans-serif}} td, th {{padding: 4px 10px; border-bottom: 1px solid #ccc; text-align: left}}
.right {{background: #dfd}} .wrong {{background: #fdd}}</style>
<h1>Answers of the realistic run</h1>
<p>Pictures: OpenMoji (CC-BY-SA 4.0), Twemoji (CC-BY 4.0), Noto Emoji (Apache-2.0), Fluent Emoji (MIT). This page is
shared under CC-BY-SA 4.0.</p>
{body}
"""
