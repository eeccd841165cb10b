"""Error against the number of samples n: a student on a teacher of known experts, competition beside softmax.

20 seeds and six sizes take minutes on two cores. Finished runs are kept in --out. Writes learning_curve.json,
learning_curve.png and README.md there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from llava_compete.files import write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    gates = ("competition", "softmax", "clusters")
    parser.add_argument("--gate", choices=gates, default="competition", help="of the teacher (default: %(default)s)")
    parser.add_argument("--rules", nargs="+", help="names of the routing study's rules (default: published, judge_c80)")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of samples (default: 250 to 8,000)")
    parser.add_argument("--seeds", type=int, default=20, help="runs a rule and size (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("outputs/learning_curve"), help="runs and results")


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing and write the results."""
    from llava_compete.console import setup_console
    from llava_compete.model.devices import usable_device
    from llava_compete.moe.allocator import keep_freed_memory
    from llava_compete.study import learning_curve

    setup_console()
    keep_freed_memory()
    settings = learning_curve.Settings(
        gate=arguments.gate,
        rules=tuple(arguments.rules or learning_curve.DEFAULT_RULES),
        sizes=tuple(arguments.sizes or learning_curve.SIZES),
        seeds=arguments.seeds,
    )
    result = learning_curve.run(settings, arguments.out, str(usable_device(arguments.device)))
    command = shlex.join(["llava-compete", *sys.argv[1:]])
    text = learning_curve.describe(result, command)
    write_json(arguments.out / "learning_curve.json", result | {"command": command})
    write_text(arguments.out / "README.md", text)
    learning_curve.draw(result, arguments.out / "learning_curve.png")
    sys.stdout.write(text)
