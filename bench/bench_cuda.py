"""Times the routing ops on a GPU beside torch and CuPy: bytes moved over time, against what a plain
copy of as many bytes reaches. Results of ours are held to fp64 at sampled places; the exit code
is 1 where one is far.

python bench/bench_cuda.py [--quick] [--json FILE] [--rehearse]
Legend: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from cuda_clock import FAR, Clock, Exact, Shape, error_of, ids_of, run_bench, sampled, why_missing

from moekernels import interop, ops

TOKENS, HIDDEN = (4096, 16384, 65536), (1024, 2048, 4096)
EXPERTS, TOP_K = (8, 64, 256), (1, 2, 4, 8)
ROUTINGS = ("balanced", "zipf")
# Liger has no routing ops of its own to call: bench_cuda_experts.py runs its whole layer.
PEERS = ("cupy",)

Candidate = tuple[str, str, Callable[[], object], int]  # op, implementation, function, bytes moved


def gate_candidates(shape: Shape, device: str, exact: Exact) -> Iterator[Candidate]:
    logits = torch.randn(shape.T, shape.E, device=device, dtype=torch.bfloat16)
    ones = torch.ones(shape.T * shape.K, device=device)
    moved = logits.nbytes + shape.T * shape.K * 8

    def plain():
        scores = torch.softmax(logits.float(), dim=-1)
        weights, ids = scores.topk(shape.K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.zeros(shape.E, device=device).index_add_(0, ids.flatten(), ones)
        z_sum = torch.logsumexp(logits.float(), -1).square().sum()
        return weights, ids, scores.sum(0), counts, z_sum

    at = sampled(shape.T, device)
    best = torch.softmax(logits[at].double(), dim=-1).topk(shape.K).values
    should = best / best.sum(-1, keepdim=True)
    exact["gate"] = lambda out: (out.weights[at].sort(descending=True).values, should)

    yield "gate", "ours", lambda: ops.gate(logits, shape.K, renormalize=True), moved
    yield "gate", "torch", plain, moved
    grads = torch.rand(shape.T, shape.K, device=device), torch.rand(1, shape.E, device=device)
    ids = ops.gate(logits, shape.K).ids
    backward = torch.ops.moekernels._gate_backward.default
    one = torch.ones(1, device=device)
    yield (
        "gate backward",
        "ours",
        lambda: backward(logits, ids, *grads, one, 0, True, 1.0, None),
        2 * logits.nbytes,
    )


def route_candidates(shape: Shape, device: str, exact: Exact) -> Iterator[Candidate]:
    ids = ids_of(shape, device)
    flat, moved = ids.flatten(), ids.numel() * 16

    def by_sort():
        order = torch.sort(flat, stable=True).indices
        row_of = torch.empty_like(order)
        row_of[order] = torch.arange(len(order), device=device)
        return row_of, torch.bincount(flat, minlength=shape.E)

    at = sampled(len(flat), device)
    row_of = by_sort()[0][at].double()
    exact["route"] = lambda routing: (routing.row_of.flatten()[at], row_of)

    yield "route", "ours", lambda: ops.route(ids, shape.E), moved
    yield "route", "torch", by_sort, moved


def row_candidates(shape: Shape, device: str, exact: Exact) -> Iterator[Candidate]:
    routing = ops.route(ids_of(shape, device), shape.E)
    token_of, row_of = routing.token_of, routing.row_of
    token_index, row_index = token_of.long(), row_of.long()
    x = torch.randn(shape.T, shape.H, device=device, dtype=torch.bfloat16)
    rows = torch.randn(shape.T * shape.K, shape.H, device=device, dtype=torch.bfloat16)
    weights = torch.rand(shape.T, shape.K, device=device)
    # The least there is to move: each token's and each row's elements once.
    moved = x.nbytes + rows.nbytes

    def weighted():
        return (rows[row_index] * weights[:, :, None].bfloat16()).sum(1)

    at, token = sampled(len(rows), device), sampled(shape.T, device)
    some, by_weight = rows[row_index[token]].double(), weights[token, :, None].double()
    drows = x[token_index[at]].double() * ops.permute_weights(weights, routing)[at, None].double()
    exact["permute"] = lambda y: (y[at], x[token_index[at]].double())
    exact["combine"] = lambda y: (y[token], some.sum(1))
    exact["combine weighted"] = lambda y: (y[token], (some * by_weight).sum(1))
    exact["combine weighted backward"] = lambda gradients: (gradients[0][at], drows)

    backward = torch.ops.moekernels._combine_backward.default
    yield "permute", "ours", lambda: ops.permute(x, token_of, row_of), moved
    yield "permute", "torch", lambda: x.index_select(0, token_index), moved
    yield "combine", "ours", lambda: ops.combine(rows, row_of, token_of), moved
    yield "combine", "torch", lambda: rows[row_index].sum(1), moved
    yield "combine weighted", "ours", lambda: ops.combine(rows, row_of, token_of, weights), moved
    yield "combine weighted", "torch", weighted, moved
    yield (
        "combine weighted backward",
        "ours",
        lambda: backward(x, rows, row_of, token_of, weights),
        x.nbytes + 2 * rows.nbytes,
    )
    if device == "cuda" and not why_missing("cupy"):
        bits, index = interop.to_cupy(x.view(torch.int16)), interop.to_cupy(token_index)

        def take():
            with interop.cupy_stream():
                return bits.take(index, axis=0)

        yield "permute", "cupy", take, moved


def shapes(quick: bool) -> Iterator[tuple[Callable, Shape]]:
    for tokens in TOKENS[:1] if quick else TOKENS:
        for experts in EXPERTS:
            for top_k in TOP_K[-1:] if quick else TOP_K:
                yield gate_candidates, Shape(tokens, 0, experts, top_k)
                for routing in ROUTINGS:
                    yield route_candidates, Shape(tokens, 0, experts, top_k, routing)
        # Rows do not feel E much: every H and K at E=64, the other E at one H and K.
        wanted = [(h, 64, k) for h in HIDDEN for k in TOP_K] + [(2048, e, 8) for e in (8, 256)]
        for hidden, experts, top_k in wanted[::5] if quick else wanted:
            for routing in ROUTINGS:
                yield row_candidates, Shape(tokens, hidden, experts, top_k, routing)


def rows(clock: Clock, args: argparse.Namespace) -> Iterator[dict]:
    tiny = [
        (candidates, Shape(64, 32, 8, 2, routing))
        for candidates in (gate_candidates, route_candidates, row_candidates)
        for routing in ROUTINGS
    ]
    for candidates, shape in tiny if args.rehearse else shapes(args.quick):
        exact: Exact = {}
        for op, name, fn, moved in candidates(shape, clock.device, exact):
            ours = name == "ours" and op in exact
            error = error_of(fn(), exact[op]) if ours else -1.0
            seconds = clock(fn)
            share = moved / seconds / clock.copy_rate(moved)
            far = "  FAR FROM EXACT" if error > FAR else ""
            yield {
                "op": op,
                "implementation": name,
                "us": seconds * 1e6,
                "bytes": moved,
                "share_of_copy": share,
                "error": error,
                "wrong": error > FAR,
                "shape": shape,
                "text": f"{seconds * 1e6:9.1f} us {share * 100:6.1f} % of copy{far}",
            }


if __name__ == "__main__":
    sys.exit(run_bench("bench_cuda", __doc__, PEERS, rows))
