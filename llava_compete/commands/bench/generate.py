"""Generation speed of our model, dense and with experts, against transformers' own Llava of the same size.

The mixture of experts stands beside dense models of its own size, of its active width, and of its bytes.

llava-compete bench generate
llava-compete bench generate --device cuda --dtype bfloat16 --batch-size 32 --json speed.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="with 64 image tokens among them (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one that warms up (%(default)s)")
    parser.add_argument("--static-cache", action="store_true", help="also with a static cache (on a GPU: CUDA graphs)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", metavar="FILE", help="write the result here as well")


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from llava_compete.bench.generate import Size, bench_generate
    from llava_compete.console import setup_console
    from llava_compete.files import write_json
    from llava_compete.manifest import package_versions

    setup_console()
    result = bench_generate(
        Size(),
        arguments.batch_size,
        arguments.prompt_tokens,
        arguments.new_tokens,
        arguments.rounds,
        arguments.device,
        arguments.dtype,
        arguments.static_cache,
    )
    table = Table("model", "parameters", "tokens/s", "slowest round", "relative", "MoE over it", title="Generation")
    for name, speed in result["speeds"].items():
        speed_row = (f"{speed.parameters:,}", f"{speed.tokens_per_second:,.0f}", f"{speed.slowest:,.0f}")
        table.add_row(name, *speed_row, f"{result['relative'][name]:.2f}", f"{result['moe_over'].get(name, 1):.2f}")
    Console().print(table)
    if arguments.json:
        speeds = {name: asdict(speed) for name, speed in result["speeds"].items()}
        write_json(Path(arguments.json), {**result, "speeds": speeds, "versions": package_versions()})
