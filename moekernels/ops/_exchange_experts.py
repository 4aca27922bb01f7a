"""The experts' FFN between the two ways of an exchange: what `exchange.put` sends is read by the
first product while it comes, and the last product's rows go straight to their owners. Where the
device has no such products (bf16 on sm_90a does), rows are received before and sent after, in the
same calls and with the same bits.

    put(x, ...)                                  # exchange.py
    rows, weights, h, a = up(ffn, ...)           # waits for what comes
    down(ffn, ..., a)                            # results to their owners
    y, _ = take_home(..., units=units(H))        # exchange.py

    put(dout, ...)
    dy, dh, weighted_a, dweights = dact(ffn, ..., h)
    product(dh, w1, ..., dweights)               # x's gradient, and the weights'
    dx, dweights = take_home(..., units=units(H))

Legend: H hidden, F the experts' hidden, G 2F or F, R' rows that come, e local experts.
"""

from __future__ import annotations

from torch import Tensor

from moekernels.ops._ffn import Ffn
from moekernels.ops._library import fake, raw
from moekernels.ops._op import wide
from moekernels.ops.exchange import Counts, Slabs

_up = raw._exchange_up.default
_down = raw._exchange_down.default
_dact = raw._exchange_dact.default
_product = raw._exchange_product.default

_COLUMNS = 128


def units(hidden: int) -> int:
    """How often a row of `hidden` numbers is counted when it comes home by `down` or `product`."""
    return max(1, -(-hidden // _COLUMNS))


@fake("_exchange_up", bundle=Ffn)
def _(
    ffn: Ffn, slab, addresses, rank, shape, patience, stuck, record, slot, coming, num_rows, keep_h
):
    x, (h_axis, f_axis) = ffn.x, (2, 1) if ffn.transposed else (1, 2)
    return (
        x.new_empty(num_rows, x.shape[1]),
        x.new_empty(num_rows, dtype=wide(x.dtype)),
        x.new_empty(num_rows if keep_h else 0, ffn.w1.shape[h_axis]),
        x.new_empty(num_rows, ffn.w2.shape[f_axis]),
    )


@fake("_exchange_down", bundle=Ffn)
def _(ffn: Ffn, slab, addresses, rank, shape, patience, stuck, record, slot, runs, a):
    return None


@fake("_exchange_dact", bundle=Ffn)
def _(
    ffn: Ffn,
    slab,
    addresses,
    rank,
    shape,
    patience,
    stuck,
    record,
    slot,
    coming,
    h,
    want_weighted_a,
    want_dweights,
):
    x, rows, (h_axis, f_axis) = ffn.x, ffn.rows, (2, 1) if ffn.transposed else (1, 2)
    return (
        x.new_empty(rows, x.shape[1]),
        x.new_empty(rows, ffn.w1.shape[h_axis]),
        x.new_empty(rows if want_weighted_a else 0, ffn.w2.shape[f_axis]),
        x.new_empty(rows if want_dweights else 0, dtype=wide(x.dtype)),
    )


@fake("_exchange_product")
def _(
    rows,
    w,
    offsets,
    transposed,
    tf32,
    weights,
    slab,
    addresses,
    rank,
    shape,
    patience,
    stuck,
    record,
    slot,
    runs,
):
    return None


def up(
    ffn: Ffn, counts: Counts, slabs: Slabs, slot: int, num_rows: int, keep_h: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What comes, rows [R', H] and weights [R'] as `exchange.take` has them, h [R', G] (empty
    unless `keep_h`) and a [R', F] of `ffn`, whose x says only their dtype and width. R' is
    `num_rows`; `ffn.offsets` are those of the rows that there is room for (`counts.held`)."""
    return _up(*ffn, *slabs.arguments(), slot, counts.offsets, num_rows, keep_h)


def down(ffn: Ffn, a: Tensor, counts: Counts, slabs: Slabs, slot: int) -> None:
    """The FFN's results, from a [R', F] and `ffn` with the rows and weights of `up`, to whom the
    rows came from."""
    _down(*ffn, *slabs.arguments(), slot, counts.back, a)


def dact(
    ffn: Ffn,
    h: Tensor,
    counts: Counts,
    slabs: Slabs,
    slot: int,
    want_weighted_a: bool,
    want_dweights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results' gradient dy [R', H] as it comes, then dh [R', G], the weighted a [R', F] and the
    weights' gradient [R'] of `ffn`, which has the rows and weights of `up`, as its h (or none)."""
    slab_arguments = slabs.arguments()
    return _dact(*ffn, *slab_arguments, slot, counts.offsets, h, want_weighted_a, want_dweights)


def product(
    rows: Tensor,
    w: Tensor,
    offsets: Tensor,
    transposed: bool,
    tf32: bool,
    weights: Tensor | None,
    counts: Counts,
    slabs: Slabs,
    slot: int,
) -> None:
    """`grouped_gemm` of rows [R', I] with w, and beside each result its weight of `weights` [R'],
    to whom the rows came from."""
    _product(rows, w, offsets, transposed, tf32, weights, *slabs.arguments(), slot, counts.back)
