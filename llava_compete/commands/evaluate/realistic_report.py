"""Summarise a finished run of scripts/realistic.sh: tables, metrics.json, report.md, and answers.html with pictures.

Reads what the stages left (stages/, */run/metrics.jsonl, eval_*/, perplexity_*/) and changes none of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("directory", type=Path, help="directory that scripts/realistic.sh wrote")
    parser.add_argument("tables", type=Path, nargs="+", help="test tables, whose pictures are shown beside answers")


def run(arguments: argparse.Namespace) -> None:
    """Write and print the report."""
    from llava_compete.report.realistic import write_report

    write_report(arguments.directory, arguments.tables)
