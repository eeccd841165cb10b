"""Upload a checkpoint to a hub, with a card of its stages, data, routers and scores.

llava-compete push outputs/quickstart/sft me/my-model [--eval outputs/quickstart/eval] [--public]
The hub and the token are huggingface_hub's: HF_ENDPOINT, HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("repo", help="where to: owner/name")
    parser.add_argument(
        "--eval", type=Path, action="append", default=[], help="evaluation whose scores the card shows; may be repeated"
    )
    parser.add_argument("--public", action="store_true", help="a new repository is for everybody (default: private)")


def run(arguments: argparse.Namespace) -> int:
    from llava_compete.console import setup_console
    from llava_compete.report.hub import push

    setup_console()
    address = push(arguments.checkpoint, arguments.repo, arguments.eval, private=not arguments.public)
    sys.stdout.write(f"uploaded: {address}\n")
    return 0
