"""What the tests know of an op.

`cases/` has a file for each stem, which calls `register(OpSpec(...))`. The contract test walks
`all_specs()`: values and gradients against the reference in fp64, gradcheck, opcheck of every raw
op that a call reaches, torch.compile, messages, determinism. Legend: T tokens, E experts, K top-k,
R routed rows.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekernels import reference
from moekernels.ops._op import wide  # noqa: F401  beside what else makes inputs
from python_tests.support import cases

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One call, `fn(**inputs)`. Its tensors ask for no gradient: the test sets that on copies."""

    name: str
    inputs: dict[str, Any]
    gradcheck: bool = True  # False where finite differences make no sense (a kink) or take too long
    compile: bool = False  # also held to the compiled function; one or two cases an op
    again: bool = (
        True  # False where a raw call cannot be made a second time, as what it awaits came
    )


@dataclass(frozen=True)
class OpSpec:
    name: str  # of the public function
    fn: Callable[..., Any]
    reference: Callable[..., Any]  # same signature, plain torch, differentiable
    # Small cases, ordinary and hostile, for a dtype; the same ones at every call.
    cases: Callable[[torch.dtype], Iterable[Case]]
    # Inputs in fp32 for any number of tokens: one compiled graph serves them all.
    sized: Callable[[int], dict[str, Any]]
    # Inputs that may ask for a gradient; a case may leave them None.
    differentiable: tuple[str, ...] = ()
    # Floating outputs and gradients equal the reference's bit for bit; integers always do.
    exact: bool = False
    # Bad calls, and the exact text that each raises.
    messages: Callable[[], Iterable[tuple[Callable[[], Any], str]]] = tuple
    # Inputs large enough for several threads.
    large: Callable[[torch.dtype], dict[str, Any]] | None = None
    # The bytes that are kept for backward, given the inputs.
    saved: Callable[[dict[str, Any]], int] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    # No function of `ops`: it writes into memory that ranks address, so it is neither compiled nor
    # differentiated; held to values, bits, schemas and messages on every backend.
    private: bool = False


_registry: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    _registry[spec.name] = spec
    return spec


def all_specs(*, private: bool = False) -> list[OpSpec]:
    """Of every stem that has a file in `cases/`; the private ones too, if asked for."""
    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"{cases.__name__}.{module.name}")
    return [spec for spec in _registry.values() if private or not spec.private]


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def randn(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values, drawn in fp64 and rounded: a case holds the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def random_ids(tokens: int, experts: int, top_k: int, seed: int = 0) -> Tensor:
    """[T, K] int32, the K ids of a token differ."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)
    return order[:, :top_k].int()


def ids_cases() -> Iterator[tuple[str, Tensor, int]]:
    """(name, ids [T, K] int32, E): the routings that every op must take, hostile ones included."""
    yield "ordinary", random_ids(37, 6, 3), 6
    yield "odd", random_ids(29, 24, 5, seed=1), 24
    yield "no_tokens", random_ids(0, 4, 2), 4
    yield "one_token", random_ids(1, 4, 2), 4
    yield "empty_experts", random_ids(33, 3, 2, seed=2) * 5 + 1, 17  # experts 1, 6 and 11 only
    yield "all_to_one", torch.full((19, 1), 2, dtype=torch.int32), 4
    yield "k_is_e", random_ids(11, 4, 4, seed=3), 4
    dropped = random_ids(23, 5, 2, seed=4)
    dropped[::3, 0] = -1
    dropped[1::4, 1] = 5
    dropped[7] = -1
    yield "dropped_ids", dropped, 5
    yield "all_dropped", torch.full((5, 2), -1, dtype=torch.int32), 3


def routing_cases(alignment: int = 1) -> Iterator[tuple[str, Tensor, int, reference.Routing]]:
    """(name, ids [T, K], E, their routing): for ops that take a routing rather than make it."""
    for name, ids, experts in ids_cases():
        yield name, ids, experts, reference.route(ids, experts, alignment=alignment)
    ids = random_ids(31, 5, 2, seed=5)
    yield "capacity", ids, 5, reference.route(ids, 5, capacity=7)
    yield "alignment", ids, 5, reference.route(ids, 5, alignment=8)


def routed(tokens: int, experts: int = 5, top_k: int = 2) -> reference.Routing:
    """For `OpSpec.sized`: only tokens may differ from size to size."""
    return reference.route(random_ids(tokens, experts, top_k), experts)


def large_routing(tokens: int = 1024, experts: int = 16, top_k: int = 4) -> reference.Routing:
    return reference.route(random_ids(tokens, experts, top_k), experts)
