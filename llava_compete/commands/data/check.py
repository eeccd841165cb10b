"""Check the data of a stage before training: every row, every image, every length.

CONFIG is a stage's YAML, a mixture's (`sources:`), or any YAML with a `data:` section. Prints a table by problem with
the first records, writes the whole report as JSON, and exits with 1 if there is any error. With --convert the tables
that training reads are made as well, so that no GPU waits for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_compete.processes import usable_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", type=Path, help="for example configs/demo/sft.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides, values are YAML")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="report file (default: outputs/data_check/<config's name>.json)")
    parser.add_argument("--write-clean", type=Path, metavar="FILE", help="write the good rows to FILE (.jsonl)")
    parser.add_argument("--convert", action="store_true", help="also make the tables of the sources without errors")
    parser.add_argument("--write-bad", type=Path, metavar="FILE", help="write the other rows with reasons (.jsonl)")


def run(arguments: argparse.Namespace) -> int:
    """Check, print, write; 1 if there is an error."""
    from rich.console import Console
    from tqdm import tqdm

    from llava_compete.check.check import check_data
    from llava_compete.check.output import RowWriter, prepare_outputs, problem_table, source_table, write_report
    from llava_compete.check.text_side import text_side_of
    from llava_compete.config import apply_overrides, parse_config, read_yaml
    from llava_compete.console import setup_console
    from llava_compete.data.config import DataSection
    from llava_compete.data.tables import load_source

    setup_console()
    content = apply_overrides(read_yaml(arguments.config), arguments.overrides)
    name = str(arguments.config)
    section = parse_config(DataSection, content.get("data", content), source=name)
    text_side = text_side_of(content["model"], section, name) if "model" in content else None
    target = arguments.json or Path("outputs/data_check") / f"{arguments.config.stem}.json"
    prepare_outputs([target], section.sources)
    with (
        RowWriter(arguments.write_clean, arguments.write_bad, section.sources) as writer,
        tqdm(unit=" rows", desc="check", mininterval=1) as bar,
    ):
        report = check_data(section, text_side, max(1, arguments.workers), bar.update, writer)
    write_report(report, target)
    if arguments.convert:
        for source in section.sources:
            if report.is_good(source.name):
                load_source(source, section.cache_dir)
    console = Console()
    console.print(source_table(report))
    if text_side is None:
        console.print("No tokenizer is known yet, so lengths were not checked (the config's model has to be there).")
    if report.counts:
        console.print(problem_table(report))
    console.print(f"{report.num_errors:,} errors. Report: {target}", highlight=False)
    return 1 if report.num_errors else 0
