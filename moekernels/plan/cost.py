"""What an action takes: a roofline whose terms are affine in a microbatch's tokens T and in the
sum S2 of its squared sequence lengths, so that a whole flush is a few array operations.

A product of m rows a weight matrix runs at `efficiency * m / (m + half_rows)` of the peak; its time
is then affine in m. Collectives cost `latency` a hop and bytes over bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from moekernels.model.decoder import DecoderSpec, copies, layer_parts
from moekernels.model.dispatch import routed_rows, way_of
from moekernels.model.spec import WIDTH, Place
from moekernels.plan.memory import owned_parameters, place_of, rank_parameters, state_bytes
from moekernels.plan.overlap import exposed
from moekernels.plan.replicas import spare_parameters
from moekernels.plan.strategy import NO_MATRICES, STATE_BYTES, Cluster, Strategy

EXCHANGE = "expert exchange"
GRADIENT = 4  # bytes of an accumulated gradient
BACKWARD_PASSES = 18 / 14  # of a backward over a matrix of scores, which makes it again


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


class LayerTotal(NamedTuple):
    """Of a `LayerCost`, the sum over all parts."""

    forward: Affine
    backward: Affine
    again: Affine
    through: Affine
    weights: Affine
    computed: Affine  # forward and backward without exchanges of rows


@dataclass(frozen=True)
class LayerCost:
    """One layer's forward, backward and recomputation, by part; and the backward in two: what it
    takes without the weights' gradients, and these."""

    forward: dict[str, Affine]
    backward: dict[str, Affine]
    again: dict[str, Affine]
    through: dict[str, Affine]
    weights: dict[str, Affine]

    def compute(self, way: str) -> Affine:
        """What a pass takes beside its exchanges of rows."""
        parts = getattr(self, way)
        return sum((x for name, x in parts.items() if name != EXCHANGE), Affine())

    @cached_property  # a planner asks for the same again and again
    def total(self) -> LayerTotal:
        ways = (self.forward, self.backward, self.again, self.through, self.weights)
        forward, backward, again, through, weights = (sum(w.values(), Affine()) for w in ways)
        computed = self.compute("forward") + self.compute("backward")
        return LayerTotal(forward, backward, again, through, weights, computed)


def forward_flops(model: DecoderSpec, tokens: float, squares: float) -> float:
    """Of the whole model: two a parameter that a token meets, and causal attention's."""
    met = model.parameters_count(active=True) - model.vocab_size * model.d_model
    if model.tie_embeddings:
        met += model.vocab_size * model.d_model
    return 2.0 * met * tokens + 2.0 * squares * model.num_layers * model.attention_width


def layer_flops(model: DecoderSpec, tokens: float, squares: float, layer: int = 0) -> float:
    """Forward FLOPs of layer number `layer`; 0: the last."""
    a_token, a_square = _layer_flops(model, layer or model.num_layers)
    return a_token * tokens + a_square * squares


@lru_cache(maxsize=1024)
def _layer_flops(model: DecoderSpec, layer: int) -> tuple[float, float]:
    one = Place(tokens=1.0)
    works = [part.work(model, one) for _, part in layer_parts(model, layer)]
    a_token = sum(w.dense + w.wide + w.grouped * model.top_k for w in works)
    return a_token, sum(w.pairs for w in works)


def layer_cost(model: DecoderSpec, cluster: Cluster, s: Strategy, layer: int = 0) -> LayerCost:
    """Of layer number `layer` (0: the last) on one rank, for a microbatch of T tokens per
    tensor-parallel group."""
    at = place_of(s, 1.0, imbalance=cluster.skew(s))
    return _layer_cost(model, cluster, at, layer or model.num_layers)


@lru_cache(maxsize=4096)  # many candidates of a search differ elsewhere
def _layer_cost(model: DecoderSpec, c: Cluster, at: Place, layer: int) -> LayerCost:
    tp = at.layout.tp
    grouped = c.flops * c.grouped_efficiency
    bandwidth = c.memory_bandwidth * c.bandwidth_efficiency
    slower = 8 if at.width < 4 else 1  # products in fp32 at least
    rows = routed_rows(model, at)  # a token of the microbatch

    products = {"attention": Affine(), "experts": Affine()}
    traffic = scores = 0.0
    for name, part in layer_parts(model, layer):
        w = part.work(model, at)
        dense = w.dense / (c.flops * c.gemm_efficiency)
        time = Affine(dense * c.half_rows, dense, w.pairs / (c.flops * c.attention_efficiency))
        time += Affine(0.0, w.wide / (c.flops * c.gemm_efficiency) * slower)
        product = w.grouped / grouped
        time += Affine(product * w.experts * c.grouped_half_rows, product * rows)
        products["attention" if name == "attention" else "experts"] += time
        traffic += w.traffic
        scores += w.scores
    attention, experts = products["attention"], products["experts"]
    elementwise = Affine(0.0, traffic / bandwidth)
    passes = Affine(0.0, 0.0, scores / bandwidth)

    shuffle = _collective(c, tp, 1, 2.0 * model.d_model * at.width * (tp - 1) / tp, 2)
    exchange = Affine()
    if layer > model.dense_layers:
        hops = way_of(at).traffic(model, at)
        exchange = sum((_collective(c, h.ranks, h.stride, h.size, h.calls) for h in hops), Affine())
    there, home, bare = _over_link(model, c, at, layer, experts)

    forward = {
        "attention": attention,
        "experts": experts,
        "memory-bound": elementwise + passes,
        "tensor exchange": shuffle,
        EXCHANGE: exchange + there,
        "overhead": Affine(c.overhead),
    }
    squares = Affine(0.0, 0.0, attention.per_square)
    weights = {"attention": attention + squares * -1.0, "experts": experts}
    through = {
        "attention": attention + squares * 1.5,
        "experts": experts,
        "memory-bound": elementwise * 2.0 + passes * BACKWARD_PASSES,
        "tensor exchange": shuffle,
        EXCHANGE: exchange + bare,
        "overhead": Affine(c.backward_overhead),
    }
    backward = {
        **through,
        "attention": attention * 2.0 + squares * 0.5,
        "experts": experts * 2.0,
        EXCHANGE: exchange + home,
    }
    # What the exchange brought is kept; the results' way back is made again.
    again = {**forward, EXCHANGE: exchange * 0.5 + there * 0.5}
    return LayerCost(forward, backward, again, through, weights)


def _over_link(
    model: DecoderSpec, c: Cluster, at: Place, layer: int, experts: Affine
) -> tuple[Affine, Affine, Affine]:
    """What forward, backward and a backward without the weights' gradients wait for a set link:
    rows of a part travel under the computation of others, the last of a backward's under the
    weights' gradients, half of its products."""
    if not c.exchange_rate or layer <= model.dense_layers or at.layout.exchange == 1:
        return Affine(), Affine(), Affine()
    way = way_of(at)
    flight = sum(hop.size for hop in way.traffic(model, at)) / 2 / c.exchange_rate
    compute, latency = experts.per_token, Affine(2 * c.exchange_latency)
    if not way.defers:  # the all-gather form: waited for
        waits = [2 * flight] * 3
    else:
        waits = [
            exposed(c.exchange_parts, flight, compute, afterwards)
            for afterwards in (0.0, compute, 0.0)
        ]
    forward, backward, bare = (latency + Affine(0.0, wait) for wait in waits)
    return forward, backward, bare


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


def border_bytes(model: DecoderSpec, s: Strategy, tokens: float) -> float:
    """That the exchanges of all ranks send to other nodes in a step of so many tokens, if experts
    are chosen evenly; `border_bytes` of a run's metrics is what they did send."""
    at = place_of(s, tokens / s.layout.dp)
    one = way_of(at).border(model, at)
    again = 0  # a layer computed again stops where nothing is needed any more: before the way home
    if model.beside:
        again = sum(layer > model.dense_layers for layer in s.checkpoint_layers)
    rows = model.moe_layers * (sum(one) - one.numbers) + again * one.back
    return s.layout.stage_ranks * (rows + model.moe_layers * s.microbatches * one.numbers)


def loss_cost(model: DecoderSpec, cluster: Cluster, s: Strategy) -> Affine:
    """The head and the loss with all their gradients, which are made in the forward pass."""
    c, tp = cluster, s.layout.tp
    vocabulary = model.vocab_size / tp
    product = 6.0 * model.d_model * vocabulary / (c.flops * c.gemm_efficiency)
    traffic = vocabulary * 24 / (c.memory_bandwidth * c.bandwidth_efficiency)
    gathers = _collective(c, tp, 1, 2.0 * model.d_model * WIDTH[s.dtype] * (tp - 1) / tp, 2)
    return Affine(c.overhead, product + traffic) + gathers


def message_seconds(model: DecoderSpec, cluster: Cluster, s: Strategy, tokens: float) -> float:
    """A microbatch's activations from one stage to the next."""
    if s.layout.pp == 1:
        return 0.0
    size = tokens / s.layout.tp * model.d_model * WIDTH[s.dtype]
    return cluster.latency + size / cluster.bandwidth(2, s.layout.stage_ranks)


def update_seconds(model: DecoderSpec, cluster: Cluster, s: Strategy) -> dict[str, float]:
    """Behind the flush: gradients summed over copies, then the optimiser; of the slowest rank."""
    layout, c = s.layout, cluster
    worst = {"gradient sum": 0.0, "optimizer": 0.0, "step overhead": c.step_overhead}
    bandwidth = c.update_bandwidth or c.memory_bandwidth * c.bandwidth_efficiency
    for rank in {0, layout.pp - 1}:
        parts = rank_parameters(model, s, rank)
        summed = 0.0
        for part, count in parts.items():
            ranks, stride = copies(model, layout, part)
            if ranks > 1:
                near = max(1, min(ranks, c.gpus_per_node // stride))
                link = c.link_bandwidth if near == ranks else c.network_bandwidth
                split = s.shard_optimizer and not (s.whole_experts and part == "experts")
                back = WIDTH[s.dtype] if split else GRADIENT  # weights are gathered
                size = count * (GRADIENT + back) * (ranks - 1) / ranks
                summed += (
                    size / (link * c.bandwidth_efficiency) + 2 * c.latency * ranks.bit_length()
                )
        if spare := spare_parameters(model, layout.ep, s.replicas, parts.get("experts", 0)):
            link = c.bandwidth(layout.exchange)  # of what comes to copies and goes from them
            summed += spare * (GRADIENT + WIDTH[s.dtype]) / link + 2 * c.latency
        worst["gradient sum"] = max(worst["gradient sum"], summed)
        owned = owned_parameters(model, s, parts)
        size = sum(n * (update_bytes(s, part) - GRADIENT) for part, n in owned.items())
        size += sum(parts.values()) * GRADIENT  # all are zeroed
        time = size / bandwidth
        if s.optimizer == "muon":
            time += orthogonal_flops(model, s, owned) / (c.flops * c.gemm_efficiency)
        away = s.offload_optimizer * 2 * state_bytes(s, owned)
        # What comes and goes is updated meanwhile.
        time += max(0.0, away / c.host_bandwidth - s.offload_optimizer * time)
        worst["optimizer"] = max(worst["optimizer"], time)
    return worst


def orthogonal_flops(model: DecoderSpec, s: Strategy, owned: dict[str, float]) -> float:
    """Of five steps of Newton-Schulz over the matrices of so many parameters by part: an estimate,
    as if each were as narrow as the narrowest of its part, and square at the worst."""
    narrow = {"attention": model.d_model, "experts": min(model.d_in, model.expert_d_ff)}
    flops = 0.0
    for part, n in owned.items():
        if part in NO_MATRICES:
            continue
        width = narrow.get(part, model.d_model)
        whole = 1 if part == "experts" else s.layout.tp  # every tensor-parallel rank makes all
        flops += 5 * 6 * width * n * whole
    return flops


def update_bytes(s: Strategy, part: str = "") -> int:
    """Read and written a parameter: the gradient for its norm, clipping, update and zeroing, the
    master, the moments, the weight; with an average that, and the master once more."""
    moments = s.moment_bytes(part) if part else STATE_BYTES[s.dtype, s.optimizer_state][3]
    return 5 * GRADIENT + 2 * 4 + 2 * moments + WIDTH[s.dtype] + 3 * 4 * (s.ema > 0)


def reduction_bytes(
    model: DecoderSpec, s: Strategy, parameters: dict[str, int], device: str = "cuda"
) -> float:
    """The copy that the sum of the gradients over ranks makes of the largest bucket, or the
    gathering of its weights."""
    shared = [n for part, n in parameters.items() if copies(model, s.layout, part)[0] > 1]
    width = WIDTH[s.dtype] if s.shard_optimizer and device == "cuda" else GRADIENT
    return float(max(shared, default=0) * width)
