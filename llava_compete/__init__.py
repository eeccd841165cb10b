"""llava_compete: visual instruction tuning with competition-routed sparse mixtures of experts.

Importing this package makes transformers' Auto classes and pipelines know the model type `llava_compete`. That needs
transformers and torch, seconds of import time which `llava-compete --help` and the data tools should not pay; so the
registration happens when transformers is first imported, or at once where it already is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


class _RegisterAfterTransformers(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds nothing itself; runs the registration once the import of `transformers` has finished."""

    def __init__(self) -> None:
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        # A module of ours that is importing transformers right now is half made: the model package, which it belongs
        # to or will import, registers at its own end.
        ours = [item for name, item in sys.modules.items() if name.startswith("llava_compete.")]
        if not any(getattr(item.__spec__, "_initializing", False) for item in ours):
            importlib.import_module("llava_compete.model")


if "transformers" in sys.modules:
    importlib.import_module("llava_compete.model")
else:
    sys.meta_path.insert(0, _RegisterAfterTransformers())
