"""One MoE layer, ours beside transformers' own experts, interleaved in the same run.

The layer is `Qwen3MoeSparseMoeBlock` with one set of weights; only `experts_implementation` changes
between `eager`, `grouped_mm` (what transformers takes by itself) and `moekernels`. The ceilings are
a dense `torch.mm` and, where few rows meet each expert, reading the weights that are hit once.
Absolute times say little on a shared machine: ratios of neighbouring runs are what counts.

    python bench/bench_moe_layer.py [--quick] [--only NAME] [--rounds N]
    pytest bench/bench_moe_layer.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moekernels.integrations.transformers  # noqa: F401  registers "moekernels"

OURS, THEIRS, SLOW = "moekernels", "grouped_mm", "eager"


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


SHAPES = {
    "coarse": Shape(2048, 1024, 2048, 64, 2),
    "decode": Shape(64, 1024, 2048, 64, 2),
    "olmoe": Shape(1024, 2048, 1024, 64, 8),
    "odd": Shape(777, 512, 768, 24, 3),
    "small": Shape(301, 256, 512, 24, 3),
}
# What grouped_mm's time over ours must be, (fp32, bf16): of the forward, of forward and backward.
FORWARD = {"coarse": (1.25, 1.1), "decode": (2.0, 1.1), "odd": (1.1, 1.1), "small": (1.1, 1.1)}
TRAINING = {
    "coarse": (1.35, 1.25),
    "olmoe": (1.25, 1.25),
    "odd": (1.15, 1.15),
    "small": (1.15, 1.15),
}
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    (name, dtype, backward)
    for backward, musts in ((False, FORWARD), (True, TRAINING))
    for name in musts
    for dtype in DTYPES
]


def must(name: str, dtype: torch.dtype, backward: bool) -> float:
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

    def check(self) -> None:
        """All implementations compute the same, or their times mean nothing."""
        ours, theirs = self.run(OURS).float(), self.run(THEIRS).float()
        tolerance = 1e-4 if self.x.dtype == torch.float32 else 3e-2
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()

    def hit_bytes(self) -> int:
        """Of the weights of the experts that the routing reaches."""
        router = self.block.gate(self.x.flatten(0, 1))
        ids = (
            router[-1]
            if isinstance(router, tuple)
            else router.topk(self.config.num_experts_per_tok)[1]
        )
        w1 = self.block.experts.gate_up_proj
        w2 = self.block.experts.down_proj
        return ids.unique().numel() * (w1[0].numel() + w2[0].numel()) * w1.element_size()


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def dense_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large torch.mm, the best of a few."""
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 4096).to(dtype)
    return 2 * 2048 * 1024 * 4096 / min(seconds(lambda: a @ b) for _ in range(4))


def reading_rate() -> float:
    """Bytes/s at which memory is read once, the best of a few."""
    big = torch.ones(1 << 26)
    return big.numel() * 4 / min(seconds(big.sum) for _ in range(3))


def compare(name: str, dtype: torch.dtype, backward: bool, rounds: int, eager: bool) -> str:
    """One line of the table. The three take turns; the ratio is the median over the rounds."""
    shape = SHAPES[name]
    layer = Layer(shape, dtype, backward)
    with torch.set_grad_enabled(backward):
        layer.check()
        times: dict[str, list[float]] = {OURS: [], THEIRS: [], "mm": []}
        for _ in range(rounds):
            for implementation in (THEIRS, OURS):
                times[implementation].append(seconds(lambda i=implementation: layer.run(i)))
            times["mm"].append(shape.flops(backward) / dense_rate(dtype))
        slow = seconds(lambda: layer.run(SLOW)) if eager else None
        floor = layer.hit_bytes() / reading_rate() if name == "decode" else None
    ours = statistics.median(times[OURS])
    ratio = statistics.median(t / o for t, o in zip(times[THEIRS], times[OURS]))
    of_mm = statistics.median(m / o for m, o in zip(times["mm"], times[OURS]))
    wanted = must(name, dtype, backward)
    line = (
        f"{name:7s} {str(dtype)[6:]:8s} {'fwd+bwd' if backward else 'forward':7s} "
        f"{ours * 1e3:8.1f} ms {shape.flops(backward) / ours / 1e9:6.0f} GF/s   "
        f"{ratio:5.2f}x grouped_mm (must {wanted:.2f}: {'yes' if ratio >= wanted else 'NO '})   "
        f"{of_mm * 100:4.0f} % of dense mm"
    )
    if slow is not None:
        line += f"   {slow / ours:5.1f}x eager"
    if floor is not None:
        line += f"   {ours / floor:4.2f}x reading the hit weights"
    return line


@pytest.mark.parametrize("implementation", [THEIRS, OURS, SLOW])
@pytest.mark.parametrize("name,dtype,backward", CASES)
def test_layer(benchmark, name, dtype, backward, implementation):
    shape = SHAPES[name]
    benchmark.group = f"moe layer {name} {str(dtype)[6:]} {'fwd+bwd' if backward else 'forward'}"
    benchmark.extra_info["implementation"] = implementation
    benchmark.extra_info["flops"] = shape.flops(backward)
    benchmark.extra_info["must"] = must(name, dtype, backward)
    layer = Layer(shape, dtype, backward)
    with torch.set_grad_enabled(backward):
        benchmark.pedantic(layer.run, args=(implementation,), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, no eager")
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for name, dtype, backward in CASES:
        if args.only not in (None, name) or (args.quick and name not in ("decode", "odd", "small")):
            continue
        rounds = 3 if args.quick else args.rounds
        print(compare(name, dtype, backward, rounds, eager=not args.quick), flush=True)


if __name__ == "__main__":
    main()
