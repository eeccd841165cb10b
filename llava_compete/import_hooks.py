"""Contexts that run around the first import of another package's module, whoever imports it.

Used for two things: transformers learns our model type once it has been imported, and optional packages that a library
would import merely because they are installed stay out (Weights & Biases takes a second, bitsandbytes another).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType


def import_inside(module: str, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Run the first import of `module` inside `context()`; nothing happens where it has been imported already."""
    if module not in sys.modules:
        sys.meta_path.insert(0, _Around(module, context))


@contextmanager
def not_installed(package: str) -> Iterator[None]:
    """Make `package` look as if it were not installed, unless it has been imported already.

    None in `sys.modules` is Python's own way to say so: `import` raises ModuleNotFoundError and
    `importlib.util.find_spec` returns None.
    """
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


class _Around(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds nothing itself: lends its place to the loader that the other finders give."""

    def __init__(self, module: str, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._module, self._context = module, context
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
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
        with self._context():
            self._loader.exec_module(module)
