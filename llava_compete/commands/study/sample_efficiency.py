"""Put the sample-efficiency claim to the test in the theory's own setting.

Fits mixtures of linear and two-layer experts, with competition and with softmax gating, exact and over-specified, to
data from a true mixture, and fits the rate at which the experts' parameters converge. Writes sample_efficiency.json,
sample_efficiency.png and README.md into --out. --separation computes instead how well any number of samples can
tell one expert from two near ones, and writes separation.json, separation.png and separation.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_compete.files import write_json, write_text
from llava_compete.processes import usable_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, default=Path("outputs/sample_efficiency"), help="directory for the results")
    parser.add_argument("--quick", action="store_true", help="10 repetitions up to n = 3,162 (under a minute)")
    parser.add_argument("--separation", action="store_true", help="the exact curve of distance against e, no sampling")
    parser.add_argument("--workers", type=int, default=min(usable_cores(), 16), help="processes (default: cores)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the starts")


def run(arguments: argparse.Namespace) -> int:
    """Run the study and write its three files."""
    from dataclasses import replace

    from llava_compete.study import sample_efficiency, sample_efficiency_report

    if arguments.separation:
        _separation(arguments.out)
        return 0
    settings = sample_efficiency.Settings.quick() if arguments.quick else sample_efficiency.Settings.full()
    result = sample_efficiency.run(replace(settings, seed=arguments.seed), arguments.workers)
    command = "llava-compete study sample-efficiency" + (" --quick" if arguments.quick else "")
    text = sample_efficiency_report.describe(result, command)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "sample_efficiency.json", result | {"command": command})
    write_text(arguments.out / "README.md", text)
    sample_efficiency_report.draw(result, arguments.out / "sample_efficiency.png")
    sys.stdout.write(text)
    return 0


def _separation(out: Path) -> None:
    from llava_compete.study import separation

    command = "llava-compete study sample-efficiency --separation"
    result = separation.run()
    text = separation.describe(result, command)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "separation.json", result | {"command": command})
    write_text(out / "separation.md", text)
    separation.draw(result, out / "separation.png")
    sys.stdout.write(text)
