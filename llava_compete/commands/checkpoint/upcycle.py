"""Turn the dense MLPs of a checkpoint into mixtures of experts.

    llava-compete upcycle --config configs/demo/upcycle.yaml
    llava-compete upcycle outputs/dense --out outputs/moe --config recipe.yaml moe.language.num_experts=8

A checkpoint directory in, a checkpoint directory out, no training: the result answers exactly as its parent.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llava_compete.config import load_config

if TYPE_CHECKING:
    from llava_compete.model.upcycle import UpcycleConfig

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", help="dense checkpoint directory (default: the config's model.checkpoint)"
    )
    parser.add_argument("--config", required=True, help="YAML with model.checkpoint, output_dir, moe and seed")
    parser.add_argument("--out", help="directory to write (default: the config's output_dir)")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave what an earlier call made of the same parent and config, and refuse what it made of others",
    )
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as moe.language.num_experts=8")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from llava_compete.console import setup_console
    from llava_compete.errors import UserError
    from llava_compete.manifest import write_manifest
    from llava_compete.model.checkpoint import read_config
    from llava_compete.model.upcycle import UpcycleConfig, upcycle
    from llava_compete.train.identity import checkpoint_digest

    setup_console()
    overrides = list(arguments.overrides)
    # argparse gives the first positional to `checkpoint`, also when it is an override.
    if arguments.checkpoint is not None and "=" in arguments.checkpoint:
        overrides.insert(0, arguments.checkpoint)
    elif arguments.checkpoint is not None:
        overrides.append(f"model.checkpoint={arguments.checkpoint}")
    if arguments.out is not None:
        overrides.append(f"output_dir={arguments.out}")
    config = load_config(UpcycleConfig, arguments.config, overrides)
    if config.model.checkpoint is None:
        raise UserError(f"{arguments.config}: missing key 'model.checkpoint', the dense checkpoint to upcycle")
    read_config(config.model.checkpoint, config.model.trust_remote_code)
    parent = checkpoint_digest(Path(config.model.checkpoint))
    # Written last: without it a call was killed at its end, and the next one makes all anew.
    if arguments.keep and (config.output_dir / "run" / "manifest.json").is_file():
        _refuse_other(config, parent)
        logger.info("%s: upcycled already", config.output_dir)
        return 0
    report = upcycle(config.model.checkpoint, config.output_dir, config.moe, config.seed)
    table = Table("part", "layers", "experts", "router", "dense MLP", "all experts", "active a token")
    for part, group in itertools.groupby(report.layers, key=lambda layer: layer.name.partition(".")[0]):
        layers = list(group)
        numbers = ", ".join(layer.name.partition(".")[2] for layer in layers)
        counts = (sum(getattr(layer, key) for layer in layers) for key in ("dense", "total", "active"))
        table.add_row(part, numbers, layers[0].experts, layers[0].router, *(f"{count:,}" for count in counts))
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(
        f"parameters: {report.parameters_before:,} before, {report.parameters_after:,} after, "
        f"{report.parameters_active:,} active for a token\nwritten to {config.output_dir}",
        highlight=False,
        soft_wrap=True,
    )
    write_manifest(
        config.output_dir,
        config,
        seeds={"upcycle": config.seed},
        data_digest=None,
        extra={
            "parent": parent,
            "parameters_before": report.parameters_before,
            "parameters_after": report.parameters_after,
        },
    )
    return 0


def _refuse_other(config: UpcycleConfig, parent: str) -> None:
    """Raise where the output directory was not made of this parent with these settings."""
    from llava_compete.errors import UserError
    from llava_compete.files import read_json
    from llava_compete.train.identity import differences, flat

    run = config.output_dir / "run"
    was, now = dict(flat(load_config(type(config), run / "config.yaml"), "")), dict(flat(config, ""))
    was["parent"], now["parent"] = read_json(run / "manifest.json").get("parent"), parent
    if changed := differences(was, now):
        raise UserError(
            f"{config.output_dir}: upcycled before from another parent or with other settings: "
            f"{'; '.join(changed.values())}. Restore them, choose another output_dir, or replace it by upcycle.sh"
        )
