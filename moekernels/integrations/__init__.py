"""Adapters that put the ops behind other libraries' interfaces; each one is imported by itself.

Importing this package imports none of those libraries, and yet makes
`experts_implementation="moekernels"` known to transformers, whichever is imported first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.integrations.moe"


class _WhenImported:
    """A finder that lets the others find transformers' registry, and registers with it then."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        importlib.import_module(f"{__name__}.transformers")
    except ImportError as error:  # theirs is too old: their users must not notice
        warnings.warn(str(error), stacklevel=2)


if _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenImported())
