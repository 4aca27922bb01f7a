"""One layer's experts on this rank. Legend: R routed rows, e local experts, H hidden, I expert
input width (H, or wider where rows are lifted), F expert hidden of this etp shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.model.decoder import DecoderSpec
from moekernels.nn.dispatcher import Routed
from moekernels.nn.home import Home
from moekernels.nn.spare import Spare
from moekernels.parallel.clock import SpanClock
from moekernels.parallel.exchange import Part
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo, shard

expert_clock = SpanClock()  # of this process: forward passes of experts, and their rows


def epilogue(config: DecoderSpec) -> dict[str, Any]:
    """How `ops.experts` goes from one product to the other, and what it keeps."""
    return {
        "activation": config.activation,
        "alpha": config.activation_alpha,
        "limit": config.activation_limit,
        "recompute": config.recompute_experts,
    }


class Experts(nn.Module):
    """w1 [e, 2F, I] (ungated [e, F, I]) and w2 [e, I, F]; with a lift also w_in [e, I, H] and w_out
    [e, H, I].

    Under ETP w1 is split by columns and w2 by rows; the lift is the same on all shards and, being
    linear, takes their partial results as it would take the whole.
    """

    w1: nn.Parameter
    w2: nn.Parameter
    b1: nn.Parameter | None
    b2: nn.Parameter | None
    w_in: nn.Parameter
    w_out: nn.Parameter

    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        home: Home,
        *,
        name: str,
    ) -> None:
        super().__init__()
        layout, d_in, d_ff = mesh.layout, config.d_in, config.expert_d_ff
        layout.validate(num_experts=config.num_experts, d_ff=d_ff)
        self.how = {**epilogue(config), "fp8": config.fp8_experts}
        self.count = e = config.num_experts // layout.ep
        f = d_ff // layout.etp
        experts = (mesh.ep_index * e, (mesh.ep_index + 1) * e)
        hidden = (mesh.etp_index * f, (mesh.etp_index + 1) * f)
        up = [hidden]
        if config.gated:  # the gate's and the up-projection's rows of a shard both lie here
            up.append((d_ff + hidden[0], d_ff + hidden[1]))
        self.shards: dict[str, ShardInfo] = {}
        std = config.init_std
        narrow = std / (2 * config.num_layers) ** 0.5  # what ends in the residual stream

        def add(
            key: str,
            shape: Sequence[int],
            ranges: dict,
            std: float,
            copies: str,
            stacked: Sequence[int] = (),
        ) -> None:
            full_shape = (config.num_experts, *shape)
            self.shards[key] = shard(
                full_shape,
                {0: [experts], **ranges},
                reduce_over=copies,
                copies=copies,
                apart=True,
                stacked=stacked,
            )
            # Every expert has its own generator: a rank makes only those that it holds.
            one = shard(shape, {d - 1: spans for d, spans in ranges.items()})
            device = home.experts_device or home.device
            weight = torch.empty(self.shards[key].local_shape, dtype=home.dtype, device=device)
            for local, number in enumerate(range(*experts)):
                full = home.full(shape, std, f"{name}.{key}.{number}")
                weight[local].copy_(one.take(full))
            setattr(self, key, nn.Parameter(weight))

        self.lifted, self.adds_b2 = config.lifted, mesh.etp_index == 0
        each = (d_ff,) * config.up_rows
        add("w1", (sum(each), d_in), {1: up}, std, "edp", each)
        add("w2", (d_in, d_ff), {2: [hidden]}, std if self.lifted else narrow, "edp")
        self.b1 = self.b2 = None
        if config.expert_bias:
            add("b1", (config.up_rows * d_ff,), {1: up}, 0.0, "edp")
            add("b2", (d_in,), {}, 0.0, "expert_copies")
        if self.lifted:
            add("w_in", (d_in, config.d_model), {}, std, "expert_copies")
            add("w_out", (config.d_model, d_in), {}, narrow, "expert_copies")
        self.spare = Spare(self.weights, home.spare)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters [e, ...] by name."""
        return {key: getattr(self, key) for key in self.shards}

    def hold(self, experts: list[int]) -> None:
        """Say that the experts of these numbers [e] lie here, in this order; moves no weights."""
        self.shards = {key: info.holding(experts) for key, info in self.shards.items()}

    def forward(self, rows: Tensor, routing: Routed, part: Part | None = None) -> Tensor:
        """rows [R, H] in expert order (or their view) -> their weighted results [R, H], partial
        under ETP. `part`: of these experts alone."""
        count = len(routing.weights)
        if expert_clock.running and rows.device.type == "cpu":
            count = int(routing.offsets[-1])  # without the room that no row took
        with expert_clock.span(rows.device, count):
            return self._compute(rows, routing, part)

    def between(self, x: Tensor) -> dict[str, Any] | None:
        """What `parallel.straight.experts` takes for tokens like x [T, H], where it computes the
        same: not under autocast, in FP8, nor for rows that are lifted or go to copies, nor where
        the experts' time is taken."""
        if self.how["fp8"] or self.lifted or self.spare.count or expert_clock.running:
            return None
        if x.dtype != self.w1.dtype:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        biases = {"b1": self.b1, "b2": self.b2 if self.adds_b2 else None}
        how = {key: value for key, value in self.how.items() if key != "fp8"}
        return {"w1": self.w1, "w2": self.w2, **biases, **how}

    def _compute(self, rows: Tensor, routing: Routed, part: Part | None) -> Tensor:
        """Rows of own experts come first, those of copies behind them."""
        own = routing.own_rows
        if own is None:
            return self._products(self.weights, rows, routing, part)
        first, end = part or Part(0, self.count + self.spare.count)
        ours = Part(first, max(first, min(end, self.count)))
        theirs = Part(max(0, first - self.count), max(0, end - self.count))
        cut, offsets = ours.end - ours.first, routing.offsets
        both = [own, len(routing.weights) - own]
        rows_of, weights_of = rows.split(both), routing.weights.split(both)
        results = []
        if cut:
            routed = replace(routing, weights=weights_of[0], offsets=offsets[: cut + 1])
            results.append(self._products(self.weights, rows_of[0], routed, ours))
        if both[1] or not cut:
            routed = replace(routing, weights=weights_of[1], offsets=offsets[cut:] - offsets[cut])
            results.append(self._products(self.spare.weights, rows_of[1], routed, theirs))
        return torch.cat(results) if len(results) > 1 else results[0]

    def _products(
        self, weights: dict[str, Tensor], rows: Tensor, routing: Routed, part: Part | None
    ) -> Tensor:
        token_of, row_of = routing.token_of, routing.row_of
        w = {key: _of_part(weight, part) for key, weight in weights.items()}
        if self.lifted:
            if token_of is not None:
                rows, token_of, row_of = ops.permute(rows, token_of, row_of), None, None
            rows = ops.grouped_gemm(rows, w["w_in"], routing.offsets)
        y = ops.experts(
            rows,
            routing.weights,
            w["w1"],
            w["w2"],
            routing.offsets,
            token_of=token_of,
            row_of=row_of,
            b1=w.get("b1"),
            b2=w.get("b2") if self.adds_b2 else None,  # of partial results one has it
            **self.how,
        )
        if not self.lifted:
            return y
        return ops.grouped_gemm(y, w["w_out"], routing.offsets)


def _of_part(w: Tensor, part: Part | None) -> Tensor:
    """Some experts of a parameter [e, ...]. Where it has a main gradient they are a leaf of their
    own, whose gradient goes there: autograd would pad it to all experts first."""
    if part is None or len(w) == part.end - part.first:
        return w
    main_grad = getattr(w, "main_grad", None)
    if main_grad is None:
        return w[part.first : part.end]
    leaf = w.detach()[part.first : part.end].requires_grad_(w.requires_grad)
    own = main_grad[part.first : part.end]
    leaf.main_grad = own  # type: ignore[attr-defined]  # torch has no such field
    return leaf
