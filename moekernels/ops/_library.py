"""Loads the kernels. Importing this registers the raw, private ops as
`torch.ops.moekernels._<name>`."""

from __future__ import annotations

from pathlib import Path

import torch

import moekernels

# Two folders where the package is a source tree and an installed one has the libraries.
_FOUND = [path for folder in moekernels.__path__ if (path := Path(folder) / "_C.so").exists()]
if not _FOUND:
    raise ImportError(
        f"moekernels is not built: {Path(moekernels.__path__[0]) / '_C.so'} does not exist, and "
        f"moekernels {moekernels.__version__} is not installed for this Python. "
        "Run `make build` in the source tree, or `pip install --no-build-isolation .`"
    )
LIBRARY = _FOUND[0]
torch.ops.load_library(str(LIBRARY))
raw = torch.ops.moekernels
