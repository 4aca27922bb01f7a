"""One MoE layer, ours beside transformers' own experts and kt-kernel's, interleaved in one run.

The layer is `Qwen3MoeSparseMoeBlock` with one set of weights; only `experts_implementation` changes
between `eager`, `grouped_mm` (what transformers takes by itself) and `moekernels`. The floor of a
shape is the larger of two times, both of this run and of as many threads: its FLOPs at the rate of
a large `torch.mm` of the dtype, and reading once the weights of the experts that are hit; the share
is the floor over our time. Caches are emptied before each call, so that few tokens find their
weights in memory, as in a model of many layers. kt-kernel (forward in bf16, weights packed by
itself) is a column where its wheel is installed and runs.
Absolute times say little on a shared machine: ratios of neighbouring runs are what counts.

    python bench/bench_moe_layer.py [--quick] [--only NAME] [--rounds N] [--json FILE]
    pytest bench/bench_moe_layer.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from machine import where
from torch import Tensor
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moekernels.integrations.transformers  # noqa: F401  registers "moekernels"
from moekernels import jsonio

OURS, THEIRS, SLOW, KT = "moekernels", "grouped_mm", "eager", "kt-kernel"


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int

    def flops(self, backward: bool) -> int:
        """Of the experts' three products; the backward has twice as many."""
        return 6 * self.tokens * self.top_k * self.hidden * self.ffn * (3 if backward else 1)

    def __str__(self) -> str:
        return f"T{self.tokens} H{self.hidden} F{self.ffn} E{self.experts} K{self.top_k}"


SHAPES = {
    "coarse": Shape(2048, 1024, 2048, 64, 2),
    "olmoe": Shape(1024, 2048, 1024, 64, 8),
    "t512": Shape(512, 1024, 2048, 64, 2),
    "t64": Shape(64, 1024, 2048, 64, 2),
    "t8": Shape(8, 1024, 2048, 64, 2),
    "t1": Shape(1, 1024, 2048, 64, 2),
    "odd": Shape(777, 512, 768, 24, 3),
    "small": Shape(301, 256, 512, 24, 3),
}
QUICK = ("t1", "t8", "odd", "small")
# The share of the floor that is wanted, (fp32, bf16): of the forward, of forward and backward.
FORWARD: dict[str, tuple[float | None, float | None]] = {
    "coarse": (0.80, 0.65),
    "t512": (0.85, 0.85),
    "t64": (0.85, 0.85),
    "t8": (0.85, 0.85),
    "t1": (0.85, 0.85),
    "odd": (None, None),
    "small": (None, None),
}
TRAINING: dict[str, tuple[float | None, float | None]] = {
    "coarse": (0.80, 0.55),
    "olmoe": (0.80, 0.60),
    "odd": (None, None),
    "small": (None, None),
}
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    (name, dtype, backward)
    for backward, musts in ((False, FORWARD), (True, TRAINING))
    for name in musts
    for dtype in DTYPES
]


def must(name: str, dtype: torch.dtype, backward: bool) -> float | None:
    return (TRAINING if backward else FORWARD)[name][DTYPES.index(dtype)]


class Layer:
    """The block, its input, and one call of it under any implementation."""

    def __init__(self, shape: Shape, dtype: torch.dtype, backward: bool):
        torch.manual_seed(0)
        self.backward = backward
        self.config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.ffn,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
        self.block = Qwen3MoeSparseMoeBlock(self.config)
        # A table of normals, repeated: to draw 400 million would take longer than to measure.
        normals = torch.randn(1_000_003) * 0.02
        for parameter in self.block.parameters():
            for part in parameter.detach().view(-1).split(len(normals)):
                part.copy_(normals[: len(part)])
        self.block.to(dtype).requires_grad_(backward)
        self.x = torch.randn(1, shape.tokens, shape.hidden).to(dtype).requires_grad_(backward)

    def run(self, implementation: str) -> Tensor:
        self.config._experts_implementation = implementation
        out = self.block(self.x)
        out = out[0] if isinstance(out, tuple) else out
        if self.backward:
            out.sum().backward()
            self.x.grad = None
            self.block.zero_grad(set_to_none=True)
        return out.detach()

    def check(self, others: dict[str, Callable[[], Tensor]]) -> None:
        """All implementations compute the same, or their times mean nothing."""
        ours = self.run(OURS).float()
        tolerance = 1e-4 if self.x.dtype == torch.float32 else 3e-2
        for name, call in others.items():
            far = (ours - call().float().view_as(ours)).abs().max() / ours.abs().max()
            assert far <= tolerance, f"{name} is {far:.1e} of the largest value off"

    def routed(self) -> tuple[Tensor, Tensor]:
        """(weights, ids) [T, K] of the block's own router."""
        _, weights, ids = self.block.gate(self.x.flatten(0, 1))
        return weights, ids

    def hit_bytes(self) -> int:
        """Of the weights of the experts that the routing reaches."""
        w1 = self.block.experts.gate_up_proj
        w2 = self.block.experts.down_proj
        hit = self.routed()[1].unique().numel()
        return hit * (w1[0].numel() + w2[0].numel()) * w1.element_size()


class KtKernel:
    """The layer's experts by kt-kernel, after the block's own router; it packs the weights into
    memory of its own."""

    def __init__(self, layer: Layer, shape: Shape):
        import kt_kernel

        extension = kt_kernel.kt_kernel_ext
        engine = getattr(extension.moe, "AMXBF16_MOE", None) or extension.moe.AVX2BF16_MOE
        self.layer, self.top_k = layer, shape.top_k
        self.cpu = extension.CPUInfer(torch.get_num_threads())
        w1 = layer.block.experts.gate_up_proj.detach()
        parts = [part.contiguous() for part in w1.chunk(2, dim=1)]
        parts.append(layer.block.experts.down_proj.detach())
        config = extension.moe.MOEConfig(shape.experts, shape.top_k, shape.hidden, shape.ffn, 0)
        config.max_len = max(shape.tokens, 1)
        config.gate_proj, config.up_proj, config.down_proj = (p.data_ptr() for p in parts)
        config.gate_scale = config.up_scale = config.down_scale = 0
        config.pool = self.cpu.backend_
        self.moe = engine(config)
        order = torch.arange(shape.experts)
        self._wait(self.moe.load_weights_task(order.data_ptr()))

    def _wait(self, task: object) -> None:
        self.cpu.submit(task)
        self.cpu.sync()

    def run(self) -> Tensor:
        x = self.layer.x.detach().flatten(0, 1)
        weights, ids = self.layer.routed()
        ids, weights = ids.long().contiguous(), weights.float().contiguous()
        out, tokens = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        at = [t.data_ptr() for t in (ids, weights, x, out)]
        self._wait(self.moe.forward_task(tokens.data_ptr(), self.top_k, *at, False))
        return out


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def dense_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large torch.mm, the best of a few."""
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 4096).to(dtype)
    return 2 * 2048 * 1024 * 4096 / min(seconds(lambda: a @ b) for _ in range(4))


BIG = torch.ones(1 << 26)


def reading_rate() -> float:
    """Bytes/s at which memory is read once; nothing else is in the caches afterwards."""
    return BIG.numel() * 4 / seconds(BIG.sum)


@dataclass
class Row:
    """One line of the table; times in seconds, each the best of its turns: what else the machine
    does only ever adds."""

    shape: str
    dtype: str
    backward: bool
    ours: float
    floor: float
    bound: str  # what the floor is made of: "products" or "reading"
    share: float
    must: float | None
    others: dict[str, float]  # times over ours

    def __str__(self) -> str:
        what = "fwd+bwd" if self.backward else "forward"
        line = f"{self.shape:27s} {self.dtype:8s} {what} {self.ours * 1e3:8.2f} ms   "
        line += (
            f"floor {self.floor * 1e3:8.2f} ms ({self.bound:8s})   share {self.share * 100:4.0f} %"
        )
        if self.must is not None:
            line += f" (must {self.must * 100:.0f}: {'yes' if self.share >= self.must else 'NO '})"
        ratios = "".join(f"   {ratio:5.2f}x {name}" for name, ratio in self.others.items())
        return line + ratios


def kt_kernel() -> str | None:
    """Why kt-kernel's column is absent; None: it is not."""
    try:
        import kt_kernel
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    kinds = {"AMXBF16_MOE", "AVX2BF16_MOE"} & set(dir(kt_kernel.kt_kernel_ext.moe))
    return None if kinds else "it has no experts in bf16 for this machine"


def compare(name: str, dtype: torch.dtype, backward: bool, rounds: int, eager: bool) -> Row:
    """One line of the table. All take turns."""
    shape = SHAPES[name]
    layer = Layer(shape, dtype, backward)
    calls: dict[str, Callable[[], Tensor]] = {
        THEIRS: lambda: layer.run(THEIRS),
        OURS: lambda: layer.run(OURS),
    }
    if dtype == torch.bfloat16 and not backward and kt_kernel() is None:
        calls[KT] = KtKernel(layer, shape).run
    turns = min(10, max(1, 64 // shape.tokens))
    times: dict[str, list[float]] = {n: [] for n in calls}
    with torch.set_grad_enabled(backward):
        layer.check({n: call for n, call in calls.items() if n != OURS})
        dense = reading = 0.0
        for _ in range(rounds):
            dense = max(dense, dense_rate(dtype))
            for _ in range(turns):
                for implementation, call in calls.items():
                    reading = max(reading, reading_rate())
                    times[implementation].append(seconds(call))
        hit = layer.hit_bytes()
        slow = seconds(lambda: layer.run(SLOW)) if eager else None
    ours = min(times.pop(OURS))
    others = {n: min(them) / ours for n, them in times.items()}
    if slow is not None:
        others[SLOW] = slow / ours
    products, read = shape.flops(backward) / dense, hit / reading
    return Row(
        shape=str(shape),
        dtype=str(dtype)[6:],
        backward=backward,
        ours=ours,
        floor=max(products, read),
        bound="products" if products >= read else "reading",
        share=max(products, read) / ours,
        must=must(name, dtype, backward),
        others=others,
    )


@pytest.mark.parametrize("implementation", [THEIRS, OURS, SLOW])
@pytest.mark.parametrize("name,dtype,backward", CASES)
def test_layer(benchmark, name, dtype, backward, implementation):
    shape = SHAPES[name]
    benchmark.group = f"moe layer {name} {str(dtype)[6:]} {'fwd+bwd' if backward else 'forward'}"
    benchmark.extra_info["implementation"] = implementation
    benchmark.extra_info["flops"] = shape.flops(backward)
    layer = Layer(shape, dtype, backward)
    with torch.set_grad_enabled(backward):
        benchmark.pedantic(layer.run, args=(implementation,), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, no eager")
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table, with machine and commit")
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    absent = kt_kernel()
    print(f"kt-kernel: {'bf16 forward' if absent is None else f'no column ({absent})'}")
    rows = []
    for name, dtype, backward in CASES:
        if args.only not in (None, name) or (args.quick and name not in QUICK):
            continue
        rounds = 3 if args.quick else args.rounds
        rows.append(compare(name, dtype, backward, rounds, eager=not args.quick))
        print(rows[-1], flush=True)
    if args.json:
        facts = {"threads": torch.get_num_threads(), "isa": torch.ops.moekernels._cpu_isa()}
        told = {**where(), **facts, "kt-kernel": absent, "rows": [asdict(row) for row in rows]}
        args.json.write_text(jsonio.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
