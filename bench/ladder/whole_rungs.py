"""Rungs 12 to 14: the headline shapes against fp32 torch, twice and under noise, capture and
replay, and the ops that move rows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ladder.diagnose import close, same
from ladder.kit import Kit, require, rung
from ladder.product_rungs import BF16, CHAIN, F32, normal
from moekernels import ops, reference

SAMPLED = 64  # rows
SECONDS = 5  # of repeats under noise
# T, H, F, E, K
HEADLINES = ((16384, 2048, 4096, 64, 2), (32768, 2048, 1024, 64, 8), (8192, 2048, 768, 128, 8))
TINY = ((12, 24, 40, 4, 2),)


def _layer_inputs(kit: Kit, shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    tokens, hidden, ffn, experts, top_k = shape
    if not kit.hardware:
        made = {
            "x": normal(BF16, tokens, hidden, seed=seed),
            "logits": normal(F32, tokens, experts, seed=seed + 1),  # of which no two tie
        }
        made["w1"] = normal(BF16, experts, 2 * ffn, hidden, seed=2) * hidden**-0.5
        made["w2"] = normal(BF16, experts, hidden, ffn, seed=3) * ffn**-0.5
        return made
    draw = torch.Generator("cuda").manual_seed(seed)

    def on_device(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=draw, device="cuda") * scale).bfloat16()

    x, logits = (
        on_device(tokens, hidden),
        torch.randn(tokens, experts, generator=draw, device="cuda"),
    )
    draw.manual_seed(7)
    w1 = on_device(experts, 2 * ffn, hidden, scale=hidden**-0.5)
    w2 = on_device(experts, hidden, ffn, scale=ffn**-0.5)
    return {"x": x, "logits": logits, "w1": w1, "w2": w2}


def _layer(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, top_k: int) -> list[Tensor]:
    """gate -> route -> experts -> combine and back: [y, dx, dw1, dw2], the gradients into fp32."""
    leaf = x.detach().requires_grad_()
    gate = ops.gate(logits, top_k, renormalize=True)
    routing = ops.route(gate.ids, w1.shape[0])
    weights = [w.detach().requires_grad_() for w in (w1, w2)]
    for w in weights:
        w.main_grad = torch.zeros(w.shape, dtype=F32, device=w.device)
    where = {"token_of": routing.token_of, "row_of": routing.row_of}
    row_weights = ops.permute_weights(gate.weights, routing)
    rows = ops.experts(leaf, row_weights, *weights, routing.offsets, **where)
    y = ops.combine(rows, routing.row_of, routing.token_of)
    y.backward(x)  # any gradient of the right size
    return [y, leaf.grad, *(w.main_grad for w in weights)]


def _expected(inputs: dict[str, Tensor], top_k: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx of some tokens, token by token in fp32 torch."""
    x, logits, w1, w2 = (t.detach() for t in inputs.values())
    gate = reference.gate(logits[tokens].float().cpu(), top_k, renormalize=True)
    outputs, gradients = [], []
    for i, token in enumerate(tokens.tolist()):
        leaf = x[token].float().requires_grad_()
        y = torch.zeros_like(leaf)
        for expert, weight in zip(gate.ids[i].tolist(), gate.weights[i].tolist()):
            g, u = (w1[expert].float() @ leaf).chunk(2)
            y = y + weight * (w2[expert].float() @ (torch.nn.functional.silu(g) * u))
        y.backward(x[token].float())
        outputs.append(y.detach())
        gradients.append(leaf.grad)
    return torch.stack(outputs), torch.stack(gradients)


def _movers(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, top_k: int) -> list[Tensor]:
    """The layer without its products: what a rehearsal has the time for."""
    gate = ops.gate(logits, top_k, renormalize=True)
    routing = ops.route(gate.ids, w1.shape[0])
    rows = ops.permute(x, routing.token_of, routing.row_of)
    return [ops.combine(rows, routing.row_of, routing.token_of, gate.weights), rows]


@contextlib.contextmanager
def _noise(kit: Kit) -> Iterator[None]:
    """Another stream that keeps the memory and some SMs busy, unevenly."""
    if not kit.hardware:
        yield
        return
    stream, room = torch.cuda.Stream(), torch.empty(64 << 20, dtype=torch.int8, device="cuda")
    with torch.cuda.stream(stream):
        for i in range(400):
            room[: (1 + i % 7) << 20].add_(1)
            torch.cuda._sleep(10_000 * (i % 11))
    yield
    stream.synchronize()


@rung(
    12,
    "wgrad_tail",
    "dact",
    look="which of y, dx, dw is wrong and at which experts' rows; twice differing: a race",
    limit=60,
)
def headline(kit: Kit) -> dict:
    """The shapes that are measured: sampled rows against fp32 torch, the same bits twice and over
    repeats beside a noisy stream."""
    facts, layer = {}, kit.wrong("layer", _layer)
    for shape in HEADLINES if kit.hardware else TINY:
        top_k, inputs = shape[-1], _layer_inputs(kit, shape)
        tokens = torch.linspace(0, shape[0] - 1, min(SAMPLED, shape[0])).long()
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        with kit.ops():
            first = layer(**inputs, top_k=top_k)
        y, dx = _expected(inputs, top_k, tokens.to(kit.device))
        torch.backends.cuda.matmul.allow_tf32 = allowed
        at = tokens.to(kit.device)
        worst = close("y", first[0][at], y, BF16, CHAIN), close("dx", first[1][at], dx, BF16, CHAIN)
        _hold_gradient_sums(first, inputs)
        repeats, begin = 0, time.monotonic()
        with _noise(kit), contextlib.ExitStack() as stack:
            if not kit.hardware:
                stack.enter_context(kit.ops())
            while repeats < (200 if kit.hardware else 1):
                again = layer(**inputs, top_k=top_k)
                for name, a, b in zip(("y", "dx", "dw1", "dw2"), first, again):
                    same(name, a, b) if repeats < 1 else _quickly_same(name, a, b)
                repeats += 1
                if time.monotonic() - begin > SECONDS:
                    break
        name = "T{} H{} F{} E{} K{}".format(*shape)
        facts[name] = {"worst_share": max(worst), "repeats": repeats}
    return facts


def _quickly_same(name: str, a: Tensor, b: Tensor) -> None:
    if not torch.equal(a, b):
        same(name, a, b)


def _hold_gradient_sums(found: list[Tensor], inputs: dict[str, Tensor]) -> None:
    """The weights' gradients against y's and x's: <dw2, w2> = <dy, y> = <x, y>, a sum over all."""
    whole = (found[0].double() * inputs["x"].double()).sum()
    part = (found[3].double() * inputs["w2"].double()).sum()
    scale = found[0].double().norm() * inputs["x"].double().norm()
    off = (whole - part).abs() / scale
    require(off < 1e-3, f"dw2 does not sum to what y says: off by {off:.2e} of |y| |x|")


class _Recording:
    """Stands for a CUDA graph where there is none: what was called is called again."""

    def __init__(self, fn: Callable[[], list[Tensor]]):
        self.fn, self.outputs = fn, fn()

    def replay(self) -> None:
        for old, new in zip(self.outputs, self.fn()):
            old.detach().copy_(new)


def _capture(kit: Kit, fn: Callable[[], list[Tensor]]):
    """-> (its outputs, replay)"""
    if not kit.hardware:
        recording = _Recording(fn)
        return recording.outputs, recording.replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # modules are loaded before the capture
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = fn()
    return outputs, graph.replay


@rung(13, "dact", look="a call that waits for the device, allocates, or takes another stream")
def capture(kit: Kit) -> dict:
    """The layer captured once, replayed over other inputs and so another routing: eager's bits."""
    shape = (512, 256, 192, 16, 4) if kit.hardware else TINY[0]
    capturing, layer = kit.wrong("capture", _capture), _layer if kit.hardware else _movers
    static = _layer_inputs(kit, shape)
    with contextlib.ExitStack() as stack:
        if not kit.hardware:
            stack.enter_context(kit.ops())
        captured, replay = capturing(kit, lambda: layer(**static, top_k=shape[-1]))
        for seed in (4, 9):
            fresh = _layer_inputs(kit, shape, seed)
            static["x"].copy_(fresh["x"])
            static["logits"].copy_(fresh["logits"])
            replay()
            eager = layer(**fresh, top_k=shape[-1])
            for i, (a, b) in enumerate(zip(captured, eager)):
                same(f"replayed result {i}", a, b)
    return {"replays": 2}


@rung(14, "driver", look="the op named; cases in python_tests/cuda/test_cuda_device.py")
def simt(kit: Kit) -> dict:
    """gate, route, permute and combine against the reference; route and permute to the bit."""
    tokens, experts, top_k, hidden = (4096, 64, 4, 264) if kit.hardware else (70, 16, 4, 72)
    logits, x = normal(F32, tokens, experts), normal(BF16, tokens, hidden, seed=1)
    placed = kit.place({"logits": logits, "x": x})
    with kit.ops():
        gate = ops.gate(placed["logits"], top_k, renormalize=True)
        routing = kit.wrong("route", ops.route)(gate.ids, experts, alignment=8)
        rows = ops.permute(placed["x"], routing.token_of, routing.row_of)
        y = ops.combine(rows, routing.row_of, routing.token_of)
    plain = reference.gate(logits, top_k, renormalize=True)
    require(torch.equal(gate.ids.cpu(), plain.ids), "gate chooses other experts")
    close("gate's weights", gate.weights, plain.weights.double(), F32, factor=64)
    wanted = reference.route(plain.ids, experts, alignment=8)
    for name in ("counts", "offsets", "row_of", "token_of"):
        same(f"route's {name}", getattr(routing, name), getattr(wanted, name))
    same("permute", rows, reference.permute(x, wanted.token_of, wanted.row_of))
    close("combine", y, x.double() * top_k, BF16)
    return {"tokens": tokens}
