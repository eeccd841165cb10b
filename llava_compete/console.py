"""What a user sees: one line per event on the console, the libraries' chatter in a log file, errors always shown.

Commands call `setup_console` once, after their imports. Our own loggers print at INFO through `tqdm.write`, so that
a progress bar stays whole; other libraries print at ERROR only. With a log file, everything from INFO on goes there.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

# Libraries that install their own stream handlers at import; theirs are replaced by propagation to the root.
_OWN_HANDLERS = ("transformers", "DeepSpeed", "accelerate", "datasets", "huggingface_hub", "lmms-eval", "torch")


class _TqdmHandler(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _for_console(record: logging.LogRecord) -> bool:
    ours = record.name == "llava_compete" or record.name.startswith("llava_compete.")
    return record.levelno >= (logging.INFO if ours else logging.ERROR)


class _ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


class _Outlasting(io.TextIOBase):
    """A stream whose reader may leave: what is written after that goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            # The descriptor itself, so that what libraries write to it goes nowhere too.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def outlive_the_reader() -> None:
    """A closed terminal, or a `| tee` that Ctrl-C has ended, do not end this process: it may have to save yet."""
    sys.stdout, sys.stderr = _Outlasting(sys.stdout), _Outlasting(sys.stderr)


def setup_console(log_file: Path | None = None, rank: int = 0) -> None:
    """Route logging for this process.

    Args:
        log_file: receives INFO and above of every library (appended); None keeps only the console.
        rank: process rank; ranks above 0 print errors only, and write their own `<log_file>.rank<r>`.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            handler.close()
    root.setLevel(logging.INFO)

    console = _TqdmHandler(level=logging.INFO if rank == 0 else logging.ERROR)
    console.addFilter(_for_console)
    console.setFormatter(_ConsoleFormatter("%(message)s"))
    root.addHandler(console)

    if log_file is not None:
        log_file = log_file if rank == 0 else log_file.with_name(f"{log_file.name}.rank{rank}")
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_file, encoding="utf-8")
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        formatter.converter = time.gmtime
        file.setFormatter(formatter)
        root.addHandler(file)

    logging.captureWarnings(True)
    warnings.simplefilter("default")
    for name in _OWN_HANDLERS:
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True
    logging.getLogger("llava_compete").setLevel(logging.INFO)
