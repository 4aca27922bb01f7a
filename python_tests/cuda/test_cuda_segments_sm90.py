"""Weight gradients of several microbatches added by one Hopper launch
(csrc/cuda/sm90/segments.cuh): the bits of as many launches, in any order of the warps, and planted
bugs."""

from __future__ import annotations

import contextlib

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops
from moekernels.ops import _deferred
from moekernels.ops._library import raw
from python_tests.support import emulated
from python_tests.support.hopper import back, here, hopper, products, set_products, where  # noqa: F401
from python_tests.support.products import offsets_of
from python_tests.support.spec import randn

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MODES = [(None, True), (0, False), (1, True)]


@pytest.fixture(autouse=True)
def defaults(where):  # noqa: F811
    yield
    set_products()


def microbatches(many, m: int, n: int, dtype, seen: bool):
    """(rows, drows, offsets, token_of, tokens) of each; `seen`: some rows have no token."""
    for i, counts in enumerate(many):
        rows = sum(counts)
        a, b = randn(dtype, rows, m, seed=2 * i + 1), randn(dtype, rows, n, seed=2 * i + 2)
        token_of = (torch.arange(rows, dtype=torch.int32) * 7 + i) % 5 - 1 if seen else None
        yield b, a, offsets_of(*counts), token_of, 3 if seen else 0


def totals(many, m: int, n: int, dtype=BF16, seen=False, grid=0, **how):
    """main_grad after a call for each microbatch, and after one for all; the products of the
    latter."""
    set_products(grid=grid)
    found = []
    of = list(microbatches(many, m, n, dtype, seen))
    for together in (False, True):
        total = here(randn(F32, len(many[0]), m, n, seed=99))
        with hopper(**how) as device:
            placed = [[here(t) if isinstance(t, torch.Tensor) else t for t in one] for one in of]
            if together:
                rows, drows, offsets, token_of, tokens = map(list, zip(*placed))
                token_of = token_of if seen else []
                raw._grouped_gemm_wgrads_(
                    total, rows, drows, offsets, False, token_of, tokens, False
                )
            else:
                for rows, drows, offsets, token_of, tokens in placed:
                    raw._grouped_gemm_wgrad_(
                        total, rows, drows, offsets, False, token_of, tokens, False
                    )
            launched = products(device)
        found.append(back(total))
    return *found, launched


MANY = {
    "two": ((0, 40, 129, 1), (70, 0, 5, 0)),
    "four": ((3, 0), (0, 64), (65, 1), (0, 0)),  # experts and microbatches without rows
    "one": ((9, 60),),
}


@pytest.mark.parametrize("many", MANY.values(), ids=list(MANY))
@pytest.mark.parametrize("seen", [False, True], ids=["rows", "tokens"])
def test_the_bits_of_as_many_launches(many, seen):
    apart, together, launched = totals(many, 136, 264, seen=seen)
    assert launched == ["AddGradient"] and torch.equal(apart, together)


def test_more_than_a_launch_takes():
    many = tuple((i, 9 - i) for i in range(6))
    apart, together, launched = totals(many, 24, 40, F16)
    assert launched == ["AddGradient"] * 2 and torch.equal(apart, together)


@pytest.mark.parametrize("schedule, lazy", MODES)
def test_any_order_and_many_tiles_a_block(schedule, lazy):
    many = ((70, 1), (0, 130))
    apart, together, _ = totals(many, 24, 264, grid=1, schedule=schedule, lazy=lazy)
    assert torch.equal(apart, together)


def test_microbatches_without_rows():
    """Before, between and behind the others: they have no tensor maps."""
    apart, together, launched = totals(((0, 0), (9, 60), (0, 0), (2, 0)), 24, 40)
    assert launched == ["AddGradient"] and torch.equal(apart, together)
    apart, together, launched = totals(((0, 0), (0, 0)), 24, 40)
    assert not launched and torch.equal(apart, together)


ALONE = {"threads_add": {"bulk_sums": False}, "asked_for": {"join": False}}


@pytest.mark.parametrize("settings", ALONE.values(), ids=list(ALONE))
def test_one_launch_each(settings):
    of = list(microbatches(MANY["two"], 136, 264, BF16, False))
    rows, drows, offsets, _, tokens = (list(side) for side in zip(*of))
    set_products(**settings)
    with hopper() as device:
        total = here(torch.zeros(4, 136, 264))
        placed = [[here(t) for t in side] for side in (rows, drows, offsets)]
        raw._grouped_gemm_wgrads_(total, *placed, False, [], tokens, False)
        assert len(products(device)) == 2


def gathered(join, transposed: bool) -> tuple[torch.Tensor, list[str]]:
    """The gradient of two microbatches whose x is seen through token_of."""
    counts, tokens = ((0, 40, 9), (70, 0, 5)), 50
    set_products(join=join)
    with hopper() as device:
        x = [here(randn(BF16, tokens, 136, seed=i)) for i in range(2)]
        drows = [here(randn(BF16, sum(c), 264, seed=5 + i)) for i, c in enumerate(counts)]
        offsets = [here(offsets_of(*c)) for c in counts]
        token_of = [here((torch.arange(sum(c)) * 37 % 54 - 2).int()) for c in counts]
        total = here(torch.zeros(3, 136, 264) if transposed else torch.zeros(3, 264, 136))
        rest = (transposed, token_of, [tokens] * 2, True)
        raw._grouped_gemm_wgrads_(total, x, drows, offsets, *rest)
        return back(total), products(device)


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "transposed"])
def test_rows_of_tokens_are_gathered_or_permuted_and_joined(transposed):
    """Narrow weights' are gathered by a launch each, unless one is asked for."""
    apart, launched = gathered(None, transposed)
    assert launched == ["AddGradient"] * 2
    joined, launched = gathered(True, transposed)
    assert launched == ["AddGradient"] and torch.equal(apart, joined) and apart.any()


def test_gradients_put_off_and_joined():
    """Of two backwards, kept and computed together."""
    w, found = randn(BF16, 3, 40, 24, seed=7), []
    rows = [
        (randn(BF16, sum(c), 24, seed=i), offsets_of(*c))
        for i, c in enumerate(((5, 0, 9), (0, 7, 1)))
    ]
    for queue in (None, _deferred.Joined()):
        with hopper() as device:
            leaf = torch.nn.Parameter(here(w))
            leaf.main_grad = torch.zeros(leaf.shape, device=leaf.device)
            for x, offsets in rows:
                y = ops.grouped_gemm(here(x), leaf, here(offsets))
                with queue.taking() if queue is not None else contextlib.nullcontext():
                    y.float().square().sum().backward()
            if queue is not None:
                assert not leaf.main_grad.any() and queue.run() == 2
            launched = products(device).count("AddGradient")
        found.append((back(leaf.main_grad), launched))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].any()
    assert [launched for _, launched in found] == [2, 1]


def test_many_rows_an_expert_have_a_launch_each():
    """From 2048 on: what a card would not gain."""
    for rows, launches in ((2047, 1), (2048, 2)):
        token_of = torch.full((rows,), -1, dtype=torch.int32)  # counted, and not summed for long
        of = [here(torch.ones(rows, 8, dtype=BF16)) for _ in range(2)]
        set_products()
        with hopper() as device:
            offsets = [here(offsets_of(1))] * 2
            total = here(torch.zeros(1, 8, 8))
            raw._grouped_gemm_wgrads_(
                total, of, of, offsets, False, [here(token_of)] * 2, [1, 1], False
            )
            assert len(products(device)) == launches


def test_other_dtypes_and_alignments_are_added_one_by_one():
    for dtype, m, n in ((F32, 24, 40), (BF16, 23, 41)):
        apart, together, launched = totals(((3, 9), (70, 0)), m, n, dtype)
        assert not launched and torch.equal(apart, together)


# ---- planted
WRONG = (AssertionError, ptx.PtxError)


@pytest.mark.parametrize(
    "bug, errors",
    [
        ("sums_not_awaited", ptx.GlobalRace),
        ("rows_of_the_first", WRONG),
        ("another_s_rows_counted", AssertionError),
        ("a_segment_not_loaded", ptx.Deadlock),
        ("no_room_of_its_own", WRONG),
        ("left_before_the_sums", ptx.AsyncHazard),
    ],
)
def test_planted_bugs_are_caught(monkeypatch, where, bug, errors):  # noqa: F811
    if where == "gpu":
        pytest.skip("the emulator is what has to find it")
    emulated.products_as(monkeypatch, bug=bug)
    seen = bug == "another_s_rows_counted"
    for how in ({}, {"schedule": 0}, {"schedule": 1, "lazy": True}):
        with pytest.raises(errors):
            apart, together, _ = totals(((70, 0), (3, 66)), 16, 72, seen=seen, **how)
            assert torch.equal(apart, together)


def test_the_planted_kernel_is_right_without_a_bug(monkeypatch, where):  # noqa: F811
    if where == "gpu":
        pytest.skip("emulated alone")
    emulated.products_as(monkeypatch)
    apart, together, _ = totals(((70, 0), (3, 66)), 16, 72)
    assert torch.equal(apart, together)
