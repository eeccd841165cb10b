"""Measure what a picture costs by how it is shown: one square, tiles, or patches at its own proportions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llava_compete.errors import UserError
from llava_compete.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--pages", type=int, default=8, help="pages to measure with (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from llava_compete.bench.pictures import run_bench

    if arguments.pages < 1:
        raise UserError(f"--pages: found {arguments.pages}, expected at least 1")
    result = run_bench(arguments.pages)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(result, indent=2) + "\n")
    columns = list(next(iter(result.values())))
    sys.stdout.write(f"| shown as | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}\n")
    for name, row in result.items():
        sys.stdout.write(f"| {name} | {' | '.join(f'{row[column]:,.0f}' for column in columns)} |\n")
