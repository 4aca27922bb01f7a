"""Loads the kernels. Importing this registers the raw, private ops as
`torch.ops.moekernels._<name>`. MOEKERNELS_LIBRARY names another build of them."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moekernels

# Two folders where the package is a source tree and an installed one has the libraries.
_NAMED = os.environ.get("MOEKERNELS_LIBRARY")
_FOLDERS = [Path(folder) / "_C.so" for folder in moekernels.__path__]
_FOUND = [path for path in ([Path(_NAMED)] if _NAMED else _FOLDERS) if path.exists()]
if _NAMED and not _FOUND:
    raise ImportError(f"MOEKERNELS_LIBRARY names {_NAMED}, which does not exist")
if not _FOUND:
    raise ImportError(
        f"moekernels is not built: {Path(moekernels.__path__[0]) / '_C.so'} does not exist, and "
        f"moekernels {moekernels.__version__} is not installed for this Python. "
        "Run `make build` in the source tree, or `pip install --no-build-isolation .`",
        name="moekernels._C",
    )
LIBRARY = _FOUND[0]
raw = torch.ops.moekernels
try:
    torch.ops.load_library(str(LIBRARY))
    _check = raw._check_environment
except (OSError, AttributeError) as error:
    if not _NAMED:
        raise
    why = error.__cause__ or error
    raise ImportError(f"MOEKERNELS_LIBRARY names {_NAMED}, no library of ours: {why}") from error
_check()


def fake(
    name: str, *, bundle: Any = None, on_cpu: tuple[str, ...] = ()
) -> Callable[[Callable], Callable]:
    """Registers the fake of a raw op: its results' shapes, for tensors without memory. With a
    `bundle`, a NamedTuple of the op's first arguments, the fake takes that in their place.

    It is also what torch calls where some arguments are on meta and others not; then it refuses
    the first that is not where the first argument is (those named in `on_cpu` may be on the CPU
    instead), as the kernels do.
    """
    op = name.strip("_")

    def register(fn: Callable) -> Callable:
        own = tuple(inspect.signature(fn).parameters)
        names = own if bundle is None else (*bundle._fields, *own[1:])

        @functools.wraps(fn)
        def checked(*args, **kwargs):
            device = args[0].device
            for argument, value in (*zip(names, args), *kwargs.items()):
                if not isinstance(value, torch.Tensor) or value.device == device:
                    continue
                if not (argument in on_cpu and value.device.type == "cpu"):
                    raise RuntimeError(
                        f"{op}: {argument} must be on {device} like the first argument, "
                        f"got {value.device}"
                    )
            if bundle is None:
                return fn(*args, **kwargs)
            named = {**dict(zip(names, args)), **kwargs}
            return fn(bundle(*[named.pop(field) for field in bundle._fields]), **named)

        return torch.library.register_fake(f"moekernels::{name}")(checked)

    return register
