"""Build the demo data: scikit-learn's digit scans and rendered scenes, as LLaVA JSON and test tables.

Takes a few seconds and no network; a complete copy made by the same version is kept.
"""

from __future__ import annotations

import argparse
import sys

from llava_compete.demo.build import build_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="playground/data/demo", help="output folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="build again even if a complete copy is there")


def run(arguments: argparse.Namespace) -> None:
    summary = build_demo(arguments.out, force=arguments.force)
    rows = ", ".join(f"{count:,} {name} rows" for name, count in summary.rows.items())
    sys.stdout.write(f"{summary.directory}: {rows} ({'built' if summary.built else 'already there'})\n")
