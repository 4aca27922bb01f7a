"""Which fused kernel, if any, computes what an experts module does between its two products.

A class that keeps transformers' default gate (`act_fn(gate) * up`) with a well-known `act_fn` is
known by identity. Any other is tried: its `_apply_gate` (`act_fn` where there is no gate) and each
fused candidate run on the same random numbers, forward and backward, and only a match within
rounding is fused. The answer is kept on the instance together with everything it rests on
(functions, scalar attributes), so that a changed `alpha` is tried anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe

from moekernels import reference


@dataclass(frozen=True)
class Epilogue:
    """What `ops.experts` is told to do between the products; activation None: no kernel has it."""

    activation: str | None
    interleaved: bool = False
    alpha: float | None = None
    limit: float | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for `ops.experts` and `reference.activate`."""
        given: dict[str, Any] = {"activation": self.activation, "interleaved": self.interleaved}
        if self.alpha is not None:
            given["alpha"] = self.alpha
        if self.limit is not None:
            given["limit"] = self.limit
        return given


UNFUSED = Epilogue(None)

_ACT_BY_TYPE = {
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.ReLUSquaredActivation: "relu2",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
_ACT_BY_FUNCTION = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
_GATED = {
    act: Epilogue(name) for act, name in (("silu", "swiglu"), ("gelu", "geglu"), ("relu", "reglu"))
}
_UNGATED = {act: Epilogue(act) for act in ("silu", "gelu", "relu2")}
_PARAMETERS = {"gate_up_proj", "up_proj", "down_proj"}
_PARAMETERS |= {name + "_bias" for name in _PARAMETERS}
_KEPT_AS = "_moekernels_epilogue"


def epilogue_of(experts: nn.Module, width: int) -> Epilogue:
    """The epilogue of a module whose first product is `width` wide (2F, or F without a gate)."""
    gated = getattr(experts, "has_gate", True)
    if not gated or _has_default_gate(experts):
        name = _act_name(getattr(experts, "act_fn", None))
        known = _GATED if gated else _UNGATED
        if name in known:
            return known[name]
    kept = experts.__dict__.get(_KEPT_AS)
    if kept is not None and kept.holds(experts):
        return kept.epilogue
    if torch.compiler.is_compiling():
        # Nothing can be tried while a graph is traced; the compiler fuses the class' own gate.
        return UNFUSED
    found = _Found.by_trying(experts, gated, width)
    setattr(experts, _KEPT_AS, found)
    return found.epilogue


def _has_default_gate(experts: nn.Module) -> bool:
    default = getattr(moe, "_default_apply_gate", None)
    own = getattr(type(experts), "_apply_gate", None)
    return own is not None and own is default and "_apply_gate" not in experts.__dict__


def _act_name(act: Any) -> str | None:
    if not isinstance(act, nn.Module):
        return _ACT_BY_FUNCTION.get(act)
    if act._forward_hooks or act._forward_pre_hooks:
        return None  # somebody watches or changes what passes here
    return _ACT_BY_TYPE.get(type(act))


def function_of(experts: nn.Module, gated: bool) -> Callable[[Tensor], Tensor]:
    """What runs between the products."""
    return getattr(experts, "_apply_gate" if gated else "act_fn")


def _identity(experts: nn.Module, gated: bool) -> object:
    """Of that: a bound method is another object each time."""
    function = function_of(experts, gated)
    return getattr(function, "__func__", function) if gated else function


@dataclass(frozen=True)
class _Found:
    """An answer and what it rests on."""

    epilogue: Epilogue
    gated: bool
    function: object
    act_fn: object
    scalars: tuple[tuple[str, str, Any], ...]  # (owner, attribute, value)

    @classmethod
    def by_trying(cls, experts: nn.Module, gated: bool, width: int) -> _Found:
        scalars = tuple(_scalars(experts))
        act_fn = getattr(experts, "act_fn", None)
        if _has_state(experts, act_fn):
            epilogue = UNFUSED
        else:
            # In a thread of its own the trial runs outside of every mode that the caller may be in:
            # autocast, inference, checkpointing (which counts saved tensors), fake tensors.
            with ThreadPoolExecutor(1) as thread:
                epilogue = thread.submit(_match, experts, gated, width, scalars).result()
        return cls(epilogue, gated, _identity(experts, gated), act_fn, scalars)

    def __reduce__(self) -> tuple[type, tuple]:
        """Copied or pickled with its module it becomes None: functions may not pickle."""
        return type(None), ()

    def holds(self, experts: nn.Module) -> bool:
        return (
            self.function is _identity(experts, self.gated)
            and self.act_fn is getattr(experts, "act_fn", None)
            and all(
                getattr(_owner(experts, owner), name, None) == value
                for owner, name, value in self.scalars
            )
        )


def _owner(experts: nn.Module, owner: str) -> Any:
    return getattr(experts, owner, None) if owner else experts


def _scalars(experts: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Every plain value that a gate can read from its module, the config or the activation."""
    for owner in ("", "config", "act_fn"):
        for name, value in getattr(_owner(experts, owner), "__dict__", {}).items():
            if type(value) in (bool, int, float, str):
                yield owner, name, value


def _has_state(experts: nn.Module, act_fn: Any) -> bool:
    """Whether the epilogue may read what changes unseen: tensors (a learned slope), hooks."""
    own = {*experts._parameters, *experts._buffers} - _PARAMETERS
    if own or any(isinstance(value, Tensor) for value in experts.__dict__.values()):
        return True
    if any(child is not act_fn for child in experts.children()):
        return True
    if not isinstance(act_fn, nn.Module):
        return False
    parts = (act_fn._modules, act_fn._parameters, act_fn._buffers)
    return any(parts) or bool(act_fn._forward_hooks or act_fn._forward_pre_hooks)


def _match(
    experts: nn.Module, gated: bool, width: int, scalars: tuple[tuple[str, str, Any], ...]
) -> Epilogue:
    """The candidate that agrees with the module on random numbers, else UNFUSED."""
    h = _probe(width)
    try:
        wanted = _value_and_grad(function_of(experts, gated), h)
    except (RuntimeError, TypeError, ValueError):  # not made for such a tensor: it will say so
        return UNFUSED
    if wanted is None:
        return UNFUSED
    for candidate in _candidates(experts, gated, scalars):
        got = _value_and_grad(partial(reference.activate, **candidate.arguments()), h)
        if got is not None and all(_close(a, b) for a, b in zip(got, wanted)):
            return candidate
    return UNFUSED


def _candidates(
    experts: nn.Module, gated: bool, scalars: tuple[tuple[str, str, Any], ...]
) -> Iterator[Epilogue]:
    if not gated:
        yield from _UNGATED.values()
        return
    numbers = [(name, float(v)) for _, name, v in scalars if type(v) in (int, float)]
    limits = dict.fromkeys(v for name, v in numbers if "limit" in name or "clamp" in name)
    alphas = dict.fromkeys([v for name, v in numbers if "alpha" in name] + [1.702])
    split_first = getattr(experts, "is_concatenated", True)
    for interleaved in (not split_first, split_first):
        for plain in _GATED.values():
            yield Epilogue(plain.activation, interleaved)
        for limit in limits:
            yield Epilogue("swiglu_clamped", interleaved, limit=limit)
            for alpha in alphas:
                yield Epilogue("swiglu_oai", interleaved, alpha, limit)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def _probe(width: int) -> Tensor:
    """[rows, width] numbers, half around 1 and half from 1e-2 to 1e4, so that every clamp shows."""
    rows = max(4, 8192 // max(width, 1))
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(draw: Callable[..., Tensor]) -> Tensor:
        return draw(rows, width, generator=generator, device="cpu", dtype=torch.float32)

    near = 2 * drawn(torch.randn)
    far = 10 ** (6 * drawn(torch.rand) - 2) * near.sign()
    return torch.where(drawn(torch.rand) < 0.5, far, near)


def _value_and_grad(f: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor] | None:
    """f(h), and the gradient of its sum; None if f is no smooth function of h alone."""
    h = h.clone().requires_grad_()
    y = f(h)
    if not isinstance(y, Tensor) or y.grad_fn is None or len(y) != len(h):
        return None
    (grad,) = torch.autograd.grad(y.sum(), h)
    return y.detach(), grad
