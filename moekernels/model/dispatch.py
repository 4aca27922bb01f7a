"""How tokens reach their experts: a register of ways, each with what it keeps and sends.

`nn.dispatcher` holds the class of each. Legend: t own tokens, K top-k, R rows, P ranks of the
exchange, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from moekernels.model.layout import Layout
from moekernels.model.router import RouterSpec
from moekernels.model.spec import Place

SLOTS = 4  # exchanges of one direction that GPUs may have posted and not yet waited for


class Hop(NamedTuple):
    """Bytes that a rank sends in so many collectives of `ranks` ranks that lie `stride` apart."""

    size: float
    calls: int
    ranks: int
    stride: int = 1


class Border(NamedTuple):
    """Bytes that a rank sends to other nodes for a layer and microbatch, on each of the four ways
    of an exchange: rows to experts, results home, and their gradients'. `numbers` of rows go once,
    before the first."""

    out: float = 0.0
    back: float = 0.0
    grad_out: float = 0.0
    grad_back: float = 0.0
    numbers: float = 0.0


@dataclass(frozen=True)
class Way:
    """rows: R that the experts' tensors have room for. routing: bytes kept of the routing.
    arriving: bytes of the rows, or the tokens behind them, that the experts see. keeps: bytes that
    outlive the first forward of a checkpointed layer, so that nothing is exchanged twice. traffic:
    what a rank sends a microbatch and forward pass. border: what of it and of the backward goes to
    other nodes, if experts are chosen evenly. view: the experts see rows through `token_of`.
    defers: the experts' weight gradients are computed while the rows'
    gradients travel home, so that what they read is held until then. peaks: (within a backward,
    within a forward, within a second forward of a checkpointed layer) the most bytes held
    besides, from the first of them without any exchange and the experts' own bytes."""

    # spec, layout, nodes that the ranks of an exchange lie on: whether it can pay at all
    suits: Callable[[RouterSpec, Layout, float], bool]
    rows: Callable[[RouterSpec, Place], float]
    routing: Callable[[RouterSpec, Place], float]
    arriving: Callable[[RouterSpec, Place], float]
    keeps: Callable[[RouterSpec, Place], float]
    traffic: Callable[[RouterSpec, Place], tuple[Hop, ...]]
    border: Callable[[RouterSpec, Place], Border]
    view: bool
    defers: bool
    peaks: Callable[[RouterSpec, Place, float, float, bool], tuple[float, float, float]]


def routed_rows(spec: RouterSpec, at: Place) -> float:
    skew = at.imbalance if at.layout.exchange > 1 else 1.0
    return at.own * spec.top_k * at.layout.etp * skew


def _nothing_besides(
    spec: RouterSpec, at: Place, working: float, experts: float, lifted: bool
) -> tuple[float, float, float]:
    return working, 0.0, 0.0


# --- all experts are here: nothing moves

LOCAL = Way(
    suits=lambda spec, layout, nodes: True,
    rows=routed_rows,
    routing=lambda spec, at: at.own * spec.top_k * (4 + 4 + 4) + at.own * spec.top_k * at.wide,
    # in fp32 it is the gate's input, counted there
    arriving=lambda spec, at: at.own * spec.d_model * at.width if at.width < at.wide else 0.0,
    keeps=lambda spec, at: 0.0,
    traffic=lambda spec, at: (),
    border=lambda spec, at: Border(),
    view=True,
    defers=False,
    peaks=_nothing_besides,
)


# --- each row goes to the ranks that hold (a shard of) its expert


def _sent(spec: RouterSpec, at: Place) -> float:
    return at.own * spec.top_k * at.layout.etp


def _exchanged_traffic(spec: RouterSpec, at: Place) -> tuple[Hop, ...]:
    p = at.layout.exchange
    size = 2.0 * routed_rows(spec, at) * spec.d_model * at.width * (p - 1) / p
    return (Hop(size, 3, p),)


def _far_ranks(at: Place) -> float:
    """Of an exchange, on other nodes."""
    return at.layout.exchange - at.layout.exchange / at.nodes


def _four_ways(copies: float, row: float, weights: float, beside: float = 0.0) -> Border:
    """Of so many copies with bytes of a row, of its weights or their gradients, and what goes
    beside it to the experts."""
    there, home = copies * (row + weights + beside), copies * (row + weights)
    return Border(there, copies * row, copies * row, home)


def _exchanged_border(spec: RouterSpec, at: Place) -> Border:
    rows = _sent(spec, at) * (1 - 1 / at.nodes)
    numbers = _far_ranks(at) * (spec.num_experts // at.layout.ep) * 8
    ways = _four_ways(rows, spec.d_model * at.width, at.wide)
    return ways._replace(numbers=numbers)


def _arriving_rows(spec: RouterSpec, at: Place) -> float:
    return routed_rows(spec, at) * spec.d_model * at.width


ALL_TO_ALL = Way(
    suits=lambda spec, layout, nodes: True,
    rows=routed_rows,
    routing=lambda spec, at: _sent(spec, at) * (4 + 4 + 4) + routed_rows(spec, at) * at.wide,
    arriving=_arriving_rows,
    keeps=lambda spec, at: (
        _arriving_rows(spec, at) + _sent(spec, at) * 12 + routed_rows(spec, at) * at.wide
    ),
    traffic=_exchanged_traffic,
    border=_exchanged_border,
    view=False,
    defers=True,
    peaks=_nothing_besides,
)


# --- every rank sees all tokens and computes its own experts: less traffic where K exceeds ep


def _gathered_rows(spec: RouterSpec, at: Place) -> float:
    """A fixed shape on a GPU: room for every choice, of which the others' stay empty."""
    rows = at.gathered * spec.top_k
    return rows if at.device == "cuda" else rows / at.layout.ep


def _gathered_tokens(spec: RouterSpec, at: Place) -> float:
    return at.gathered * spec.d_model * at.width


def _gathered_peaks(
    spec: RouterSpec, at: Place, working: float, experts: float, lifted: bool
) -> tuple[float, float, float]:
    token = spec.d_model * at.width
    rows = _gathered_rows(spec, at)
    # All tokens of the group four times over: what is summed, packed, exchanged and unpacked.
    forward = 4 * at.gathered * token + at.own * spec.d_model * (at.wide + at.width)
    working += rows * token + at.own * token
    working = max(working, forward + rows * token - experts)
    # The results' gradient comes from all ranks before the layer is computed again, up to the sums
    # of all tokens; the gathered tokens are held until then, lifted or not.
    again = (2 * at.gathered + rows + 2 * at.residual) * token
    again += _gathered_tokens(spec, at) if lifted else 0.0
    return working, forward, again


def _gathered_traffic(spec: RouterSpec, at: Place) -> tuple[Hop, ...]:
    p = at.layout.exchange
    size = 2.0 * spec.d_model * at.width * (p - 1) / at.layout.tp * at.tokens
    return (Hop(size, 2, p),)


def _gathered_border(spec: RouterSpec, at: Place) -> Border:
    far, k = _far_ranks(at), spec.top_k
    ways = _four_ways(at.own * far, spec.d_model * at.width, k * at.wide, k * 4)
    return ways._replace(numbers=far * 8 if at.layout.tp % at.layout.exchange else 0)


ALL_GATHER = Way(
    suits=lambda spec, layout, nodes: spec.top_k >= layout.ep,
    rows=_gathered_rows,
    routing=lambda spec, at: at.gathered * spec.top_k * (4 + 4 + 4 + at.wide),
    arriving=_gathered_tokens,
    keeps=lambda spec, at: _gathered_tokens(spec, at) + at.gathered * spec.top_k * (at.wide + 4),
    traffic=_gathered_traffic,
    border=_gathered_border,
    view=True,
    defers=False,
    peaks=_gathered_peaks,
)

# --- one copy of a token to each node that it chose, and from there to the ranks of its experts


def nodes_met(spec: RouterSpec, nodes: float) -> float:
    """That a token's K different experts lie on, on average over even choices."""
    elsewhere = spec.num_experts - int(spec.num_experts / nodes)
    return nodes * (1 - math.comb(elsewhere, spec.top_k) / math.comb(spec.num_experts, spec.top_k))


def _copies(spec: RouterSpec, at: Place) -> float:
    """Copies of tokens that come to a rank."""
    return at.own * nodes_met(spec, at.nodes)


def _crossing_routing(spec: RouterSpec, at: Place) -> float:
    """Of own tokens by node, and of the copies that come by rank; those of other nodes' experts
    have room, too."""
    choices = _copies(spec, at) * spec.top_k * at.layout.etp
    return (at.own * at.nodes + choices) * (4 + 4 + 4)


def _crossing_border(spec: RouterSpec, at: Place) -> Border:
    copies, weights = _copies(spec, at) * (1 - 1 / at.nodes), spec.top_k * at.wide
    ways = _four_ways(copies, spec.d_model * at.width, weights, weights)
    return ways._replace(numbers=(at.nodes - 1) * 8)


def _hierarchical_traffic(spec: RouterSpec, at: Place) -> tuple[Hop, ...]:
    near, nodes = int(at.layout.exchange / at.nodes), int(at.nodes)
    border = _crossing_border(spec, at)
    rows = 2.0 * routed_rows(spec, at) * spec.d_model * at.width * (near - 1) / near
    return Hop(border.out + border.back, 3, nodes, near), Hop(rows, 3, near)


def _levels(spec: RouterSpec, layout: Layout, nodes: float) -> bool:
    """Whether there are several nodes with as many ranks each, several, and the etp shards of an
    expert on one."""
    near = layout.exchange / nodes
    return nodes > 1 and near > 1 and layout.exchange % nodes == 0 and near % layout.etp == 0


HIERARCHICAL = Way(
    suits=_levels,
    rows=routed_rows,
    routing=lambda spec, at: _crossing_routing(spec, at) + routed_rows(spec, at) * at.wide,
    arriving=_arriving_rows,
    keeps=lambda spec, at: (
        _arriving_rows(spec, at)
        + routed_rows(spec, at) * at.wide
        + _crossing_routing(spec, at)
        + _copies(spec, at) * (spec.d_model * at.width + 2 * spec.top_k * at.wide)
    ),
    traffic=_hierarchical_traffic,
    border=_crossing_border,
    view=False,
    defers=True,
    peaks=_nothing_besides,
)

WAYS = {"all_to_all": ALL_TO_ALL, "all_gather": ALL_GATHER, "hierarchical": HIERARCHICAL}
WORTH = 2 / 3  # of the bytes between nodes: where more is left, a second hop is not worth it


def choose(kind: str, spec: RouterSpec, layout: Layout, nodes: float = 1) -> str:
    """The name in `WAYS` that a kind stands for. `auto` takes the all-gather where it moves less: a
    token meets K peers or all ep of them; and, where ranks that exchange rows lie on several nodes,
    as many on each, one copy a node where that saves a third of what goes between them."""
    if kind != "auto":
        return kind
    flat = "all_gather" if spec.top_k > layout.ep else "all_to_all"
    if HIERARCHICAL.suits(spec, layout, nodes):
        at = Place(layout, tokens=1.0, nodes=nodes)
        borders = [WAYS[name].border(spec, at)[:4] for name in ("hierarchical", flat)]
        if sum(borders[0]) <= WORTH * sum(borders[1]):
            return "hierarchical"
    return flat


def way_of(at: Place) -> Way:
    return LOCAL if at.layout.exchange == 1 else WAYS[at.dispatcher]
