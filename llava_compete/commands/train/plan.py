"""Parameters, memory a GPU, FLOPs and the largest micro-batch of a recipe, in seconds, without weights or a download.

llava-compete plan configs/phi35_siglip/sft.yaml --gpus 8 --gpu-memory 80 [--json FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML of a training stage or of an upcycling")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as training.per_device_train_batch_size=2")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of the run (default 1)")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of memory of one GPU (default 80)")
    parser.add_argument("--json", type=Path, help="write the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.files import write_json
    from llava_compete.plan.plan import GIB, plan

    setup_console()
    if arguments.gpus < 1:
        raise UserError(f"--gpus: found {arguments.gpus}, expected at least 1")
    if arguments.gpu_memory <= 0:
        raise UserError(f"--gpu-memory: found {arguments.gpu_memory:g}, expected GiB above 0")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: {arguments.json.parent}: no such directory")
    result = plan(arguments.config, arguments.overrides, arguments.gpus, arguments.gpu_memory)
    console = Console(file=sys.stdout)
    parts = Table("part", "parameters", "trainable", "active a token", title="parameters")
    for name, part in {**result.parameters, "total": result.total}.items():
        parts.add_row(name, *(f"{count:,}" for count in (part.total, part.trainable, part.active)))
    console.print(parts)
    recipe = result.recipe
    table = Table(
        "ZeRO", "weights", "gradients", "optimizer", "sum", "batch", "with ckpt.",
        title=f"GiB on each of {result.num_gpus} GPU(s); largest micro-batch, without and with checkpointing",
    )  # fmt: skip
    for stage, state in result.states.items():
        sizes = result.largest_micro_batch[stage]
        memory = (state.weights, state.gradients, state.optimizer, state.total)
        offloaded = f", {' and '.join(recipe.offload)} offloaded" if recipe.offload else ""
        mark = f" (config{offloaded})" if stage == recipe.zero_stage else ""
        table.add_row(
            f"{stage}{mark}", *(f"{size / GIB:.3g}" for size in memory), *(str(size) for size in sizes.values())
        )
    console.print(table)
    console.print(
        f"micro-batch of {recipe.micro_batch} x {recipe.length} tokens: activations "
        f"{result.activations(False) / GIB:.3g} GiB, with checkpointing {result.activations(True) / GIB:.3g} GiB; "
        f"a competition step adds {result.competition_bytes / GIB:.3g} GiB\n"
        f"one optimizer step: {result.flops_per_step / 1e12:,.3g} TFLOP, "
        f"a competition step {result.competition_flops / 1e12:,.3g} more"
        + (
            f"; a loss that judges adds at most {result.asking_flops / 1e12:,.3g}, asking the contested experts alone"
            if result.asking_flops
            else ""
        ),
        highlight=False,
        soft_wrap=True,
    )
    if arguments.json is not None:
        write_json(arguments.json, result.as_json())
    return 0
