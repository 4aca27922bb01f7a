"""moekernels: Mixture-of-Experts training from the kernel up. See README.md for the map."""

from __future__ import annotations

import importlib.machinery
import os
import pkgutil
from types import ModuleType

__version__ = "0.1.0"


def _with_installed_libraries(path: list[str]) -> list[str]:
    """The folders of this package: beside a source tree whose libraries are not built (for this
    Python), the installed package of the same version, for its libraries alone. A source tree in
    the current folder hides the installed package, built though that is."""
    libraries = ["_C.so"], ["_host" + end for end in importlib.machinery.EXTENSION_SUFFIXES]

    def built(folder: str) -> bool:
        return all(
            any(os.path.exists(os.path.join(folder, n)) for n in names) for names in libraries
        )

    if built(path[0]):
        return path
    from importlib.metadata import distributions  # here: a built package needs no look at others

    for found in distributions(name=__name__):
        folder = str(found.locate_file(__name__))
        if found.version == __version__ and built(folder):
            return [*path, folder]
    return path


__path__ = _with_installed_libraries(__path__)


def __getattr__(name: str) -> ModuleType:
    """`moekernels.ops` and the other parts, imported when first asked for."""
    if name in __dir__():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    parts = [part.name for part in pkgutil.iter_modules(__path__[:1]) if part.name[0] != "_"]
    return sorted({*globals(), *parts})
