"""The multi-rank test helper itself: results, failures and hangs are all reported, quickly."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from python_tests.support.distributed import RankError, RankPool, run_ranks


def _sum(rank, scale):
    x = torch.full((3,), float(rank + 1)) * scale
    dist.all_reduce(x)
    return x


def stuck_here(rank):
    if rank == 1:
        time.sleep(600)


def test_results_come_in_rank_order_and_closures_work():
    offset = 10
    results = run_ranks(4, lambda rank: (rank + offset, dist.get_world_size()))
    assert results == [(10, 4), (11, 4), (12, 4), (13, 4)]


def test_pool_serves_several_calls():
    with RankPool(3) as pool:
        for scale in (1.0, 2.0):
            for x in pool.run(_sum, scale):
                assert torch.equal(x, torch.full((3,), 6.0 * scale))


def test_backward_works_in_ranks_after_threads_ran_in_the_parent():
    """Other tests of the same process use OpenMP and autograd before ranks are forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    a = torch.randn(256, 256, requires_grad=True)
    (a @ a).exp().sum().backward()

    def work(rank):
        b = torch.ones(256, 256, requires_grad=True)
        (b @ b).sum().backward()
        return float(b.grad.sum())

    try:
        assert run_ranks(2, work) == [2 * 256.0**3] * 2
    finally:
        torch.set_num_threads(before)


def test_a_rank_that_raises_is_named_and_the_others_do_not_hang():
    def work(rank):
        if rank == 2:
            raise ValueError("rank two is unhappy")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RankError, match="(?s)rank 2 of 3 failed.*rank two is unhappy") as caught:
        run_ranks(3, work, timeout=600)
    assert caught.value.rank == 2 and time.monotonic() - start < 300


def test_a_rank_that_dies_is_named():
    def work(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        run_ranks(2, work)


def test_a_rank_that_hangs_shows_its_stack():
    with RankPool(2) as pool:
        pool.run(_sum, 1.0)  # all are there, however busy the machine is
        pool.timeout = 1.5
        with pytest.raises(RankError, match="(?s)no answer after 1.5 s.*stuck_here"):
            pool.run(stuck_here)
