"""One page about a run, or several side by side: routing, scores, training, answered pictures.

  llava-compete report RUN --data TABLE [--out DIR]       a checkpoint, a stage's directory, a finished quickstart
  llava-compete report RUN RUN --data configs/demo/sft.yaml --rows 400 --processes 2
  llava-compete report RUN --checkpoints --data TABLE     how routing settled, over the checkpoints that it has kept

Writes report.html (self-contained), report.json and figures/ into DIR (default: `report` in the first run's directory).
Data are test tables (parquet with image, question, answer), anything that a stage trains on, or a stage's YAML file;
without any, the page has what lies on disk: training and scores. Of a quickstart's directory the closing table,
metrics.json and report.md are written too.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="checkpoint or directory of a stage")
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="rows on which routing is measured")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that the data's image paths are relative to")
    parser.add_argument(
        "--eval",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="further evaluations of the runs, or of the models that they were upcycled from",
    )
    parser.add_argument("--checkpoints", action="store_true", help="each RUN's kept checkpoints too, oldest first")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: report in the first run's directory")
    parser.add_argument("--rows", type=int, default=200, help="rows of each file of data (default 200)")
    parser.add_argument("--examples", type=int, default=4, help="answered rows with maps (default 4)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1, help="processes that run the model over the rows")
    parser.add_argument("--device", help="default: the GPU if there is one")


def run(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.evaluation.checkpoint_routing import MeasureOptions, measure_checkpoint
    from llava_compete.evaluation.routing_data import Rows
    from llava_compete.report.quickstart import is_finished, write_report
    from llava_compete.report.run_facts import find_runs, with_checkpoints
    from llava_compete.report.run_report import write_run_report

    for name in ("rows", "batch_size", "processes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: found {getattr(arguments, name)}, expected at least 1")
    setup_console()
    paths = arguments.runs
    if arguments.checkpoints:
        paths = [path for run in paths for path in with_checkpoints(run)]
    runs = find_runs(paths, arguments.eval)
    rows = Rows(arguments.data, arguments.images, arguments.rows)
    options = MeasureOptions(
        examples=arguments.examples,
        batch_size=arguments.batch_size,
        processes=arguments.processes,
        device=arguments.device,
    )
    out = arguments.out or arguments.runs[0] / "report"
    out.mkdir(parents=True, exist_ok=True)  # where it cannot be, that is said before anything is measured
    routing = {}
    for one in runs:
        if one.checkpoint is not None and len(rows):
            with tqdm(total=len(rows), desc=one.name, unit="row") as bar:
                routing[one.name] = measure_checkpoint(one.checkpoint, rows, options, bar.update)
    command = f"llava-compete {shlex.join(sys.argv[1:])}"
    for path in write_run_report(runs, routing, out, command):
        sys.stdout.write(f"Written: {path}\n")
    if is_finished(arguments.runs[0]):
        write_report(arguments.runs[0])
