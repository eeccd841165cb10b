"""Build the harder scene benchmark: compositional questions at three levels, and unseen colour-shape pairs.

Needs no network; a complete copy made by the same version with as many images is kept.
"""

from __future__ import annotations

import argparse
import sys

from llava_compete.demo.scenes_hard import build_scenes_hard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", default="playground/data/scenes_hard", help="output folder (default: %(default)s)")
    parser.add_argument("--train-images", type=int, default=6000, help="training scenes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="build again even if a complete copy is there")


def run(arguments: argparse.Namespace) -> None:
    """Build and say what is there."""
    summary = build_scenes_hard(arguments.out, arguments.train_images, force=arguments.force)
    rows = ", ".join(f"{count:,} {name} rows" for name, count in summary.rows.items())
    sys.stdout.write(f"{summary.directory}: {rows} ({'built' if summary.built else 'already there'})\n")
