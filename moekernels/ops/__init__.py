"""The ops, as public differentiable functions.

Every file here without an underscore is a stem; its `__all__` names what this package offers of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from moekernels.ops._library import LIBRARY, raw
from moekernels.ops._memory import release_memory as release_memory

__all__: list[str] = []

for _found in pkgutil.iter_modules(__path__):
    if not _found.name.startswith("_"):
        try:
            _stem = importlib.import_module(f"{__name__}.{_found.name}")
        except AttributeError as error:
            if error.obj is not raw:
                raise
            raise ImportError(
                f"{LIBRARY} was built from other sources than this Python's: it has no "
                f"{error.name}; run `make build`",
                name="moekernels._C",
            ) from None
        # A function takes the place of the module of its name.
        globals().update({_name: getattr(_stem, _name) for _name in _stem.__all__})
        __all__ += _stem.__all__
__all__ = sorted([*__all__, "release_memory"])

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
