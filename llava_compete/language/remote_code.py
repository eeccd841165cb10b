"""Language models whose Python files come with their weights: nothing of them runs unless `trust_remote_code` asks.

To trust a source registers its classes with transformers for this process, so whatever builds or loads the model later
needs no flag. A checkpoint takes the files along and stays self-contained; loading it asks for trust again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module

from llava_compete.errors import UserError

logger = logging.getLogger(__name__)


def register_remote_code(source: str | Path, config: dict[str, Any], trusted: bool) -> None:
    """Register the classes that a language model's config.json (`config`) names among the files of `source`.

    Does nothing for a model type that transformers has itself, also where the source brings code for it.

    Raises:
        UserError: there is code to run, and it is not trusted.
    """
    references = config.get("auto_map") or {}
    if config.get("model_type") in CONFIG_MAPPING or "AutoConfig" not in references:
        return
    names = ", ".join(sorted(references.values()))
    if not trusted:
        raise UserError(
            f"{source}: model type {config.get('model_type')!r} needs Python code of its own ({names}); read it, and "
            "run it with `model.trust_remote_code: true` or `load_checkpoint(..., trust_remote_code=True)`"
        )
    logger.warning("trust_remote_code: running %s of %s", names, source)
    config_class: Any = get_class_from_dynamic_module(references["AutoConfig"], source)
    model_class: Any = get_class_from_dynamic_module(references["AutoModelForCausalLM"], source)
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForCausalLM")
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)


def copy_remote_code(language_model: Any, directory: str | Path) -> None:
    """Put the language model's own Python files, if it has any, into `directory`, and their names into its config."""
    if type(language_model).__module__.startswith("transformers_modules."):
        Path(directory).mkdir(parents=True, exist_ok=True)
        for item in (language_model, language_model.config):
            custom_object_save(item, directory, config=language_model.config)
