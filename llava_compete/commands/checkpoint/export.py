"""Write a checkpoint as one of another package, which loads it without this one.

    llava-compete export outputs/sft --to llava-hf --out outputs/sft_hf

llava-hf: transformers' LlavaForConditionalGeneration, for a CLIP or SigLIP tower; experts in the language model become
those of transformers' own family where it has one (Mixtral, Qwen3-MoE). What cannot be expressed says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("--to", required=True, choices=["llava-hf"], help="whose format")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from llava_compete.console import setup_console
    from llava_compete.convert.exporting import export_checkpoint

    setup_console()
    report = export_checkpoint(arguments.checkpoint, arguments.out)
    Console(file=sys.stdout, highlight=False, soft_wrap=True).print(
        f"{report.architecture}, {report.num_parameters:,} parameters, {report.num_shards} file(s)\n"
        f"written to {arguments.out}"
    )
    return 0
