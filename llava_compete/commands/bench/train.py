"""Measure whole training steps: tokens/s and peak memory of dense, softmax and competition on the same model and data.

Prints the overhead of competition over softmax routing and of softmax routing over a dense model with the same
active parameters. On a GPU: as many layers of Phi-3.5-mini and SigLIP so400m as train in 70 GiB, in bf16, and the MFU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_compete.errors import UserError
from llava_compete.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--repeats", type=int, default=15, help="steps of each case (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    import torch

    from llava_compete.bench.train import CPU_SHAPE, GPU_LIMIT, fit, run_bench
    from llava_compete.manifest import package_versions
    from llava_compete.moe.allocator import keep_freed_memory

    if arguments.repeats < 1:
        raise UserError(f"--repeats: found {arguments.repeats}, expected at least 1")
    shape, device = CPU_SHAPE, torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        shape = fit(min(GPU_LIMIT, torch.cuda.mem_get_info()[0]))
    else:
        keep_freed_memory()  # as training does
    result = run_bench(shape, device, arguments.repeats)
    speeds, memory = result["tokens_per_second"], result["peak_mb"]
    experts = " and ".join(shape.expert_parts)
    sys.stdout.write(
        f"{result['device']}: {shape.name}, {result['parameters']['competition'] / 1e9:.2f}B parameters, experts in "
        f"{experts}, {shape.dtype}\n  {shape.micro_batches} x {shape.rows} rows of {shape.length} tokens a step\n"
    )
    for case, speed in speeds.items():
        utilisation = f"  MFU {result['mfu'][case]:.0%}" if "mfu" in result else ""
        sys.stdout.write(f"  {case:<12} {speed:>10,.0f} tokens/s  {memory[case]:>9,.0f} MB{utilisation}\n")
    sys.stdout.write(f"competition over softmax  {result['competition_over_softmax']:+.1%}  (aim: at most 5%)\n")
    sys.stdout.write(f"softmax over dense        {result['softmax_over_dense']:+.1%}  (aim: at most 15%)\n")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {**result, "versions": package_versions()})
