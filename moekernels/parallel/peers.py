"""Memory that the ranks of a group on one machine share, and the tensors that travel through it.

A rank writes into a slab of its own, which all ranks of the group map; the reader copies out. What
waits, waits in C++ (`csrc/host/slabs.h`): it spins for a moment, then sleeps, and looks every
second whether the rank that it waits for lives. Legend: P ranks of the group.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moekernels import _host
from moekernels.errors import UsageError
from moekernels.parallel.nodes import Nodes, cores, gather

MODES = ("auto", "shared", "collective")
SPACE = 1 << 36  # bytes of addresses of a slab; memory is taken as messages need it
SUMS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # what `_host` adds up, by its names
MARK = 16  # bytes at the end of a slab, by which whoever finds it knows whose it is
SPINS, SPINS_ALONE = 50, 2000  # before a wait sleeps; where every rank has a core of its own


class PeerLost(RuntimeError):
    """A peer is gone, or did not come in time; the message says who waited for what of whom, and
    whoever knows more (a microbatch, a layer) adds a note."""

    def __str__(self) -> str:
        return "; ".join([super().__str__(), *getattr(self, "__notes__", [])])


class PeerMemory:
    """The memory that `ranks` share; this one is `ranks[rank]`."""

    def __init__(self, ranks: Sequence[int], rank: int, *, space: int = SPACE) -> None:
        """RuntimeError where this system has no such memory, or no room for it."""
        self.ranks, self.rank, self.size = tuple(ranks), rank, len(ranks)
        self.host = _host.Peers(rank, self.size, space)
        self.mark = secrets.token_bytes(MARK)
        os.pwrite(self.host.fd, self.mark, os.fstat(self.host.fd).st_size - MARK)

    def connect(self, pids: Sequence[int], descriptors: Sequence[int]) -> None:
        """Map what the peers made, in the order of `ranks`; RuntimeError where one's memory cannot
        be reached."""
        self.host.connect(list(pids), list(descriptors))

    def set_link(self, latency: float, rate: float) -> None:
        """Have exchanges arrive `latency` seconds + bytes / `rate` behind their last post."""
        self.host.latency, self.host.rate = int(latency * 1e9), rate / 1e9

    def lost(self, error: Exception, what: str) -> PeerLost:
        peer, seconds, gone = error.args
        me, other = self.ranks[self.rank], self.ranks[peer]
        if gone:
            return PeerLost(
                f"Connection closed by peer: rank {other} is gone, rank {me} waited {seconds:g} s "
                f"for {what} from it"
            )
        return PeerLost(
            f"Timed out waiting: rank {me} waited {seconds:g} s for {what} from rank {other}"
        )

    def all_to_all(
        self,
        x: Tensor,
        receive: Sequence[int] | None = None,
        send: Sequence[int] | None = None,
        *,
        stamped: bool = False,
    ) -> Tensor:
        """`send[p]` rows of x to peer p, `receive[p]` from it, in peer order; default: equal."""
        x = x.contiguous()
        if receive is None or send is None:
            even = [x.shape[0] // self.size] * self.size
            receive, send = receive or even, send or even
        out = x.new_empty(sum(receive), *x.shape[1:])
        row = x.element_size() * math.prod(x.shape[1:])
        try:
            self.host.all_to_all(
                x.data_ptr(),
                out.data_ptr(),
                [n * row for n in send],
                [n * row for n in receive],
                stamped,
            )
        except _host.Lost as lost:
            raise self.lost(lost, f"a part of {list(out.shape)}") from None
        return out

    def all_gather(self, x: Tensor, *, stamped: bool = False) -> Tensor:
        """x [T, ...] -> [P*T, ...]."""
        x = x.contiguous()
        first, *rest = x.shape
        out = x.new_empty(self.size * first, *rest)
        try:
            self.host.all_gather(x.data_ptr(), out.data_ptr(), x.nbytes, stamped)
        except _host.Lost as lost:
            raise self.lost(lost, f"a part of {list(out.shape)}") from None
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """x [P*T, ...] of a dtype of `SUMS` -> [T, ...], the own part summed in rank order, in fp32
        at least."""
        x = x.contiguous()
        first, *rest = x.shape
        out = x.new_empty(first // self.size, *rest)
        try:
            self.host.reduce_scatter(x.data_ptr(), out.data_ptr(), out.numel(), SUMS[x.dtype])
        except _host.Lost as lost:
            raise self.lost(lost, f"a part of {list(x.shape)}") from None
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, likewise."""
        x = x.contiguous()
        out = torch.empty_like(x)
        try:
            self.host.all_reduce(x.data_ptr(), out.data_ptr(), out.numel(), SUMS[x.dtype])
        except _host.Lost as lost:
            raise self.lost(lost, f"a part of {[self.size, *x.shape]}") from None
        return out

    def send(self, x: Tensor, peer: int, lane: int, tag: int) -> None:
        """Give x away; waits for nobody, unless many of its lane lie unread."""
        x = x.contiguous()
        try:
            self.host.send(lane, peer, x.data_ptr(), x.nbytes, tag)
        except _host.Lost as lost:
            raise self.lost(lost, "room for a message") from None

    def expect(self, peer: int, lane: int) -> int:
        """The number of the next message of a lane; ask in the order in which they are sent."""
        return self.host.expect(lane, peer)

    def receive(self, out: Tensor, peer: int, lane: int, number: int, tag: int) -> None:
        """Wait for a message and copy it to `out`."""
        try:
            self.host.receive(lane, peer, number, out.data_ptr(), out.nbytes, tag)
        except _host.Lost as lost:
            raise self.lost(lost, f"a message {list(out.shape)}") from None


def share(
    groups: Sequence[tuple[int, ...]],
    rank: int,
    nodes: Nodes,
    mode: str,
    device: torch.device,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[dict[tuple[int, ...], PeerMemory], str]:
    """Memory for those of the groups that hold this rank and lie on one node, and why there is
    none. All ranks of the run call it together; either all of them share or none does. Or those of
    a process group: ranks are counted within it, then.

    Raises UsageError under the mode `shared` where the ranks cannot share, and under any other
    where they are not of one machine though it seemed so.
    """
    if mode == "collective":
        return {}, "--exchange collective"
    world = len(nodes.of)
    if device.type != "cpu":
        return _none(mode, "ranks share memory on the CPU only, this run is on a GPU")
    mine = [ranks for ranks in groups if rank in ranks and nodes.together(ranks)]
    made, complaint = {}, ""
    try:
        made = {ranks: PeerMemory(ranks, ranks.index(rank)) for ranks in mine}
    except (RuntimeError, OSError) as error:
        complaint = str(error)
    opened = {ranks: (memory.host.fd, memory.mark) for ranks, memory in made.items()}
    everyone = gather((os.getpid(), opened, complaint), world, process_group)
    complaint = next((text for _, _, text in everyone if text), "")
    if len({(nodes.of[r], pid) for r, (pid, _, _) in enumerate(everyone)}) < world:
        complaint = "several ranks are of one process"  # a backend that only pretends, say
    if not complaint:
        _check_machine(rank, made, everyone, process_group)
        alone = len(nodes.mates(rank)) <= cores()
        try:
            for ranks, memory in made.items():
                memory.connect(
                    [everyone[r][0] for r in ranks], [everyone[r][1][ranks][0] for r in ranks]
                )
                memory.host.spins = SPINS_ALONE if alone else SPINS
        except RuntimeError as error:
            complaint = str(error)
        complaint = next((text for text in gather(complaint, world, process_group) if text), "")
    return _none(mode, complaint) if complaint else (made, "")


def _check_machine(
    rank: int,
    made: Iterable[tuple[int, ...]],
    everyone: Sequence[tuple],
    process_group: dist.ProcessGroup | None,
) -> None:
    """UsageError, on all ranks, where one does not find another's memory on its machine: two of
    them have one name, and whatever is told of nodes would be wrong."""
    strangers = (
        peer
        for ranks in made
        for peer in ranks
        if peer != rank and _is_strange(everyone[peer][0], *everyone[peer][1][ranks])
    )
    found = gather(next(strangers, None), len(everyone), process_group)
    for other, peer in enumerate(found):
        if peer is not None:
            raise UsageError(
                f"ranks {min(other, peer)} and {max(other, peer)} say that they run on one machine "
                f"(host name, boot and process numbers), but rank {other} does not find the memory "
                f"of rank {peer} there; give the machines, or containers, names of their own"
            )


def _is_strange(pid: int, descriptor: int, mark: bytes) -> bool:
    """Whether there is no such process here, or what it has open by that number is not the peer's.
    One that may not be looked into is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        slab = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.ENOENT
    try:
        return os.pread(slab, MARK, max(0, os.fstat(slab).st_size - MARK)) != mark
    except OSError:
        return True  # a pipe, say
    finally:
        os.close(slab)


def _none(mode: str, why: str) -> tuple[dict, str]:
    if mode == "shared":
        raise UsageError(f"--exchange shared: {why}; give --exchange collective")
    return {}, why
