"""What a rank holds: sums of what the parts of the model count (`moekernels.model`); each term is a
tensor that some module or autograd function keeps.

`python_tests/plan/test_plan_memory.py` holds the counts to the modules and torch's MemTracker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moekernels.model import experts, vocabulary
from moekernels.model.decoder import DecoderSpec, chunk_parameters, copies, layer_parts
from moekernels.model.dispatch import SLOTS, routed_rows, way_of
from moekernels.model.ffn import ffn_working
from moekernels.model.spec import Owed, Place
from moekernels.parallel.offload import CHUNK
from moekernels.pipeline import greedy
from moekernels.pipeline.build import (
    build,
    by_clock,
    found_by_clock,
    held_limits,
    in_pairs,
    receive_limit,
    splits,
)
from moekernels.pipeline.check import SENDS_IN_FLIGHT
from moekernels.pipeline.schedule import Schedule
from moekernels.plan.replicas import spare_parameters
from moekernels.plan.strategy import STATE_BYTES, Strategy

JOINED = ("experts", "dense", "shared")  # parts with products that `ops.experts` makes

# --- activations


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer and one microbatch: kept from forward to backward by part, kept of it when the
    layer is checkpointed, and the most that its backward, its forward and, where it is
    checkpointed, its second forward within the backward hold besides. cut: what both hold in
    addition where the exchange is cut, which one that is checkpointed is not. owed: what a backward
    leaves where the weights' gradients are put off."""

    kept: dict[str, float]
    checkpointed: float
    working: float
    forward: float
    again: float
    owed: Owed
    cut: float = 0.0
    joined: float = 0.0  # of what is owed, that several microbatches compute together

    @property
    def total(self) -> float:
        return sum(self.kept.values())

    def besides(self, checkpointed: bool) -> float:
        """Beyond what is kept of all layers, the most at any moment."""
        if not checkpointed:
            return max(self.working, self.forward) + self.cut
        again = self.total - self.checkpointed
        return max(self.working + again, self.forward, self.again + again)

    @property
    def all_owed(self) -> float:
        return self.owed.inputs + self.owed.gradients

    def beyond(self, owed: float, checkpointed: bool) -> float:
        """The most that a backward holds that puts weights' gradients off, beyond the `owed` bytes
        that it leaves of this layer."""
        cut = 0.0 if checkpointed else self.cut
        working = self.working + cut + max(0.0, self.total - owed)
        again = self.again + self.total - self.checkpointed - owed
        return max(working, again) if checkpointed else working


def place_of(
    s: Strategy,
    tokens: float,
    *,
    imbalance: float = 1.0,
    device: str = "cuda",
    runs: int = 1,
    parts: int = 1,
    squares: float = 0.0,
) -> Place:
    return Place(
        s.layout, tokens, s.dtype, s.dispatcher, s.sequence_parallel, imbalance, device, runs,
        parts, s.nodes, squares,
    )  # fmt: skip


@lru_cache(maxsize=4096)  # the stages of a plan share it
def layer_bytes(model: DecoderSpec, at: Place, layer: int = 0) -> LayerBytes:
    """The activations of layer number `layer` (0: the last) for a microbatch on one rank."""
    parts = list(layer_parts(model, layer or model.num_layers))
    kept = {name: part.kept(model, at) for name, part in parts}
    owed = sum((part.owed(model, at) for _, part in parts), Owed())
    apart = [part.owed(model, at) for name, part in parts if name in JOINED]
    joined = sum(one.inputs + one.gradients for one in apart)
    way, residual = way_of(at), at.residual * model.d_model * at.width
    # What an attention's backward holds comes when all behind it has let go of what it kept; beside
    # it lie the gradient of the residual stream here, and that from the chunk behind.
    attended = 0.0
    if passing := sum(part.passing(model, at) for _, part in parts):
        attended = passing + 2 * residual + kept["attention"]
    if "experts" not in kept:
        working = max(ffn_working(model, at, model.dense_d_ff), attended - sum(kept.values()))
        return LayerBytes(kept, residual, working, 0.0, 0.0, owed, joined=joined)
    kept["routing"] = way.routing(model, at)
    working = experts.working(model, at) + residual
    backward, forward, again = way.peaks(model, at, working, kept["experts"], model.lifted)
    backward = max(backward, attended - sum(kept.values()))
    cut = 0.0  # room for all rows that come home, from the first part's on
    if way.defers and min(at.parts, model.num_experts // at.layout.ep) > 1:
        cut = way.rows(model, at) * model.d_model * at.width
    checkpointed = residual + way.keeps(model, at)
    return LayerBytes(kept, checkpointed, backward, forward, again, owed, cut, joined)


@lru_cache(maxsize=4096)
def chunk_bytes(
    model: DecoderSpec, at: Place, first: bool, last: bool
) -> tuple[float, float, float]:
    """Of a chunk and one microbatch, beside its layers: (kept until its end, kept by the loss,
    which its backward lets go first, and what the loss holds besides while it runs)."""
    kept = at.tokens * model.turning(model.head_dim) * at.wide  # sine and cosine
    if first and at.layout.tp > 1:
        kept += at.tokens * 9  # which tokens are here
    if not last:
        return kept, 0.0, 0.0
    norm, loss, besides = vocabulary.loss_bytes(model, at)
    return kept + norm, loss, besides


# --- a rank


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    messages: float
    parameters: dict[str, int]
    host: float = 0.0  # in the host's memory

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + self.activations + self.working + self.messages

    def parts(self) -> dict[str, float]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "working": self.working,
            "messages": self.messages,
        }


@lru_cache(maxsize=512)
def cached_schedule(name: str, stages: int, microbatches: int, virtual_stages: int) -> Schedule:
    return build(name, stages, microbatches, virtual_stages)


class ChunkBytes(NamedTuple):
    """Of a chunk and one microbatch. kept: until its backward, working: the most that is held
    besides at any moment, owed: left by a backward that puts the weights' gradients off, split:
    as working, where backward does so. layer_owed: the most of owed that is a single layer's.
    joined: as owed, where only what several microbatches compute together is put off."""

    kept: float
    working: float
    owed: float
    split: float
    layer_owed: float = 0.0
    joined: float = 0.0
    apart: float = 0.0


@lru_cache(maxsize=1 << 14)  # ranks and strategies share most of their chunks
def chunk_activations(
    model: DecoderSpec,
    at: Place,
    layers: tuple[tuple[int, int, int], ...],
    first: bool,
    last: bool,
) -> ChunkBytes:
    """Of a chunk with `layers` (as `Strategy.kinds_of_layers`) and one microbatch."""
    beside, loss, working = chunk_bytes(model, at, first, last)
    kept, owed, beyond, layer_owed = beside + loss, 0.0, 0.0, 0.0
    joined = besides = 0.0
    for layer, count, again in layers:
        one = layer_bytes(model, at, layer)
        kept += (count - again) * one.total + again * one.checkpointed
        owed += count * one.all_owed
        joined += count * one.joined
        layer_owed = max(layer_owed, one.all_owed)
        beyond = max(beyond, one.beyond(one.all_owed, again > 0))
        besides = max(besides, one.beyond(one.joined, again > 0))
        # What the loss keeps is gone by the time a layer works.
        working = max(working, one.besides(again > 0) - loss)
    # Layer by layer what is kept becomes what is owed: the most is held in the last of them.
    split = max(working, beside + owed + beyond - kept)
    apart = max(working, beside + joined + besides - kept)
    return ChunkBytes(kept, working, owed, split, layer_owed, joined, apart)


@lru_cache(maxsize=1 << 14)
def pair_activations(
    model: DecoderSpec,
    at: Place,
    layers: tuple[tuple[int, int, int], ...],
    first: bool,
    last: bool,
) -> float:
    """Kept by a forward and a backward that take turns through such a chunk: before the forward
    begins a layer that exchanges rows the backward has left one, as `interleave` orders them. Of
    the loss's only one is there at a time."""
    beside, loss, _ = chunk_bytes(model, at, first, last)
    sums, dense = [0.0], 0  # of the first layers; those without experts are the first
    for layer, count, again in layers:
        one = layer_bytes(model, at, layer)
        dense += count if layer <= model.dense_layers else 0
        for number in range(count):
            sums.append(sums[-1] + (one.checkpointed if number < again else one.total))
    total = len(sums) - 1
    if total == dense:  # one pass after the other
        return 2 * (beside + loss + sums[-1])
    turns = range(total - dense)
    return 2 * beside + loss + max(sums[dense + k + 1] + sums[total - k] for k in turns)


@lru_cache(maxsize=1 << 14)
def _rank_parameters(
    model: DecoderSpec, at: Place, layers: tuple[range, ...], stages: int, rank: int
) -> dict[str, int]:
    counts: dict[str, int] = {}
    for v in range(rank, len(layers), stages):
        part = chunk_parameters(model, at, layers[v], v == 0, v == len(layers) - 1)
        for name, count in part.items():
            counts[name] = counts.get(name, 0) + count
    if model.tie_embeddings and stages == 1 < len(layers):  # the first and the last share a table
        counts["vocabulary"] //= 2
    return counts


def rank_parameters(model: DecoderSpec, s: Strategy, rank: int) -> dict[str, int]:
    """Parameters of a rank of pipeline stage `rank`, by part; not to be changed."""
    at = Place(s.layout, sequence_parallel=s.sequence_parallel)  # all that matters of it
    return _rank_parameters(model, at, s.layer_ranges, s.layout.pp, rank)


def owned_parameters(
    model: DecoderSpec, s: Strategy, parameters: dict[str, int]
) -> dict[str, float]:
    """Those of a rank's parameters whose masters and moments it keeps, by part. Norms within
    attention, some hundred, count as the rest of it."""
    if not s.shard_optimizer:
        return dict(parameters)
    owned = {part: n / copies(model, s.layout, part)[0] for part, n in parameters.items()}
    if s.whole_experts and "experts" in owned:
        owned["experts"] = float(parameters["experts"])
    elif "experts" in owned:  # what each etp shard holds whole is split over those, too
        etp = s.layout.etp
        owned["experts"] *= 1 - experts.whole_share(model, etp) * (1 - 1 / etp)
    return owned


def state_bytes(s: Strategy, owned: dict[str, float]) -> float:
    """Of masters, moments and averages of so many parameters by part."""
    return sum(n * s.kept_bytes(part) for part, n in owned.items())


def host_bytes(model: DecoderSpec, s: Strategy, rank: int) -> float:
    """Masters, moments and averages of a rank of pipeline stage `rank` in its host's memory."""
    if not s.offload_optimizer:
        return 0.0
    owned = owned_parameters(model, s, rank_parameters(model, s, rank))
    return state_bytes(s, owned) * s.offload_optimizer


def _in_turn(pairs: int, chunks: list[float]) -> float:
    """The most that (chunk, microbatch) pairs hold: they go round the rank's chunks in turn."""
    if len(chunks) == 1:
        return pairs * chunks[0]
    share, rest = divmod(pairs, len(chunks))
    return share * sum(chunks) + sum(sorted(chunks, reverse=True)[:rest])


def slab_bytes(model: DecoderSpec, at: Place) -> float:
    """Memory that a GPU's peers address: slots for the rows that come and those that come home,
    with their weights. None where no rows are exchanged."""
    if at.layout.exchange == 1 or at.dispatcher != "all_to_all":
        return 0.0
    rows = routed_rows(model, at) + at.own * model.top_k * at.layout.etp
    return SLOTS * rows * (model.d_model * at.width + 8)


@lru_cache(maxsize=512)
def _held_by_clock(stages: int, microbatches: int, virtual_stages: int) -> list[np.ndarray]:
    """`greedy.held` as [n, 2, chunks]."""
    found = found_by_clock(stages, microbatches, virtual_stages)
    return [np.array(held) for held in greedy.held(found.orders, virtual_stages)]


def stage_memory(
    model: DecoderSpec,
    s: Strategy,
    rank: int,
    tokens: float,
    *,
    imbalance: float = 1.0,
    device: str = "cuda",
    parts: int = 1,
    bound: float = 0.0,
    squares: float = 0.0,
) -> StageMemory:
    """Memory of a rank of pipeline stage `rank` when the largest microbatches have `tokens`, and
    neighbouring equal sequences of one `squares`. `bound`: of the rows that a rank has room for
    over the mean, whatever their imbalance is."""
    stages = s.layout.pp
    if bound:
        imbalance = min(bound, s.layout.exchange)
    virtual = range(rank, s.depth, stages)
    at = place_of(s, tokens, imbalance=imbalance, device=device, parts=parts, squares=squares)
    parameters = rank_parameters(model, s, rank)
    total = sum(parameters.values())
    total += spare_parameters(model, s.layout.ep, s.replicas, parameters.get("experts", 0))
    weight, gradient, *_ = STATE_BYTES[s.dtype, s.optimizer_state]
    fp8 = 2 * parameters.get("experts", 0) if model.fp8_experts else 0  # both ways, for a step

    held = [
        chunk_activations(model, at, s.kinds_of_layers(model, v), v == 0, v == s.depth - 1)
        for v in virtual
    ]
    kept = [chunk.kept for chunk in held]
    size = stages, s.microbatches, s.virtual_stages
    if by_clock(s.schedule, s.virtual_stages):
        costs = np.array([kept, [chunk.owed for chunk in held]])
        activations = float((_held_by_clock(*size)[rank] * costs).sum((1, 2)).max())
    else:
        owed = [chunk.owed for chunk in held]
        activations = max(
            _in_turn(n, kept) + _in_turn(later, owed)
            for n, later in held_limits(s.schedule, *size)[rank]
        )
    if s.at_once > 1:
        activations += (s.at_once - 1) * sum(chunk.joined for chunk in held)
        working = max(chunk.apart for chunk in held)
    else:
        split = splits(s.schedule)
        working = max([chunk.split if split else chunk.working for chunk in held])
    # One that a chunk needs, and one ahead; what comes round for a rank's next chunk may be early.
    receives = 2 if s.virtual_stages == 1 else receive_limit(*size)
    if in_pairs(s.schedule):  # two passes work at once, and one's layer may owe its weights
        working = 2 * working + held[0].layer_owed
        receives = 4
        if s.microbatches > 1:
            mine = s.kinds_of_layers(model, rank), rank == 0, rank == s.depth - 1
            activations += pair_activations(model, at, *mine) - 2 * kept[0]
    state = state_bytes(s, owned_parameters(model, s, parameters))
    host = host_bytes(model, s, rank)
    on_the_way = min(2 * CHUNK * s.kept_bytes(""), 2 * host)
    message = at.residual * model.d_model * at.width
    messages = (receives + 2 * SENDS_IN_FLIGHT) * message if stages > 1 else 0.0
    if bound and device == "cuda":
        messages += slab_bytes(model, at)
    return StageMemory(
        weights=total * weight + fp8,
        gradients=total * gradient,
        optimizer=state - host + on_the_way,
        activations=activations,
        working=working,
        messages=messages,
        parameters=parameters,
        host=host,
    )
