"""The router: a product per token, then `ops.gate`. T tokens, H hidden, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moekernels import ops, reference
from moekernels.errors import UsageError
from moekernels.model.decoder import DecoderSpec
from moekernels.model.tensors import SELECTION_BIAS
from moekernels.nn import choice
from moekernels.nn.home import Home
from moekernels.nn.linear import linear
from moekernels.nn.norm import RMSNorm
from moekernels.ops.gate import gate
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import shard
from moekernels.parallel.tensor import copy_to, swap_columns

# (layer, logits [T, E], ids [T, K] that the gate chose) -> the ids to use instead, or None to keep
# them.
RouteHook = Callable[[int, Tensor, Tensor], Tensor | None]


class Router(nn.Module):
    """logits of own tokens: by tokens under sequence parallel, else by columns and exchanged."""

    selection_bias: Tensor | None

    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        layer: int,
        home: Home,
        *,
        name: str,
    ) -> None:
        super().__init__()
        self.config, self.top_k, self.layer = config, config.top_k, layer
        self.tp, self.by_columns = mesh.tp, not home.sequence_parallel and mesh.tp.size > 1
        full_shape = (config.num_experts, config.d_model)
        if self.by_columns:
            if config.num_experts % mesh.tp.size:
                raise UsageError(
                    f"layout: tp {mesh.tp.size} does not divide the gate of {config.num_experts} "
                    "experts; use sequence parallel"
                )
            part = config.num_experts // mesh.tp.size
            mine = (mesh.tp.rank * part, (mesh.tp.rank + 1) * part)
            info = shard(full_shape, {0: [mine]})
        else:
            info = shard(full_shape, reduce_over="stage", copies="stage")
        self.shards = {"weight": info}
        self.weight = home.normal(info, config.init_std, f"{name}.weight")
        self.bias = None
        if config.router_bias:
            if self.by_columns:
                info = shard(full_shape[:1], {0: [mine]})
            else:
                info = shard(full_shape[:1], reduce_over="stage", copies="stage")
            self.shards["bias"] = info
            self.bias = home.filled(info.local_shape, 0.0)
        bias = None
        if config.bias_update_rate > 0:  # moves the choice only, and by no gradient
            bias = torch.zeros(config.num_experts, device=home.device)
        self.register_buffer(SELECTION_BIAS, bias)

    def logits(self, x: Tensor) -> Tensor:
        """x [T/tp, H], or [T, H] replicated where the gate goes by columns -> [T/tp, E], fp32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if not self.by_columns:
            return linear(x.to(wide), self.weight, self.bias)
        return swap_columns(linear(copy_to(x, self.tp).to(wide), self.weight, self.bias), self.tp)

    def _gating(self) -> dict[str, Any]:
        """How `ops.gate` chooses and weighs, in its order."""
        config = self.config
        return {
            "top_k": self.top_k,
            "score": config.score,
            "bias": self.selection_bias,
            "num_groups": config.num_groups,
            "groups_kept": config.groups_kept,
            "group_score": config.group_score,
            "renormalize": config.renormalize,
            "scale": config.scale,
        }

    def behind(
        self,
        norm: RMSNorm,
        x: Tensor,
        added: Tensor,
        valid: Tensor | None,
        hook: RouteHook | None = None,
        segments: Tensor | None = None,
    ) -> choice.Chosen:
        """x and added [T/tp, H]: the norm of their sum, that sum, and `gate` of the norm's logits,
        in one autograd function where nothing else stands between."""
        plain = self.by_columns or self.bias is not None or hook is not None
        if not plain and choice.fits(x, norm.weight, self.weight):
            gating = self._gating()
            if self.selection_bias is not None:
                gating["bias"] = self.selection_bias.to(x.dtype)
            way = choice.Way(norm.eps, tuple(gating.values()), segments, valid)
            return choice.choose(x, added, norm.weight, self.weight, way)
        normed, total = norm.behind(x, added)
        return choice.Chosen(normed, total, self.gate(self.logits(normed), valid, hook, segments))

    def gate(
        self,
        logits: Tensor,
        valid: Tensor | None,
        hook: RouteHook | None = None,
        segments: Tensor | None = None,
    ) -> ops.GateOutput:
        """logits [T, E] -> weights and ids [T, K] and the sums of the losses, over each of the
        segments [S+1] where they are given; tokens that are not valid go nowhere."""
        out = gate(logits, **self._gating(), segments=segments, valid=valid)
        if hook is None:
            return out
        ids = hook(self.layer, logits.detach(), out.ids)
        if ids is None or torch.equal(ids, out.ids):
            return out
        c = self.config
        weights, *_ = reference.gate_sums(logits, ids, c.score, c.renormalize, c.scale, None)
        counts = _counts(ids, logits.shape[1], segments)
        return out._replace(weights=weights, ids=ids, counts=counts)


def _counts(ids: Tensor, num_experts: int, segments: Tensor | None) -> Tensor:
    """ids [T, K] -> [1, E] int64, or [S, E] with segments [S+1], which hold every token."""
    parts = 1 if segments is None else len(segments) - 1
    places = ids.long()
    if segments is not None:
        token = torch.arange(len(ids), device=ids.device)
        places = places + num_experts * torch.searchsorted(segments[1:], token, right=True)[:, None]
    return torch.bincount(places[ids >= 0], minlength=parts * num_experts).view(parts, num_experts)
