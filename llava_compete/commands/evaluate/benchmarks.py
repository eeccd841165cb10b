"""Evaluate a checkpoint with lmms-eval, offline.

  llava-compete eval CKPT --suite NAME            a suite of eval/suites (demo, quick, text, paper)
  llava-compete eval CKPT --tasks pope,mme        lmms-eval's tasks, or those of eval/tasks, by name
  llava-compete eval CKPT --suite NAME dtype=bfloat16 adapter=DIR attn_implementation=eager ...   any setting
  llava-compete eval --config FILE [key=value...] settings from a YAML file, as scripts/eval.sh does
  llava-compete eval prepare --suite NAME         fetch and verify data sets, while there is a network

Results go to `eval` beside the checkpoint: summary.json, per-sample scores, lmms-eval's own files. A run that was
stopped goes on with the tasks that are not finished. A benchmark that fails does not stop the others; it is named at
the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_compete.config import apply_overrides, load_config, parse_config
from llava_compete.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CKPT", help="checkpoint directory (with --config: an override)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in the YAML file")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--suite", help="name of a suite in eval/suites, or a YAML file")
    chosen.add_argument("--tasks", help="task names, separated by commas")
    parser.add_argument("--out", dest="output_dir", metavar="DIR", help="results (default: eval beside the checkpoint)")
    parser.add_argument("--batch-size", type=int, help="questions in one batch; answers do not depend on it")
    parser.add_argument("--limit", type=int, help="only the first questions of each task, for trying out")
    parser.add_argument("--processes", type=int, help="data-parallel processes (default: one for each GPU)")


def run(arguments: argparse.Namespace) -> int:
    from llava_compete.console import setup_console
    from llava_compete.evaluation.checkpoint_facts import checkpoint_config, refuse_competition_at_inference
    from llava_compete.evaluation.config import EvalConfig
    from llava_compete.evaluation.lmms.benchmark_run import EvaluationError, evaluate
    from llava_compete.files import write_json

    if arguments.checkpoint == "prepare":
        return _prepare(arguments)
    overrides = list(arguments.overrides)
    options: dict[str, Any] = {
        name: value
        for name in ("suite", "output_dir", "batch_size", "limit", "processes")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.tasks:
        options["tasks"] = _names(arguments.tasks)
    if arguments.config:
        if arguments.checkpoint and "=" in arguments.checkpoint:
            overrides.insert(0, arguments.checkpoint)
        elif arguments.checkpoint:
            options["checkpoint"] = arguments.checkpoint
        if options:
            raise UserError(f"with --config, give settings as key=value, not as options: {', '.join(options)}")
        config = load_config(EvalConfig, arguments.config, overrides)
    else:
        if arguments.checkpoint is None or "=" in arguments.checkpoint:
            raise UserError("expected a checkpoint directory, or --config FILE, before key=value settings")
        if "suite" not in options and "tasks" not in options:
            raise UserError("expected --suite NAME or --tasks A,B (suites: see eval/suites)")
        content = apply_overrides({"checkpoint": arguments.checkpoint, **options}, overrides)
        config = parse_config(EvalConfig, content, source="llava-compete eval")

    checkpoint_config(Path(config.checkpoint))  # before a log is written beside something else
    if config.competition_at_inference:
        refuse_competition_at_inference(Path(config.checkpoint))
    setup_console(config.directory / "eval.log")
    try:
        summary = evaluate(config)
    except EvaluationError as failed:
        return _report(failed.failures)
    if config.routing_data:
        from llava_compete.evaluation.routing import measure_routing

        write_json(config.directory / "routing.json", measure_routing(config))
    print_table(summary, config.directory)
    return _report(summary["failures"])


def _report(failures: dict[str, str]) -> int:
    """A line for each benchmark that failed, and the exit status."""
    for task, reason in failures.items():
        sys.stderr.write(f"error: {task}: {reason}\n")
    return 1 if failures else 0


def _prepare(arguments: argparse.Namespace) -> int:
    from llava_compete.console import setup_console
    from llava_compete.evaluation.config import EVAL_ROOT
    from llava_compete.evaluation.lmms.prepare import prepare
    from llava_compete.evaluation.lmms.suites import beside_their_data, load_suite

    others = (arguments.config, arguments.output_dir, arguments.batch_size, arguments.limit, arguments.processes)
    if not (arguments.suite or arguments.tasks) or arguments.overrides or any(value is not None for value in others):
        raise UserError("expected: llava-compete eval prepare --suite NAME or --tasks A,B")
    setup_console()
    tasks = _names(arguments.tasks) if arguments.tasks else load_suite(arguments.suite).tasks
    failed = [result for result in prepare(tasks, beside_their_data(EVAL_ROOT / "tasks")) if result.error]
    for result in failed:
        sys.stderr.write(f"error: {result.task}: {result.error}\n")
    return 1 if failed else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def print_table(summary: dict[str, Any], directory: Path) -> None:
    """The scores, next to chance where it is known."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "score", "chance", "questions", title="Evaluation", title_justify="left")
    for name, task in summary["tasks"].items():
        chance = f"{task['chance']:.3f}" if "chance" in task else ""
        score = "" if task["accuracy"] is None else f"{task['accuracy']:.3f}"
        table.add_row(name, score, chance, str(task["n"]))
    console = Console()
    console.print(table)
    console.print(f"Written: {directory}/summary.json")
