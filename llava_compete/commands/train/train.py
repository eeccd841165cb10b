"""Run one training stage from a YAML config: `llava-compete train CONFIG [key=value ...]`.

The same command goes on where the stage stopped. On several devices start it through scripts/<stage>.sh, which
picks the launcher. Every rank runs this command; errors are said once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from llava_compete.errors import UserError

logger = logging.getLogger(__name__)

# A rank that only lost contact waits: the launcher ends it as soon as the rank with the true error is gone.
_GRACE_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", type=Path, help="the stage's YAML, for example configs/demo/sft.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides, values are YAML")
    parser.add_argument(
        "--allow-changed", action="store_true", help="obey settings and data that have changed since the checkpoint"
    )
    parser.add_argument("--stage", help="refuse a config of another stage (used by the stage scripts)")


def run(arguments: argparse.Namespace) -> int:
    """Run the stage on this rank; status 143 where it was told to stop before its end."""
    from llava_compete.console import outlive_the_reader, setup_console

    outlive_the_reader()
    setup_console(rank=0 if os.environ.get("RANK", "0") == "0" else 1)  # before the imports: some libraries chatter
    if os.environ.get("NUM_GPUS") == "0":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed's launcher numbers the CPU's ranks there
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses the same, with a warning
    from llava_compete.config import load_config
    from llava_compete.train.config import TrainConfig
    from llava_compete.train.distributed import this_rank
    from llava_compete.train.stopping import STOPPED
    from llava_compete.train.waiting import SharedError, is_lost_contact

    rank = this_rank()
    alike = True  # until the ranks work on different things, they make the same mistakes
    try:
        config = load_config(TrainConfig, arguments.config, arguments.overrides)
        if arguments.stage and config.stage != arguments.stage:
            raise UserError(f"{arguments.config}: stage is {config.stage!r}, expected {arguments.stage!r}")
        from llava_compete.train.run import train

        alike = False
        finished = train(config, allow_changed=arguments.allow_changed)
    except UserError as error:
        if alike and not rank.is_main:
            time.sleep(_GRACE_SECONDS)  # rank 0 says it; its launcher would end it as soon as another has left
        if rank.is_main:
            sys.stderr.write(f"error: {error}\n")
        elif not isinstance(error, SharedError) and (not alike or rank.local_index == 0):
            sys.stderr.write(f"error: rank {rank.number}: {error}\n")
        return 2
    except Exception as error:  # the last stop: one line to the user, the traceback to run/console.log
        if is_lost_contact(error):
            time.sleep(_GRACE_SECONDS)
        first_line = (str(error).strip().splitlines() or [""])[0]
        logger.error("rank %d: %s: %s", rank.number, type(error).__name__, first_line)
        # Not one of our loggers, so it stays off the console.
        logging.getLogger("traceback").info("", exc_info=True)
        return 1
    return 0 if finished else STOPPED
