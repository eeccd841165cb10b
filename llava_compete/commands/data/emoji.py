"""Build questions about real pictures: emoji of three vendors to train on, of a fourth and unseen ones to test on.

Needs the pictures of `llava-compete fetch emoji`, and no network; a complete copy made by the same version is kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_compete.demo.emoji.build import build_emoji


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", default="playground/data/emoji", help="output folder (default: %(default)s)")
    pictures = "playground/data/pretrained/emoji"
    parser.add_argument("--pictures", type=Path, default=Path(pictures), help="fetched folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="build again even if a complete copy is there")


def run(arguments: argparse.Namespace) -> None:
    """Build and say what is there."""
    summary = build_emoji(arguments.out, arguments.pictures, force=arguments.force)
    rows = ", ".join(f"{count:,} {name} rows" for name, count in summary.rows.items())
    sys.stdout.write(f"{summary.directory}: {rows} ({'built' if summary.built else 'already there'})\n")
