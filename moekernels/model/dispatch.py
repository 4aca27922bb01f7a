"""How tokens reach their experts: a register of ways, each with what it keeps and sends.

`nn.dispatcher` holds the class of each. Legend: t own tokens, K top-k, R rows, P ranks of the
exchange, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moekernels.model.router import RouterSpec
from moekernels.model.spec import Place

SLOTS = 4  # exchanges of one direction that GPUs may have posted and not yet waited for


@dataclass(frozen=True)
class Way:
    """rows: R that the experts' tensors have room for. routing: bytes kept of the routing.
    arriving: bytes of the rows, or the tokens behind them, that the experts see. keeps: bytes that
    outlive the first forward of a checkpointed layer, so that nothing is exchanged twice. traffic:
    bytes that a rank sends a micro-batch, and in how many collectives. view: the experts see rows
    through `token_of`. defers: the experts' weight gradients are computed while the rows'
    gradients travel home, so that what they read is held until then. peaks: (within a backward,
    within a forward, within a second forward of a checkpointed layer) the most bytes held
    besides, from the first of them without any exchange and the experts' own bytes."""

    suits: Callable[[RouterSpec, int], bool]  # spec, ep: whether it can pay at all
    rows: Callable[[RouterSpec, Place], float]
    routing: Callable[[RouterSpec, Place], float]
    arriving: Callable[[RouterSpec, Place], float]
    keeps: Callable[[RouterSpec, Place], float]
    traffic: Callable[[RouterSpec, Place], tuple[float, int]]
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
    suits=lambda spec, ep: True,
    rows=routed_rows,
    routing=lambda spec, at: at.own * spec.top_k * (4 + 4 + 4) + at.own * spec.top_k * at.wide,
    # in fp32 it is the gate's input, counted there
    arriving=lambda spec, at: at.own * spec.d_model * at.width if at.width < at.wide else 0.0,
    keeps=lambda spec, at: 0.0,
    traffic=lambda spec, at: (0.0, 0),
    view=True,
    defers=False,
    peaks=_nothing_besides,
)


# --- each row goes to the ranks that hold (a shard of) its expert


def _sent(spec: RouterSpec, at: Place) -> float:
    return at.own * spec.top_k * at.layout.etp


def _exchanged_traffic(spec: RouterSpec, at: Place) -> tuple[float, int]:
    p = at.layout.exchange
    return 2.0 * routed_rows(spec, at) * spec.d_model * at.width * (p - 1) / p, 3


def _arriving_rows(spec: RouterSpec, at: Place) -> float:
    return routed_rows(spec, at) * spec.d_model * at.width


ALL_TO_ALL = Way(
    suits=lambda spec, ep: True,
    rows=routed_rows,
    routing=lambda spec, at: _sent(spec, at) * (4 + 4 + 4) + routed_rows(spec, at) * at.wide,
    arriving=_arriving_rows,
    keeps=lambda spec, at: (
        _arriving_rows(spec, at) + _sent(spec, at) * 12 + routed_rows(spec, at) * at.wide
    ),
    traffic=_exchanged_traffic,
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


ALL_GATHER = Way(
    suits=lambda spec, ep: spec.top_k >= ep,
    rows=_gathered_rows,
    routing=lambda spec, at: at.gathered * spec.top_k * (4 + 4 + 4 + at.wide),
    arriving=_gathered_tokens,
    keeps=lambda spec, at: _gathered_tokens(spec, at) + at.gathered * spec.top_k * (at.wide + 4),
    traffic=lambda spec, at: (
        2.0 * spec.d_model * at.width * (at.layout.exchange - 1) / at.layout.tp * at.tokens,
        2,
    ),
    view=True,
    defers=False,
    peaks=_gathered_peaks,
)

WAYS = {"all_to_all": ALL_TO_ALL, "all_gather": ALL_GATHER}


def choose(kind: str, spec: RouterSpec, ep: int) -> str:
    """The name in `WAYS` that a kind stands for; `auto` takes the all-gather where it moves less: a
    token meets K peers or all ep of them."""
    if kind != "auto":
        return kind
    return "all_gather" if spec.top_k > ep else "all_to_all"


def way_of(at: Place) -> Way:
    return LOCAL if at.layout.exchange == 1 else WAYS[at.dispatcher]
