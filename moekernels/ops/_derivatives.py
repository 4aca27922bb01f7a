"""Derivatives that a kernel has not: of gradients, forward mode, and under `torch.func`.

They are rare, so there they are computed in plain torch, which differentiates itself: by the
reference of an op, on whatever the op was given or has kept. The ordinary path asks two flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def constant_in_graphs(fn: Callable[[], bool]) -> Callable[[], bool]:
    """`torch.compiler.assume_constant_result` without its import of the whole compiler."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the compiler's mark
    return fn


@constant_in_graphs  # a compiler guards on torch.func's transforms by itself
def in_functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether forward mode or a `torch.func` transform looks at what is computed now."""
    return forward_ad._current_level >= 0 or in_functorch()


def refuse_transforms(name: str) -> None:
    """For what has no derivative but the ordinary gradient."""
    if transformed():
        raise RuntimeError(
            f"{name}: has no forward-mode derivative and takes part in no torch.func transform; "
            "use torch.autograd.grad or backward()"
        )


def refuse_gradients(name: str, why: str, *tensors: Tensor | None) -> None:
    """For what has no derivative at all: never a gradient that is missing without a word."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{name}: not differentiable ({why}); give detached tensors")


def _differentiates(tensors: Iterable[Any]) -> bool:
    """Whether a transform that is active takes derivatives, rather than maps alone (`vmap`)."""
    if forward_ad._current_level >= 0:
        return True
    stack = _functorch.get_interpreter_stack() or []
    if any(level.key() != _functorch.TransformType.Vmap for level in stack):
        return True
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )


def _is_mapped(t: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return False


def under_transforms(
    name: str, fn: Callable, plain: Callable | None, arguments: dict[str, Any]
) -> Any:
    """`fn(**arguments)` under the transforms that are active, in plain torch where one of them
    takes derivatives. `vmap` alone runs the kernel once for each entry, as torch does."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(f"{name}: is not compiled under torch.func and forward mode")
    if not _differentiates(arguments.values()):
        return fn(**arguments)
    if plain is None:
        raise RuntimeError(f"{name}: not differentiable, by forward mode and torch.func neither")
    for key, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_floating_point() and _is_mapped(value):
            raise RuntimeError(
                f"{name}: {key} must not be mapped by torch.vmap where derivatives are taken; "
                "call the op once for each"
            )
    return plain(**arguments)


def needs_plain() -> bool:
    """Asked in a backward: whether what it returns is differentiated again (`create_graph`) or
    looked at by a transform."""
    return (torch.is_grad_enabled() or transformed()) and not torch.compiler.is_compiling()


def vjp(
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    alias: Callable[[int, Tensor], Tensor] = lambda i, t: t.view_as(t),
) -> list[Tensor | None]:
    """The gradients of `plain(*inputs)`, differentiable again.

    One of `grads` for each output (None: zero), one of the result for each input, None where it is
    not `needed`. `alias(i, input)` is what stands for a needed input, so that a gradient ends there
    even where one input was computed from another.
    """
    # Some of torch's own derivatives have forward mode only where they can be differentiated again.
    create_graph = torch.is_grad_enabled() or transformed()
    with torch.enable_grad():
        own = [
            alias(i, t) if need and t is not None else t
            for i, (t, need) in enumerate(zip(inputs, needed))
        ]
        outputs = plain(*own)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        roots = [(y, g) for y, g in zip(outputs, grads) if g is not None and y.requires_grad]
        wanted = [i for i, need in enumerate(needed) if need and inputs[i] is not None]
        result: list[Tensor | None] = [None] * len(inputs)
        if roots:
            found = torch.autograd.grad(
                [y for y, _ in roots],
                [t for i in wanted if (t := own[i]) is not None],
                [g for _, g in roots],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, g in zip(wanted, found):
                result[i] = g
    return result
