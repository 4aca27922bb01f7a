"""The `"moekernels"` experts implementation of transformers (5.10 and later).

    import moekernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moekernels")

Importing this module registers the implementation; nothing else of transformers changes. An
experts class whose epilogue (the nonlinearity between its two products) is one that a fused kernel
computes runs fused; any other runs `grouped_gemm -> its own _apply_gate -> grouped_gemm`. What an
epilogue computes is never inferred from a config's `hidden_act`: it is known by the identity of the
class' functions, or else found by trying them (`_epilogue`).

Legend: T tokens, H hidden, F expert hidden, E local experts, K top-k, R routed rows.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.errors import UsageError
from moekernels.integrations._cache import Rows
from moekernels.integrations._epilogue import UNFUSED, Epilogue, epilogue_of, function_of

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
except ImportError as error:  # older than 5.0, or none at all
    raise ImportError(
        "moekernels.integrations.transformers needs transformers >= 5.10 (its registry of experts "
        "implementations): pip install 'transformers>=5.10'"
    ) from error

NAME = "moekernels"
# What a class can say of itself when it is registered. `is_concatenated` is not read: how its
# halves lie is found with what its gate computes.
_KNOWN = {"experts_class", "experts_interface", "is_concatenated", "is_transposed"}
_KNOWN |= {"has_bias", "has_gate", "has_post_expert_norm"}


def _unknown_flags(decorator: Callable[..., object]) -> tuple[tuple[str, object], ...]:
    """(name, default) of what a newer transformers lets a class say beside that."""
    parameters = inspect.signature(decorator).parameters
    return tuple((name, p.default) for name, p in parameters.items() if name not in _KNOWN)


_UNKNOWN = _unknown_flags(use_experts_implementation)


def register() -> None:
    """Make `experts_implementation="moekernels"` known and, from 5.23 on, `ep_implementation`;
    calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    with contextlib.suppress(ModuleNotFoundError):  # older
        importlib.import_module("moekernels.integrations.expert_parallel")


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls in place of an experts class' own forward, with the module as `self`.

    hidden_states [T, H], top_k_index [T, K] integers, top_k_weights [T, K] of any float dtype ->
    [T, H] in hidden_states' dtype. Ids outside [0, E) mark experts that live elsewhere (expert
    parallelism): they contribute nothing.
    """
    for name, default in _UNKNOWN:
        if (value := getattr(self, name, default)) != default:
            raise UsageError(
                f"{type(self).__name__}: {name} is {value!r}, and what it means is not known to "
                f"experts_implementation={NAME!r}; use another implementation"
            )
    if (cache := getattr(self, CACHE, None)) is not None:
        return cache.forward(self, hidden_states, top_k_index, top_k_weights)
    rows = weighted_rows(self, hidden_states, top_k_index, top_k_weights, parameters_of(self))
    return rows.combined().to(hidden_states.dtype)


CACHE = "_moekernels_cache"  # an experts module whose weights lie elsewhere has it


class Parameters(NamedTuple):
    """Of an experts module, as `ops.experts` takes them."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None


def parameters_of(module: nn.Module) -> Parameters:
    """The module's, whatever its class calls them."""
    # Flags that an older transformers does not set have the value that its classes imply.
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    names = [first, "down_proj"]
    if getattr(module, "has_bias", False):
        names += [f"{name}_bias" for name in names]
    return Parameters(*(getattr(module, name) for name in names))


def weighted_rows(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    parameters: Parameters,
) -> Rows:
    """What experts with these parameters make of their tokens, as the module `self` would."""
    gated = getattr(self, "has_gate", True)
    normed = getattr(self, "has_post_expert_norm", False)
    transposed = getattr(self, "is_transposed", False)
    dtype = _compute_dtype(hidden_states, parameters.w1)
    x = hidden_states.to(dtype)
    w1, w2 = parameters.w1.to(dtype), parameters.w2.to(dtype)
    b1, b2 = (None if b is None else b.to(dtype) for b in (parameters.b1, parameters.b2))
    weights = top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)

    routing = ops.route(top_k_index, w1.shape[0])
    epilogue = UNFUSED if normed else epilogue_of(self, width=w1.shape[2 if transposed else 1])
    if epilogue.activation is not None:
        rows = ops.experts(
            x,
            ops.permute_weights(weights, routing),
            w1,
            w2,
            routing.offsets,
            token_of=routing.token_of,
            row_of=routing.row_of,
            b1=b1,
            b2=b2,
            transposed=transposed,
            **epilogue.arguments(),
        )
        return Rows(rows, routing, None)
    rows = ops.permute(x, routing.token_of, routing.row_of)
    h = _linear(rows, w1, b1, routing.offsets, transposed)
    a = function_of(self, gated)(h)
    rows = _linear(a.to(dtype), w2, b2, routing.offsets, transposed)
    if normed:
        rows = self.get_submodule("post_expert_norm")(rows).to(dtype)
    return Rows(rows, routing, weights)


def _compute_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """The products' dtype: autocast's where it is on (it leaves fp64 alone), else the weights'."""
    device = x.device.type
    if w.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return w.dtype


def _linear(
    rows: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool
) -> Tensor:
    """rows [R, I], w [E, O, I] (transposed: [E, I, O]), bias [E, O] -> [R, O]."""
    y = ops.grouped_gemm(rows, w, offsets, transposed=transposed)
    if bias is None:
        return y
    # Rows past the last group belong to no expert; whatever bias they take, nothing combines them.
    row = torch.arange(rows.shape[0], device=rows.device)
    expert = torch.searchsorted(offsets[1:], row, right=True).clamp(max=w.shape[0] - 1)
    return y + bias[expert]


register()

__all__ = ["NAME", "Epilogue", "epilogue_of", "experts_forward", "register"]
