"""Ranks of an exchange that are threads of this process, over memory that they share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

from moekernels import ops
from moekernels.parallel import expert
from moekernels.parallel.mesh import Group
from moekernels.parallel.peers import PeerMemory
from python_tests.support.spec import randn, random_ids, wide

HIDDEN, EXPERTS, TOP_K = 6, 2, 2


class Threads:
    """Memory that threads share; `slabs` counts how often it was asked for."""

    def __init__(self, size: int) -> None:
        self.barrier, self.addresses, self.slabs = Barrier(size, timeout=60), [0] * size, 0

    def of(self, rank: int) -> ThreadMemory:
        return ThreadMemory(self, rank)


class ThreadMemory:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank

    def allocate(self, nbytes: int) -> tuple[Tensor, list[int]]:
        room = torch.zeros(nbytes + 128, dtype=torch.uint8)
        slab = room[(first := -room.data_ptr() % 128) : first + nbytes]
        self.threads.addresses[self.rank] = slab.data_ptr()
        self.threads.barrier.wait()
        addresses = list(self.threads.addresses)
        self.threads.slabs += self.rank == 0
        self.threads.barrier.wait()
        return slab, addresses


def in_threads(size: int, function, *args) -> list:
    with ThreadPoolExecutor(size) as pool:
        return [f.result(60) for f in [pool.submit(function, r, *args) for r in range(size)]]


def group_of(threads: Threads, rank: int, size: int) -> Group:
    return Group(None, rank, size, tuple(range(size)), device_memory=threads.of(rank))


def inputs(rank: int, dtype: torch.dtype, size: int, call: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (3 + 5 * rank) * (call + 1) if rank != 1 else call
    ids = random_ids(tokens, size * EXPERTS, TOP_K, seed=rank + 10 * call)
    ids[::3, 0] = -1
    x = randn(dtype, tokens, HIDDEN, seed=rank + call)
    return x, ids, randn(wide(dtype), tokens, TOP_K, seed=rank + 7)


def layers(rank: int, groups: list[Group], dtype: torch.dtype) -> list[list[Tensor]]:
    """Of calls that grow: what each brings, forward and backward."""
    group, results = groups[rank], []
    for call in range(3):
        x, ids, weights = inputs(rank, dtype, group.size, call)
        x.requires_grad_(), weights.requires_grad_()
        plan = expert.ExchangePlan.make(ids, EXPERTS, group, layer=call)
        rows, row_weights, offsets = expert.dispatch(x, weights, plan)
        y = rows * (row_weights + rank)[:, None].to(dtype)
        out = expert.combine(y, plan)
        out.backward(torch.ones_like(out))
        grads = [x.grad, weights.grad]
        results.append([rows, row_weights, offsets, out, *grads, plan.came(plan.whole)])
    return results


WIDTH = 5


def parameters(rank: int, dtype: torch.dtype, main: bool) -> dict[str, Tensor]:
    shapes = {"w1": (2 * WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "b1": (2 * WIDTH,), "b2": (HIDDEN,)}
    made = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        made[name] = p = randn(dtype, EXPERTS, *shape, seed=100 * rank + seed).requires_grad_()
        if main:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            p.main_grad = torch.ones(p.shape, dtype=wide)
    return made


def in_steps(x: Tensor, weights: Tensor, plan: expert.ExchangePlan, w1, w2, **how) -> Tensor:
    rows, row_weights, offsets = expert.dispatch(x, weights, plan)
    return expert.combine(ops.experts(rows, row_weights, w1, w2, offsets, **how), plan)


def learning(rank: int, groups: list[Group], layer, dtype, how: dict, main: bool) -> list[Tensor]:
    """Of calls that grow: what each gives, and all gradients."""
    found, group = [], groups[rank]
    for call in range(2):
        x, ids, weights = inputs(rank, dtype, group.size, call)
        x.requires_grad_(), weights.requires_grad_()
        learnt = parameters(rank, dtype, main)
        plan = expert.ExchangePlan.make(ids, EXPERTS, group, layer=call)
        out = layer(x, weights, plan, **learnt, **how)
        (out * out).sum().backward()
        found += [out, x.grad, weights.grad]
        found += [p.main_grad if main else p.grad for p in learnt.values()]
    return found


def over_the_cpu(size: int) -> list[Group]:
    """The same ranks with the memory that ranks on a CPU share."""
    memories = [PeerMemory(range(size), rank, space=1 << 24) for rank in range(size)]
    for memory in memories:
        memory.connect([os.getpid()] * size, [m.host.fd for m in memories])
    return [Group(None, r, size, tuple(range(size)), m) for r, m in enumerate(memories)]
