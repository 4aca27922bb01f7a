"""The decoder: its parts put together, and the sums over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from moekernels.errors import UsageError
from moekernels.model import dense, experts, router, vocabulary
from moekernels.model.attention import ATTENTIONS, AttentionSpec
from moekernels.model.beside import BESIDE, BesideSpec
from moekernels.model.dense import DenseSpec
from moekernels.model.experts import ACTIVATIONS
from moekernels.model.layout import Layout
from moekernels.model.router import SCOPES, SCORES
from moekernels.model.spec import Part, Place, key
from moekernels.model.vocabulary import VocabularySpec


@dataclass(frozen=True)
class DecoderSpec(VocabularySpec, AttentionSpec, DenseSpec, BesideSpec):
    """[model]: the decoder and its experts. Frozen, so that a plan can be cached by it."""

    num_layers: int = key(16, "decoder layers", low=1, flag="layers", high=4096)
    norm_eps: float = key(1e-6, "epsilon of RMSNorm", low=1e-30, high=1)
    init_std: float = key(0.02, "standard deviation of the initial weights", above=0, high=100)

    def __post_init__(self) -> None:
        """What no single key shows, and the limits of keys that were set in Python."""
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "kv_heads",
            "head_dim",
            "num_experts",
            "top_k",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"model: {name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise UsageError(
                f"model: top_k {self.top_k} exceeds the {self.num_experts} experts; "
                f"use {self.num_experts} or less"
            )
        if self.num_heads % self.kv_heads:
            raise UsageError(
                f"model: num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"model: head_dim is {self.head_dim}; rotary positions need it even")
        self.check_attention()
        if ACTIVATIONS.get(self.activation) is not self.gated:
            kinds = [name for name, gated in ACTIVATIONS.items() if gated is self.gated]
            gated = "gated" if self.gated else "not gated"
            raise UsageError(
                f"model: activation {self.activation!r} but the experts are {gated}; "
                f"use one of {', '.join(kinds)}"
            )
        if self.score not in SCORES:
            raise UsageError(f"model: router score {self.score!r}; use one of {', '.join(SCORES)}")
        if self.balance_scope not in SCOPES:
            raise UsageError(
                f"model: balance_scope {self.balance_scope!r}; use one of {', '.join(SCOPES)}"
            )
        if self.num_experts % self.num_groups or not 1 <= self.groups_kept <= self.num_groups:
            raise UsageError(
                f"model: {self.groups_kept} of {self.num_groups} groups of experts cannot be "
                f"kept among {self.num_experts} experts"
            )
        eligible = self.num_experts // self.num_groups * self.groups_kept
        if self.top_k > eligible:
            raise UsageError(
                f"model: top_k {self.top_k} exceeds the {eligible} experts of the kept groups"
            )
        self.check_dense(self.num_layers)
        self.check_beside()

    @property
    def moe_layers(self) -> int:
        """Layers with experts; the `dense_layers` before them have none."""
        return self.num_layers - self.dense_layers

    def parameters_count(self, *, active: bool = False) -> int:
        """All parameters, or only those that one token meets (top_k experts a layer)."""
        parts = chunk_parameters(
            self, Place(), range(1, self.num_layers + 1), True, True, active=active
        )
        return sum(parts.values())


# The parts of a layer's second half, by name; the first is an attention of some kind.
PARTS: dict[str, Part] = {
    "dense": dense.PART,
    "router": router.PART,
    "experts": experts.PART,
    **BESIDE,
}


def layer_parts(spec: DecoderSpec, layer: int) -> Iterator[tuple[str, Part]]:
    """The parts of layer number `layer`, from 1, by name."""
    yield "attention", ATTENTIONS[spec.attention]
    names = ("dense",) if layer <= spec.dense_layers else ("router", "experts", *spec.beside)
    for name in names:
        yield name, PARTS[name]


def alike(spec: DecoderSpec, layers: range) -> list[tuple[int, int]]:
    """(number of a layer, how many of `layers` are made as it is), for each kind among them."""
    if not spec.dense_layers:  # a planner asks this often
        return [(spec.num_layers, len(layers))] if layers else []
    plain = max(0, min(layers.stop, spec.dense_layers + 1) - layers.start)
    kinds = [(1, plain), (spec.num_layers, len(layers) - plain)]
    return [(layer, count) for layer, count in kinds if count]


def copies(spec: DecoderSpec, layout: Layout, part: str) -> tuple[int, int]:
    """(ranks that share a part's gradient, how far apart they lie)."""
    if part == "norms":
        return layout.stage_ranks, 1
    if part == "vocabulary" and spec.tie_embeddings and layout.pp > 1:
        ranks = 2 * layout.dp  # of the first stage and the last
        return ranks, -(-layout.world // ranks)
    return PARTS[part].copies(layout) if part in PARTS else (layout.dp, layout.tp)


@lru_cache(maxsize=4096)  # a planner asks for the same chunks again and again
def _chunk_parameters(
    spec: DecoderSpec,
    at: Place,
    layers: range,
    first: bool,
    last: bool,
    active: bool,
    tp_index: int | None,
) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer, count in alike(spec, layers):
        for name, part in layer_parts(spec, layer):
            counts[name] = counts.get(name, 0) + count * part.parameters(spec, at, active)
    counts["norms"] = 2 * spec.d_model * len(layers) + (spec.d_model if last else 0)
    counts["vocabulary"] = vocabulary.parameters(spec, at, first, last, tp_index)
    return counts


def chunk_parameters(
    spec: DecoderSpec,
    at: Place,
    layers: range,
    first: bool,
    last: bool,
    *,
    active: bool = False,
    tp_index: int | None = None,
) -> dict[str, int]:
    """Parameters of a pipeline chunk on one rank, by part; `active`: that one token meets. Without
    `tp_index`, of the rank that holds most of the vocabulary."""
    place = Place(at.layout, sequence_parallel=at.sequence_parallel)  # all that matters of it
    return dict(_chunk_parameters(spec, place, layers, first, last, active, tp_index))
