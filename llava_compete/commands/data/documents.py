"""Build pages of small print (receipts, tables, bar charts, letters) and questions about them.

Needs no network; written in the fonts that matplotlib carries. A complete copy made by the same version with as many
pages is kept. --forms builds forms of few words instead, meant for an hour of a CPU.
"""

from __future__ import annotations

import argparse
import sys

from llava_compete.demo.documents.build import FORMS, PAGES, build_documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--forms", action="store_true", help="forms, for configs/forms")
    parser.add_argument("--out", help="output folder (default: playground/data/documents; of forms, .../forms)")
    parser.add_argument("--train-pages", type=int, help="pages of training (default: 4000; of forms, 640)")
    parser.add_argument("--force", action="store_true", help="build again even if a complete copy is there")


def run(arguments: argparse.Namespace) -> None:
    """Build and say what is there."""
    folder, pages, collection = ("forms", 640, FORMS) if arguments.forms else ("documents", 4000, PAGES)
    out = arguments.out or f"playground/data/{folder}"
    pages = pages if arguments.train_pages is None else arguments.train_pages
    summary = build_documents(out, pages, force=arguments.force, collection=collection)
    rows = ", ".join(f"{count:,} {name} rows" for name, count in summary.rows.items())
    sys.stdout.write(f"{summary.directory}: {rows} ({'built' if summary.built else 'already there'})\n")
