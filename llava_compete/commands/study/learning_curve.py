"""Accuracy against the number of training samples (1/16 ... 1), softmax router and competition, with intervals.

Trains from one dense parent on the harder scenes. First: llava-compete data scenes-hard, and for the parent
scripts/pretrain_align.sh configs/demo_hard/pretrain_align.yaml (3 minutes on 2 CPU cores). Finished runs are kept: the
same command goes on after a stop. Writes learning_curve.json, learning_curve.png and README.md into --out.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from llava_compete.files import write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    recipe = Path("configs/demo_hard")
    parser.add_argument(
        "--parent",
        type=Path,
        default=Path("outputs/demo_hard/pretrain_align"),
        help="dense checkpoint; {seed} in it stands for a run's seed (with one parent, differences hold for that one)",
    )
    parser.add_argument("--config", type=Path, default=recipe / "sft.yaml", help="YAML of the sft stage")
    parser.add_argument("--upcycle", type=Path, default=recipe / "upcycle.yaml", help="YAML of the upcycling")
    parser.add_argument("--data", type=Path, default=Path("playground/data/scenes_hard/instruct.json"), help="all rows")
    parser.add_argument("--suite", default="demo_hard", help="what to evaluate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="the largest set (default: all rows)")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of every run (default: one pass over the largest set)"
    )
    parser.add_argument("--limit", type=int, help="only the first questions of each task")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)")
    parser.add_argument("--out", type=Path, default=Path("outputs/learning_curve"), help="runs and results")


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing and write the results."""
    from llava_compete.console import setup_console
    from llava_compete.study import learning_curve

    setup_console()
    names = ("parent", "config", "upcycle", "data", "suite", "out", "seeds", "rows", "steps", "limit", "jobs")
    settings = learning_curve.Settings(**{name: getattr(arguments, name) for name in names})
    result = learning_curve.run(settings)
    command = shlex.join(["llava-compete", *sys.argv[1:]])
    text = learning_curve.describe(result, settings.routers, command)
    write_json(arguments.out / "learning_curve.json", result | {"command": command})
    write_text(arguments.out / "README.md", text)
    learning_curve.draw(result, settings.routers, arguments.out / "learning_curve.png")
    sys.stdout.write(text)
