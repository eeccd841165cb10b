"""Merge LoRA adapters into their base: a plain checkpoint that answers as the two together.

llava-compete merge outputs/lora_run --out outputs/merged [--checkpoint BASE]
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="directory with adapter_config.json")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--checkpoint", type=Path, help="base checkpoint (default: the one the adapter names)")


def run(arguments: argparse.Namespace) -> int:
    from llava_compete.console import setup_console
    from llava_compete.model.lora import logger, merge_adapters

    setup_console()
    merge_adapters(arguments.adapter, arguments.out, arguments.checkpoint)
    logger.info("written to %s", arguments.out)
    return 0
