"""What lmms-eval finds through the entry point `lmms_eval.models` (pyproject.toml).

Kept apart from the model class and free of heavy imports: lmms-eval loads every installed entry point at start-up, and
one that fails to import disables all the others without a word.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from llava_compete.errors import UserError

GROUP, NAME = "lmms_eval.models", "llava_compete"
HERE = f"{__name__}:manifests"


def check_registered() -> None:
    """An installation whose entry point is missing or of an older version is a `UserError`: lmms-eval names neither."""
    found = [entry.value for entry in metadata.entry_points(group=GROUP) if entry.name == NAME]
    if HERE not in found:
        raise UserError(
            f"entry point {NAME!r} of {GROUP}: found {', '.join(found) or 'none'}, expected {HERE}; "
            "install llava_compete again (pip install -e . in a clone)"
        )


def manifests() -> Any:
    """The `ModelManifest` of `--model llava_compete`: a simple model, since chat models cannot do loglikelihood."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=NAME,
        simple_class_path="llava_compete.evaluation.lmms.model.LlavaCompeteLmms",
    )
