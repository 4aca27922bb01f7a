"""What a rank holds, counted: every term is a tensor that some module or autograd function keeps.

Legend: T tokens of a micro-batch, t own tokens (T/tp under sequence parallel), H hidden, I an
expert's input width, F expert hidden of an etp shard, E experts, e local experts, K top-k, R routed
rows that arrive, P ranks of the exchange, V vocabulary.

`python_tests/test_plan_memory.py` holds the counts to the real modules and to torch's MemTracker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from moekernels.nn.config import ModelConfig
from moekernels.nn.loss import chunk_tokens
from moekernels.parallel.mesh import Layout
from moekernels.pipeline.check import SENDS_IN_FLIGHT, peak_in_flight
from moekernels.pipeline.schedule import Schedule, build
from moekernels.plan.strategy import STATE_BYTES, WIDTH, Strategy

# --- parameters


def layer_parameters(model: ModelConfig, layout: Layout, *, sequence_parallel: bool = True) -> dict:
    """Parameters of one layer on one rank, by part."""
    spec, hd = model.expert, model.head_dim
    heads = (model.num_heads + 2 * model.num_kv_heads + model.num_heads) // layout.tp
    e, f = model.num_experts // layout.ep, spec.d_ff // layout.etp
    expert = (3 if spec.gated else 2) * spec.d_in * f
    if spec.lifted:
        expert += 2 * spec.d_model * spec.d_in
    split = 1 if sequence_parallel else layout.tp
    return {
        "attention": model.d_model * hd * heads + (2 * hd if model.qk_norm else 0),
        "norms": 2 * model.d_model,
        "router": model.num_experts // split * model.d_model,
        "experts": e * expert,
    }


def chunk_parameters(
    model: ModelConfig,
    layout: Layout,
    layers: int,
    first: bool,
    last: bool,
    *,
    tp_index: int | None = None,
    sequence_parallel: bool = True,
) -> dict[str, int]:
    """Parameters of a pipeline chunk on one rank, by part. Without `tp_index`, of the rank that
    holds most of the vocabulary."""
    one = layer_parameters(model, layout, sequence_parallel=sequence_parallel)
    counts = {part: layers * count for part, count in one.items()}
    if tp_index is None:
        rows = -(-model.vocab_size // layout.tp)
    else:
        begin = model.vocab_size * tp_index // layout.tp
        rows = model.vocab_size * (tp_index + 1) // layout.tp - begin
    tables = int(first) + int(last and not model.tie_embeddings)
    counts["vocabulary"] = tables * rows * model.d_model
    if last:
        counts["norms"] += model.d_model
    return counts


# --- activations


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer and one micro-batch: kept from forward to backward by part, kept of it when the
    layer is checkpointed, and the most that its backward, its forward and, where it is
    checkpointed, its second forward within the backward hold besides."""

    kept: dict[str, float]
    checkpointed: float
    working: float
    forward: float
    again: float

    @property
    def total(self) -> float:
        return sum(self.kept.values())

    def besides(self, checkpointed: bool) -> float:
        """Beyond what is kept of all layers, the most at any moment."""
        if not checkpointed:
            return max(self.working, self.forward)
        again = self.total - self.checkpointed
        return max(self.working + again, self.forward, self.again + again)


def routed_rows(model: ModelConfig, s: Strategy, tokens: float, imbalance: float = 1.0) -> float:
    """R: rows that the experts of a rank compute."""
    own = tokens / s.layout.tp
    return own * model.top_k * s.layout.etp * (imbalance if s.layout.exchange > 1 else 1.0)


def layer_bytes(
    model: ModelConfig,
    s: Strategy,
    tokens: float,
    *,
    imbalance: float = 1.0,
    device: str = "cuda",
    runs: int = 1,
) -> LayerBytes:
    """One layer's activations for a micro-batch of `tokens` (T) on one rank.

    runs: groups of neighbouring equal segments, which attention on the CPU takes one by one.
    """
    layout, spec, hidden = s.layout, model.expert, model.d_model
    b = WIDTH[s.dtype]
    wide = max(4, b)
    k, e = model.top_k, model.num_experts // layout.ep
    own = tokens / layout.tp
    residual = own if s.sequence_parallel else tokens
    hq, hk = model.num_heads / layout.tp, model.num_kv_heads / layout.tp
    hd = model.head_dim

    norm = residual * (hidden * b + wide)
    attention = norm + tokens * hidden * b  # the gathered input of the projections
    turned = hq + hk
    attention += tokens * hd * b * ((hq + 2 * hk) + turned)  # v keeps q and k of before the turn
    if model.qk_norm:  # their inputs share the projections' storage
        attention += tokens * turned * wide
    copies = 2 if device == "cpu" and runs > 1 else 1  # each run's output and their concatenation
    attention += tokens * hq * (copies * hd * b + wide)  # and its log-sum-exp

    # The gate computes in fp32 at least: below that its input and weight are copies.
    router = norm + residual * hidden * wide + own * model.num_experts * wide + own * k * 4
    if b < wide:
        router += model.num_experts // (1 if s.sequence_parallel else layout.tp) * hidden * wide

    gathered = own * layout.exchange
    rows = routed_rows(model, s, tokens, imbalance)
    if layout.exchange == 1:
        route, keeps = own * k * (4 + 4 + 4), 0.0
        route += own * k * wide  # row weights
        arriving = own * hidden * b if b < wide else 0.0  # else the gate's input, counted there
    elif s.gathers:
        # A fixed shape on a GPU: room for every choice, of which the others' stay empty.
        rows = gathered * k if device == "cuda" else gathered * k / layout.ep
        route = gathered * k * (4 + 4 + 4 + wide)
        arriving = gathered * hidden * b
        keeps = arriving + gathered * k * (wide + 4)
    else:
        sent = own * k * layout.etp
        route = sent * (4 + 4 + 4) + rows * wide
        arriving = rows * hidden * b
        keeps = arriving + sent * 12 + rows * wide
    offsets = (e + 1) * 8
    up = (2 if spec.gated else 1) * spec.d_ff / layout.etp
    f = spec.d_ff / layout.etp
    h = 0.0 if model.recompute_experts else rows * up * b
    experts = h + offsets
    if spec.lifted:
        viewed = layout.exchange == 1 or s.gathers
        experts += rows * hidden * b if viewed else arriving  # what is lifted
        experts += 2 * rows * spec.d_in * b  # the lifted rows, and the results to be lowered
    else:
        experts += arriving

    kept = {"attention": attention, "router": router, "routing": route, "experts": experts}
    checkpointed = residual * hidden * b + keeps
    # In the experts' backward: gradients of the output, of h, and the weighted activations or the
    # gradient of the input; the rows to be lowered are gone by then.
    working = rows * b * (spec.d_in + up + max(f, spec.d_in)) + residual * hidden * b
    if spec.lifted:
        working -= rows * spec.d_in * b
    forward = computed_again = 0.0
    if s.gathers:
        # All tokens of the group four times over: what is summed, packed, exchanged and unpacked.
        forward = 4 * gathered * hidden * b + own * hidden * (wide + b)
        working += rows * hidden * b + own * hidden * b
        working = max(working, forward + rows * hidden * b - experts)
        # The results' gradient comes from all ranks before the layer is computed again, up to the
        # sums of all tokens; the gathered tokens are held until then, lifted or not.
        computed_again = (2 * gathered + rows + 2 * residual) * hidden * b
        computed_again += arriving if spec.lifted else 0.0
    return LayerBytes(kept, checkpointed, working, forward, computed_again)


def chunk_bytes(
    model: ModelConfig, s: Strategy, tokens: float, first: bool, last: bool
) -> tuple[float, float, float]:
    """Of a chunk and one micro-batch, beside its layers: (kept until its end, kept by the loss,
    which its backward lets go first, and what the loss holds besides while it runs)."""
    b, hidden = WIDTH[s.dtype], model.d_model
    wide = max(4, b)
    own = tokens / s.layout.tp
    residual = own if s.sequence_parallel else tokens
    kept = tokens * model.head_dim * wide  # sine and cosine
    if first and s.layout.tp > 1:
        kept += tokens * 9  # which tokens are here
    if not last:
        return kept, 0.0, 0.0
    vocabulary = -(-model.vocab_size // s.layout.tp)
    kept += residual * (hidden * b + wide)  # the norm's input
    loss = residual * hidden * b + vocabulary * hidden * wide  # both gradients, made in forward
    # Of a chunk of tokens the logits, and the softmax where it is another tensor; while the next
    # one's are made, both's. Below fp32 the head's gradient is a product first.
    chunk, narrow = min(tokens, chunk_tokens(vocabulary)), b < wide
    logits = chunk * vocabulary * (wide + (b if narrow else 0))
    product = vocabulary * hidden * b if narrow else 0
    besides = max(2 * logits if tokens > chunk else 0, logits + product)
    besides += (2 * tokens - residual) * hidden * b
    return kept, loss, besides


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


@lru_cache(maxsize=512)
def in_flight(name: str, stages: int, microbatches: int, virtual_stages: int) -> tuple[int, ...]:
    """Per rank, the (chunk, micro-batch) pairs that are kept at most."""
    if virtual_stages == 1 and name == "1f1b":
        return tuple(min(stages - r, microbatches) for r in range(stages))
    return tuple(peak_in_flight(cached_schedule(name, stages, microbatches, virtual_stages)))


def stage_memory(
    model: ModelConfig,
    s: Strategy,
    rank: int,
    tokens: float,
    *,
    imbalance: float = 1.0,
    device: str = "cuda",
) -> StageMemory:
    """Memory of a rank of pipeline stage `rank` when the largest micro-batches have `tokens`."""
    stages = s.layout.pp
    virtual = range(rank, s.depth, stages)
    parameters: dict[str, int] = {}
    for v in virtual:
        part = chunk_parameters(
            model,
            s.layout,
            s.layers[v],
            v == 0,
            v == s.depth - 1,
            sequence_parallel=s.sequence_parallel,
        )
        for name, count in part.items():
            parameters[name] = parameters.get(name, 0) + count
    total = sum(parameters.values())
    weight, gradient, master, moments = STATE_BYTES[s.dtype, s.optimizer_state]

    one = layer_bytes(model, s, tokens, imbalance=imbalance, device=device)
    chunks, working = [], 0.0
    for v in virtual:
        beside, loss, besides = chunk_bytes(model, s, tokens, v == 0, v == s.depth - 1)
        plain = s.layers[v] - s.checkpointed[v]
        chunks.append(beside + loss + plain * one.total + s.checkpointed[v] * one.checkpointed)
        # What the loss keeps is gone by the time a layer works.
        working = max(working, one.besides(s.checkpointed[v] > 0) - loss, besides)
    # The pairs in flight go round the rank's chunks in turn; the heaviest come first.
    pairs = in_flight(s.schedule, stages, s.microbatches, s.virtual_stages)[rank]
    chunks.sort(reverse=True)
    share, rest = divmod(pairs, len(chunks))
    activations = share * sum(chunks) + sum(chunks[:rest])
    residual = tokens / (s.layout.tp if s.sequence_parallel else 1)
    message = residual * model.d_model * WIDTH[s.dtype]
    messages = (2 + 2 * SENDS_IN_FLIGHT) * message if stages > 1 else 0.0
    return StageMemory(
        weights=total * weight,
        gradients=total * gradient,
        optimizer=total * (master + moments),
        activations=activations,
        working=working,
        messages=messages,
        parameters=parameters,
    )
