"""Attention with a window or sinks makes whole matrices of scores: their memory and their FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moekernels.model import grouped
from moekernels.model.layout import Layout
from moekernels.model.spec import Place
from moekernels.nn.masked import masked_attention
from moekernels.parallel.mesh import Mesh
from moekernels.plan.evaluate import Problem, memory_of
from moekernels.plan.strategy import Batch, Cluster, Strategy
from python_tests.support.activations import DTYPES, counted, measure, small

MASKED = [{"sinks": True}, {"window": 40, "num_kv_heads": 2}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", [0, 3])
@pytest.mark.parametrize("options", MASKED, ids=str)
def test_the_peak_of_a_real_run(options, checkpoint, dtype):
    """Within 0.1 %, scores being most of it: two matrices in the backward."""
    model, tokens = small(**options), 1024
    squares = tokens**2 / 4  # four sequences, which attention takes at once
    layers = range(1, 1 + checkpoint)
    _, peak = measure(model, Mesh(Layout()), 3, True, False, dtype, tokens, layers)
    s = Strategy(Layout(), (3,), (checkpoint,), 1, dtype=dtype)
    _, said = counted(model, s, tokens, True, False, squares=squares)
    _, without = counted(model, s, tokens, True, False)
    assert said == pytest.approx(peak, rel=1e-3)
    assert without < 0.95 * peak


@pytest.mark.parametrize("options", MASKED, ids=str)
def test_the_flops_are_those_of_the_products(options):
    model, n = small(**options), 48
    q, k, v = (
        torch.randn(n, heads, model.head_dim, requires_grad=True)
        for heads in (model.num_heads, model.kv_heads, model.kv_heads)
    )
    sinks = torch.zeros(model.num_heads, requires_grad=True) if model.sinks else None
    pairs = grouped.work(model, Place(tokens=n)).pairs
    with FlopCounterMode(display=False) as forward:
        out = masked_attention(q, k, v, sinks, [(1, n)], model.window, model.qk_scale)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == pairs * n * n
    assert backward.get_total_flops() == 2.5 * pairs * n * n  # as `layer_cost` has it


def test_layers_that_see_everything_cost_half():
    plain, masked = (grouped.work(small(window=w), Place(tokens=1.0)) for w in (0, 8))
    some = grouped.work(small(window=8, window_period=4), Place(tokens=1.0))
    assert masked.pairs == 2 * plain.pairs and plain.scores == 0 < masked.scores
    assert some.pairs == 1.75 * plain.pairs and some.scores == 0.75 * masked.scores


def test_sequences_of_one_length_are_taken_together():
    cluster = Cluster(1, 8, 1e14, 64e9, 1e12, 1e11, 1e10)
    s = Strategy(Layout(), (4,), (0,), 1)
    held = [
        memory_of(Problem(small(sinks=True), Batch(lengths), cluster), s, 0, 1024).total
        for lengths in ((1024,), (512, 512), (256,) * 4)
    ]
    scores = 2 * 4 * 4  # matrices, heads, bytes
    assert held[0] - held[1] == scores * (1024**2 - 2 * 512**2)
    assert held[1] - held[2] == scores * (2 * 512**2 - 4 * 256**2)
