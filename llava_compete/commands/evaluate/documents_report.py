"""What a page costs and what is read of it, by how it is shown: the table of scripts/compare_documents.sh.

Each RUN is NAME=DIR, a folder with seed0, seed1, ... that hold pretrain_align, sft and eval; the first is the baseline.
Tokens, seconds and memory a picture are measured here, on --page; the rest is read. Writes README.md and metrics.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_compete.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="a way to show a page, and its folder")
    parser.add_argument("--page", type=Path, required=True, help="picture that costs are measured on")
    parser.add_argument("--comparison", type=Path, required=True, help="folder of `llava-compete compare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md and metrics.json")


def run(arguments: argparse.Namespace) -> None:
    """Measure, write and print."""
    from llava_compete.study.documents import write_report

    folders = {}
    for text in arguments.runs:
        name, _, folder = text.partition("=")
        if not folder:
            raise UserError(f"{text!r}: expected NAME=DIR")
        folders[name] = Path(folder)
    sys.stdout.write(write_report(folders, arguments.page, arguments.comparison, arguments.out))
