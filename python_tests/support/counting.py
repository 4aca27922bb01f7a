"""How much work something is, counted in calls: what a busy or slow machine does not change."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class TooManyCalls(Exception):
    pass


@contextlib.contextmanager
def at_most_calls(limit: int) -> Iterator[None]:
    """Raises TooManyCalls where this thread calls more functions, of Python or of C; a generator
    that goes on counts as one."""
    left = limit

    def count(frame, event, argument):
        nonlocal left
        if event in ("call", "c_call"):
            left -= 1
            if left < 0:
                sys.setprofile(before)
                raise TooManyCalls(f"more than {limit:,}, in {frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def calls_within(folder: str, run: Callable[[], Any]) -> int:
    """How many functions of Python files below `folder` this thread calls while `run` runs."""
    found = 0

    def count(frame, event, argument):
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(folder)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


class HostReads(TorchFunctionMode):
    """Counts what would have the host wait for a device: `reads` names them, in their order.

        with HostReads() as counted:
            ...
        assert counted.reads == []

    On a GPU torch's own counter of synchronisations would be asked; without one, that values are
    asked for (`item`, `tolist`, `cpu`, `nonzero`, a tensor as a condition, ...) by calls of Python
    or within torch.
    """

    _ASKING = frozenset(
        ["item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__",
         "__index__", "unique", "masked_select", "equal", "allclose", "is_nonzero", "bincount"]
    )  # fmt: skip
    _WITHIN = frozenset(
        ["aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
         "aten::is_nonzero", "aten::_unique2", "aten::bincount"]
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __enter__(self):
        reads, within = self.reads, self._WITHIN

        class Within(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func._schema.name
                mask = name == "aten::index" and any(
                    i is not None and i.dtype == torch.bool for i in args[1]
                )
                if name in within or mask:
                    reads.append(name)
                return func(*args, **(kwargs or {}))

        self._inner = Within()
        self._inner.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self._inner.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self._ASKING:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))
