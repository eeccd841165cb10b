"""Do routers differ, and does competition help? Small tasks on which routing decides, many seeds, paired tests.

By default facts of 8 tasks and one teacher, 13 rules, 10 seeds: minutes on two cores. --full: every task and rule, 30
seeds (8 on bytes), three learning rates; it says first how long that takes here. --explore: what was tried to make the
judge better, --confirm: the best of that on seeds that had no part in choosing it. --wide: routers that start with a
standard deviation of sqrt(0.02), not 0.02. Finished runs are kept in --out: the same command goes on after a stop.
Writes routing.json (every run's score), routing.png and README.md into --out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from llava_compete.files import write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--full", action="store_true", help="every task, rule and learning rate")
    preset.add_argument("--explore", action="store_true", help="what was tried to make the judge better, seeds from 0")
    preset.add_argument("--confirm", action="store_true", help="the best of that on fresh seeds, from 100")
    preset.add_argument("--wide", action="store_true", help="routers that start at seven times the width")
    preset.add_argument("--quick", action="store_true", help="three rules and two seeds on the smallest task")
    parser.add_argument(
        "--seeds", type=int, help="runs a rule (default: 10; --explore 5, --full, --confirm, --wide 30)"
    )
    parser.add_argument("--minutes", type=float, help="stop after this time and report what has run")
    parser.add_argument("--workers", type=int, help="processes (default: cores, or one with --device cuda)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("outputs/routing"), help="runs and results")


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing and write the results."""
    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.model.devices import usable_device
    from llava_compete.moe.allocator import keep_freed_memory
    from llava_compete.processes import usable_cores
    from llava_compete.study.routing import grid, plans, report
    from llava_compete.study.routing.results import Runs

    setup_console()
    if arguments.seeds is not None and arguments.seeds < 2:
        raise UserError(f"--seeds: found {arguments.seeds}, expected at least 2, for runs are compared over seeds")
    device, out = str(usable_device(arguments.device)), arguments.out
    workers = usable_cores() if device == "cpu" else 1
    if arguments.workers is not None:
        if arguments.workers < 1 or (device != "cpu" and arguments.workers > 1):
            expected = "1 or more" if device == "cpu" else f"1, for all runs share the device ({device})"
            raise UserError(f"--workers: found {arguments.workers}, expected {expected}")
        workers = arguments.workers
    keep_freed_memory()
    if arguments.quick:
        plan = plans.quick_plan()
    else:
        make = plans.default_plan
        for preset in ("full", "explore", "confirm", "wide"):
            if getattr(arguments, preset):
                make = getattr(plans, f"{preset}_plan")
        plan = make() if arguments.seeds is None else make(arguments.seeds)
    if arguments.full:
        sys.stderr.write(f"about {grid.estimated_hours(plan, out, device, workers):.1f} hours on this machine\n")
    finished = False
    try:
        finished = grid.run(plan, out, device, arguments.minutes, workers)
    finally:  # also of a study that is interrupted
        runs = Runs(out)
        if runs.files:
            command = shlex.join(["llava-compete", *sys.argv[1:]])
            text = report.describe(runs, command, finished)
            write_json(out / "routing.json", report.to_json(runs, command))
            write_text(out / "README.md", text)
            report.draw(runs, out / "routing.png")
            sys.stdout.write(text)
