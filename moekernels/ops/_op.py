"""What every public op does beside its kernel."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moekernels.ops import _derivatives
from moekernels.ops._derivatives import in_functorch


def op(plain: Callable | None) -> Callable[[Callable], Callable]:
    """Decorates a public op: an argument of a wrong kind is named (TypeError), and `plain`, the op
    in plain torch, computes where a transform takes derivatives that the kernel has not (None: the
    op has no derivatives)."""

    def decorate(fn: Callable) -> Callable:
        @functools.wraps(fn)
        def call(*args, **kwargs):
            try:
                if forward_ad._current_level >= 0 or in_functorch():  # `transformed`, inlined
                    bound = inspect.signature(fn).bind(*args, **kwargs).arguments
                    return _derivatives.under_transforms(fn.__name__, fn, plain, bound)
                return fn(*args, **kwargs)
            except Exception:
                complaint = _wrong_kind(fn, args, kwargs)
                if complaint is None:
                    raise
            raise TypeError(complaint)

        return call

    return decorate


def require_tensor(value: Any) -> None:
    """For an argument that only a backward reads: `op` says which of them is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"must be a tensor, got {type(value).__name__}")


# Annotation -> what a message calls it, and whether a value is one.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    Tensor: ("a tensor", lambda v: isinstance(v, Tensor)),
    bool: ("a bool", lambda v: isinstance(v, (bool, torch.SymBool))),
    int: ("an int", lambda v: hasattr(v, "__index__") and not isinstance(v, Tensor)),
    float: ("a number", lambda v: isinstance(v, (numbers.Real, torch.SymFloat, torch.SymInt))),
    str: ("a str", lambda v: isinstance(v, str)),
    torch.dtype: ("a torch.dtype", lambda v: isinstance(v, torch.dtype)),
    types.NoneType: ("None", lambda v: v is None),
}


def _wrong_kind(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Which argument is no tensor, number or name where `fn`'s annotations ask for one; None if
    all are."""
    try:
        arguments = inspect.signature(fn).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    hints = typing.get_type_hints(fn)
    for name, value in arguments.items():
        kinds = [_KINDS[k] for k in typing.get_args(hints[name]) or [hints[name]] if k in _KINDS]
        if kinds and not any(holds(value) for _, holds in kinds):
            wanted = " or ".join(words for words, _ in kinds)
            way = "; torch.as_tensor makes one" if kinds[0][0] == "a tensor" else ""
            return f"{fn.__name__}: {name} must be {wanted}, got {type(value).__name__}{way}"
    return None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of routing weights and sums beside `dtype`: fp64 stays, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
