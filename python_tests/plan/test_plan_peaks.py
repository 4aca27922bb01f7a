"""The memory that the planner says a flush takes, held to what one holds: two ranks run it, and
what either makes is followed to where it is let go."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch

from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.ops import _deferred
from moekernels.parallel.launch import RankEnv, run_local
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.tensor import all_reduce
from moekernels.parallel.turns import take_turns
from moekernels.pipeline.build import build
from moekernels.pipeline.runtime import PipelineRuntime
from moekernels.plan.memory import StageMemory, stage_memory
from moekernels.plan.strategy import Strategy
from python_tests.support.activations import DTYPES, pack, small
from python_tests.support.peak import Held

TOKENS, MICROBATCHES = 256, 4


def peak(env: RankEnv, s: Strategy, ran: str) -> list[int]:
    """Bytes that the ranks hold at most beside parameters and gradients."""
    mesh, model, batch = Mesh(s.layout, device="cpu"), small(), pack(TOKENS)
    ranges, stages = s.layer_ranges, s.layout.pp
    chunks = [
        StageModel(
            model, mesh, ranges[v], v == 0, v == s.depth - 1,
            dtype=DTYPES[s.dtype], checkpoint_layers=s.checkpoint_layers,
        )
        for v in range(mesh.pp_index, s.depth, stages)
    ]  # fmt: skip
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    for p in parameters:
        p.main_grad = torch.zeros_like(p, dtype=torch.float32)
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # as the optimiser
    grads = [p.main_grad for p in parameters]
    held = Held([batch.tokens, batch.labels, batch.positions, *parameters, *grads])

    def turns(order, forward, backward, observe):
        def beside():  # in a thread of its own
            with held:
                return backward()

        return take_turns(order, forward, beside, observe)

    runtime = PipelineRuntime(
        build(ran, stages, s.microbatches, s.virtual_stages), chunks, mesh.pp,
        lambda batch: (batch.rows, model.d_model), DTYPES[s.dtype], "cpu",
        put_off=_deferred.owed, turns=turns,
    )  # fmt: skip
    with held:
        runtime.step([batch] * s.microbatches, record=False)
    every = torch.zeros(env.world, dtype=torch.int64)
    every[env.rank] = held.most
    return all_reduce(every, mesh.world).tolist()


class Case(NamedTuple):
    """layers and again: of each virtual stage, how many it has and how many of them are computed
    again. least: of what is said, the part that is held at any rate: both passes of a pair are
    never at their fullest at once."""

    pp: int
    layers: tuple[int, ...]
    again: tuple[int, ...]
    least: float = 0.85


CASES = {
    "1f1b": Case(2, (2, 2), (0, 0)),
    "zb": Case(2, (2, 2), (0, 0)),
    "zb, computed again": Case(2, (2, 2), (1, 1)),
    "zb, virtual stages": Case(2, (1,) * 4, (0,) * 4),
    "overlap": Case(1, (4,), (0,), 0.66),
    "overlap, computed again": Case(1, (4,), (2,), 0.55),
}


@functools.cache
def measured(case: str, dtype: str, ran: str = "") -> tuple[list[int], list[StageMemory]]:
    """By rank: bytes, and what the planner says."""
    pp, layers, again, _ = CASES[case]
    name = case.partition(",")[0]
    layout = Layout(pp=pp, dp=2 // pp, ep=2 // pp)
    s = Strategy(layout, layers, again, MICROBATCHES, name, len(layers) // pp, dtype=dtype)
    said = [
        stage_memory(small(), s, rank // layout.stage_ranks, TOKENS, device="cpu")
        for rank in range(2)
    ]
    return run_local(2, "cpu", peak, s, ran or name), said


def passing(one: StageMemory) -> float:
    return one.activations + one.working + one.messages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_flush_holds_what_the_planner_says(case, dtype):
    for most, said in zip(*measured(case, dtype), strict=True):
        assert CASES[case].least * passing(said) <= most <= passing(said)


def test_a_schedule_that_puts_weights_off_holds_more_than_is_said_of_1f1b():
    """On the last stage, which has most of them: what is measured tells the two apart."""
    most, said = (of[-1] for of in measured("1f1b", "fp32", ran="zb"))
    assert most > passing(said)
