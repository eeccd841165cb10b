"""What was evaluated: the digest of a checkpoint's files, its stage and the seed it was trained with.

Every evaluation stores these facts in its summary.json. By them `compare` knows two evaluations of one checkpoint, and
which runs of two methods share a seed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.files import read_json


def checkpoint_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint of this package; an error where there is none."""
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UserError(f"{directory}: no checkpoint here (no config.json)")
    config: dict[str, Any] = read_json(config_file)
    if config.get("model_type") != "llava_compete":
        raise UserError(f"{config_file}: model_type is {config.get('model_type')!r}, expected 'llava_compete'")
    return config


def checkpoint_facts(directory: Path, adapter: Path | None = None) -> dict[str, Any]:
    """SHA-256 over a checkpoint's files (and an adapter's), its stage, if it has experts, and its training seed."""
    config = checkpoint_config(directory)
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter here (no adapter_config.json)")
    return {
        "path": str(directory),
        "sha256": _files_digest(directory),
        "adapter_sha256": _files_digest(adapter) if adapter else None,
        "stage": config.get("stage"),
        "moe": config.get("moe") is not None,
        "training_seed": training_seed(adapter or directory),
    }


def refuse_competition_at_inference(directory: Path) -> None:
    """Raise a `UserError` for a checkpoint with a part whose competition the loss judges: no loss, no competition."""
    for part, layer in (checkpoint_config(directory).get("moe") or {}).items():
        if isinstance(layer, dict) and layer.get("competition_judge") == "loss":
            raise UserError(
                f"competition_at_inference: {directory} has moe.{part}.competition_judge 'loss', which competes in "
                "training's backward only; expected false"
            )


def training_seed(directory: Path) -> int | None:
    """The seed in the manifest of the run that wrote a checkpoint or adapter; None where no manifest is near."""
    for place in (directory, directory.parent):  # an adapter lies in its run's directory
        manifest = place / "run" / "manifest.json"
        if manifest.is_file():
            seeds = read_json(manifest).get("seeds") or {}
            return seeds.get("seed")
    return None


def _files_digest(directory: Path) -> str:
    """Over weights, configs and tokenizer."""
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
