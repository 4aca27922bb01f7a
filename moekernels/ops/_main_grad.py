"""`main_grad`: the fp32 buffer of a parameter to which kernels add its gradient themselves.

Only a backward that reaches the parameter may: `backward(inputs=[x])` and `autograd.grad(y, x)` run
through the same functions without. The engine alone knows; it is asked about the parameter's own
node, and only where there is a main gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekernels.ops._library import raw

_wgrad_ = raw._grouped_gemm_wgrad_.default
_dbias_ = raw._experts_dbias_.default


def main_grad_of(w: Tensor | None) -> Tensor | None:
    """The buffer that a parameter's gradient is added to, if it has one and wants a gradient."""
    if w is None or not w.requires_grad:
        return None
    return getattr(w, "main_grad", None)


def reached(
    ctx: Any, main_grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Asked in the backward of a function whose first arguments were `inputs`: those of
    `main_grads`, one each, that this backward adds to. Where there is none the gradient is returned
    as usual: nobody wants it, or `autograd.grad` wants it for itself.

    While a compiler traces all are, and the ops below ask when they run.
    """
    if torch.compiler.is_compiling() or all(g is None for g in main_grads):
        return main_grads
    edges, at = ctx.next_functions, 0  # one for each tensor among the arguments
    added: list[Tensor | None] = []
    for g, t in zip(main_grads, inputs, strict=True):
        added.append(g if g is not None and _accumulates(edges[at][0]) else None)
        at += t is not None
    return added


def _accumulates(node: Any) -> bool:
    """Whether the backward that runs adds to the leaf behind a graph's node."""
    while node.next_functions:  # casts and copies between a parameter and its use
        node = next(n for n, _ in node.next_functions if n is not None)
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient autograd.grad is to return
        return False


def _compiled_backward_reaches(main_grad: Tensor) -> bool:
    """The same, asked from within a compiled backward: about the leaf of the compiled function that
    has this main gradient."""
    node = torch._C._current_autograd_node()
    for leaf, _ in () if node is None else node.next_functions:
        own = getattr(getattr(leaf, "variable", None), "main_grad", None)
        if own is not None and own.data_ptr() == main_grad.data_ptr():
            return _accumulates(leaf)
    return True


class Collect(torch.autograd.Function):
    """w passes through; its gradient goes to main_grad, as the kernels' does."""

    @staticmethod
    def forward(ctx, w: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return w.view_as(w)

    @staticmethod
    def backward(ctx, dw: Tensor) -> tuple[Tensor | None, None]:
        return add(reached(ctx, [ctx.main_grad], [ctx.main_grad])[0], dw), None


def add(main_grad: Tensor | None, dw: Tensor | None) -> Tensor | None:
    """dw after it was added to `main_grad`, which leaves none, or as it is without."""
    if main_grad is None or dw is None:
        return dw
    main_grad.add_(dw.detach())
    return None


# The kernels that add, as a compiled backward calls them: it is one function, whatever part of it
# is wanted. `same` is main_grad, where a compiler replaces what is written to by a copy.
_library = torch.library.Library("moekernels", "FRAGMENT")
_WGRAD = (
    "(Tensor(a!) main_grad, Tensor same, Tensor rows, Tensor drows, Tensor offsets, "
    "bool transposed, Tensor? token_of, SymInt tokens, bool gather, bool tf32=False) -> ()"
)
_DBIAS = (
    "(Tensor(a!) main_grad, Tensor same, Tensor rows, Tensor? weights, Tensor offsets, "
    "Tensor? token_of, SymInt tokens) -> ()"
)


def _if_reached(name: str, schema: str, kernel: Any) -> Any:
    def run(main_grad: Tensor, same: Tensor, *args: Any) -> None:
        if _compiled_backward_reaches(same):
            kernel(main_grad, *args)

    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moekernels::{name}", lambda *args: None, lib=_library)
    compiled = getattr(raw, name).default

    def add_to(main_grad: Tensor, *args: Any) -> None:
        if torch.compiler.is_compiling():
            compiled(main_grad, main_grad, *args)
        else:
            kernel(main_grad, *args)

    return add_to


wgrad_ = _if_reached("_grouped_gemm_wgrad_if_reached_", _WGRAD, _wgrad_)
dbias_ = _if_reached("_experts_dbias_if_reached_", _DBIAS, _dbias_)
