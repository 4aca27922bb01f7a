"""One way to train a model on a cluster, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from moekernels.model.decoder import DecoderSpec, alike
from moekernels.model.layout import Layout
from moekernels.plan import replicas

# bytes of (weight, gradient, master, both moments) a parameter, by (dtype, optimizer_state)
STATE_BYTES = {
    ("fp32", "fp32"): (4, 4, 0, 8),
    ("fp32", "bf16"): (4, 4, 0, 4),
    ("bf16", "fp32"): (2, 4, 4, 8),
    ("bf16", "bf16"): (2, 4, 4, 4),
    ("fp64", "fp32"): (8, 8, 0, 16),
    ("fp64", "bf16"): (8, 8, 0, 16),
}


# Parts of a model whose parameters Muon leaves to AdamW; of the others it takes all but vectors.
NO_MATRICES = ("router", "norms", "vocabulary")


@lru_cache(maxsize=1024)
def _layer_ranges(layers: tuple[int, ...]) -> tuple[range, ...]:
    ends = accumulate(layers, initial=1)
    return tuple(range(*bounds) for bounds in pairwise(ends))


@dataclass(frozen=True)
class Strategy:
    """`layers` and `checkpointed` count layers per virtual stage; those checkpointed come first."""

    layout: Layout
    layers: tuple[int, ...]
    checkpointed: tuple[int, ...]
    microbatches: int  # of the whole flush, per data-parallel rank
    schedule: str = "1f1b"
    virtual_stages: int = 1
    dispatcher: str = "all_to_all"
    dtype: str = "bf16"
    optimizer_state: str = "fp32"
    shard_optimizer: bool = False
    whole_experts: bool = False  # but not that of experts, which move
    offload_optimizer: float = 0.0  # part of masters and moments in the host's memory
    replicas: int = 0  # spare slots of a rank and layer for copies of hot experts
    optimizer: str = "adamw"
    ema: float = 0.0  # decay of a moving average of the masters beside them; 0: there is none
    sequence_parallel: bool = True
    at_once: int = 1  # microbatches whose gradients of weights are computed together
    nodes: float = 1  # that the ranks of an exchange lie on

    def moment_bytes(self, part: str) -> int:
        """Of both moments of a parameter of that part, or of Muon's momentum."""
        moments = STATE_BYTES[self.dtype, self.optimizer_state][3]
        return moments // 2 if self.optimizer == "muon" and part not in NO_MATRICES else moments

    def kept_bytes(self, part: str) -> int:
        """Of master, moments and average of a parameter of that part."""
        weight, _, master, _ = STATE_BYTES[self.dtype, self.optimizer_state]
        return master + self.moment_bytes(part) + (max(weight, master) if self.ema else 0)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @cached_property
    def checkpoint_layers(self) -> tuple[int, ...]:
        """Numbers, from 1, of the layers computed again."""
        chosen: list[int] = []
        first = 1
        for count, again in zip(self.layers, self.checkpointed):
            chosen += range(first, first + again)
            first += count
        return tuple(chosen)

    def layer_range(self, stage: int) -> range:
        """Numbers, from 1, of a virtual stage's layers."""
        return self.layer_ranges[stage]

    @property
    def layer_ranges(self) -> tuple[range, ...]:
        return _layer_ranges(self.layers)

    def kinds_of_layers(self, model: DecoderSpec, stage: int) -> tuple[tuple[int, int, int], ...]:
        """(number of a layer, how many of the virtual stage's are made as it is, how many of them
        are computed again), for each kind; those checkpointed come first."""
        return _kinds_of_layers(model, self.layer_range(stage), self.checkpointed[stage])


@lru_cache(maxsize=4096)  # the candidates of a search share most of them
def _kinds_of_layers(
    model: DecoderSpec, layers: range, again: int
) -> tuple[tuple[int, int, int], ...]:
    redone = dict(alike(model, layers[:again]))
    return tuple((layer, count, redone.get(layer, 0)) for layer, count in alike(model, layers))


def ranges_text(numbers: tuple[int, ...]) -> str:
    """(1, 2, 3, 7) -> `1-3,7`; `none` where there are none."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs) or "none"


@dataclass(frozen=True)
class Objective:
    """What the recommended plan is best at, among those that reach `at_least` sequences/s."""

    best: str = "throughput"  # latency | cost | gpus | memory
    at_least: float = 0.0


@lru_cache(maxsize=256)
def busiest(loads: tuple[tuple[float, ...], ...], ranks: int) -> float:
    """Rows of the busiest of `ranks` over their mean, in the mean over layers [L, E]: in each, all
    wait for it. A rank holds neighbouring experts."""
    total = 0.0
    for layer in loads:
        share = len(layer) // ranks
        sums = [sum(layer[r * share : (r + 1) * share]) for r in range(ranks)]
        total += max(sums) * ranks / sum(sums)
    return total / len(loads)


@dataclass(frozen=True)
class Batch:
    """What a step reads: the lengths of its sequences, and how they are packed."""

    lengths: tuple[int, ...]
    policy: str = "packed"
    assumed: str = field(default="", compare=False)  # what was taken for granted about them

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def squares(self) -> int:
        """The lengths' squares, summed."""
        return sum(n * n for n in self.lengths)


def nodes_of_exchange(layout: Layout, gpus_per_node: int) -> float:
    """That its ranks lie on."""
    return max(1.0, layout.exchange / gpus_per_node)


@dataclass(frozen=True)
class Cluster:
    """Cards and links; bytes and FLOPs a second are of one card."""

    gpus: int
    gpus_per_node: int
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float  # within a node, a direction
    network_bandwidth: float  # between nodes, a direction
    host_memory: float = 0.0  # of a node, for what its cards keep there
    host_bandwidth: float = 55e9  # between a card and its host, both ways together
    reserve: float = 2e9  # of a card's memory: context, collectives, allocator
    gemm_efficiency: float = 0.70  # of a large dense product
    attention_efficiency: float = 0.70  # of attention's own products
    grouped_efficiency: float = 0.55  # of the experts' grouped products
    half_rows: float = 96.0  # rows at which a product reaches half of its efficiency
    grouped_half_rows: float = 24.0  # the same, of each expert's
    bandwidth_efficiency: float = 0.75
    latency: float = 15e-6  # of a collective's every hop
    overhead: float = 1.2e-3  # of a layer that no roofline sees: launches, host syncs
    backward_overhead: float = 2.4e-3  # the same of its backward
    action_overhead: float = 0.0  # of an action, whatever its layers
    update_bandwidth: float = 0.0  # at which the optimiser works; 0: the memory's
    step_overhead: float = 0.0  # of a step, whatever its flush
    imbalance: float = 1.10  # rows of the busiest rank over the mean, where `loads` is not known
    loads: tuple[tuple[float, ...], ...] = ()  # [L, E] rows of each expert, to any scale
    exchange_latency: float = 0.0  # of a set link (`run.link`), which the exchange goes over
    exchange_rate: float = 0.0  # bytes a second of it; 0: there is none
    exchange_parts: int = 1
    exchange_bound: float = 0.0  # of rows that a rank takes in over the mean; 0: as many as come
    device: str = "cuda"
    calibrated: str = ""  # when and where the constants were measured
    error_band: float = 0.0  # which 90 % of the measurements lie within

    def skew(self, s: Strategy) -> float:
        """Rows of the busiest rank over the mean: 1 where every rank has all experts whole."""
        layout = s.layout
        if layout.exchange == 1:
            return 1.0
        if not self.loads:
            return self.imbalance
        if s.replicas:
            return replicas.busiest(self.loads, layout, s.replicas)
        return busiest(self.loads, layout.ep)

    def bandwidth(self, ranks: int, stride: int = 1) -> float:
        """Of a collective over `ranks` ranks that lie `stride` apart."""
        inside = ranks * stride <= self.gpus_per_node
        link = self.link_bandwidth if inside else self.network_bandwidth
        return link * self.bandwidth_efficiency
