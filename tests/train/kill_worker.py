"""One rank that is killed in the last save: `torchrun kill_worker.py CONFIG POINT` (see test_last_save_launched.py)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_compete.config import load_config
from llava_compete.train import checkpoints, run
from llava_compete.train.config import TrainConfig

_replace = Path.replace


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_the_config(path: Path, target: Path) -> Path:
    """The files before it are in place already."""
    if path.parent.name == "final" and path.name == "config.json":
        kill()
    return _replace(path, target)


POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "publishing": (checkpoints, "publish", kill),
    "model": (run, "_save_final", kill),
    "installing": (Path, "replace", kill_before_the_config),
    "mark": (checkpoints, "write_finished", kill),
}

if __name__ == "__main__":
    config, point = sys.argv[1:]
    owner, name, replacement = POINTS[point]
    setattr(owner, name, replacement)
    run.train(load_config(TrainConfig, Path(config)))
