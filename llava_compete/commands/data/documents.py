"""Build pages of small print (receipts, tables, bar charts, letters) and questions about them.

Needs no network; written in the fonts that matplotlib carries. A complete copy made by the same version with as many
pages is kept.
"""

from __future__ import annotations

import argparse
import sys

from llava_compete.demo.documents.build import build_documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", default="playground/data/documents", help="output folder (default: %(default)s)")
    parser.add_argument("--train-pages", type=int, default=4000, help="pages of training (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="build again even if a complete copy is there")


def run(arguments: argparse.Namespace) -> None:
    """Build and say what is there."""
    summary = build_documents(arguments.out, arguments.train_pages, force=arguments.force)
    rows = ", ".join(f"{count:,} {name} rows" for name, count in summary.rows.items())
    sys.stdout.write(f"{summary.directory}: {rows} ({'built' if summary.built else 'already there'})\n")
