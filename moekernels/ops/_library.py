"""Loads the kernels. Importing this registers the raw, private ops as
`torch.ops.moekernels._<name>`."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_C.so"

if not LIBRARY.exists():
    raise ImportError(
        f"moekernels is not built: {LIBRARY} does not exist. "
        "Run `make build` in the source tree, or `pip install --no-build-isolation .`"
    )
torch.ops.load_library(str(LIBRARY))
raw = torch.ops.moekernels
