"""How much bfloat16 moves the loss's judgement of experts, beside the task's own gradient at the router.

llava-compete bench judge                 a CPU will do; on a GPU its kernels are measured
llava-compete bench judge --shape 512 128 64 8 --json noise.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1024, help="tokens (default %(default)s)")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("D", "I", "E", "K"), action="append", help="only these")
    parser.add_argument("--margin", type=float, default=0.8, help="competition_margin (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows as JSON")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from llava_compete.bench import judge
    from llava_compete.bench.moe import Shape
    from llava_compete.errors import UserError

    if arguments.tokens < 1:
        raise UserError(f"--tokens: found {arguments.tokens}, expected at least 1")
    if not 0 <= arguments.margin <= 1:
        raise UserError(f"--margin: found {arguments.margin:g}, expected 0 to 1")
    for sizes in arguments.shape or []:
        if min(sizes) < 1 or sizes[3] >= sizes[2]:
            raise UserError(f"--shape: found {' '.join(map(str, sizes))}, expected sizes >= 1 and K < E")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for sizes in arguments.shape or ((256, 1024, 4, 2), (512, 128, 64, 8)):
        shape = Shape(*sizes)
        rows = judge.measure(shape, arguments.tokens, device, arguments.margin)
        sys.stdout.write("\n".join(judge.table(shape, rows)) + "\n")
        found.append((shape, rows))
    if arguments.json is not None:
        judge.write_json(found, arguments.json)
