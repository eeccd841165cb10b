"""What lmms-eval finds through the entry point `lmms_eval.models` (pyproject.toml).

Kept apart from the model class and free of heavy imports: lmms-eval loads every installed entry point at start-up, and
one that fails to import disables all the others without a word.
"""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """The `ModelManifest` of `--model llava_compete`: a simple model, since chat models cannot do loglikelihood."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llava_compete",
        simple_class_path="llava_compete.evaluation.lmms.model.LlavaCompeteLmms",
    )
