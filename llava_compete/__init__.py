"""llava_compete: visual instruction tuning with competition-routed sparse mixtures of experts.

Importing this package makes transformers' Auto classes and pipelines know the model type `llava_compete`. That needs
transformers and torch, seconds of import time which `llava-compete --help` and the data tools should not pay; so the
registration happens when transformers is first imported, or at once where it already is.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llava_compete.import_hooks import import_inside, not_installed


@contextmanager
def _then_register() -> Iterator[None]:
    yield
    # A module of ours that is importing transformers right now is half made: the model package, which it belongs to or
    # will import, registers at its own end.
    ours = [item for name, item in sys.modules.items() if name.startswith("llava_compete.")]
    if not any(getattr(item.__spec__, "_initializing", False) for item in ours):
        importlib.import_module("llava_compete.model")


if "transformers" in sys.modules:
    importlib.import_module("llava_compete.model")
else:
    import_inside("transformers", _then_register)

# A third of a rank's imports. The Trainer imports wandb itself where `report_to` names it, and model/lora.py sees to
# bitsandbytes where the weights are quantised.
import_inside("timm.utils.summary", functools.partial(not_installed, "wandb"))
import_inside("peft.helpers", functools.partial(not_installed, "bitsandbytes"))
