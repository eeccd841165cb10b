"""Every key of the YAML files: type, default, meaning.

llava-compete config                  a training stage
llava-compete config moe.language     a section of it
llava-compete config eval             another file: upcycle, eval, suite, lm_suite
llava-compete config --markdown FILE  all of it, as docs/config.md
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", default="stage", help="a section such as training, or a kind of file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the whole reference as Markdown")


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from llava_compete.files import write_text
    from llava_compete.plan.config_reference import find, to_markdown

    if arguments.markdown is not None:
        write_text(arguments.markdown, to_markdown())
        return
    console = Console()
    for section in find(arguments.section):
        table = Table("key", "type", "default", "meaning", title=", ".join(section.paths) or None, title_justify="left")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
