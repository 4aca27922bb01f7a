"""torchtitan's experts and token dispatchers on our ops (torchtitan 0.3), by its own overrides:

    --override.imports moekernels.integrations.torchtitan.experts \\
        moekernels.integrations.torchtitan.local_dispatcher \\
        moekernels.integrations.torchtitan.all_to_all_dispatcher

Each can be had alone. Under `experts` a layer's gate and up weights lie in one parameter, as
torchtitan's own `fused_grouped_experts` has them; checkpoints keep them apart.

Legend: T tokens, D model dimension, F expert hidden, E experts, e local experts, K top-k, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels import ops
from moekernels.errors import UsageError
from moekernels.integrations.transformer_engine import chunk_order
from moekernels.ops import Routing

try:
    import spmd_types as spmd
    from torchtitan.config import derive, override
    from torchtitan.distributed.spmd_types import current_spmd_mesh, maybe_set_sparse_mesh
    from torchtitan.distributed.utils import get_spmd_backend
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.common.token_dispatcher import (
        AllToAllTokenDispatcher,
        LocalTokenDispatcher,
    )
    from torchtitan.overrides.fused_swiglu import FusedGroupedExperts, fused_grouped_experts
except ImportError as error:
    raise ImportError(
        "moekernels.integrations.torchtitan needs torchtitan 0.3 and what it imports, triton among "
        f"it ({error}): pip install torchtitan triton"
    ) from error

__all__ = [
    "AllToAllDispatcher",
    "Experts",
    "LocalDispatcher",
    "all_to_all_dispatcher",
    "experts",
    "local_dispatcher",
]


class Experts(FusedGroupedExperts):
    """x [R, D] in expert order, the rows of each local expert [e] -> [R, D] in x's dtype, computed
    in bf16 as torchtitan's are, h and the activation in fp32. Rows past the last are zero."""

    @dataclass(kw_only=True, slots=True)
    class Config(FusedGroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        w1, w2 = (w.to_local() if hasattr(w, "to_local") else w for w in (self.w13, self.w2_EDF))
        w1 = w1.reshape(w1.shape[0], -1, w1.shape[-1])  # gate and up alternate
        offsets = F.pad(num_tokens_per_expert_E.cumsum(0), (1, 0))
        x, w1, w2 = (t.bfloat16() for t in (x_RD, w1, w2))
        return ops.experts(x, None, w1, w2, offsets, interleaved=True).type_as(x_RD)


@override(target=GroupedExperts.Config, exact=True, description="Experts on moekernels' ops.")
def experts(cfg: Any) -> Any:
    """SwiGLU experts, sharded and initialised as they were."""
    return derive(fused_grouped_experts(cfg), Experts.Config)


@dataclass(frozen=True)
class Dispatched:
    """What `combine` reads of a dispatch."""

    routing: Routing
    scores: Tensor  # [T, K]
    exchange: Any = None  # torchtitan's own, where there was one

    def combined(self, rows: Tensor, x: Tensor) -> Tensor:
        """rows [R, D] in the routing's order -> [T, D], weighted and summed in fp32."""
        routing = self.routing
        return ops.combine(rows, routing.row_of, routing.token_of, self.scores).type_as(x)


class LocalDispatcher(LocalTokenDispatcher):
    """For layers whose experts all lie here: `route`, `permute`, `combine`."""

    @dataclass(kw_only=True, slots=True)
    class Config(LocalTokenDispatcher.Config):
        pass

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Dispatched]:
        """x [T, D], scores and ids [T, K], counts [E] -> rows [T K, D], counts, for `combine`."""
        routing = ops.route(topk_expert_ids_TK, self.num_experts)
        rows = ops.permute(x_TD, routing.token_of, routing.row_of)
        return rows, num_local_tokens_per_expert_E, Dispatched(routing, topk_scores_TK)

    def combine(self, routed_output_RD: Tensor, metadata: Dispatched, x_TD: Tensor) -> Tensor:
        """rows [T K, D] -> [T, D]."""
        return metadata.combined(routed_output_RD, x_TD)


@override(target=LocalTokenDispatcher.Config, exact=True, description="moekernels' permutation.")
def local_dispatcher(cfg: Any) -> Any:
    """The dispatcher of a layer whose experts are not spread over ranks."""
    return derive(cfg, LocalDispatcher.Config)


class AllToAllDispatcher(AllToAllTokenDispatcher):
    """torchtitan's exchange, between our permutations on both sides of it.

    Raises:
        UsageError: under torchtitan's checking of SPMD types, of which kernels have none.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Dispatched]:
        """x [T, D], scores and ids [T, K], counts [E] -> rows [R, D] of the local experts, their
        counts [e], for `combine`."""
        if get_spmd_backend() == "spmd_types" and spmd.is_type_checking():
            raise UsageError(
                "moekernels' AllToAllDispatcher: its steps have no SPMD types to check; leave "
                "all_to_all_dispatcher out of override.imports, or turn type checking off"
            )
        scores, ids, counts = topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
        self._routing = ops.route(ids, self.num_experts)  # read below, in this very call
        rows, counts, exchange = super().dispatch(x_TD, scores, ids, counts)
        return rows, counts, Dispatched(self._routing, scores, exchange)

    def _local_reorder(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        routing = self._routing
        rows = ops.permute(x_TD, routing.token_of, routing.row_of)
        return rows, routing.token_of, topk_scores_TK  # what `Dispatched` keeps

    def _permute(self, routed_input_RD: Tensor, num_global_tokens_per_local_expert_E: Tensor):
        counts = num_global_tokens_per_local_expert_E.view(self.ep_mesh.size(), -1)
        by_expert = torch.arange(counts.numel(), device=counts.device).view_as(counts).T
        rows = _arrived(routed_input_RD)
        source, target = chunk_order(rows, counts.reshape(-1), by_expert.reshape(-1))
        return rows.shape, ops.permute(rows, source, target), (source, target), counts.sum(0)

    def combine(self, routed_output_RD: Tensor, metadata: Dispatched, x_TD: Tensor) -> Tensor:
        """rows [R, D] of the local experts -> [T, D]."""
        rows, exchange = routed_output_RD, metadata.exchange
        if self.ep_mesh is not None:
            source, target = exchange.permuted_indices
            rows = ops.permute(rows, target.reshape(-1), source[:, None])
            with maybe_set_sparse_mesh():
                mesh = current_spmd_mesh() if get_spmd_backend() == "spmd_types" else self.ep_mesh
                group = mesh.get_group("ep") if mesh is not self.ep_mesh else mesh.get_group()
                splits = exchange.input_splits, exchange.output_splits
                rows = self._combine_token_exchange(rows, group, *splits)
        return metadata.combined(_arrived(rows), x_TD)


def _arrived(rows: Tensor) -> Tensor:
    """Rows once their exchange is over: no kernel waits for it by itself."""
    return torch.ops._c10d_functional.wait_tensor(rows) if hasattr(rows, "wait") else rows


@override(
    target=AllToAllTokenDispatcher.Config, exact=True, description="moekernels' permutations."
)
def all_to_all_dispatcher(cfg: Any) -> Any:
    """The dispatcher of a layer whose experts are spread over ranks."""
    return derive(cfg, AllToAllDispatcher.Config)
