"""Training steps of one process against a plain transformers loop, interleaved in the same run.

Both train the same Qwen3-MoE from the same weights on the same rows of equal length (no padding),
in fp32, with AdamW, clipping and gradient accumulation: the losses of every step must agree, so the
work is the same.
transformers runs as its users run it: `grouped_mm` experts, sdpa attention, fused AdamW.

    python bench/bench_train.py            # the table
    pytest bench/bench_train.py            # the same under pytest-benchmark
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekernels.data.batch import NO_LABEL, MicroBatch
from moekernels.integrations.families import decoder_spec, load_
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.optimizer import Optimizer

MUST = 1.25  # our tokens/s over theirs
LR, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    ffn: int
    vocab: int
    rows: int  # of one microbatch
    length: int
    microbatches: int  # of one optimiser step

    @property
    def tokens(self) -> int:
        return self.microbatches * self.rows * self.length


SHAPES = {
    # The tiny preset: its microbatches too, but experts not lifted (transformers has no such).
    "tiny": Shape(16, 64, 4, 4, 64, 2, 64, 1024, 1, 256, 8),
    "small": Shape(8, 256, 8, 4, 32, 4, 256, 4096, 8, 256, 4),
    "small, no accumulation": Shape(8, 256, 8, 4, 32, 4, 256, 4096, 8, 256, 1),
    # OLMoE's proportions.
    "olmoe/4": Shape(4, 512, 8, 8, 64, 8, 256, 4096, 4, 512, 2),
}


def their_model(shape: Shape) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.ffn,
        norm_topk_prob=True,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model.train()


def their_step(model: Qwen3MoeForCausalLM) -> Callable[[Tensor], float]:
    """tokens [microbatches, rows, length] -> the loss, after one update."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True
    )

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in tokens:
            loss = model(input_ids=part, labels=part).loss / len(tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return step


def our_step(theirs: Qwen3MoeForCausalLM) -> Callable[[Tensor], float]:
    """The same from a copy of their weights."""
    config = decoder_spec(theirs.config)
    layers = range(1, config.num_layers + 1)
    mesh = Mesh(Layout())
    model = StageModel(config, mesh, layers, True, True)
    load_(model, theirs.state_dict(), "qwen3_moe")
    optimizer = Optimizer(
        model.named_shards(),
        mesh,
        AdamWConfig(LR, 1.0, clip=CLIP, weight_decay=0.0, beta1=BETAS[0], beta2=BETAS[1]),
    )

    def step(tokens: Tensor) -> float:
        # A row's last token has no successor, so transformers gives it no loss: neither do we.
        labels = torch.nn.functional.pad(tokens[..., 1:], (0, 1), value=NO_LABEL)
        scale = 1 / int((labels != NO_LABEL).sum())
        optimizer.zero_grad()
        total = 0.0
        for rows in zip(tokens, labels):
            loss = model(MicroBatch.pack(list(zip(*rows)), loss_scale=scale))
            loss.backward()
            total += loss.item()
        optimizer.reduce()
        optimizer.step()
        return total

    return step


class Pair:
    """Both trainers of a shape, stepped in turn on the same data."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        theirs = their_model(shape)
        self.steps = {"moekernels": our_step(theirs), "transformers": their_step(theirs)}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        self.losses: dict[str, list[float]] = {name: [] for name in self.steps}

    def tokens(self, number: int) -> Tensor:
        """Tokens whose low ones are common, so that there is something to learn at once."""
        generator = torch.Generator().manual_seed(number)
        shape = (self.shape.microbatches, self.shape.rows, self.shape.length)
        return (torch.rand(shape, generator=generator) ** 3 * self.shape.vocab).long()

    def step(self, name: str) -> None:
        tokens = self.tokens(len(self.losses[name]))
        begin = time.perf_counter()
        loss = self.steps[name](tokens)
        self.seconds[name].append(time.perf_counter() - begin)
        self.losses[name].append(loss)

    def check(self) -> None:
        for number, (a, b) in enumerate(zip(*self.losses.values()), 1):
            if abs(a - b) > 1e-3 * b:
                raise AssertionError(f"step {number}: our loss is {a:.6f}, theirs {b:.6f}")

    def rates(self, warmup: int) -> dict[str, float]:
        """Median tokens/s."""
        return {
            name: self.shape.tokens / statistics.median(seconds[warmup:])
            for name, seconds in self.seconds.items()
        }


@pytest.mark.parametrize("name", SHAPES)
def test_train(benchmark, name: str, rounds: int = 7, warmup: int = 2) -> None:
    """The row is ours; theirs, stepped before each of our rounds, is in extra_info."""
    pair = Pair(SHAPES[name])
    for _ in range(warmup):
        pair.step("transformers")
        pair.step("moekernels")
    benchmark.group = f"train {name}, fp32"
    benchmark.pedantic(
        pair.step, ("moekernels",), setup=lambda: pair.step("transformers"), rounds=rounds
    )
    pair.check()
    rates = pair.rates(warmup)
    ratio = rates["moekernels"] / rates["transformers"]
    benchmark.extra_info |= {f"{who}_tokens_per_s": rate for who, rate in rates.items()}
    benchmark.extra_info |= {"ratio": ratio, "must": MUST}
    print(f"\n{name}: {ratio:.2f}x transformers' tokens/s")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    print(f"{'tokens/s':24} {'transformers':>12} {'moekernels':>12}   ratio (must {MUST})")
    for name in chosen.shapes:
        pair = Pair(SHAPES[name])
        for _ in range(chosen.rounds + 2):
            for who in ("transformers", "moekernels"):
                pair.step(who)
        pair.check()
        rates = pair.rates(2)
        ours, theirs = rates["moekernels"], rates["transformers"]
        print(f"{name:24} {theirs:12.0f} {ours:12.0f} {ours / theirs:6.2f}x", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
