"""Measure the data path: samples/s with 1 and 2 workers and time by step, with Pillow's pixels and with later
versions, and a plain per-row loop beside it.

With --scale also a generated table of 665,000 rows: start-up time and memory of a worker.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from llava_compete.errors import UserError
from llava_compete.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--rows", type=int, default=800, help="rows to read in each run (default: %(default)s)")
    parser.add_argument("--scale", action="store_true", help="also measure a table of 665,000 rows (about 2 minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from llava_compete.bench.data import BATCH_SIZE, make_rows, processor_for, run_bench, table
    from llava_compete.bench.data_scale import run_scale

    if arguments.rows < 2 * BATCH_SIZE:
        # The first batch only starts the workers, and is not measured.
        raise UserError(f"--rows: found {arguments.rows}, expected at least {2 * BATCH_SIZE}, two batches")
    with tempfile.TemporaryDirectory() as folder:
        result = run_bench(Path(folder), arguments.rows, workers=(1, 2))
        if arguments.scale:
            processor = processor_for(make_rows(Path(folder), 200))
            result["scale"] = run_scale(Path(folder), processor)
    text = json.dumps(result, indent=2)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, text + "\n")
    sys.stdout.write(text + "\n")
    sys.stdout.write(
        "\n".join(["milliseconds of processor time a sample:", *table(result["milliseconds_by_step"]), ""])
    )
    photo = result["large_photographs"]
    sys.stdout.write(
        f"a JPEG of {photo['size'][0]}x{photo['size'][1]} to {photo['to']} pixels: {photo['pillow']:.0f} ms by version "
        f"1, {photo['whole']:.0f} by the latest ({photo['pillow'] / photo['whole']:.2f}), with jpeg_draft "
        f"{photo['draft']:.0f} ({photo['pillow'] / photo['draft']:.2f})\n"
    )
    gpu = result["gpu"]
    rate, workers = gpu["samples_per_second_a_worker"], gpu["workers"]
    sys.stdout.write(
        f"{gpu['model']}: {gpu['images_per_second']:.1f} images/s wanted; {rate:.0f} a worker x {workers} = "
        f"{rate * workers:.0f} samples/s at its size\n"
    )
