"""Build a text corpus from Python's standard library: its documentation strings and comments.

Takes a few seconds and no network. Writes train.jsonl and validation.jsonl (held-out modules) into --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, default=Path("playground/data/stdlib_text"), help="output directory")


def run(arguments: argparse.Namespace) -> None:
    """Write the corpus and say its size."""
    from llava_compete.demo.stdlib_text import build_stdlib_text

    summary = build_stdlib_text(arguments.out)
    sys.stdout.write(
        f"{arguments.out}: train {summary.train_documents} documents, {summary.train_bytes / 1e6:.2f} MB; "
        f"validation {summary.validation_documents} documents, {summary.validation_bytes / 1e6:.2f} MB\n"
    )
