"""What a checkpoint is: its parts, parameters, stage, the stages before it, and its routers.

llava-compete info outputs/quickstart/sft [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_compete.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("--json", type=Path, help="write the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.plan.info import describe

    setup_console()
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: {arguments.json.parent}: no such directory")
    facts = describe(arguments.checkpoint)
    console = Console(file=sys.stdout)
    console.print(f"{arguments.checkpoint}: stage {facts['stage']}, after {' -> '.join(facts['parents']) or 'nothing'}")
    for key in ("vision_tower", "projector", "language_model", "image_tokens", "stored_dtypes", "shards"):
        console.print(f"{key}: {facts[key]}", highlight=False, soft_wrap=True)
    parts = Table("part", "parameters", "active a token")
    for name, counts in facts["parameters"]["parts"].items():
        parts.add_row(name, f"{counts['total']:,}", f"{counts['active']:,}")
    parts.add_row("total", f"{facts['parameters']['total']:,}", f"{facts['parameters']['active']:,}")
    console.print(parts)
    for part, moe in facts["moe"].items():
        console.print(
            f"{part}: router {moe['router']}, {moe['num_experts_per_tok']} of {moe['num_experts']} experts, "
            f"layers {', '.join(str(layer) for layer in moe['layers'])}",
            highlight=False,
            soft_wrap=True,
        )
    if arguments.json is not None:
        write_json(arguments.json, facts)
    return 0
