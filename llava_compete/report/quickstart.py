"""The closing report of a quickstart: metrics.json, report.md, two figures and a table on the console.

Every number is read from what the stages wrote: wall time from stages/*, losses
and tokens/s from */run/metrics.jsonl, scores from eval/summary.json, routing on held-out tokens from eval/routing.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llava_compete.errors import UserError
from llava_compete.files import read_json, read_json_lines, write_json, write_text
from llava_compete.report.figures import plot_loss_terms
from llava_compete.report.heat_maps import load_maps, save

TRAINING_STAGES = ("pretrain_align", "sft")
STAGES = ("setup", "data", "pretrain_align", "upcycle", "sft", "eval")


@dataclass(frozen=True)
class TrainingLog:
    """metrics.jsonl of one training stage: the logged steps and the closing line."""

    steps: list[dict[str, Any]]
    end: dict[str, Any]


def read_log(stage_directory: Path) -> TrainingLog:
    """Read a stage's metrics.jsonl and check that every logged loss is finite."""
    path = stage_directory / "run" / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing; the stage has not run to its end")
    lines = list(read_json_lines(path))
    steps = [line for line in lines if "event" not in line and "loss" in line]
    ends = [line for line in lines if line.get("event") == "end"]
    if not steps or not ends:
        raise UserError(f"{path}: {len(steps)} logged steps and {len(ends)} closing lines; expected both")
    for line in steps:
        # A number that is not finite is written as null; a router that was not asked has null for other reasons.
        bad = [name for name, value in line.items() if name.endswith("loss") and value is None]
        bad += [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise UserError(f"{path}: step {line['step']} has non-finite {', '.join(bad)}")
    return TrainingLog(steps, ends[-1])


def is_finished(directory: Path) -> bool:
    """Whether it is a quickstart's, and all its stages have run; other scripts keep other stages in such a folder."""
    return all((directory / "stages" / stage).is_file() for stage in STAGES)


def collect(directory: Path) -> dict[str, Any]:
    """Everything that metrics.json holds, from the files of a finished quickstart."""
    seconds = {}
    for stage in STAGES:
        mark = directory / "stages" / stage
        if not mark.is_file():
            raise UserError(f"{mark}: missing; stage {stage!r} has not finished (run scripts/quickstart.sh again)")
        seconds[stage] = float(mark.read_text(encoding="utf-8").split()[1])
    evaluation = _read_json(directory / "eval" / "summary.json")
    routing = _read_json(directory / "eval" / "routing.json")
    logs = {stage: read_log(directory / stage) for stage in TRAINING_STAGES}
    return {
        "tasks": evaluation["tasks"],
        "seconds": seconds,
        "competition_steps": logs["sft"].end["competition_steps"],
        "routing_controls": routing["controls"],
        "winners_found": routing["agreement"],
        "expert_use": routing["expert_use"],
        "training": {
            stage: {**log.end, "peak_memory_gib": max(step["memory_gib"] for step in log.steps)}
            for stage, log in logs.items()
        },
    }


def write_report(directory: Path) -> None:
    """Write metrics.json, report.md, loss_terms.png and expert_use.png into `directory` and print the table."""
    metrics = collect(directory)
    logs = {stage: read_log(directory / stage).steps for stage in TRAINING_STAGES}
    plot_loss_terms(logs, directory / "loss_terms.png")
    save(load_maps({"held-out questions and answers": metrics["expert_use"]}), directory / "expert_use.png")
    write_json(directory / "metrics.json", metrics)
    sections = _sections(metrics)
    console = Console()
    markdown = ["# Quickstart", "", "Written by `bash scripts/quickstart.sh`.", ""]
    for title, header, rows in sections:
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        markdown += [f"## {title}", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    markdown += ["![loss terms over steps](loss_terms.png)", "", "![expert use by layer](expert_use.png)", ""]
    write_text(directory / "report.md", "\n".join(markdown))
    console.print(f"Written: {directory}/metrics.json, report.md, loss_terms.png, expert_use.png")


def _sections(metrics: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    tasks = [
        [name, *(f"{task[key]:.3f}" for key in ("accuracy", "chance", "blind")), str(task["n"])]
        for name, task in metrics["tasks"].items()
    ]
    stages = []
    for name, seconds in metrics["seconds"].items():
        end = metrics["training"].get(name, {})
        speed = f"{end['tokens'] / end['train_seconds']:,.0f}" if end else ""
        memory = f"{end['peak_memory_gib']:.2f}" if end else ""
        stages.append([name, f"{seconds:.0f}", speed, memory])
    experts = [[layer, " ".join(f"{share:.2f}" for share in shares)] for layer, shares in metrics["expert_use"].items()]
    routing = [["competition steps in sft", str(metrics["competition_steps"])]]
    routing += [
        [f"winners of a competition found (held out): {kind.replace('_', ' ')}", f"{share:.3f}"]
        for kind, share in (metrics["winners_found"] or {}).items()
    ]
    controls = [
        [name.replace("_", " "), f"{found['loss']:.3f}", f"{found['exact']:.3f}"]
        for name, found in metrics["routing_controls"].items()
    ]
    return [
        ("Accuracy", ["task", "accuracy", "chance", "best blind answer by question type", "questions"], tasks),
        ("Stages", ["stage", "seconds", "tokens/s", "peak GiB a process"], stages),
        ("Routing", ["", ""], routing),
        ("What routing is worth (held out)", ["experts chosen by", "loss (nats a token)", "exact answers"], controls),
        ("Expert use (share of choices, held out)", ["layer", "experts"], experts),
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: missing; the evaluation has not finished")
    return read_json(path)
