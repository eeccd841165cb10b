"""Measure the MoE block: every router and a competition step against dense floors, in one run.

Prints time, peak memory and ratios, and writes a figure. Ratios are to K dense MLPs on the same tokens, and for
competition steps to E dense MLPs.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from llava_compete.errors import UserError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=None, help="tokens in a step (default 2048; 8192 on a GPU)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which every case runs once (default 7)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("D", "I", "E", "K"), action="append", help="only these")
    parser.add_argument("--figure", type=Path, default=Path("outputs/bench_moe.png"), help="default %(default)s")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows as JSON")


def _check_shape(width: int, hidden: int, experts: int, chosen: int) -> None:
    """Refuse what one of the measured routers would: an odd E (cosine routers), K = 1 (shared experts), K > E."""
    if min(width, hidden) < 1 or experts % 2 or not 2 <= chosen <= experts:
        raise UserError(
            f"--shape: found {width} {hidden} {experts} {chosen}, expected D and I >= 1, an even E, and 2 <= K <= E"
        )


def run(arguments: argparse.Namespace) -> None:
    import torch

    from llava_compete.bench import moe
    from llava_compete.moe.allocator import keep_freed_memory

    for name in ("tokens", "rounds", "threads"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise UserError(f"--{name}: found {number}, expected at least 1")
    for sizes in arguments.shape or []:
        _check_shape(*sizes)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    on_gpu = torch.cuda.is_available()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not on_gpu:
        keep_freed_memory()
    device = torch.device("cuda" if on_gpu else "cpu")
    tokens = arguments.tokens or (8192 if on_gpu else 2048)
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    logger.info("%s, %s, %d tokens", machine, "bfloat16" if on_gpu else "float32", tokens)
    for path in filter(None, (arguments.figure, arguments.json)):
        path.parent.mkdir(parents=True, exist_ok=True)
    shapes = [moe.Shape(*sizes) for sizes in arguments.shape or []]
    rows: list[moe.Row] = []
    for shape in shapes or (moe.GPU_SHAPES if on_gpu else moe.CPU_SHAPES):
        rows += moe.measure(
            [shape],
            tokens=tokens,
            rounds=arguments.rounds,
            device=device,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            progress=logger.info,
        )
        if arguments.json:  # after each shape, so that what was measured stays if the time runs out
            moe.write_json(rows, arguments.json)
    for line in moe.table(rows):
        logger.info("%s", line)
    moe.write_figure(rows, arguments.figure)
