"""What the tuner times: the products of a layer at shapes, each as a call on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from moekernels.predict.layer import Layer

OPS = ("up", "down", "dact", "dgrad", "wgrad")  # of a layer; forward is grouped_gemm by itself
PREFETCHING = ("dact", "wgrad")  # whose epilogues read what a prefetch brings
STYLES = {"dact": "pingpong", "wgrad": "pingpong"}  # beside direct; of the others: hidden
STAGES = {"direct": 4, "hidden": 3, "pingpong": 6}


# Ours, OLMoE, Qwen3-30B, and SonicMoE's 30B and 120B.
LAYERS = (
    Layer(32768, 2048, 4096, 64, 4),
    Layer(16384, 2048, 4096, 64, 2),
    Layer(32768, 2048, 1024, 64, 8),
    Layer(32768, 2048, 768, 128, 8),
    Layer(32768, 4096, 1024, 64, 4),
    Layer(32768, 4096, 2048, 64, 4),
)
# Rows of DeepGEMM's table of grouped products, 4 x 8192 and 8 x 4096 of them: R = T, N = F, K = H.
GROUPED = (
    Layer(32768, 7168, 4096, 4, 1),
    Layer(32768, 2048, 7168, 4, 1),
    Layer(32768, 7168, 4096, 8, 1),
    Layer(32768, 2048, 7168, 8, 1),
)
QUICK = LAYERS[:1]
TINY = (Layer(24, 136, 136, 2, 2),)
# Whose launches take a part of their time.
SMALL = tuple(replace(at, T=tokens) for at in (LAYERS[0], LAYERS[3]) for tokens in (1024, 4096))


@dataclass(frozen=True)
class Setting:
    """What a launch may be told (moekernels/sm90.h); 0: the default. stages 0: the table's.

    style, pair: how the epilogue goes, and what two blocks share (moekernels/gemm_tuned.h); empty:
    the table's. join: gradients of several microbatches by one launch."""

    stages: int = 0
    band: int = 0
    grid: int = 0
    promotion: int = 0
    prefetch: bool = True
    bulk_sums: bool = True
    style: str = ""
    pair: str = ""
    gather: bool | None = None
    join: bool | None = None
    chain: bool | None = None
    route_at_once: bool | None = None

    def __str__(self) -> str:
        told = [f"{n} {v}" for n, v in asdict(self).items() if v != Setting.__dict__[n]]
        return ", ".join(told) or "the default"


# How a layer's launches follow one another: chain, route_at_once.
CLOSELY = ((False, False), (False, True), (True, False), (True, True))
TOKENS = "tokens"  # of a problem that sees x through token_of
SEGMENTS = 4  # microbatches whose gradients one call adds
MANY = f"of {SEGMENTS}"  # of such a problem


def settings_of(
    op: str, multiprocessors: int, of: str = "", table: tuple[str, str] = ("direct", "none")
) -> list[Setting]:
    """Every setting of an op, the default first; those of other styles with the table's stages. Of
    x seen through token_of: who gathers it; of several microbatches: whether one launch adds.
    table: the default's style and pairing."""
    if op == "layer":
        return [Setting(chain=c or None, route_at_once=r or None) for c, r in CLOSELY]
    if of.endswith(TOKENS):
        return [Setting(gather=gather) for gather in (None, True, False)]
    if of.endswith(MANY):
        return [Setting(join=join) for join in (None, True, False)]
    fewer = multiprocessors // 8 * 8 if multiprocessors % 8 else multiprocessors - 4
    axes = itertools.product(
        (0, 3),
        (0, 8, 32, -16),
        (0, fewer),
        (0, 128),
        (True, False) if op in PREFETCHING else (True,),
        (True, False) if op == "wgrad" else (True,),
    )
    direct = [Setting(*values) for values in axes]
    of_style = [s for s in direct if not s.stages and not s.grid and s.bulk_sums]
    if op == "wgrad":  # in tiles of half the columns, lower bands
        of_style = [replace(s, band=4) if s.band == 32 else s for s in of_style]
    found = [replace(s, style="direct", pair="none") for s in direct]
    style = STYLES.get(op, "hidden")
    found += [replace(s, style=style, pair=pair) for pair in ("none", "n", "m") for s in of_style]
    named = [replace(s, style="", pair="") if (s.style, s.pair) == table else s for s in found]
    return sorted(named, key=lambda s: s != Setting())


@dataclass(frozen=True)
class Problem:
    """A product at a shape. m, n, k: as the table of tiles counts them; of: which weights, where an
    op has two of a layer's.

    run: one call -> its result; alone: what else a call of `run` holds, timed and taken off."""

    op: str
    layer: Layer
    m: int
    n: int
    k: int
    run: Callable[[], Tensor]
    alone: Callable[[], Tensor] | None = None
    of: str = ""

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.of, str(self.layer))))


def every(
    layers: tuple[Layer, ...],
    grouped: tuple[Layer, ...],
    device: str,
    small: tuple[Layer, ...] = (),
) -> Iterator[Problem]:
    """The products of layers, grouped_gemm forward at shapes of its own, and whole small layers."""
    for layer in layers:
        yield from problems(layer, device)
    for layer in grouped:
        yield forward(layer, device)
    for layer in small:
        yield whole(layer, device)


def whole(layer: Layer, device: str) -> Problem:
    """A layer from its choices on, forward and backward, in bf16."""
    from moekernels import ops

    normal, (rows, h, f, e) = normal_on(device), (layer.rows, layer.H, layer.F, layer.E)
    x, dy = normal(layer.T, h).requires_grad_(), normal(layer.T, h)
    w1, w2 = normal(e, 2 * f, h, scale=h**-0.5), normal(e, h, f, scale=f**-0.5)
    for w in (w1.requires_grad_(), w2.requires_grad_()):
        w.main_grad = torch.zeros(w.shape, device=device)
    ids = torch.rand(layer.T, e, device=device).topk(layer.K).indices.int()
    weights = torch.rand(rows, device=device)

    def run() -> Tensor:
        at = ops.route(ids, e)
        seen = {"token_of": at.token_of, "row_of": at.row_of}
        out = ops.experts(x, weights, w1, w2, at.offsets, **seen)
        y = ops.combine(out, at.row_of, at.token_of)
        x.grad = None
        y.backward(dy)
        return torch.cat([y.detach(), x.grad])

    return Problem("layer", layer, rows, 9 * f, h, run)


def balanced_offsets(layer: Layer, device: str) -> Tensor:
    """[E+1] int64 of a uniform random routing."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.multinomial(torch.ones(layer.E), layer.rows, True, generator=draw)
    counts = counts.bincount(minlength=layer.E)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device)


def normal_on(device: str) -> Callable[..., Tensor]:
    """A function of sizes (and a scale) that gives bf16 numbers."""
    torch.manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).bfloat16()

    return normal


def forward(layer: Layer, device: str) -> Problem:
    """grouped_gemm [R, H] x [E, F, H], with K of 1."""
    from moekernels.ops._library import raw

    normal, offsets = normal_on(device), balanced_offsets(layer, device)
    x = normal(layer.rows, layer.H)
    w = normal(layer.E, layer.F, layer.H, scale=layer.H**-0.5)

    def run() -> Tensor:
        return raw._grouped_gemm(x, w, offsets, False)

    return Problem("forward", layer, layer.rows, layer.F, layer.H, run)


PRODUCTS = 10  # of a layer


def problems(layer: Layer, device: str) -> Iterator[Problem]:
    """The products of one layer, in bf16, gradients added to fp32."""
    from moekernels.ops._library import raw

    rows, h, f, e = layer.rows, layer.H, layer.F, layer.E
    normal, offsets = normal_on(device), balanced_offsets(layer, device)
    x, a, dy = normal(rows, h), normal(rows, f), normal(rows, h)
    w1, w2 = normal(e, 2 * f, h, scale=h**-0.5), normal(e, h, f, scale=f**-0.5)
    kept, weights = normal(rows, 2 * f), torch.rand(rows, device=device)
    style = ("swiglu", 1.702, 7.0, False, False, False)
    ffn = (x, weights, w1, w2, offsets, None, None, None, *style)
    draw = torch.Generator().manual_seed(1)
    token_of = torch.randint(layer.T, (rows,), generator=draw, dtype=torch.int32).to(device)
    tokens = x[: layer.T]

    def down() -> Tensor:
        return raw._grouped_gemm(a, w2, offsets, False)

    def both() -> Tensor:
        return raw._experts(*ffn, True)[1]

    def both_of_tokens() -> Tensor:
        return raw._experts(tokens, *ffn[1:5], token_of, *ffn[6:], True)[1]

    def dact() -> Tensor:
        return raw._experts_dact(*ffn, dy, kept, False, False)[0]

    def dgrad() -> Tensor:
        return raw._grouped_gemm(kept, w1, offsets, True)

    def wgrad(m: int, n: int, rows: Tensor, drows: Tensor, *seen) -> Callable[[], Tensor]:
        total = torch.zeros(e, m, n, device=device)

        def run() -> Tensor:
            through = seen or (None, 0, False)
            raw._grouped_gemm_wgrad_(total, rows, drows, offsets, False, *through)
            return total

        return run

    def wgrads(m: int, n: int, rows: Tensor, drows: Tensor) -> Callable[[], Tensor]:
        total = torch.zeros(e, m, n, device=device)
        # What one microbatch reads another must not find in the cache.
        many = [[t, *(t.clone() for _ in range(SEGMENTS - 1))] for t in (rows, drows)]

        def run() -> Tensor:
            rest = ([offsets] * SEGMENTS, False, [], [0] * SEGMENTS, False)
            raw._grouped_gemm_wgrads_(total, *many, *rest)
            return total

        return run

    yield Problem("up", layer, rows, 2 * f, h, both, down)
    yield Problem("up", layer, rows, 2 * f, h, both_of_tokens, down, of=TOKENS)
    yield Problem("down", layer, rows, h, f, down)
    yield Problem("dact", layer, rows, f, h, dact)
    yield Problem("dgrad", layer, rows, h, 2 * f, dgrad)
    yield Problem("wgrad", layer, 2 * f, h, rows, wgrad(2 * f, h, x, kept), of="w1")
    of_tokens = wgrad(2 * f, h, tokens, kept, token_of, layer.T, True)
    yield Problem("wgrad", layer, 2 * f, h, rows, of_tokens, of=f"w1 {TOKENS}")
    yield Problem("wgrad", layer, h, f, rows, wgrad(h, f, a, dy), of="w2")
    all_rows = SEGMENTS * rows
    yield Problem("wgrad", layer, 2 * f, h, all_rows, wgrads(2 * f, h, x, kept), of=f"w1 {MANY}")
    yield Problem("wgrad", layer, h, f, all_rows, wgrads(h, f, a, dy), of=f"w2 {MANY}")
