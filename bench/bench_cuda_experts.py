"""Times the grouped products and the whole MoE layer on a GPU beside their peers: TFLOP/s, and the
memory that a call takes at its peak.

python bench/bench_cuda_experts.py [--quick] [--json FILE] [--rehearse]

The products: forward [R, H] x [E, 2F, H], dgrad, and wgrad into fp32, beside cuBLAS's dense product
of as many FLOPs, torch's grouped_mm, DeepGEMM and, where this build holds it, CUTLASS. The layer:
route, experts (SwiGLU), combine, from ids and weights, beside torch's grouped_mm, transformers'
experts, Liger and SonicMoE (whose layer begins with its router). Every result is held to fp64 on
sampled rows; one that is far is marked, and the exit code is 1 where it is one of ours.
Legend: T tokens, H hidden, F expert hidden, E experts, K top-k, R = T*K rows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import torch
from cuda_clock import FAR, Clock, Exact, Shape, error_of, ids_of, run_bench, sampled, why_missing
from torch import Tensor
from torch.nn import functional
from tune_problems import LAYERS

from moekernels import _host, ops

PEERS = ("transformers", "liger_kernel", "deep_gemm", "sonicmoe")
SONIC = [  # of its paper, table 9b: its 30B and 7B, and OLMoE
    Shape(32768, 4096, 256, 16, "balanced", 256),
    Shape(32768, 4096, 128, 8, "balanced", 512),
    Shape(32768, 4096, 64, 4, "balanced", 1024),
    Shape(24576, 1536, 128, 8, "balanced", 256),
    Shape(24576, 1536, 64, 4, "balanced", 512),
    Shape(24576, 1536, 32, 2, "balanced", 1024),
    Shape(32768, 2048, 64, 8, "balanced", 1024),
]
# What bench/predicted.json says something of.
PREDICTED = [Shape(at.T, at.H, at.E, at.K, "balanced", at.F) for at in LAYERS]

Candidate = tuple[str, str, Callable[[], Tensor | None], int]  # op, implementation, function, FLOPs


def shapes(quick: bool) -> Iterator[Shape]:
    if quick:
        yield from (*PREDICTED[:3], Shape(32768, 2048, 64, 4, "zipf", 4096))
        return
    yield from dict.fromkeys(PREDICTED + SONIC)
    for tokens in (4096, 16384, 65536):
        for hidden in (1024, 2048):
            for ffn in (2048, 4096):
                for top_k in (1, 2, 4, 8):
                    if tokens * top_k <= 262144:  # more rows only take longer
                        for routing in ("balanced", "zipf"):
                            yield Shape(tokens, hidden, 64, top_k, routing, ffn)


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).bfloat16()


def by_cutlass(fn: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
    def call() -> Tensor | None:
        os.environ["MOEKERNELS_GEMM"] = "cutlass"
        try:
            return fn()
        finally:
            del os.environ["MOEKERNELS_GEMM"]

    return call


def exact_products(rows: Tensor, drows: Tensor, w: Tensor, offsets: Tensor) -> Exact:
    at = sampled(rows.shape[0], rows.device)
    expert = torch.searchsorted(offsets[1:], at, right=True)

    def by_rows(of: Tensor, equation: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        parts = [torch.einsum(equation, of[r].double(), w[e].double()) for r, e in zip(at, expert)]
        return lambda y: (y[at], torch.stack(parts))

    def gradient(dw: Tensor) -> tuple[Tensor, Tensor]:
        e = offsets.diff().argmax()
        begin, end, columns = *offsets[e : e + 2], sampled(w.shape[1], w.device)
        of = drows[begin:end].double()[:, columns]
        return dw[e, columns], of.T @ rows[begin:end].double()

    return {
        "grouped forward": by_rows(rows, "h,fh->f"),
        "grouped dgrad": by_rows(drows, "f,fh->h"),
        "grouped wgrad": gradient,
    }


def exact_layer(x, ids, weights, w1, w2, dy) -> Exact:
    """A token's output and gradient need no other token."""
    at = sampled(x.shape[0], x.device)
    leaves, outputs = x.detach()[at].double().requires_grad_(), []
    for token, row in zip(at, leaves):
        y = torch.zeros_like(row)
        for e, weight in zip(ids[token].tolist(), weights[token].double()):
            gate, up = (w1.detach()[e].double() @ row).chunk(2)
            y = y + weight.detach() * (w2.detach()[e].double() @ (functional.silu(gate) * up))
        outputs.append(y)
    y = torch.stack(outputs)
    (dx,) = torch.autograd.grad(y, leaves, dy[at].double())
    y = y.detach()
    return {
        "layer forward": lambda ours: (ours[at], y),
        "layer forward, backward": lambda ours: (ours[at], dx),
    }


def product_candidates(shape: Shape, device: str, exact: Exact) -> Iterator[Candidate]:
    routing = ops.route(ids_of(shape, device), shape.E)
    offsets, ends = routing.offsets, routing.offsets[1:].int()
    count, out = shape.T * shape.K, 2 * shape.F
    rows, drows = normal(device, count, shape.H), normal(device, count, out)
    w = normal(device, shape.E, out, shape.H, scale=shape.H**-0.5)
    flops = 2 * count * shape.H * out
    main_grad = torch.zeros(shape.E, out, shape.H, device=device)
    exact |= exact_products(rows, drows, w, offsets)

    yield "grouped forward", "ours", lambda: ops.grouped_gemm(rows, w, offsets), flops
    yield "grouped forward", "cublas dense", lambda: (rows @ w[0].T)[:0], flops
    grouped = functional.grouped_mm
    yield "grouped forward", "torch", lambda: grouped(rows, w.transpose(1, 2), offs=ends), flops
    if device == "cuda" and not why_missing("deep_gemm"):
        yield "grouped forward", "deepgemm", deep_gemm_forward(shape, w), flops
    yield "grouped dgrad", "ours", lambda: ops.grouped_gemm_dgrad(drows, w, offsets), flops
    yield "grouped dgrad", "cublas dense", lambda: (drows @ w[0])[:0], flops
    yield "grouped dgrad", "torch", lambda: grouped(drows, w, offs=ends), flops

    def wgrad() -> Tensor:
        ops.grouped_gemm_wgrad(rows, drows, offsets, out=main_grad)
        return main_grad

    yield "grouped wgrad", "ours, fp32 +=", wgrad, flops
    yield "grouped wgrad", "cublas dense", lambda: (drows.T @ rows)[:0], flops
    yield "grouped wgrad", "torch, bf16", lambda: grouped(drows.T, rows, offs=ends), flops
    if device == "cuda" and _host.build["cutlass"]:
        forward = by_cutlass(lambda: ops.grouped_gemm(rows, w, offsets))
        dgrad = by_cutlass(lambda: ops.grouped_gemm_dgrad(drows, w, offsets))
        yield "grouped forward", "cutlass", forward, flops
        yield "grouped dgrad", "cutlass", dgrad, flops
        main_grad.zero_()
        yield "grouped wgrad", "cutlass, fp32 +=", by_cutlass(wgrad), flops


def deep_gemm_forward(shape: Shape, w: Tensor) -> Callable[[], None]:
    """DeepGEMM's grouped product, over rows of which each expert's begin at a multiple of 128."""
    import deep_gemm

    routing = ops.route(ids_of(shape, "cuda"), shape.E, alignment=128)
    rows = normal("cuda", routing.token_of.shape[0], shape.H)
    at = torch.arange(rows.shape[0], device="cuda")
    expert = torch.searchsorted(routing.offsets[1:], at, right=True)
    layout = torch.where(routing.token_of >= 0, expert, -1).int()
    out = torch.empty(rows.shape[0], w.shape[1], device="cuda", dtype=torch.bfloat16)
    return lambda: deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, w, out, layout)


Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # x, ids, weights, w1, w2 -> y


def our_layer(recompute: bool) -> Layer:
    def layer(x, ids, weights, w1, w2):
        routing = ops.route(ids, w1.shape[0])
        row_weights = ops.permute_weights(weights, routing)
        token_of, row_of = routing.token_of, routing.row_of
        where = {"token_of": token_of, "row_of": row_of, "recompute": recompute}
        rows = ops.experts(x, row_weights, w1, w2, routing.offsets, **where)
        return ops.combine(rows, row_of, token_of)

    return layer


def torch_layer(x, ids, weights, w1, w2):
    """What one writes with torch alone: sort, gather, two grouped products, scatter."""
    order = torch.sort(ids.flatten(), stable=True).indices
    counts = torch.zeros(w1.shape[0], dtype=torch.int32, device=x.device)
    counts = counts.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
    ends, token = counts.cumsum(0).int(), order // ids.shape[1]
    gate, up = functional.grouped_mm(x[token], w1.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = functional.silu(gate) * up
    rows = functional.grouped_mm(rows, w2.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(x).index_add_(0, token, rows)


def transformers_layer(shape: Shape) -> Layer:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.H,
        moe_intermediate_size=shape.F,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def layer(x, ids, weights, w1, w2):
        parameters = {"gate_up_proj": w1, "down_proj": w2}
        arguments = (x, ids.long(), weights.to(x.dtype))
        return torch.func.functional_call(module, parameters, arguments)

    return layer


def liger_layer(x, ids, weights, w1, w2):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, w1, w2, ids, weights)


def sonic_layer(shape: Shape) -> Layer:
    """With weights of its own and its own router on x: its time alone counts."""
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    module = MoE(
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        hidden_size=shape.H,
        intermediate_size=shape.F,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    )
    module = module.to(device="cuda", dtype=torch.bfloat16)

    def layer(x, ids, weights, w1, w2):
        return module(x)[0]

    layer.parameters = tuple(module.parameters())
    return layer


def layers(shape: Shape, device: str) -> Iterator[tuple[str, Layer]]:
    yield "ours", our_layer(recompute=False)
    yield "ours, recomp.", our_layer(recompute=True)
    yield "torch", torch_layer
    if not why_missing("transformers"):
        yield "transformers", transformers_layer(shape)
    if device == "cuda" and not why_missing("liger_kernel"):
        yield "liger", liger_layer
    if device == "cuda" and not why_missing("sonicmoe"):
        yield "sonicmoe", sonic_layer(shape)


def layer_candidates(shape: Shape, device: str, exact: Exact) -> Iterator[Candidate]:
    ids = ids_of(shape, device)
    x = normal(device, shape.T, shape.H).requires_grad_()
    weights = torch.rand(shape.T, shape.K, device=device).requires_grad_()
    w1 = normal(device, shape.E, 2 * shape.F, shape.H, scale=shape.H**-0.5).requires_grad_()
    w2 = normal(device, shape.E, shape.H, shape.F, scale=shape.F**-0.5).requires_grad_()
    dy = normal(device, shape.T, shape.H)
    flops = 6 * shape.T * shape.K * shape.H * shape.F
    exact |= exact_layer(x, ids, weights, w1, w2, dy)
    for name, layer in layers(shape, device):

        def forward(layer=layer):
            with torch.no_grad():
                return layer(x, ids, weights, w1, w2)

        def both(layer=layer):
            y = layer(x, ids, weights, w1, w2)
            leaves = (x, *getattr(layer, "parameters", (weights, w1, w2)))
            return torch.autograd.grad(y, leaves, dy, allow_unused=True)[0]

        yield "layer forward", name, forward, flops
        yield "layer forward, backward", name, both, 3 * flops


def rows(clock: Clock, args: argparse.Namespace) -> Iterator[dict]:
    tiny = [Shape(48, 64, 4, 2, routing, 32) for routing in ("balanced", "zipf")]
    for shape in tiny if args.rehearse else shapes(args.quick):
        for candidates in (product_candidates, layer_candidates):
            exact: Exact = {}
            for op, name, fn, flops in candidates(shape, clock.device, exact):
                row = {"op": op, "implementation": name, "shape": shape}
                try:
                    result = fn()  # of fp32 += the first call's: what it adds to is zero
                    error = -1.0 if name == "sonicmoe" else error_of(result, exact[op])
                    del result
                    seconds, peak = clock(fn), clock.peak(fn)
                except Exception as trouble:  # a peer that cannot do this shape is a row too
                    if name.startswith("ours"):
                        raise
                    why = " ".join(str(trouble).split())[:100]
                    yield {**row, "skipped": why, "text": f"skipped: {why}"}
                    continue
                far = error > FAR
                rate = flops / seconds / 1e12
                text = f"{seconds * 1e3:9.3f} ms {rate:7.1f} TFLOP/s {peak / 2**20:8.0f} MiB"
                figures = {"us": seconds * 1e6, "tflops": rate, "peak_bytes": peak}
                figures |= {"error": error, "far": far, "wrong": far and name.startswith("ours")}
                yield {**row, **figures, "text": text + ("  FAR FROM EXACT" if far else "")}


if __name__ == "__main__":
    sys.exit(run_bench("bench_cuda_experts", __doc__, PEERS, rows))
