"""Starts `python -m lmms_eval` (by torchrun for several processes), shows its progress, and notices its failures.

It ends with us: the processes of lmms-eval are a group of their own, which an interrupt (Ctrl-C, TERM, a closed
terminal) of this process ends too.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llava_compete.errors import UserError
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.lmms.documents import FOLDER_VARIABLE
from llava_compete.processes import usable_cores

log = logging.getLogger(__name__)
# torchrun gives its workers up to 30 seconds to end; killed earlier, it would leave them behind.
_SECONDS_TO_END = 40
_PROGRESS = re.compile(r"^answering: ")
# The last line of a Python traceback, also as torchrun shows it.
_ERROR = re.compile(r"^(?:\[rank\d+\]: )?(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt))\b:? ?(.*)")


def command(config: EvalConfig, tasks: list[str], output: Path) -> list[str]:
    """The command line; DEBUG is the only verbosity at which lmms-eval ends with a non-zero status on an exception."""
    model_args = {
        "pretrained": config.checkpoint,
        "dtype": config.dtype,
        "attn_implementation": config.attn_implementation,
        "adapter": config.adapter,
        "competition_at_inference": config.competition_at_inference or None,
    }
    processes = num_processes(config)
    python = [sys.executable, "-m"]
    launcher = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [
        *(launcher if processes > 1 else python),
        "lmms_eval",
        *("--model", "llava_compete"),
        *("--model_args", ",".join(f"{key}={value}" for key, value in model_args.items() if value is not None)),
        *("--tasks", ",".join(tasks)),
        *("--include_path", str(Path(config.include_path).resolve())),
        *("--batch_size", str(config.batch_size)),
        *(("--device", config.device) if config.device else ()),
        *(("--limit", str(config.limit)) if config.limit else ()),
        *("--output_path", str(output)),
        "--log_samples",
        *("--verbosity", "DEBUG"),
    ]


def num_processes(config: EvalConfig) -> int:
    """`processes`, where "auto" is one for each GPU, or one."""
    if config.processes != "auto":
        return config.processes
    if config.device is not None:
        return 1
    import torch  # seconds to import, and not needed where the number is given

    return max(torch.cuda.device_count(), 1)


def run_lmms_eval(
    config: EvalConfig, tasks: list[str], output: Path, log_file: Path, datasets_cache: Path | None
) -> None:
    """Run lmms-eval offline, its output going to `log_file`; a failure is a `UserError` with the line that matters.

    Args:
        datasets_cache: where `datasets` keeps its converted copies, instead of its usual place.
    """
    words = command(config, tasks, output)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment[FOLDER_VARIABLE] = str(output)
    if datasets_cache is not None:
        environment["HF_DATASETS_CACHE"] = str(datasets_cache)
    processes = num_processes(config)
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // processes, 1)))
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8") as file, ended_by_signals():
        file.write(f"$ {' '.join(words)}\n")
        with subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                last_error = _follow(process, file)
            except BaseException:
                _end(process)
                raise
        status = process.returncode
    if status != 0:
        killed = f"killed by signal {-status} (9: perhaps out of memory)"
        reason = last_error or (killed if status < 0 else f"exit status {status}")
        raise UserError(f"lmms-eval failed on {', '.join(tasks)}: {reason} (all of its output: {log_file})")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, TERM and HUP raise `SystemExit` as Ctrl-C raises `KeyboardInterrupt`: Python would just die."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[str]) -> None:
    """TERM to the process and those it started, KILL to whatever of them does not end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_SECONDS_TO_END)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _follow(process: subprocess.Popen[str], log_file: IO[str]) -> str | None:
    """Copy the output to the log, show the progress bar on a terminal, return the line that says what went wrong."""
    assert process.stdout is not None
    error: str | None = None
    for line in process.stdout:  # universal newlines: each redraw of a progress bar is a line of its own
        log_file.write(line)
        if _PROGRESS.match(line) and sys.stderr.isatty():
            sys.stderr.write("\r" + line.rstrip("\n"))
        found = _ERROR.match(line)
        # The document's name is the best reason; else the first exception, since torchrun's own come after it.
        if found and (error is None or (found[1] == "DocumentError" and "DocumentError" not in error)):
            error = f"{found[1]}: {found[2]}" if found[1] != "DocumentError" else found[2]
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    return error
