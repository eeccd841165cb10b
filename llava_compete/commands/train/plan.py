"""Parameters, memory a GPU, FLOPs and the largest micro-batch of a recipe, in seconds, without weights or a download;
and what a step sends and lasts on a cluster.

llava-compete plan configs/phi35_siglip/sft.yaml --gpus 8 --gpu-memory 80 [--json FILE] [key=value ...]
llava-compete plan configs/phi35_siglip/sft.yaml --gpus 64 --nodes 8 --tokens 1e11 moe.expert_parallel=4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_compete.plan.cluster import Cluster
    from llava_compete.plan.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML of a training stage or of an upcycling")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as training.per_device_train_batch_size=2")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of the run (default 1)")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of memory of one GPU (default 80)")
    parser.add_argument("--nodes", type=int, help="machines that they are in (default: 8 GPUs a machine)")
    parser.add_argument("--link", type=float, default=450, help="GB/s of a GPU in its machine (default 450: NVLink 4)")
    parser.add_argument("--network", type=float, default=50, help="GB/s of a GPU to others (default 50: 400 Gb/s)")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of one GPU in bf16 (default 989: H100, H200)")
    parser.add_argument("--efficiency", type=float, help="share of the peak that arithmetic reaches (default .404)")
    parser.add_argument("--tokens", type=float, help="also say how many days training on so many tokens takes")
    parser.add_argument("--json", type=Path, help="write the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.files import write_json
    from llava_compete.plan.plan import GIB, plan

    setup_console()
    cluster = _cluster(arguments)
    if arguments.gpu_memory <= 0:
        raise UserError(f"--gpu-memory: found {arguments.gpu_memory:g}, expected GiB above 0")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: {arguments.json.parent}: no such directory")
    result = plan(arguments.config, arguments.overrides, cluster, arguments.gpu_memory)
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
        spread = f", experts over {recipe.expert_parallel}" if recipe.expert_parallel > 1 else ""
        mark = f" (config{offloaded}{spread})" if stage == recipe.zero_stage else ""
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
    if cluster.gpus > 1:
        _print_steps(console, result, arguments.tokens)
    if arguments.json is not None:
        write_json(arguments.json, result.as_json())
    return 0


def _cluster(arguments: argparse.Namespace) -> Cluster:
    from llava_compete.errors import UserError
    from llava_compete.plan.cluster import EFFICIENCY, Cluster

    if arguments.gpus < 1:
        raise UserError(f"--gpus: found {arguments.gpus}, expected at least 1")
    nodes = max(1, arguments.gpus // 8) if arguments.nodes is None else arguments.nodes
    if nodes < 1 or arguments.gpus % nodes:
        raise UserError(f"--nodes: found {nodes}, expected a divisor of --gpus {arguments.gpus}")
    rates = {name: getattr(arguments, name) for name in ("link", "network", "peak")}
    for name, rate in {**rates, "tokens": arguments.tokens or 1}.items():
        if not rate > 0:
            raise UserError(f"--{name}: found {rate:g}, expected a number above 0")
    efficiency = EFFICIENCY if arguments.efficiency is None else arguments.efficiency
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency: found {efficiency:g}, expected a share above 0, at most 1")
    link, network, peak = rates["link"] * 1e9, rates["network"] * 1e9, rates["peak"] * 1e12
    return Cluster(nodes, arguments.gpus // nodes, link, network, peak, efficiency)


def _print_steps(console: Any, result: Plan, budget: float | None) -> None:
    from rich.table import Table

    from llava_compete.plan.cluster import days

    cluster, spread = result.cluster, result.recipe.expert_parallel
    table = Table(
        "step", "gradients", "weights", "tokens", "arithmetic", "tokens", "waiting for links", "new weights", "in all",
        title=f"GB that a GPU sends inside its machine + beyond it, and seconds, on {cluster.nodes} x "
        f"{cluster.gpus_per_node} GPUs" + (f", experts over {spread}" if spread > 1 else ""),
    )  # fmt: skip
    for name, competing in (("router", False), ("competition", True)):
        if competing and not result.num_competing:
            continue
        one = result.step(competing=competing)
        sent = (f"{volume.inside / 1e9:.3g} + {volume.beyond / 1e9:.3g}" for volume in one.sent.values())
        table.add_row(name, *sent, *(f"{seconds:.3g}" for seconds in (*one.seconds.values(), one.total)))
    console.print(table)
    text = f"MFU {100 * result.utilisation():.1f}% where arithmetic alone reaches {100 * cluster.efficiency:.1f}%"
    if budget is not None:
        lasts = days(budget, result.tokens_per_step, result.step().total)
        text += f"; {budget:.3g} tokens in {lasts:,.3g} days of router steps ({result.tokens_per_step:,} tokens a step)"
    console.print(text, highlight=False, soft_wrap=True)
