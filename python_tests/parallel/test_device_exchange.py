"""The exchange through slabs, as ranks of GPUs would make it, here by threads over the CPU's
kernels: a layer's dispatch and combine, forward and backward, with the collective's bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekernels import assembly
from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.ops import exchange as kernels
from moekernels.parallel import device_exchange, expert, symmetric
from moekernels.parallel.exchange import Part
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.nodes import Nodes
from moekernels.run.files import RunConfig
from python_tests.support.exchanges import (
    EXPERTS,
    Threads,
    group_of,
    in_threads,
    inputs,
    layers,
    over_the_cpu,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_layers_have_the_bits_of_the_exchange_on_a_cpu(size, dtype):
    threads = Threads(size)
    groups = [group_of(threads, rank, size) for rank in range(size)]
    found = in_threads(size, layers, groups, dtype)
    expected = in_threads(size, layers, over_the_cpu(size), dtype)
    for mine, theirs in zip(found, expected):
        for a, b in zip(mine, theirs):
            assert all(map(torch.equal, a, b))
    assert threads.slabs <= 4  # one for the counts, then at most one a call that outgrew it


def post_many(rank: int, threads: Threads, dtype: torch.dtype) -> str:
    x, ids, weights = inputs(rank, dtype, 2, 1)
    plan = expert.ExchangePlan.make(ids, EXPERTS, group_of(threads, rank, 2))
    with pytest.raises(ValueError, match="GPUs exchange the rows of all experts at once"):
        plan.exchange.post_out(x, weights, plan, Part(0, 1))
    pending = [plan.exchange.post_out(x + n, None, plan) for n in range(device_exchange.SLOTS)]
    try:
        plan.exchange.post_out(x, None, plan)
    except RuntimeError as error:
        rows = [p.wait().rows for p in pending]
        assert all(torch.equal(rows[n], rows[0] + n) for n in range(1, len(rows)))
        return str(error)
    return ""


def test_as_many_may_be_on_their_way_as_there_are_slots():
    x = in_threads(2, post_many, Threads(2), torch.float64)
    assert x == ["5 exchanges are posted before one is waited for; 4 may be"] * 2


def test_a_wait_that_gives_up_names_what_it_waits_for():
    shape = kernels.Shape(2, 3, 2, 8, 8, 16)
    slab, addresses = Threads(1).of(0).allocate(kernels.bytes_of(shape))
    slabs = kernels.Slabs(slab, [*addresses, *addresses], 0, shape, patience=1000)
    with pytest.raises(RuntimeError, match="rank 0 waits for the word at byte 4 of its slab to"):
        kernels.gather_counts(torch.zeros(6, dtype=torch.int64), slabs)
    words = {}
    for at in range(0, 2048, 4):
        stuck = torch.tensor([0, at, 5, 9])
        try:
            words[at] = kernels.describe_wait(slabs._replace(stuck=stuck))
        except RuntimeError as error:
            assert (
                str(error) == f"exchange_word: byte {at} of a slab is no word that ranks wait for"
            )
    assert len(words) == 2 + 2 * (3 + 1 + 4)
    assert "waits for rows of its expert 2, in slot 1: the counter is 5, not 9" in "\n".join(
        words.values()
    )


def test_what_a_run_asks_of_gpus_that_share(monkeypatch):
    mesh = Mesh(Layout())
    group = Group(None, 0, 2, (0, 1), device_memory=Threads(2).of(0))
    monkeypatch.setattr(mesh, "exchange", group)
    monkeypatch.setattr(assembly, "Mesh", lambda *_, **__: mesh)
    train = RunConfig().train
    for change, words in (
        ({"link": "1us,1GB/s"}, "--link 1us,1GB/s is one of ranks on a CPU"),
        ({"exchange_parts": 2}, "--exchange-parts 2: GPUs that share memory exchange all rows at"),
    ):
        run = replace(RunConfig(), train=replace(train, **change))
        with pytest.raises(UsageError, match=words):
            assembly.build_mesh(run, torch.device("cpu"))


def test_gpus_share_only_where_they_are_asked_to_and_can(monkeypatch):
    gpu, nodes = torch.device("cuda", 0), Nodes.named(["a"])
    assert "by the collective unless" in symmetric.why_not_symmetric(gpu, 0, nodes, "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="does not see its node's other GPUs; give --exchange co"):
        symmetric.why_not_symmetric(gpu, 0, nodes, "shared")
    assert Mesh(Layout(), exchange_mode="auto").exchange.device_memory is None
    with pytest.raises(UsageError, match="17 GPUs exchange rows, at most 16 can"):
        device_exchange.DeviceExchange(Threads(1).of(0), 0, 17)
