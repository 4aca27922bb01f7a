"""Rungs 15 to 18: the exchange through memory that devices share, with the ranks on one card,
which is all but the link between cards; then rows put over that link, against a plain copy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ladder.diagnose import same
from ladder.kit import Kit, RungSkipped, require, rung
from ladder.product_rungs import BF16, F32, normal
from moekernels import reference
from moekernels.ops import _exchange_experts as products
from moekernels.ops import exchange as kernels
from moekernels.ops._ffn import Ffn
from moekernels.ops._library import raw
from moekernels.parallel.device_stamps import DeviceStamps
from moekernels.parallel.measure import OUT
from python_tests.support.devices import emulated_devices

PEERS, EXPERTS, TOP_K = 3, 2, 2
PATIENCE = 2_000_000_000  # nanoseconds on a card


class _Streams:
    """A rank is a stream of the one card, as a device is in the emulator."""

    def __init__(self) -> None:
        self.streams = [torch.cuda.Stream() for _ in range(PEERS)]

    def on(self, rank: int) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self.streams[rank])

    def run(self) -> None:
        torch.cuda.synchronize()


@contextlib.contextmanager
def _ranks(kit: Kit, slabs: list[Tensor]) -> Iterator:
    if kit.hardware:
        torch.cuda.synchronize()
        yield _Streams()
        return
    with emulated_devices(**kit.how) as devices:
        for slab in slabs:
            devices.emulator.know(slab, lasts=True)
        try:
            yield devices
        finally:
            for slab in slabs:
                del devices.emulator.lasting[slab.data_ptr()]


def _slabs(kit: Kit, shape: kernels.Shape, devices: list[str] | None = None) -> list[kernels.Slabs]:
    size, devices = kernels.bytes_of(shape), devices or [kit.device] * shape.peers
    room = [torch.zeros(size + 128, dtype=torch.uint8, device=d) for d in devices]
    memory = [r[(first := -r.data_ptr() % 128) : first + size] for r in room]
    addresses = [m.data_ptr() for m in memory]
    patience = PATIENCE if kit.hardware else 0
    return [kernels.Slabs(m, addresses, p, shape, patience) for p, m in enumerate(memory)]


@rung(15, "simt", look="csrc/cuda/exchange.cu, common/flags.cuh; streams that do not run together")
def exchange(kit: Kit) -> dict:
    """Rows out and home between ranks of one card, twice over one slot, to the bit."""
    tokens, hidden = (4096, 2048) if kit.hardware else (5, 16)
    x = [normal(BF16, tokens + p, hidden, seed=p) for p in range(PEERS)]
    every = PEERS * EXPERTS
    draw = torch.Generator().manual_seed(1)
    ids = [torch.rand(len(v), every, generator=draw).argsort(1)[:, :TOP_K].int() for v in x]
    routings = [reference.route(i, every) for i in ids]
    counts = [r.counts.view(PEERS, EXPERTS) for r in routings]
    messages = [reference.pack(v, None, r.slot_of, TOP_K) for v, r in zip(x, routings)]
    wanted = reference.exchange(messages, counts, hidden)
    most = max(len(rows) for rows, _, _ in wanted)
    back = max(i.numel() for i in ids)
    slabs = _slabs(kit, kernels.Shape(PEERS, EXPERTS, 1, most, back, 2 * hidden))
    placed = [
        kit.place({"x": v, "slot_of": r.slot_of, "counts": r.counts}) for v, r in zip(x, routings)
    ]
    put = kit.wrong("put", kernels.put)
    seconds = 0.0
    with _ranks(kit, [s.slab for s in slabs]) as devices:
        for _ in range(2):
            came, home = [], []
            began = time.perf_counter()
            for p, given in enumerate(placed):
                with devices.on(p):
                    known = kernels.gather_counts(given["counts"], slabs[p])
                    put(given["x"], None, given["slot_of"], TOP_K, known, slabs[p], 0)
                    like, rows = given["x"], len(wanted[p][0])
                    taken = kernels.take(like, known, slabs[p], 0, rows, weighted=False)[0]
                    kernels.push(taken, None, known, slabs[p], 0)
                    size = ids[p].numel()
                    returned = kernels.take_home(like, known, slabs[p], 0, size, weighted=False)
                    came.append(taken)
                    home.append(returned[0])
            devices.run()
            seconds = time.perf_counter() - began
            for p in range(PEERS):
                same(f"rows that came to rank {p}", came[p], wanted[p][0])
                same(f"rows that came home to rank {p}", home[p], messages[p])
    moved = 4 * sum(t.numel() * 2 for t in came)  # read and written, out and home
    return {"ranks": PEERS, "gigabytes_a_second_with_launches": moved / seconds / 1e9}


# Of what a copy between the two cards reaches, and of an H100 pair on NVLink in GB/s: kernels that
# others measured put rows at 419. A copy above `NVLINK` goes by it: PCIe 5 carries 64.
OF_A_COPY, ON_H100, NVLINK = 0.9, 400.0, 100.0


def judge(put: float, copy: float, card: str) -> None:
    """GB/s of rows that were put to a peer, of a copy to it, and what the cards are."""
    require(
        put >= OF_A_COPY * copy,
        f"put {put:.0f} GB/s, a copy {copy:.0f}: it must reach {OF_A_COPY:g} of that",
    )
    if "H100" in card and copy > NVLINK:
        require(put >= ON_H100, f"put {put:.0f} GB/s over NVLink, an H100 must reach {ON_H100:.0f}")


class _Cards:
    """A rank is a card; one process drives both."""

    def on(self, rank: int) -> contextlib.AbstractContextManager:
        return torch.cuda.device(rank)

    def run(self) -> None:
        for rank in range(2):
            torch.cuda.synchronize(rank)


@contextlib.contextmanager
def _two(kit: Kit, slabs: list[Tensor]) -> Iterator:
    if kit.hardware:
        yield _Cards()
        return
    with _ranks(kit, slabs) as devices:
        yield devices


def _seconds(fn: Callable[[], None]) -> float:
    """Of work on card 0, by its own clock."""
    with torch.cuda.device(0):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _cards(kit: Kit) -> list[str]:
    if not kit.hardware:
        return ["cpu", "cpu"]
    if torch.cuda.device_count() < 2:
        raise RungSkipped("there is one card here, and rows are put from one to another")
    if not torch.cuda.can_device_access_peer(0, 1) or not torch.cuda.can_device_access_peer(1, 0):
        raise RungSkipped("cards 0 and 1 do not reach one another's memory")
    for a, b in ((0, 1), (1, 0)):  # torch opens the way to a peer when it first copies there
        torch.ones(1, device=f"cuda:{a}").to(f"cuda:{b}")
    return ["cuda:0", "cuda:1"]


@rung(16, "exchange", look="csrc/cuda/exchange.cu: kSendBlocks, move_piece; the link's own speed")
def put(kit: Kit) -> dict:
    """All rows of rank 0 to the experts of rank 1, to the bit, as fast as a copy."""
    cards = _cards(kit)
    rows, hidden, turns = (1 << 14, 2048, 10) if kit.hardware else (9, 16, 2)
    x, drawn = normal(BF16, rows, hidden), torch.Generator().manual_seed(1)
    ids = EXPERTS + torch.randint(0, EXPERTS, (rows, 1), generator=drawn).int()
    routing = reference.route(ids, 2 * EXPERTS)
    nothing = torch.zeros_like(routing.counts)
    slabs = _slabs(kit, kernels.Shape(2, EXPERTS, 1, rows, rows, 2 * hidden), cards)
    x0, slot_of = x.to(cards[0]), routing.slot_of.to(cards[0])
    counts = [c.to(card) for c, card in zip((routing.counts, nothing), cards)]
    put_rows, times, copies = kit.wrong("put", kernels.put), [], []
    with _two(kit, [s.slab for s in slabs]) as devices:
        known = []
        for rank in range(2):
            with devices.on(rank):
                known.append(kernels.gather_counts(counts[rank], slabs[rank]))
        devices.run()
        for _ in range(turns):

            def send() -> None:
                with devices.on(0):
                    put_rows(x0, None, slot_of, 1, known[0], slabs[0], 0)

            if kit.hardware:
                times.append(_seconds(send))
            else:
                send()
            with devices.on(1):
                like = x[:0].to(cards[1])
                came = kernels.take(like, known[1], slabs[1], 0, rows, weighted=False)[0]
            devices.run()
            same("rows that came to rank 1", came, x[routing.slot_of.long()])
    if not kit.hardware:
        return {"ranks": 2}
    there = torch.empty_like(x, device=cards[1])
    copies = [_seconds(lambda: there.copy_(x0, non_blocking=True)) for _ in range(turns)]
    speed, copy = (x.nbytes / min(seconds) / 1e9 for seconds in (times, copies))
    card = torch.cuda.get_device_name(0)
    judge(speed, copy, card)
    return {"card": card, "put_gigabytes_a_second": speed, "copy_gigabytes_a_second": copy}


HIDDEN, FFN = 16, 24  # of a rehearsal
STYLE = ("swiglu", 1.702, 7.0, False, False)


@contextlib.contextmanager
def _blocks(kit: Kit, count: int) -> Iterator[None]:
    """Of a product's grid: on one card those of all ranks run at once, beside who sends rows."""
    ops = torch.ops.moekernels if kit.hardware else torch.ops.moekernels_emulated
    ops._sm90_settings(grid=count)
    try:
        yield
    finally:
        ops._sm90_settings()


@rung(
    17,
    "exchange",
    "dact",
    look="csrc/cuda/sm90/peers.cuh, arriving.cuh (the acquire, the proxy fence), going.cuh",
)
def straight(kit: Kit) -> dict:
    """A layer's forward and backward between ranks of one card: products that read rows while they
    come and bring results home have the bits of the steps one after the other."""
    tokens, hidden, ffn = (4096, 2048, 1024) if kit.hardware else (5, HIDDEN, FFN)
    every = PEERS * EXPERTS
    draw = torch.Generator().manual_seed(1)
    ids = [
        torch.rand(tokens + p, every, generator=draw).argsort(1)[:, :TOP_K].int()
        for p in range(PEERS)
    ]
    routings = [reference.route(i, every) for i in ids]
    placed = []
    for p, routing in enumerate(routings):
        given = {
            "x": normal(BF16, tokens + p, hidden, seed=p),
            "dout": normal(BF16, tokens + p, hidden, seed=9 + p),
            "weights": normal(F32, tokens + p, TOP_K, seed=19 + p),
            "w1": normal(BF16, EXPERTS, 2 * ffn, hidden, seed=29 + p) * hidden**-0.5,
            "w2": normal(BF16, EXPERTS, hidden, ffn, seed=39 + p) * ffn**-0.5,
        }
        placed.append(kit.place(given | {"slot_of": routing.slot_of, "counts": routing.counts}))
    came = torch.stack([r.counts for r in routings]).view(PEERS, PEERS, EXPERTS).sum((0, 2))
    most, back = int(came.max()), max(i.numel() for i in ids)
    slabs = _slabs(kit, kernels.Shape(PEERS, EXPERTS, 1, most, back, 2 * hidden))
    blocks = 1
    if kit.hardware:
        blocks = (torch.cuda.get_device_properties(0).multi_processor_count - 16) // PEERS
    results, seconds = [], {}
    up, units = kit.wrong("up", products.up), products.units(hidden)
    for way in ("steps", "straight", "straight"):
        apart, began = way == "steps", time.perf_counter()
        with _ranks(kit, [s.slab for s in slabs]) as devices, _blocks(kit, blocks):
            found = []
            for p, given in enumerate(placed):
                with devices.on(p):
                    found.append([kernels.gather_counts(given["counts"], slabs[p])])
            devices.run()
            for p, given in enumerate(placed):
                known, size, like = found[p][0], ids[p].numel(), given["x"]
                own = given["w1"], given["w2"], known.held, None, None, None
                layer = Ffn(like[:0], None, *own, *STYLE, False)
                with devices.on(p):
                    kernels.put(like, given["weights"], given["slot_of"], TOP_K, known, slabs[p], 0)
                    rows = int(came[p])
                    if apart:
                        x, w = kernels.take(like, known, slabs[p], 0, rows, weighted=True)
                        layer = layer._replace(x=x, weights=w)
                        y, h = raw._experts(*layer, True, None)
                        kernels.push(y, None, known, slabs[p], 0)
                    else:
                        x, w, h, a = up(layer, known, slabs[p], 0, rows, True)
                        layer = layer._replace(x=x, weights=w)
                        products.down(layer, a, known, slabs[p], 0)
                    home = kernels.take_home(
                        like, known, slabs[p], 0, size, weighted=False, units=1 if apart else units
                    )
                    found[p] += [layer, h, x, w, home[0]]
            devices.run()
            for p, given in enumerate(placed):
                known, layer, h = found[p][:3]
                size, like = ids[p].numel(), given["dout"]
                with devices.on(p):
                    kernels.put(like, None, given["slot_of"], TOP_K, known, slabs[p], 0)
                    if apart:
                        rows = layer.x.shape[0]
                        dy, _ = kernels.take(like, known, slabs[p], 0, rows, weighted=False)
                        dh, _, dw = raw._experts_dact(*layer, dy, h, False, True)
                        dx = raw._grouped_gemm(dh, layer.w1, known.held, True, False)
                        kernels.push(dx, dw, known, slabs[p], 0)
                    else:
                        dy, dh, _, dw = products.dact(layer, h, known, slabs[p], 0, False, True)
                        products.product(
                            dh, layer.w1, known.held, True, False, dw, known, slabs[p], 0
                        )
                    home = kernels.take_home(
                        like, known, slabs[p], 0, size, weighted=True, units=1 if apart else units
                    )
                    found[p] += [dy, dh, *home]
            devices.run()
        seconds[way] = time.perf_counter() - began
        results.append([f[2:] for f in found])
    names = ("h", "rows", "weights", "results", "dy", "dh", "dx", "dweights")
    for turn in results[1:]:
        for p, (mine, theirs) in enumerate(zip(turn, results[0])):
            for name, a, b in zip(names, mine, theirs, strict=True):
                same(f"{name} of rank {p}", a, b)
    return {"ranks": PEERS, **{f"seconds_{way}": s for way, s in seconds.items()}}


class _Shared:
    """Memory for all ranks of one card, made when the first asks: what `DeviceStamps` takes."""

    def __init__(self, kit: Kit, made: list[list[Tensor]], rank: int) -> None:
        self.kit, self.made, self.rank, self.asked = kit, made, rank, 0

    def allocate(self, nbytes: int) -> tuple[Tensor, list[int]]:
        if self.asked == len(self.made):
            room = [
                torch.zeros(nbytes + 128, dtype=torch.uint8, device=self.kit.device)
                for _ in range(PEERS)
            ]
            self.made.append([r[(first := -r.data_ptr() % 128) : first + nbytes] for r in room])
        self.asked += 1
        memory = self.made[self.asked - 1]
        return memory[self.rank], [m.data_ptr() for m in memory]


@rung(18, "exchange", look="csrc/cuda/exchange_clock.cu, Record in exchange.h; %globaltimer's step")
def stamps(kit: Kit) -> dict:
    """When rows of ranks of one card were sent, needed and here, by a clock that they share: as the
    ranks find out, and in the order in which it must be."""
    tokens, hidden = (4096, 2048) if kit.hardware else (5, 16)
    every, draw = PEERS * EXPERTS, torch.Generator().manual_seed(1)
    ids = [
        torch.rand(tokens + p, every, generator=draw).argsort(1)[:, :TOP_K].int()
        for p in range(PEERS)
    ]
    routings = [reference.route(i, every) for i in ids]
    came = torch.stack([r.counts for r in routings]).view(PEERS, PEERS, EXPERTS).sum((0, 2))
    most, back = int(came.max()), max(i.numel() for i in ids)
    slabs = _slabs(kit, kernels.Shape(PEERS, EXPERTS, 1, most, back, 2 * hidden))
    x = [normal(BF16, len(i), hidden, seed=p) for p, i in enumerate(ids)]
    placed = [
        kit.place({"x": v, "slot_of": r.slot_of, "counts": r.counts}) for v, r in zip(x, routings)
    ]
    made: list[list[Tensor]] = []
    patience = PATIENCE if kit.hardware else 0
    noted = [DeviceStamps(_Shared(kit, made, p), p, PEERS, patience) for p in range(PEERS)]
    records = [n.begin(OUT, 2 * hidden) for n in noted]
    shared = [m for memory in made for m in memory]
    record = kit.wrong("record", lambda given: given)
    with _ranks(kit, [s.slab for s in slabs] + shared) as devices:
        for p, given in enumerate(placed):
            with devices.on(p):
                known = kernels.gather_counts(given["counts"], slabs[p])
                stamped = slabs[p]._replace(record=record(records[p]))
                kernels.put(given["x"], None, given["slot_of"], TOP_K, known, stamped, 0)
                kernels.take(given["x"], known, stamped, 0, int(came[p]), weighted=False)
        devices.run()
        ahead = []
        for p in range(PEERS):
            with devices.on(p):
                ahead.append(noted[p].meet())
        devices.run()
        for p in range(PEERS):
            with devices.on(p):
                noted[p].copy(ahead[p])
    off, flights = 0, []
    for p in range(PEERS):
        off = max(off, *map(abs, ahead[p].tolist()[:PEERS]))
        (s,) = noted[p].take()
        require(s.need <= s.got, f"rank {p} had its rows before it asked for them: {s}")
        require(s.size == 2 * hidden * int(came[p]), f"rank {p}: {s.size} bytes came: {s}")
        flights.append(s.ready - s.start)
    require(off < 100_000, f"ranks of one card have clocks that differ by {off} ns")
    return {"ranks": PEERS, "clocks_differ_by_ns": off, "flight_ns": max(flights)}
