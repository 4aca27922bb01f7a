"""The experts' products over rows of an exchange, in the emulator: virtual ranks whose first
product reads rows while peers still send them and whose last brings its results home, forward and
backward, held bit for bit to the same products between the two ways of the exchange on a CPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptx_emulator as ptx
from moekernels.ops import _exchange_experts as over
from moekernels.ops import exchange, exchange_clock
from moekernels.ops._ffn import Ffn
from moekernels.ops._library import raw
from moekernels.parallel.expert import ExchangePlan
from moekernels.parallel.mesh import Group
from moekernels.parallel.peers import PeerMemory
from python_tests.support import emulated, planted
from python_tests.support.spec import randn
from python_tests.support.virtual_ranks import MODES, ROUTINGS, Ranks, aligned, all_ids

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
BF16, F32 = torch.bfloat16, torch.float32
HIDDEN, WIDTH = 16, 24  # H, F
STYLE = ("swiglu", 1.702, 7.0, False, False)
CASES = [((2, 3, 8)[i % 3], name, BF16) for i, name in enumerate(ROUTINGS)]
CASES += [(2, "uneven", BF16), (2, "ordinary", F32), (3, "k_is_e", F32), (8, "dropped", F32)]


class Layer:
    """Virtual ranks with experts of their own, a gradient, and room for what comes."""

    def __init__(self, ids: list[Tensor], experts: int, dtype: torch.dtype, **room: int) -> None:
        room = {"rows": 3 + sum(i.numel() for i in ids)} | room
        self.ranks = Ranks(ids, experts, dtype, HIDDEN, slots=2, **room)
        self.peers, self.dtype = len(ids), dtype
        self.douts = [randn(dtype, *x.shape, seed=20 + p) for p, x in enumerate(self.ranks.x)]
        self.w1, self.w2, self.b1, self.b2 = [], [], [], []
        for p in range(self.peers):
            self.w1.append(randn(dtype, experts, 2 * WIDTH, HIDDEN, seed=30 + p, scale=0.3))
            self.w2.append(randn(dtype, experts, HIDDEN, WIDTH, seed=40 + p, scale=0.3))
            self.b1.append(randn(dtype, experts, 2 * WIDTH, seed=50 + p))
            self.b2.append(randn(dtype, experts, HIDDEN, seed=60 + p))

    def ffn(self, p: int, x: Tensor, weights: Tensor | None, offsets: Tensor) -> Ffn:
        own = self.w1[p], self.w2[p], offsets, None, self.b1[p], self.b2[p]
        return Ffn(x, weights, *own, *STYLE, False)

    def record_forward(
        self, devices, rows: list[int], stream: int = 0, apart: bool = False
    ) -> list[tuple]:
        """Of each rank: ffn with the rows that came, h, and what came home. `apart`: the results
        are a run of their own, as what lies behind the last row that came nobody writes before."""
        ranks, kept = self.ranks, []
        for p in range(self.peers):
            known, slabs = ranks.known[p], ranks.slabs[p]
            with devices.on(p, stream):
                ranks.put(p, ranks.x[p], ranks.weights[p])
            with devices.on(p):
                ffn = self.ffn(p, ranks.x[p], None, known.held)
                came, weights, h, a = over.up(ffn, known, slabs, 0, rows[p], True)
                kept.append((ffn._replace(x=came, weights=weights), h, a))
        if apart:
            devices.run()
        for p, (ffn, h, a) in enumerate(kept):
            with devices.on(p):
                over.down(ffn, a, ranks.known[p], ranks.slabs[p], 0)
                kept[p] = (ffn, h, self._home(p, False))
        return kept

    def _home(self, p: int, weighted: bool) -> tuple[Tensor, Tensor | None]:
        ranks, count = self.ranks, over.units(HIDDEN)
        size, known, slabs = ranks.ids[p].numel(), ranks.known[p], ranks.slabs[p]
        like = ranks.x[p]
        return exchange.take_home(like, known, slabs, 0, size, weighted=weighted, units=count)

    def record_backward(self, devices, kept: list[tuple], stream: int = 0) -> list[tuple]:
        """Of each rank: dy, dh, the weighted a, and dx and dweights that came home."""
        ranks, found = self.ranks, []
        for p in range(self.peers):
            known, slabs, (ffn, h, _) = ranks.known[p], ranks.slabs[p], kept[p]
            with devices.on(p, stream):
                ranks.put(p, self.douts[p], None)
            with devices.on(p):
                found.append(over.dact(ffn, h, known, slabs, 0, True, True))
        if self.peers == 8:  # together they are more than the emulator runs
            devices.run()
        for p, (dy, dh, wa, dw) in enumerate(found):
            known, slabs, ffn = ranks.known[p], ranks.slabs[p], kept[p][0]
            with devices.on(p):
                over.product(dh, ffn.w1, ffn.offsets, True, False, dw, known, slabs, 0)
                found[p] = (dy, dh, wa, *self._home(p, True))
        return found

    def run(self, rows: list[int], **how) -> tuple[list[tuple], list[tuple], list[str]]:
        with self.ranks.devices(**how) as devices, blocks(2 if self.peers < 8 else 1):
            self.ranks.gather(devices)
            devices.run()
            kept = self.record_forward(devices, rows, apart=rows != rows_of(self))
            devices.run()
            found = self.record_backward(devices, kept)
            devices.run()
            return kept, found, devices.emulator.launches


@contextmanager
def blocks(count: int):
    """Of the products' grids."""
    settings = torch.ops.moekernels_emulated._sm90_settings
    settings(grid=count)
    try:
        yield
    finally:
        settings()


class Cpu:
    """The same ranks over the exchange of ranks on a CPU; a device's products between."""

    def __init__(self, layer: Layer) -> None:
        ranks, peers = layer.ranks, layer.peers
        self.layer, self.memories = (
            layer,
            [PeerMemory(range(peers), p, space=1 << 24) for p in range(peers)],
        )
        for memory in self.memories:
            memory.connect([os.getpid()] * peers, [m.host.fd for m in self.memories])
        of = tuple(range(peers))
        groups = [Group(None, p, peers, of, memory) for p, memory in enumerate(self.memories)]
        each = zip(ranks.ids, groups)
        self.plans = [ExchangePlan.make(ids, ranks.experts, group) for ids, group in each]

    def _out(self, rows: list[Tensor], weights: list) -> list:
        each = zip(self.plans, rows, weights)
        posted = [plan.exchange.post_out(x, w, plan) for plan, x, w in each]
        return [pending.wait() for pending in posted]

    def _home(self, rows: list[Tensor], weights: list) -> list:
        each = zip(self.plans, rows, weights)
        posted = [plan.exchange.post_back(x, w, plan) for plan, x, w in each]
        return [pending.wait() for pending in posted]

    def run(self) -> tuple[list[tuple], list[tuple]]:
        layer, none = self.layer, [None] * self.layer.peers
        came = self._out(layer.ranks.x, layer.ranks.weights)
        ffns = [layer.ffn(p, *c) for p, c in enumerate(came)]
        with emulated.emulated_cuda(capability=90):
            results = [raw._experts.default(*ffn, True, None) for ffn in ffns]
        home = self._home([y for y, _ in results], none)
        kept = [(f, h, (t.rows, None)) for f, (_, h), t in zip(ffns, results, home)]
        dys = [c.rows for c in self._out(layer.douts, none)]
        with emulated.emulated_cuda(capability=90):
            back = [
                raw._experts_dact.default(*ffn, dy, h, True, True)
                for (ffn, h, _), dy in zip(kept, dys)
            ]
            dxs = [
                raw._grouped_gemm.default(dh, ffn.w1, ffn.offsets, True, False)
                for (dh, *_), ffn in zip(back, ffns)
            ]
        home = self._home(dxs, [dw for *_, dw in back])
        found = [(dy, dh, wa, *t) for dy, (dh, wa, _), t in zip(dys, back, home)]
        return kept, found


def same(mine, theirs) -> None:
    """Bit for bit; rows behind the last that came are zero."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs):
        if b is None:
            assert a is None or not a.numel()
            continue
        assert torch.equal(a[: len(b)], b) and not a[len(b) :].any()


def held(layer: Layer, kept: list[tuple], found: list[tuple]) -> None:
    cpu_kept, cpu_found = Cpu(layer).run()
    for p in range(layer.peers):
        (ffn, h, home), (cpu_ffn, cpu_h, cpu_home) = kept[p], cpu_kept[p]
        same([ffn.x, ffn.weights, h, *home], [cpu_ffn.x, cpu_ffn.weights, cpu_h, *cpu_home])
        same(found[p], cpu_found[p])


def rows_of(layer: Layer, more: int = 0) -> list[int]:
    return [len(rows) + more for rows, _, _ in layer.ranks.expected()]


def taken(launches: list[str]) -> set[str]:
    """The epilogues of the products over an exchange that ran."""
    kinds = ("StoreUp", "StoreDAct", "PushRows")
    return {k for k in kinds for name in launches if "peer_product" in name and k in name}


@pytest.mark.parametrize("peers, name, dtype", CASES)
def test_products_have_the_bits_of_the_exchange_on_a_cpu(peers, name, dtype):
    layer = Layer(all_ids(name, peers, 1 if peers == 8 else 2), 1 if peers == 8 else 2, dtype)
    how = MODES[((*ROUTINGS, "uneven").index(name) + peers) % len(MODES)]
    kept, found, launches = layer.run(rows_of(layer, 3 * (peers == 2)), **how)
    held(layer, kept, found)
    wanted = {"StoreUp", "StoreDAct", "PushRows"} if dtype is BF16 else set()
    if name not in ("nothing", "no_tokens"):
        assert taken(launches) == wanted


# What the text of the products' PTX is turned into: what is found, and the kernel's epilogue.
PLANTED = {
    "wait_of_the_device": ("ld.acquire.sys", "ld.acquire.gpu", ptx.GlobalRace),
    "wait_without_acquiring": ("ld.acquire.sys", "ld.relaxed.sys", ptx.GlobalRace),
    "relaxed_add": ("red.release.sys", "red.relaxed.sys", ptx.GlobalRace),
    "add_of_the_device": ("red.release.sys", "red.release.gpu", ptx.GlobalRace),
    "no_proxy_fence": ("fence.proxy.async.global;", "", ptx.ProxyFenceMissing),
    "claims_stay": ("st.relaxed.gpu.global.u32", "// st.relaxed", ptx.Deadlock),
}


def small_layer(one_by_one: bool = False) -> Layer:
    ids = all_ids("ordinary", 2, 2)
    if one_by_one:
        ids = [torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)] * 2
    return Layer(ids, 2, BF16)


def find(error: type[Exception], change=None) -> None:
    """On at least 3 of 4 schedules a forward, twice over one slot, and a backward fail so."""
    stream = int(change is as_if_freed)  # else rows that come say that results were taken
    found = 0
    for how in MODES:
        layer = small_layer(change is as_if_a_row_had_come)
        rows = rows_of(layer)
        if change is not None:
            change(layer)
        with layer.ranks.devices(**how) as devices, blocks(1):
            layer.ranks.gather(devices)
            try:
                devices.run()
                layer.record_forward(devices, rows, stream)
                kept = layer.record_forward(devices, rows, stream)
                layer.record_backward(devices, kept, stream)
                devices.run()
            except error:
                found += 1
        if found == 3:
            return
    raise AssertionError(f"found on {found} of {len(MODES)} schedules")


def replaced(monkeypatch, stem: str, module: ptx.Module) -> None:
    own = emulated.module
    monkeypatch.setattr(emulated, "module", lambda name: module if name == stem else own(name))


@pytest.mark.parametrize("bug", PLANTED)
def test_bugs_in_the_products_are_found(bug, monkeypatch):
    before, after, error = PLANTED[bug]
    text = emulated.source("exchange_sm90")
    assert before in text
    replaced(monkeypatch, "exchange_sm90", ptx.Module(text.replace(before, after)))
    find(error)


FREED, EXPECTED = 404, 800  # bytes of such a slab: of the first slot, home; by expert


def as_if_freed(layer: Layer) -> None:
    """Owners are said to have read their results long before."""
    for memory in layer.ranks.memory:
        words = memory.view(torch.int32)
        first = FREED // 4
        words[first : first + layer.peers] = 9


def as_if_a_row_had_come(layer: Layer) -> None:
    for memory in layer.ranks.memory:
        memory.view(torch.int32)[EXPECTED // 4 :][:2] = -1


@pytest.mark.parametrize("change", [as_if_freed, as_if_a_row_had_come], ids=lambda c: c.__name__)
def test_counts_that_are_wrong_are_found(change):
    find(ptx.GlobalRace, change)


# Lines of the products' headers that are exchanged.
HEADERS = {
    "told_before_all_is_stored": (
        "peers.cuh",
        "wait(claims.stored(n), claims.phase(n));\n        Peers::tell",
        "Peers::tell",
    ),
    "waits_for_its_own_rows_alone": (
        "arriving.cuh",
        " || s.row_begin[come] < tile.row + kTileRows)",
        ")",
    ),
}


@pytest.mark.parametrize("bug", HEADERS)
def test_bugs_in_the_products_headers_are_found(bug, monkeypatch):
    file, right, wrong = HEADERS[bug]
    with tempfile.TemporaryDirectory() as folder:
        headers = Path(folder)
        planted.copy_headers(emulated.ROOT, headers)
        planted.plant(headers, f"sm90/{file}", (right, wrong))
        shutil.copy(emulated.ROOT / "csrc" / "cuda" / "exchange_sm90.cu", headers)
        text = emulated.compiled(headers / "exchange_sm90.cu")
    replaced(monkeypatch, "exchange_sm90", ptx.Module(text))
    find(ptx.GlobalRace)


@pytest.mark.parametrize("room, error", [(4, None), (3, ptx.Deadlock)])
def test_a_product_leaves_room_for_who_sends_its_rows(room, error):
    """On a card of 4 blocks, the product there first: 3 of its blocks wait for rows that a fourth
    sends."""
    layer = Layer([torch.arange(8).view(4, 2).int() % 4] * 2, 4, BF16)
    rows = rows_of(layer)
    with layer.ranks.devices(resident=room) as devices:
        layer.ranks.gather(devices)
        devices.run()
        for p in range(2):
            known, slabs = layer.ranks.known[p], layer.ranks.slabs[p]
            with devices.on(p):
                ffn = layer.ffn(p, layer.ranks.x[p], None, known.held)
                over.up(ffn, known, slabs, 0, rows[p], True)
            with devices.on(p, stream=1):
                layer.ranks.put(p, layer.ranks.x[p], layer.ranks.weights[p])
        if error is None:
            devices.run()
        else:
            with pytest.raises(error):
                devices.run()


def test_a_product_stamps_what_it_waits_for():
    """Its one block waits for a late peer's rows; who takes them behind it waits no more."""
    layer, delay = small_layer(), 50_000
    ranks, rows = layer.ranks, rows_of(layer)
    records = [aligned(8 * exchange_clock.record_words(2)) for _ in range(2)]
    addresses = tuple(r.data_ptr() for r in records)
    with ranks.devices() as devices, blocks(1):
        for memory in records:
            devices.emulator.know(memory, lasts=True)
        ranks.gather(devices)
        devices.run()
        began = devices.time
        for p in range(2):
            ranks.slabs[p] = ranks.slabs[p]._replace(record=addresses)
            with devices.on(p, stream=1):
                if p == 1:
                    devices.delay(p, delay, stream=1)
                ranks.put(p, ranks.x[p], ranks.weights[p])
            with devices.on(p):
                ffn = layer.ffn(p, ranks.x[p], None, ranks.known[p].held)
                over.up(ffn, ranks.known[p], ranks.slabs[p], 0, rows[p], True)
        devices.run()
        for memory in records:
            del devices.emulator.lasting[memory.data_ptr()]
    for p, record in enumerate(records):
        need, waited, readers, taking, takers, _, came = record.view(torch.int64)[:7].tolist()
        assert (readers, came) == (1, rows[p]) and takers > 0
        assert 2**63 - 1 - need - began < 0.1 * delay
        assert waited == pytest.approx(delay, rel=0.1) and taking < 0.1 * delay * takers


@pytest.mark.parametrize("how", MODES[2:], ids=["by chance", "by chance, late"])
def test_what_was_recorded_has_its_bits_again_and_in_any_order(how):
    """Twice the same launches, rows on their way beside the product that reads them, under a bound
    that leaves rows out: a graph's replay, whose claims, counts and slots go on where they were."""
    layer = small_layer()
    rows = rows_of(layer)
    with layer.ranks.devices(**how) as devices, blocks(2):
        layer.ranks.gather(devices)
        devices.run()
        kept = layer.record_forward(devices, rows, stream=1)
        for _ in range(2):
            devices.run(again=True)
        kept_forward = [
            (ffn._replace(x=ffn.x.clone(), weights=ffn.weights.clone()), h.clone(), home)
            for ffn, h, home in kept
        ]
        devices.run()
        found = layer.record_backward(devices, kept, stream=1)
        devices.run(again=True)
        devices.run()
    held(layer, kept_forward, found)


def test_rows_beyond_the_bound_come_home_as_zeros():
    """And all others in the bits that they have without one; nobody waits for what was left out."""
    layer = Layer(all_ids("one_rank", 3, 2), 2, BF16)
    ranks, peers = layer.ranks, layer.peers
    bound = rows_of(layer)[1] - 7
    with ranks.devices(schedule=4, lazy=True) as devices, blocks(1):
        for p in range(peers):
            with devices.on(p):
                counts = exchange.gather_counts(ranks.counts[p], ranks.slabs[p], bound)
                ranks.known[p] = counts
        devices.run()
        kept = layer.record_forward(devices, [bound] * peers, apart=True)
        devices.run()
        found = layer.record_backward(devices, kept)
        devices.run()
    cpu_kept, cpu_found = Cpu(layer).run()
    for p in range(peers):
        runs = ranks.known[p].out.tolist()
        places = [
            place + i
            for (begin, place), (end, _) in zip(runs, runs[1:])
            for i in range(end - begin)
        ]
        there = torch.tensor(places) < bound
        pairs = (kept[p][2][0], cpu_kept[p][2][0]), *zip(found[p][3:], cpu_found[p][3:])
        for mine, theirs in pairs:
            mine = mine[: len(there)]
            assert torch.equal(mine[there], theirs[there]) and not mine[~there].any()
    assert sum(int(c.sum()) for c in ranks.counts) > bound
