"""How transformers learns of our checkpoints when somebody writes ``import sparsert``.

transformers has no entry point for quantizers, only ``register_quantizer``. To call it we would have to import
transformers, which costs seconds that ``import sparsert`` must not cost. And registering only if transformers
happens to be imported already is a trap: import sorters put sparsert first, and an unknown ``quant_method`` is a
warning and a model of random weights. So the import of the one module that holds transformers' table of quantizers is
watched, and the entry added right behind it. What it costs: one string comparison for each module imported later.

Who does not want that can call ``sparsert.integrations.transformers.register()``; it makes no difference twice.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

#: Holds transformers' table of quantizers; imported with its first model class.
_TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register our quantizer with transformers now if its table is loaded, else as soon as it is."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _register() -> None:
    try:
        from sparsert.integrations.transformers import register

        register()
    except (ImportError, AttributeError) as error:
        # importing transformers must not fail because of us
        warnings.warn(
            f"sparsert could not register with transformers, which will not read its checkpoints: {error}; "
            "transformers 5 is needed",
            stacklevel=2,
        )


class _TableFinder(importlib.abc.MetaPathFinder):
    """Finds the table where it is, and asks to be told when it has run."""

    _searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _TableLoader(spec.loader)
        return spec


class _TableLoader(importlib.abc.Loader):
    """The module's own loader, and our registration behind it."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        _register()
