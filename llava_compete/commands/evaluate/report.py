"""Summarise a finished quickstart directory: a table, metrics.json, report.md and two figures.

Reads what the stages left (stages/, */run/metrics.jsonl, eval/) and changes none of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="directory that scripts/quickstart.sh wrote")


def run(arguments: argparse.Namespace) -> None:
    from llava_compete.report.quickstart import write_report

    write_report(arguments.directory)
