"""Memory that ranks share: the bits of the collective, whatever the order of arrival; waits that
end; nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moekernels
from moekernels import _host
from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.parallel import expert, peers, tensor
from moekernels.parallel.measure import Stamps, times_of
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.nodes import Nodes
from moekernels.parallel.peers import PeerLost, PeerMemory
from python_tests.support import distributed
from python_tests.support.counting import calls_within
from python_tests.support.distributed import RankPool, run_ranks
from python_tests.support.exchanges import in_threads, over_the_cpu

EXPERTS = 6
OURS = str(Path(moekernels.__file__).parent)


@pytest.fixture(scope="module")
def three() -> Iterator[RankPool]:
    with RankPool(3) as pool:
        yield pool


def _mesh(size: int, mode: str, **options) -> Mesh:
    return Mesh(Layout(dp=size, ep=size), exchange_mode=mode, **options)


def _inputs(rank: int, routed: str, dtype: torch.dtype, experts: int) -> tuple[Tensor, ...]:
    """x [T, H], ids [T, K], weights [T, K]; T differs by rank, and is zero on one."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 1 if routed == "one token" else [5, 0, 9, 2, 7, 1, 3, 4][rank]
    top_k = experts if routed == "all of them" else 2
    x = torch.randn(tokens, 5, generator=generator).to(dtype)
    scores = torch.rand(tokens, experts, generator=generator)
    ids = scores.topk(top_k, dim=1).indices.int()
    if routed == "one expert":
        ids[:, 0], ids[:, 1:] = 1, -1
    elif routed == "one rank":
        ids = ids % 2 + experts - 2
    elif routed == "nothing" or (routed == "one token" and rank):
        ids.fill_(-1)
    elif routed == "dropped":
        ids[::2, 0] = -1
    wide = torch.promote_types(dtype, torch.float32)
    return x, ids, torch.rand(tokens, top_k, generator=generator).to(wide)


ROUTED = ("any", "one expert", "one rank", "nothing", "one token", "all of them", "dropped")


def _all_of_it(mesh: Mesh, x: Tensor, ids: Tensor, weights: Tensor, delay: float) -> list[Tensor]:
    """A layer's forward and backward: everything that an exchange brings."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    plan = expert.ExchangePlan.make(ids, 2, mesh.exchange, layer=7)
    time.sleep(delay)
    rows, row_weights, offsets = expert.dispatch(x, weights, plan)
    out = expert.combine(rows * row_weights[:, None].to(x.dtype), plan)
    out.backward(torch.arange(out.numel(), dtype=x.dtype).view_as(out))
    return [rows, row_weights, offsets, out, x.grad, weights.grad, plan.came(plan.whole)]


def _same_bits(rank: int, size: int) -> list[str]:
    shared, collective = _mesh(size, "shared"), _mesh(size, "collective")
    different = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64)[: 1 if size == 8 else 3]:
        for number, routed in enumerate(ROUTED):
            given = _inputs(rank, routed, dtype, 2 * size)
            delay = 0.002 * ((rank + number) % 3)  # another rank is the last one every time
            got = _all_of_it(shared, *given, delay)
            wanted = _all_of_it(collective, *given, 0.0)
            if not all(map(torch.equal, got, wanted)):
                different.append(f"{routed} {dtype}")
    return different


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_bits_of_the_collective(size: int) -> None:
    assert run_ranks(size, _same_bits, size) == [[]] * size


def _same_tensors(rank: int) -> bool:
    shared, collective = _mesh(3, "shared").exchange, _mesh(3, "collective").exchange
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(rank))
    send = [[0, 5, 7], [1, 0, 2], [4, 4, 4]]
    receive = [s[rank] for s in send]
    x_uneven = x[: sum(send[rank])]
    for function in (tensor.all_gather, tensor.reduce_scatter, tensor.all_reduce):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32):
            given = (3 * x).to(dtype)
            got, wanted = function(given, shared), function(given, collective)
            assert got.dtype == dtype and torch.equal(got, wanted), (function.__name__, dtype)
    for kind in (x_uneven, x_uneven.bool(), x_uneven[:, :0], x_uneven.half().T.contiguous().T):
        got, wanted = (
            tensor.all_to_all(kind, g, receive, send[rank]) for g in (shared, collective)
        )
        assert torch.equal(got, wanted)
    return True


def test_whole_tensors(three: RankPool) -> None:
    assert all(three.run(_same_tensors))


def _run_ahead(rank: int) -> int:
    """Many messages of many sizes from one that does not wait; the memory that they took."""
    memory = _mesh(3, "shared").exchange.memory
    for number in range(200):
        size = 1 + 97 * number % 5000
        if rank == 0:
            memory.send(torch.full((size,), float(number)), 1, 0, number)
        elif rank == 1:
            out = torch.empty(size)
            memory.receive(out, 0, 0, memory.expect(0, 0), number)
            assert (out == number).all(), number
    return memory.host.held


def test_messages_wait_for_room_and_memory_is_used_again(three: RankPool) -> None:
    assert max(three.run(_run_ahead)) <= 1 << 20  # the messages are 2 MB


def _leaves_nothing(rank: int) -> list[str]:
    mesh = _mesh(3, "shared")
    tensor.all_gather(torch.zeros(4), mesh.exchange)
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in maps if " rw-s " in line and len(line) > 72]


def test_the_memory_has_no_name(three: RankPool) -> None:
    """So that no size of /dev/shm bounds it and nothing is to be removed."""
    for files in three.run(_leaves_nothing):
        shared = [f for f in files if "moekernels" in f]
        assert len(shared) >= 3 and all(f.startswith("/memfd:") for f in shared), files


def _kill_one(rank: int) -> str:
    mesh = _mesh(3, "shared")
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    x, ids, weights = _inputs(rank, "any", torch.float32, EXPERTS)
    plan = expert.ExchangePlan.make(ids, 2, mesh.exchange, layer=7)
    with pytest.raises(PeerLost) as lost:
        expert.dispatch(x, weights, plan)
    if time.monotonic() - began > 10:
        return "too late"
    if rank == 0:  # outlives the report of the one that was killed
        Path(os.environ["SAID"]).write_text(str(lost.value))
    return str(lost.value)


def test_a_killed_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 20.0)
    with pytest.raises(distributed.RankError, match="rank 2 was killed by SIGKILL"):
        run_ranks(3, _kill_one)
    said = (tmp_path / "said").read_text()
    assert said.startswith("Connection closed by peer: rank 2 is gone, rank 0 waited ")
    assert said.endswith(" s for rows of experts 0-1 of layer 7 from it")


def _stuck(rank: int) -> str:
    memory = _mesh(3, "shared").exchange.memory
    memory.host.patience = 0.5
    if rank == 0:
        return ""
    with pytest.raises(PeerLost) as lost:
        memory.all_gather(torch.zeros(1))
    return str(lost.value)


def test_a_wait_that_ends_says_who_waits_for_whom(three: RankPool) -> None:
    for rank, said in enumerate(run_ranks(3, _stuck)[1:], start=1):
        assert said.startswith(f"Timed out waiting: rank {rank} waited 1")
        assert said.endswith(" s for a part of [3] from rank 0")


def test_notes_are_part_of_what_is_said() -> None:
    lost = PeerLost("rank 1 waited")
    lost.add_note("in pipeline stage 0 of 4: B12")
    assert str(lost) == "rank 1 waited; in pipeline stage 0 of 4: B12"


def _other_program(rank: int) -> bool:
    memory = _mesh(2, "shared").exchange.memory
    x = torch.zeros(2)
    with pytest.raises(RuntimeError, match="run different programs"):
        memory.all_gather(x) if rank else memory.all_to_all(x)
    return True


def test_ranks_that_do_not_do_the_same_are_told() -> None:
    assert all(run_ranks(2, _other_program))


def test_no_room() -> None:
    with pytest.raises(RuntimeError, match="must hold more than its channels"):
        PeerMemory(range(8), 0, space=1 << 12)
    memory = PeerMemory((0, 1), 0, space=1 << 16)
    memory.connect([os.getpid()] * 2, [memory.host.fd] * 2)
    with pytest.raises(RuntimeError, match="no room for a message of 100000 bytes in a slab of 65"):
        memory.send(torch.zeros(25000), 1, 0, 0)
    with pytest.raises(RuntimeError, match=r"/proc/\d+/fd/999: No such file"):
        PeerMemory((0, 1), 0).connect([os.getpid()] * 2, [999] * 2)


def _nodes(rank: int) -> tuple[list[bool], str]:
    nodes = Nodes((0, 0, 1, 1))
    mesh = Mesh(Layout(tp=2, dp=2, ep=2), nodes=nodes)
    shares = [getattr(mesh, name).memory is not None for name in ("tp", "exchange", "dp", "world")]
    x = torch.full((4, 1), float(rank))
    wanted = tensor.all_gather(x, Mesh(Layout(tp=2, dp=2), exchange_mode="collective").world)
    assert torch.equal(tensor.all_gather(x, mesh.world), wanted)
    try:
        Mesh(Layout(dp=4, ep=4), exchange_mode="shared", nodes=nodes)
    except UsageError as error:
        return shares, str(error)
    return shares, "nothing"


def test_groups_over_several_nodes_keep_the_collective() -> None:
    said = (
        "--exchange shared: ranks [0, 1, 2, 3] exchange rows and are not of one node; give auto "
        "or collective"
    )
    assert run_ranks(4, _nodes) == [([True, True, False, False], said)] * 4


NOBODY = (1 << 22) + 1  # beyond the numbers of processes


def _stranger(rank: int, gone: bool) -> str:
    """Rank 1 says that it is a process which is not here, or one that has something else open."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            told = peers.gather

            def wrong(value: Any, world: int, group: Any = None) -> list:
                if isinstance(value, tuple) and isinstance(value[1], dict):
                    pid, opened, complaint = value
                    there = {ranks: (fd, bytes(peers.MARK)) for ranks, (fd, _) in opened.items()}
                    value = (NOBODY, opened, complaint) if gone else (pid, there, complaint)
                return told(value, world, group)

            patch.setattr(peers, "gather", wrong)
        try:
            Mesh(Layout(dp=2, ep=2))
        except UsageError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "another"])
def test_machines_of_one_name_are_told_apart(gone: bool) -> None:
    """Two ranks whose nodes have one name, and neither sees the other's processes."""
    said = run_ranks(2, _stranger, gone)
    assert len(set(said)) == 1
    assert "ranks 0 and 1 say that they run on one machine" in said[0]
    assert "rank 0 does not find the memory of rank 1 there" in said[0]


def test_ranks_of_one_process_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torch's fake backend, whose gathers bring every rank's own value."""
    monkeypatch.setattr(peers, "gather", lambda value, world, group=None: [value] * world)
    nodes, cpu = Nodes((0, 0)), torch.device("cpu")
    said = "several ranks are of one process"
    assert peers.share([(0, 1)], 0, nodes, "auto", cpu) == ({}, said)
    with pytest.raises(UsageError, match=f"--exchange shared: {said}; give --exchange collective"):
        peers.share([(0, 1)], 0, nodes, "shared", cpu)


def _late(rank: int, link: bool) -> list[Stamps]:
    mesh = _mesh(3, "shared")
    if link:
        mesh.exchange.memory.set_link(0.02, 1e5)
    tensor.all_gather(torch.zeros(1), mesh.world)
    mesh.exchange.memory.host.take_stamps()
    if rank == 2:
        time.sleep(0.2)
    tensor.all_gather(torch.zeros(500), mesh.exchange, stamped=True)
    return [Stamps(*s) for s in mesh.exchange.memory.host.take_stamps()]


def test_a_peer_that_is_late_is_skew(three: RankPool) -> None:
    for rank, stamps in enumerate(three.run(_late, False)):
        times = times_of(stamps)
        assert len(stamps) == 1 and stamps[0].size == 4000
        assert (times.skew >= 0.1) == (rank != 2)
        assert times.flight == 0  # rows were here as soon as they were posted


def test_a_link_delivers_behind_the_last_post(three: RankPool) -> None:
    for rank, stamps in enumerate(three.run(_late, True)):
        times, s = times_of(stamps), stamps[0]
        assert s.ready - max(s.post, s.last) == 60_000_000  # 20 ms + 4000 B at 1e5 B/s
        assert times.flight == pytest.approx(0.06)
        assert times.exposed >= 0.05 + times.moving
        assert (times.skew >= 0.1) == (rank != 2)


def test_a_number_that_was_not_posted_is_refused() -> None:
    with pytest.raises(RuntimeError, match="exchange 3 was not posted, or taken"):
        _host.Peers(0, 1, 1 << 20).arrive(3)


class _Operations(TorchDispatchMode):
    """Of torch, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


# Way -> the most functions of ours that it calls, and operations of torch: one for each tensor that
# comes.
WORK = {
    "dispatch": (3, 2),
    "combine": (4, 1),
    "combine's gradient": (3, 1),
    "dispatch's gradient": (4, 2),
    "plan": (12, 2),
    "all_gather": (2, 1),
    "reduce_scatter": (2, 1),
    "all_reduce": (2, 1),
}


def _work(rank: int, groups: list[Group]) -> dict[str, tuple[int, int]]:
    group = groups[rank]
    x, ids, weights = _inputs(rank, "any", torch.float32, 4)
    plan = expert.ExchangePlan.make(ids, 2, group)
    exchange, whole = plan.exchange, torch.randn(6, 3)
    came = exchange.post_out(x, weights, plan).wait()
    ways = {
        "dispatch": lambda: exchange.post_out(x, weights, plan).wait(),
        "combine": lambda: exchange.post_back(came.rows, None, plan).wait(),
        "combine's gradient": lambda: exchange.post_out(x, None, plan).wait(),
        "dispatch's gradient": lambda: exchange.post_back(came.rows, came.weights, plan).wait(),
        "plan": lambda: expert.ExchangePlan.make(ids, 2, group),
        "all_gather": lambda: tensor.all_gather(whole, group),
        "reduce_scatter": lambda: tensor.reduce_scatter(whole, group),
        "all_reduce": lambda: tensor.all_reduce(whole, group),
    }
    found = {}
    for name, way in ways.items():
        with _Operations() as operations:
            way()
        found[name] = calls_within(OURS, way), operations.count
    return found


def test_little_is_done_beside_moving_rows() -> None:
    """On small messages an exchange takes as long as the Python around it."""
    for found in in_threads(2, _work, over_the_cpu(2)):
        assert found.keys() == WORK.keys()
        for name, (calls, operations) in found.items():
            assert calls <= WORK[name][0] and operations <= WORK[name][1], (name, found[name])
