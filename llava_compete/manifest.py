"""What a run was: resolved config, package versions, git state, seeds and data digest, saved beside its results.

Every command that makes a checkpoint or a score calls `write_manifest`; nothing in the program reads it back to
decide behaviour (that is config.json's job), except to refuse a resume whose data or geometry changed.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llava_compete.config import dump_yaml
from llava_compete.files import write_json

PACKAGES = (
    "llava_compete", "torch", "torchvision", "transformers", "accelerate", "deepspeed", "open_clip_torch", "timm",
    "peft", "datasets", "tokenizers", "safetensors", "pillow", "numpy", "lmms-eval", "lm-eval",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Installed version by package; packages that are not installed are left out."""
    found = ((name, _version(name)) for name in PACKAGES)
    return {"python": platform.python_version(), **{name: version for name, version in found if version is not None}}


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any]:
    """Commit of the source tree and whether it has uncommitted changes; empty where this file is in no git checkout, or
    in somebody else's: an environment often lies below another project."""
    try:
        _git("ls-files", "--error-unmatch", "manifest.py")
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def last_change(*rooms: str) -> str | None:
    """The commit that changed one of these folders of the package last; None where `git_state` is empty, or where one
    has uncommitted changes, so that no commit names what runs."""
    try:
        _git("ls-files", "--error-unmatch", "manifest.py")
        if _git("status", "--porcelain", "--", *rooms):
            return None
        return _git("log", "-1", "--format=%H", "--", *rooms) or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_manifest(
    directory: Path,
    config: BaseModel | dict[str, Any],
    *,
    seeds: dict[str, int],
    data_digest: str | None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `run/config.yaml` and `run/manifest.json` under `directory`."""
    run = Path(directory) / "run"
    run.mkdir(parents=True, exist_ok=True)
    dump_yaml(config, run / "config.yaml")
    manifest = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "packages": package_versions(),
        "git": git_state(),
        "seeds": seeds,
        "data_digest": data_digest,
        **(extra or {}),
    }
    write_json(run / "manifest.json", manifest)
