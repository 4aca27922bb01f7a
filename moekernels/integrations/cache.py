"""Experts of a transformers model in host memory or mapped files, and a few of each layer in slots:
a model whose experts do not fit where they are computed, or not in memory at all, runs.

    import moekernels.integrations.transformers
    from moekernels.integrations.cache import cached

    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moekernels")
    cache = cached(model, slots=16, policy="lru", folder="experts/")  # maps them from there
    model.generate(...)
    print(cache.report())

For inference alone. Outputs have the bits of the resident model: a row's result does not hang on
where its expert lies, and a token's rows are added in the order of its choices. While a layer and
the attention behind it compute, the experts that the next layer's router would choose for this
layer's input are fetched. Legend: T tokens, K top-k, E experts, H hidden, S slots per layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from moekernels.errors import UsageError
from moekernels.integrations import _slots
from moekernels.integrations._cache import LAYER, ExpertCache, Layer, Rows, check_memory, mapped
from moekernels.integrations._slots import Slots
from moekernels.integrations.transformers import (
    CACHE,
    NAME,
    Parameters,
    parameters_of,
    weighted_rows,
)

GATES = ("gate", "router")  # what a block calls the router beside its experts


def cached(
    model: nn.Module,
    slots: int,
    policy: str = "lru",
    *,
    prefetch: bool = True,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
) -> ExpertCache:
    """Put the experts of a model behind a cache of `slots` a layer; the model then runs as before.

    `folder`: write all experts there and map them, so that their memory is free afterwards; experts
    on the meta device are those that another call has written there. None: they stay where they
    are. `device`: of the slots; None: the experts' own. UsageError where the model's experts do not
    run as "moekernels", are cached already, or the slots do not fit; the model is then as it was.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter)
    ]
    if not found:
        raise UsageError("cache: no layer of the model has experts that it could keep")
    if any(hasattr(module, CACHE) for _, module in found):
        raise UsageError("cache: the model's experts are cached already")
    config = getattr(found[0][1], "config", model.config)
    chosen = getattr(config, "_experts_implementation", None)
    if chosen != NAME:
        raise UsageError(
            f"cache: the model's experts run as {chosen!r}; load it with "
            f'experts_implementation="{NAME}"'
        )
    layers = []
    for number, (name, module) in enumerate(found):
        each = parameters_of(module)._asdict()
        whole = {k: v.detach() for k, v in each.items() if v is not None}
        experts = len(whole["w1"])
        _slots.check(slots, policy, experts)
        if number == 0:
            check_memory(whole, slots, len(found))
        if folder is not None or whole["w1"].is_meta:
            whole = mapped(whole, None if folder is None else Path(folder), number)
        place = torch.device(device) if device is not None else whole["w1"].device
        kept = {
            k: torch.zeros(slots, *v.shape[1:], dtype=v.dtype, device=place)
            for k, v in whole.items()
        }
        gate = _gate_of(model, name, experts)
        layers.append(Layer(whole, kept, Slots(slots, policy), gate, _rows_of))
    cache = ExpertCache(layers, policy, prefetch)
    for number, (_, module) in enumerate(found):  # nothing can fail any more
        for key, parameter in list(module.named_parameters(recurse=False)):
            if len(parameter) == layers[number].experts:
                shell = torch.empty_like(parameter, device="meta")
                setattr(module, key, nn.Parameter(shell, requires_grad=False))
        setattr(module, LAYER, number)
        setattr(module, CACHE, cache)
    return cache


def _rows_of(
    module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, kept: dict[str, Tensor]
) -> Rows:
    return weighted_rows(module, x, ids, weights, Parameters(**kept))


def _gate_of(model: nn.Module, name: str, experts: int) -> Tensor | None:
    """The weight [E, H] of the router beside an experts module, where there is one to be seen."""
    block = model.get_submodule(name.rpartition(".")[0])
    for key in GATES:
        weight = getattr(getattr(block, key, None), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == experts:
            return weight
    return None
