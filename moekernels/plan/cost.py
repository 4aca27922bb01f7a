"""What an action takes: a roofline whose terms are affine in a micro-batch's tokens T and in the
sum S2 of its squared sequence lengths, so that a whole flush is a few array operations.

A product of m rows a weight matrix runs at `efficiency * m / (m + half_rows)` of the peak; its time
is then affine in m. Collectives cost `latency` a hop and bytes over bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.nn.config import ModelConfig
from moekernels.parallel.mesh import Layout
from moekernels.plan.memory import chunk_parameters
from moekernels.plan.strategy import STATE_BYTES, WIDTH, Cluster, Strategy

GRADIENT = 4  # bytes of an accumulated gradient


@dataclass(frozen=True)
class Affine:
    """Seconds: fixed + per_token * T + per_square * S2."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_square: float = 0.0

    def __add__(self, other: Affine) -> Affine:
        return Affine(
            self.fixed + other.fixed,
            self.per_token + other.per_token,
            self.per_square + other.per_square,
        )

    def __mul__(self, factor: float) -> Affine:
        return Affine(self.fixed * factor, self.per_token * factor, self.per_square * factor)

    def __call__(self, tokens, squares):
        return self.fixed + self.per_token * tokens + self.per_square * squares


@dataclass(frozen=True)
class LayerCost:
    """One layer's forward, backward and recomputation, by part."""

    forward: dict[str, Affine]
    backward: dict[str, Affine]
    again: dict[str, Affine]

    @staticmethod
    def total(parts: dict[str, Affine]) -> Affine:
        return sum(parts.values(), Affine())


def forward_flops(model: ModelConfig, tokens: float, squares: float) -> float:
    """Of the whole model: two a parameter that a token meets, and causal attention's."""
    met = model.parameters_count(active=True) - model.vocab_size * model.d_model
    if model.tie_embeddings:
        met += model.vocab_size * model.d_model
    return 2.0 * met * tokens + 2.0 * squares * model.num_layers * model.num_heads * model.head_dim


def layer_flops(model: ModelConfig, tokens: float, squares: float) -> float:
    """Forward FLOPs of one layer."""
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    met = model.d_model * (heads + model.num_experts)
    met += model.top_k * model.expert.parameters_count()
    return 2.0 * met * tokens + 2.0 * squares * model.num_heads * model.head_dim


def layer_cost(model: ModelConfig, cluster: Cluster, s: Strategy) -> LayerCost:
    """On one rank, for a micro-batch of T tokens per tensor-parallel group."""
    c, layout, spec = cluster, s.layout, model.expert
    tp, p, b, hidden = layout.tp, layout.exchange, WIDTH[s.dtype], model.d_model
    hd, hq, hk = model.head_dim, model.num_heads / tp, model.num_kv_heads / tp
    dense = c.flops * c.gemm_efficiency
    grouped = c.flops * c.grouped_efficiency
    bandwidth = c.memory_bandwidth * c.bandwidth_efficiency

    heads = 2 * (hq + hk) * hd
    projections = 2.0 * hidden * heads / dense
    pairs = 2.0 * hq * hd / (c.flops * c.attention_efficiency)
    attention = Affine(projections * c.half_rows, projections, pairs)
    slower = 8 if b < 4 else 1  # the router's product is in fp32 at least
    router = Affine(0.0, 2.0 * hidden * model.num_experts / tp / dense * slower)

    up = (2 if spec.gated else 1) * spec.d_ff / layout.etp
    f = spec.d_ff / layout.etp
    weights = (up + f) * spec.d_in + (2 * hidden * spec.d_in if spec.lifted else 0)
    skew = c.skew(layout)
    rows = model.top_k * layout.etp / tp * skew  # a token of the micro-batch
    e = model.num_experts / layout.ep
    product = 2.0 * weights / grouped
    experts = Affine(product * e * c.grouped_half_rows, product * rows)

    widths = 8 * hidden + 6 * hidden * 2 + (3 * hq + 4 * hk) * hd * tp + 2 * model.num_experts
    traffic = widths * b / tp + rows * b * (6 * hidden + 2 * (up + f))
    if spec.lifted:
        traffic += rows * b * 4 * spec.d_in
    elementwise = Affine(0.0, traffic / bandwidth)

    shuffle = _collective(c, tp, 1, 2.0 * hidden * b * (tp - 1) / tp, 2)
    if p == 1:
        exchange = Affine()
    elif s.gathers:
        exchange = _collective(c, p, 1, 2.0 * hidden * b * (p - 1) / tp, 2)
    else:
        exchange = _collective(c, p, 1, 2.0 * rows * hidden * b * (p - 1) / p, 3)
    exchange = exchange * (1.0 - c.overlap)
    overhead = Affine(c.overhead)

    forward = {
        "attention": attention,
        "experts": experts + router,
        "memory-bound": elementwise,
        "tensor exchange": shuffle,
        "expert exchange": exchange,
        "overhead": overhead,
    }
    backward = {
        "attention": attention * 2.0 + Affine(0.0, 0.0, attention.per_square * 0.5),
        "experts": (experts + router) * 2.0,
        "memory-bound": elementwise * 2.0,
        "tensor exchange": shuffle,
        "expert exchange": exchange,
        "overhead": Affine(c.backward_overhead),
    }
    # What the exchange brought is kept; the results' way back is made again.
    again = {**forward, "expert exchange": exchange * 0.5}
    return LayerCost(forward, backward, again)


def _collective(c: Cluster, ranks: int, stride: int, bytes_per_token: float, calls: int) -> Affine:
    """A rank's traffic over `ranks` ranks, some of them in other nodes."""
    if ranks == 1:
        return Affine()
    near = max(1, min(ranks, c.gpus_per_node // stride))
    cross = (ranks - near) / (ranks - 1)
    per_byte = (1 - cross) / (c.link_bandwidth * c.bandwidth_efficiency)
    per_byte += cross / (c.network_bandwidth * c.bandwidth_efficiency)
    hops = 1 + (ranks - 1).bit_length()
    return Affine(calls * c.latency * hops, bytes_per_token * per_byte)


def loss_cost(model: ModelConfig, cluster: Cluster, s: Strategy) -> Affine:
    """The head and the loss with all their gradients, which are made in the forward pass."""
    c, tp = cluster, s.layout.tp
    vocabulary = model.vocab_size / tp
    product = 6.0 * model.d_model * vocabulary / (c.flops * c.gemm_efficiency)
    traffic = vocabulary * 24 / (c.memory_bandwidth * c.bandwidth_efficiency)
    gathers = _collective(c, tp, 1, 2.0 * model.d_model * WIDTH[s.dtype] * (tp - 1) / tp, 2)
    return Affine(c.overhead, product + traffic) + gathers


def message_seconds(model: ModelConfig, cluster: Cluster, s: Strategy, tokens: float) -> float:
    """A micro-batch's activations from one stage to the next."""
    if s.layout.pp == 1:
        return 0.0
    size = tokens / s.layout.tp * model.d_model * WIDTH[s.dtype]
    return cluster.latency + size / cluster.bandwidth(2, s.layout.stage_ranks)


def update_seconds(model: ModelConfig, cluster: Cluster, s: Strategy) -> dict[str, float]:
    """Behind the flush: gradients summed over copies, then the optimiser; of the slowest rank."""
    layout, c = s.layout, cluster
    worst = {"gradient sum": 0.0, "optimizer": 0.0, "step overhead": c.step_overhead}
    bandwidth = c.update_bandwidth or c.memory_bandwidth * c.bandwidth_efficiency
    per_parameter = update_bytes(s)
    for rank in {0, layout.pp - 1}:
        parts: dict[str, int] = {}
        for v in range(rank, s.depth, layout.pp):
            chunk = chunk_parameters(model, layout, s.layers[v], v == 0, v == s.depth - 1)
            for name, count in chunk.items():
                parts[name] = parts.get(name, 0) + count
        summed = 0.0
        for part, count in parts.items():
            ranks, stride = _copies(layout, part)
            if ranks > 1:
                near = max(1, min(ranks, c.gpus_per_node // stride))
                link = c.link_bandwidth if near == ranks else c.network_bandwidth
                size = 2.0 * count * GRADIENT * (ranks - 1) / ranks
                summed += (
                    size / (link * c.bandwidth_efficiency) + 2 * c.latency * ranks.bit_length()
                )
        worst["gradient sum"] = max(worst["gradient sum"], summed)
        worst["optimizer"] = max(
            worst["optimizer"], sum(parts.values()) * per_parameter / bandwidth
        )
    return worst


def update_bytes(s: Strategy) -> int:
    """Read and written a parameter: the gradient for its norm, clipping, update and zeroing, the
    master, the moments, the weight."""
    moments = STATE_BYTES[s.dtype, s.optimizer_state][3]
    return 5 * GRADIENT + 2 * 4 + 2 * moments + WIDTH[s.dtype]


def _copies(layout: Layout, part: str) -> tuple[int, int]:
    """(ranks that share a part's gradient, how far apart they lie)."""
    if part == "experts":
        return layout.edp, layout.exchange
    if part in ("router", "norms"):
        return layout.stage_ranks, 1
    return layout.dp, layout.tp


def reduction_bytes(model: ModelConfig, s: Strategy, parameters: dict[str, int]) -> float:
    """The copy that the sum of the gradients over ranks makes of the largest bucket."""
    shared = [n for part, n in parameters.items() if _copies(s.layout, part)[0] > 1]
    return float(max(shared, default=0) * GRADIENT)
