"""Evaluate a language model on lm-evaluation-harness's tasks.

  llava-compete eval-text outputs/lm/154m --suite paper
  llava-compete eval-text outputs/lm/154m --tasks lambada_openai,piqa --limit 100
  llava-compete eval-text outputs/lm/tiny --tasks my_task --include my_tasks/       (task YAMLs of your own, offline)

Writes summary.json, samples/ (as `llava-compete compare` reads them) and the harness's own results.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("checkpoint", type=Path, help="model directory of stage pretrain_lm")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--suite", help="a suite of eval/lm_suites, such as paper")
    chosen.add_argument("--tasks", help="names of tasks or groups, joined by commas")
    parser.add_argument("--include", type=Path, help="folder of further task YAMLs")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first documents of each task")
    parser.add_argument("--out", type=Path, help="default: CHECKPOINT/eval_text")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print one line a task."""
    from llava_compete.evaluation.text.harness import evaluate_text, suite_tasks

    tasks = suite_tasks(arguments.suite) if arguments.suite else arguments.tasks.split(",")
    out = arguments.out or arguments.checkpoint / "eval_text"
    summary = evaluate_text(
        arguments.checkpoint,
        tasks,
        out,
        include=arguments.include,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
    )
    for task, entry in summary.get("tasks", {}).items():
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in entry["metrics"].items() if isinstance(value, float))
        sys.stdout.write(f"{task}: {numbers} (n {entry['n']})\n")
