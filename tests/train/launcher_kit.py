"""What the stage scripts take for an installed environment, with programs of a test in place of the launchers."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from stage_kit import ROOT

OUR_TORCHRUN = ROOT / "scripts" / "lib" / "torchrun.py"
OURS = ("NUM_GPUS", "NUM_PROCESSES", "HOSTFILE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def write_script(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def environment_of(venv: Path, **changes: str) -> dict[str, str]:
    """This one's, without variables that choose devices or machines."""
    inherited = {key: value for key, value in os.environ.items() if key not in (*OURS, "CUDA_VISIBLE_DEVICES")}
    return {**inherited, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "VENV": str(venv), **changes}


def make_venv(folder: Path, deepspeed: str, torchrun: str) -> Path:
    """An environment whose `deepspeed` and (our) torchrun are these lines of bash."""
    (folder / "bin").mkdir(parents=True)
    write_script(folder / "bin" / "deepspeed", deepspeed)
    write_script(
        folder / "bin" / "python", f'[ "$1" = "{OUR_TORCHRUN}" ] || exec {sys.executable} "$@"; shift; {torchrun}'
    )
    stamp = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    (folder / ".installed").write_text(hashlib.sha256(stamp).hexdigest() + "\n", encoding="utf-8")
    return folder
