"""Compare evaluations: scores, paired differences with 95% intervals, tests, power, a forest plot.

  llava-compete compare outputs/a/eval outputs/b/eval
  llava-compete compare dense=d0/eval,d1/eval,d2/eval competition=c0/eval,c1/eval,c2/eval --out eval/results/mine

  llava-compete compare softmax=s0/eval,s1/eval,s2/eval competition=c0/eval,c1/eval,c2/eval --primary mean --margin 0.5

Each RUN is an evaluation directory, or NAME=DIR,DIR,... with one directory a training seed; runs are paired by the
seed that they recorded. The first is the baseline. With several seeds each method is tested over them (paired t). The
verdict is of one row (--primary), corrected over its methods; --margin also tests whether a difference is too small to
matter. Runs that answered other questions, or were prompted or scored in another way, are refused.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="DIR or NAME=DIR,DIR,... (one directory a seed)")
    parser.add_argument(
        "--published", metavar="FILE", action="append", default=[], help="JSON of published scores; may be repeated"
    )
    parser.add_argument("--out", default="outputs/comparison", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--primary", metavar="ROW", help="benchmark to judge (default: the mean, or the only one)")
    parser.add_argument("--margin", type=float, metavar="POINTS", help="a difference below it does not matter")
    parser.add_argument("--resamples", type=int, default=10_000, help="draws over questions (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from llava_compete.errors import UserError
    from llava_compete.evaluation.compare.comparison import compare_methods
    from llava_compete.evaluation.compare.evaluation_dirs import read_method, read_published
    from llava_compete.report.comparison import to_markdown, write_comparison

    published = read_published([Path(file) for file in arguments.published])
    comparison = compare_methods(
        [read_method(text) for text in arguments.runs],
        published,
        primary=arguments.primary,
        margin=arguments.margin,
        resamples=arguments.resamples,
    )
    if published and not comparison.published:
        raise UserError(
            f"{', '.join(arguments.published)}: no score of a task that the runs have ({', '.join(comparison.rows)})"
        )
    command = shlex.join(["llava-compete", *sys.argv[1:]])
    paths = write_comparison(comparison, Path(arguments.out), command)
    sys.stdout.write(to_markdown(comparison, command))
    sys.stdout.write(f"Written: {', '.join(map(str, paths))}\n")
