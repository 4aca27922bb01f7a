"""The FFN that every token visits. Legend: T tokens, H hidden, F hidden of this tp shard."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.model.decoder import DecoderSpec
from moekernels.nn.experts import epilogue
from moekernels.nn.home import Home
from moekernels.nn.linear import linear
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import shard
from moekernels.parallel.tensor import copy_to, gather_tokens, reduce_from, scatter_tokens


class FeedForward(nn.Module):
    """w1 [1, 2F, H] (ungated [1, F, H]) by columns and w2 [1, H, F] by rows over tp: one expert to
    `ops.experts`, which keeps, accumulates and recomputes as it does for the routed ones."""

    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        d_ff: int,
        home: Home,
        *,
        name: str,
    ) -> None:
        super().__init__()
        mesh.layout.divide("tp", d_ff, "hidden units of an FFN")
        self.tp, self.sequence_parallel = mesh.tp, home.sequence_parallel
        self.how = epilogue(config)
        part = d_ff // mesh.tp.size
        mine = (mesh.tp.rank * part, (mesh.tp.rank + 1) * part)
        up = [mine]
        if config.gated:  # the gate's and the up-projection's rows of a shard both lie here
            up.append((d_ff + mine[0], d_ff + mine[1]))
        narrow = config.init_std / (2 * config.num_layers) ** 0.5
        self.shards = {
            "w1": shard(
                (1, config.up_rows * d_ff, config.d_model),
                {1: up},
                stacked=(d_ff,) * config.up_rows,
            ),
            "w2": shard((1, config.d_model, d_ff), {2: [mine]}),
        }
        for key, std in (("w1", config.init_std), ("w2", narrow)):
            info = self.shards[key]
            setattr(self, key, home.normal(info, std, f"{name}.{key}"))

    def forward(self, x: Tensor) -> Tensor:
        """x [T/tp, H] under sequence parallel, else [T, H] -> the same shape."""
        x = gather_tokens(x, self.tp) if self.sequence_parallel else copy_to(x, self.tp)
        bounds = torch.tensor([0, x.shape[0]], dtype=torch.int64, device=x.device)
        y = ops.experts(
            x,
            None,
            self.w1,
            self.w2,
            bounds,
            **self.how,
        )
        return scatter_tokens(y, self.tp) if self.sequence_parallel else reduce_from(y, self.tp)


class SharedExpert(FeedForward):
    """A feed-forward beside the routed experts; `gate` [1, H], where there is one, scales a token's
    result by sigmoid(<gate, x>)."""

    def __init__(self, config: DecoderSpec, mesh: Mesh, home: Home, *, name: str) -> None:
        super().__init__(config, mesh, config.shared_d_ff, home, name=name)
        self.gate = None
        if config.shared_gate:
            # The same on every rank of a stage; under sequence parallel each sees its own tokens.
            over = "stage" if self.sequence_parallel else "dp"
            info = shard((1, config.d_model), reduce_over=over, copies="stage")
            self.shards["gate"] = info
            self.gate = home.normal(info, config.init_std, f"{name}.gate")

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.gate is None else y * torch.sigmoid(linear(x, self.gate))
