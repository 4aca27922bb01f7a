"""A whole model's experts in the host's memory, and a few of each layer in slots where it computes,
for `moekernels generate`. Legend: T tokens, K top-k, E experts, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.integrations import _slots
from moekernels.integrations._cache import LAYER, ExpertCache, Layer, Rows, check_memory
from moekernels.nn.dispatcher import PartOfExperts, Routed
from moekernels.nn.experts import Experts
from moekernels.nn.transformer import StageModel


class CachedDispatcher:
    """In the place of a layer's own: rows go to slots. It says that it has parts, so that it is
    given the whole way from choices to results."""

    parts, posts, straight = 2, False, False

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache

    def dispatch(self, *_: object) -> tuple[Tensor, Routed]:
        raise RuntimeError("a cache of experts is for inference alone")

    def combine(self, rows: Tensor, routing: Routed) -> Tensor:
        raise RuntimeError("a cache of experts is for inference alone")

    def in_parts(self, x: Tensor, ids: Tensor, weights: Tensor, experts: PartOfExperts) -> Tensor:
        assert isinstance(experts, Experts)
        return self.cache.forward(experts, x, ids, weights)


def cached(model: StageModel, slots: int, policy: str, device: torch.device) -> ExpertCache:
    """Put the experts of a whole model behind `slots` a layer on the device; they stay where they
    are. The model's outputs keep their bits. UsageError where the slots do not fit."""
    layers: list[Layer] = []
    modules = model.experts_layers
    for number, moe in enumerate(modules):
        whole = {name: p.detach() for name, p in moe.experts.named_parameters()}
        _slots.check(slots, policy, moe.experts.count)
        if number == 0 and device.type == "cpu":
            check_memory(whole, slots, len(modules))
        kept = {
            name: torch.zeros(slots, *x.shape[1:], dtype=x.dtype, device=device)
            for name, x in whole.items()
        }
        gate = moe.router.weight.detach()
        layers.append(Layer(whole, kept, _slots.Slots(slots, policy), gate, _rows_of))
    cache = ExpertCache(layers, policy, prefetch=True)
    for number, moe in enumerate(modules):
        for name, parameter in list(moe.experts.named_parameters()):
            shell = torch.empty_like(parameter, device="meta")
            setattr(moe.experts, name, nn.Parameter(shell, requires_grad=False))
        setattr(moe.experts, LAYER, number)
        moe.dispatcher = CachedDispatcher(cache)
    return cache


def _rows_of(
    module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, kept: dict[str, Tensor]
) -> Rows:
    """As the layer's own experts and dispatcher have them."""
    routing = ops.route(ids, len(kept["w1"]))
    row_weights = ops.permute_weights(weights, routing)
    routed = Routed(row_weights, routing.offsets, routing.token_of, routing.row_of, None)
    rows = torch.func.functional_call(module, kept, (x, routed))
    return Rows(rows, routing, None)
