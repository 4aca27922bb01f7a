"""Vocabulary-parallel embedding: each rank holds the rows of its part of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekernels.nn.home import Home
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import even_range, shard
from moekernels.parallel.tensor import reduce_from, scatter_tokens


class VocabularyWeight(nn.Module):
    """A [V, H] table split by rows over tp; parts differ by at most one row: no padding."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        mesh: Mesh,
        home: Home,
        *,
        std: float,
        name: str,
        group: str = "dp",
    ) -> None:
        """group: of the mesh, the ranks that hold these rows and whose gradients are summed."""
        super().__init__()
        self.first, self.end = even_range(vocab_size, mesh.tp.rank, mesh.tp.size)
        info = shard(
            (vocab_size, d_model),
            {0: [(self.first, self.end)]},
            reduce_over=group,
            copies=group,
        )
        self.weight = home.normal(info, std, f"{name}.weight")
        self.shards = {"weight": info}


def embed(
    table: VocabularyWeight, tokens: Tensor, mesh: Mesh, *, sequence_parallel: bool
) -> Tensor:
    """tokens [T] -> [T/tp, H] (all [T, H] without sequence parallel)."""
    if mesh.tp.size == 1:
        return F.embedding(tokens, table.weight)
    here = (tokens >= table.first) & (tokens < table.end)
    local = torch.where(here, tokens - table.first, 0)
    partial = F.embedding(local, table.weight) * here[:, None]
    return scatter_tokens(partial, mesh.tp) if sequence_parallel else reduce_from(partial, mesh.tp)
