"""The mixture-of-experts layer. Legend: T tokens, H hidden, E experts, K top-k."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekernels.model.decoder import DecoderSpec
from moekernels.nn.dispatcher import Dispatcher
from moekernels.nn.experts import Experts
from moekernels.nn.ffn import SharedExpert
from moekernels.nn.router import RouteHook, Router
from moekernels.parallel.expert import Kept
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import join_tokens, split_tokens


class MoE(nn.Module):
    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        layer: int,
        dispatcher: Dispatcher,
        *,
        sequence_parallel: bool,
        seed: int,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        common = {"seed": seed, "dtype": dtype, "device": device}
        self.router = Router(
            config,
            mesh,
            layer,
            sequence_parallel=sequence_parallel,
            name=f"{name}.router",
            **common,
        )
        self.experts = Experts(config, mesh, name=f"{name}.experts", **common)
        self.shared = None
        if config.shared_d_ff:
            parallel = {"sequence_parallel": sequence_parallel, **common}
            self.shared = SharedExpert(config, mesh, name=f"{name}.shared", **parallel)
        self.dispatcher = dispatcher
        self.tp, self.replicated = mesh.tp, not sequence_parallel

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None,
        hook: RouteHook | None = None,
        segments: Tensor | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T/tp, H] ([T, H] where replicated), valid [T/tp] -> the same shape, and of own tokens
        the scores' sum [1, E], the counts [1, E] and the z-loss' sum [1]; S of each with segments
        [S+1]."""
        logits = self.router.logits(x)
        own = split_tokens(x, self.tp) if self.replicated else x
        weights, ids, *sums = self.router.gate(logits, valid, hook, segments)
        rows, routing = self.dispatcher.dispatch(own, ids, weights, kept)
        y = self.dispatcher.combine(self.experts(rows, routing), routing)
        if self.replicated:
            y = join_tokens(y, self.tp)
        return (y if self.shared is None else y + self.shared(x), *sums)
