"""Bring a published checkpoint in: a directory or a model on the hub, whose layout is found from its files.

    llava-compete import llava-hf/llava-1.5-7b-hf --out outputs/llava15
    llava-compete import ~/models/llava-v1.5-7b-lora --base lmsys/vicuna-7b-v1.5 --out outputs/llava15_lora

Known: transformers' Llava (llava-hf), LLaVA's own layout, CompeteSMoE and LibMoE, CuMo, MoE-LLaVA, and language models
with experts (Mixtral, Qwen3-MoE).

Every tensor is accounted for, pictures are prepared as the source prepares them, and the result can be trained,
upcycled, evaluated and exported as any checkpoint here.
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="directory, or hub name such as llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--base", help="language model that an adapter or mm_projector.bin belongs to")
    parser.add_argument("--vision-tower", help="transformers' CLIP or SigLIP, in place of the one named")
    parser.add_argument("--chat-template", help="one of ours in place of the source's own, such as vicuna_v1")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from llava_compete.console import setup_console
    from llava_compete.convert.importing import import_checkpoint
    from llava_compete.convert.layout import ImportOptions

    setup_console()
    options = ImportOptions(arguments.chat_template, arguments.base, arguments.vision_tower)
    report = import_checkpoint(arguments.source, arguments.out, options)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(
        f"{arguments.source}: layout {report.layout}, {report.num_read} tensors read, {report.num_parameters:,} "
        f"parameters, {report.num_shards} file(s)"
    )
    for why, count in collections.Counter(report.unused.values()).items():
        console.print(f"left out: {count} tensor(s), {why}")
    for note in report.notes:
        console.print(note)
    console.print(f"written to {arguments.out}")
    return 0
