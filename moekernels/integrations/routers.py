"""The fused router in models of transformers, for whoever asks for it.

    from moekernels.integrations.routers import fuse_routers
    fuse_routers(model)  # beside experts_implementation="moekernels", or alone

A router there is a module with a weight [E, H] that makes (logits, weights, ids) of tokens, each
class in its own words. What one computes is found by trying: a copy of the module and each way of
`ops.gate` run on the same random tokens, and only a router that one of them equals is replaced.

Legend: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekernels import ops, reference
from moekernels.errors import UsageError

_BIAS = "e_score_correction_bias"  # of the choice: a buffer, or an argument of forward
_KEPT_AS = "_moekernels_router"
_TOKENS = 128


@dataclass(frozen=True)
class Router:
    """What a router does with its logits, and the dtypes that it does it in."""

    gate: tuple[tuple[str, Any], ...]  # the arguments for `ops.gate`
    wide: bool  # the product is made in fp32, whatever the model's dtype
    wide_weights: bool  # they are returned in fp32, else in the logits' dtype
    scalars: tuple[tuple[str, Any], ...]  # of the module: where one changes it is tried anew


def fuse_routers(model: nn.Module) -> list[str]:
    """Replace the forward of each router in a model that `ops.gate` computes; the others stay.

    Weights, checkpoints, hooks and what is recorded of routers stay as they are; a softmax over
    bf16 logits is made in fp32. `del router.forward` brings a router's own back.

    Returns:
        The names of the routers that run fused.

    Raises:
        UsageError: the model has none that can be.
    """
    fused, left = [], []
    for name, module in model.named_modules():
        if not _looks_like_one(module):
            continue
        module.__dict__.pop("forward", None)
        found = find(module)
        if found is None:
            left.append(f"{name} ({type(module).__name__})")
            continue
        setattr(module, _KEPT_AS, found)
        module.forward = MethodType(_forward, module)
        fused.append(name)
    if not fused:
        what = f"what {left[0]} computes is none of its ways" if left else "there is no router"
        raise UsageError(f"fuse_routers: {type(model).__name__}: {what}; run it as it is")
    return fused


def _looks_like_one(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(module, "top_k")


def _forward(self: nn.Module, hidden_states: Tensor, *args: Tensor) -> tuple:
    """hidden_states [..., H] (and the bias [E] of the choice) -> logits [T, E], weights [T, K], ids
    [T, K] int64."""
    kept: Router = getattr(self, _KEPT_AS)
    if not torch.compiler.is_compiling() and kept.scalars != _scalars(self):
        found = find(self)
        if found is None:
            raise UsageError(
                f"{type(self).__name__} was changed to what ops.gate has not; del its forward"
            )
        kept = found
        setattr(self, _KEPT_AS, kept)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    own: Any = self
    dtype = torch.float32 if kept.wide else own.weight.dtype
    bias = getattr(own, "bias", None)
    bias = None if bias is None else bias.to(dtype)
    logits = F.linear(x.to(dtype), own.weight.to(dtype), bias)
    out = ops.gate(logits, bias=args[0] if args else getattr(self, _BIAS, None), **dict(kept.gate))
    weights = out.weights if kept.wide_weights else out.weights.to(logits.dtype)
    return logits, weights, out.ids.long()


def find(module: nn.Module) -> Router | None:
    """What the module's own forward computes; None where it is no way of the gate."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(parameters) > 2 or parameters[1:] not in ([], [_BIAS]):
        return None
    # In a thread of its own the trial runs outside of every mode that the caller may be in.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_find, module, len(parameters) > 1).result()


def _find(module: nn.Module, bias_is_given: bool) -> Router | None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    own, weight = _copy(module, drawn), module.weight
    assert isinstance(weight, Tensor)
    experts, hidden = weight.shape
    x = drawn(_TOKENS, hidden)
    given = [drawn(experts)] if bias_is_given else []
    bias = given[0] if given else getattr(own, _BIAS, None)
    try:
        answer = own(x, *given)
        narrow = own.bfloat16()(x.bfloat16(), *given)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # made for something else
        return None
    if not (_is_answer(answer, experts) and _is_answer(narrow, experts)):
        return None
    logits, weights, ids = answer
    for how in _candidates(module, ids.shape[1]):
        try:
            out = reference.gate(logits, bias=bias, **how)
        except (RuntimeError, ValueError):  # more groups than experts, and the like
            continue
        mine = torch.zeros_like(logits).scatter(1, out.ids.long(), out.weights)
        if torch.allclose(mine, torch.zeros_like(logits).scatter(1, ids, weights), atol=1e-5):
            wide, wide_weights = (t.dtype == torch.float32 for t in narrow[:2])
            return Router(tuple(how.items()), wide, wide_weights, _scalars(module))
    return None


def _copy(module: nn.Module, drawn: Any) -> nn.Module:
    """The module with random numbers in fp32 on the CPU, its own forward, no hooks."""
    own = type(module).__new__(type(module))
    nn.Module.__init__(own)
    kept = {k: v for k, v in module.__dict__.items() if k not in own.__dict__ and k != "forward"}
    own.__dict__.update({k: copy.copy(v) for k, v in kept.items() if not isinstance(v, Tensor)})
    width = {name: p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0 for name, p in _tensors(module)}
    for name, p in module._parameters.items():
        value = None if p is None else nn.Parameter(drawn(*p.shape) * width[name])
        own.register_parameter(name, value)
    for name, b in module._buffers.items():
        own.register_buffer(name, None if b is None else drawn(*b.shape) * width[name])
    own._modules.update(module._modules)
    return own.train()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None:
            yield name, t


def _is_answer(found: Any, experts: int) -> bool:
    if not isinstance(found, tuple) or len(found) != 3:
        return False
    if not all(isinstance(t, Tensor) and t.ndim == 2 and len(t) == _TOKENS for t in found):
        return False
    logits, weights, ids = found
    return logits.shape[1] == experts and weights.shape == ids.shape and ids.dtype == torch.int64


def _candidates(module: nn.Module, top_k: int) -> Iterator[dict[str, Any]]:
    """Every way of the gate that the module's own settings allow."""

    def own(*names: str) -> Any:
        return next((v for n in names if (v := getattr(module, n, None)) is not None), None)

    normed, groups = own("norm_topk_prob"), own("num_group", "n_group")
    scales = dict.fromkeys([own("routed_scaling_factor") or 1.0, 1.0])
    cuts: list[dict] = [{}]
    if groups and groups > 1:
        kept = {"num_groups": groups, "groups_kept": own("topk_group")}
        cuts = [{**kept, "group_score": score} for score in reference.GROUP_SCORES] + cuts
    renorms = [True, False] if normed is None else [bool(normed)]
    for cut, scale, score, renorm in product(cuts, scales, reference.SCORES, renorms):
        yield {"top_k": top_k, "score": score, "renormalize": renorm, "scale": scale, **cut}


def _scalars(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Every plain value of the module that its forward may read."""
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if type(value) in (bool, int, float, str) and name != "training"
    )
