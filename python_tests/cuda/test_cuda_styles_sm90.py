"""The styles that the Hopper products have beside the direct one (hidden epilogues, ping-pong,
pairs of blocks): the direct style's bits in every shape and order of the warps, refusals in words,
and bugs planted in the very kernels. All but the bugs runs on a GPU of sm_90 as well."""

from __future__ import annotations

from contextlib import contextmanager, suppress

import pytest
import torch

import ptx_emulator as ptx
from moekernels import ops
from moekernels.ops._library import raw
from python_tests.support import emulated, planted
from python_tests.support.hopper import back, here, hopper, set_products, styles, where  # noqa: F401
from python_tests.support.products import ffn, offsets_of, product
from python_tests.support.spec import randn

BF16, F16 = torch.bfloat16, torch.float16
PAIRS = ("none", "n", "m")
# (schedule, lazy): as issued, as late as may be, in other orders
MODES = [(None, True), (0, False), (1, True)]


@contextmanager
def settings(**how):
    """Of the launches, inside."""
    set_products(**how)
    try:
        yield
    finally:
        set_products()


def both(call, style: str, how: dict | None = None, **setting):
    """A call's results in the direct style and in another, whose kernels have run."""
    with settings(style="direct", pair="none"), hopper():
        direct = call()
    with settings(style=style, **setting), hopper(**(how or {})) as device:
        found = call()
        assert styles(device) == {style}
    for i, (a, b) in enumerate(zip(found, direct, strict=True)):
        assert torch.equal(back(a), back(b)), f"result {i} has other bits"


def rows(dtype, width: int, out: int, *counts: int, **how):
    inputs = here(product(dtype, width, out, *counts, **how))
    return lambda: [ops.grouped_gemm(**inputs)]


# ---- hidden epilogues of the row products
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "transposed"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "counts, width, out",
    [
        ((130, 0, 1, 65), 88, 520),  # ragged, empty, one row; three column tiles, an odd number
        ((0, 0, 300), 200, 72),  # all to one; one column tile, whose neighbour does not exist
    ],
    ids=["ragged", "all_to_one"],
)
def test_hidden_rows(counts, width, out, pair, transposed):
    dtype = F16 if transposed else BF16
    both(rows(dtype, width, out, *counts, transposed=transposed, unused=140), "hidden", pair=pair)


@pytest.mark.parametrize("schedule, lazy", MODES)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_buffer_that_is_used_again(pair, schedule, lazy):
    """One block, or one pair of them, for all tiles, in any order of the warps."""
    call = rows(BF16, 72, 520, 70, 0, 200)
    grid = 1 if pair == "none" else 2
    both(call, "hidden", {"schedule": schedule, "lazy": lazy}, pair=pair, grid=grid)


def test_many_experts_take_the_room_of_stages():
    counts = [0] * 2500
    counts[3], counts[2400], counts[2499] = 2, 5, 1
    both(rows(BF16, 16, 24, *counts), "hidden")


def test_no_rows_of_any_expert():
    both(rows(BF16, 72, 40, 0, 0, unused=5), "hidden", pair="m")


@pytest.mark.parametrize("offsets", [[0, 50, 9, 80], [-5, 3, 2**40, 1], [7, 7, 7, 7]])
@pytest.mark.parametrize("pair", PAIRS)
def test_hostile_offsets_stay_within_the_arrays(pair, offsets):
    given = here(randn(BF16, 12, 8), randn(BF16, 3, 16, 8), torch.tensor(offsets))
    with settings(style="hidden", pair=pair), hopper() as device:
        with suppress(ptx.GlobalRace, ptx.UninitializedRead):  # of rows that two experts have
            raw._grouped_gemm(*given, False)
        assert styles(device) == {"hidden"}


# ---- the experts
def experts(dtype, hidden: int, width: int, *sizes: int, **options):
    """Arguments of the raw ops of the experts, dy and h."""
    given = ffn(dtype, hidden, width, *sizes, **options)
    r = given["token_of"].shape[0]
    gates = given["w1"].shape[2 if options.get("transposed") else 1]
    names = ("x", "weights", "w1", "w2", "offsets", "token_of", "b1", "b2")
    more = randn(dtype, r, hidden, seed=6), randn(dtype, r, gates, seed=7)
    flags = (options.get("interleaved", False), options.get("transposed", False), False)
    style = (options.get("activation", "swiglu"), 1.702, 0.8, *flags)
    # Between them, tensors come to where the ops run.
    placed = [None if given[n] is None else here(given[n]) for n in names]
    return (*placed, *style), here(*more), here(given["row_of"])


CASES = {
    "swiglu": ("none", {}),
    "ungated": ("n", {"activation": "relu2"}),
    "interleaved": ("m", {"interleaved": True, "activation": "swiglu_oai"}),
    "transposed": ("n", {"transposed": True, "b1": None}),
    "pair_m": ("m", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_hidden_up(case):
    pair, options = CASES[case]
    given, _, row_of = experts(BF16, 72, 264, 13, 3, 2, **options)
    both(lambda: list(raw._experts(*given, True, row_of)), "hidden", pair=pair)


@pytest.mark.parametrize("case", CASES)
def test_pingpong_dact(case):
    pair, options = CASES[case]
    given, (dy, h), _ = experts(BF16, 72, 264, 13, 3, 2, **options)

    def call():
        return list(raw._experts_dact(*given, dy, h.clone(), True, True))

    both(call, "pingpong", pair=pair)


@pytest.mark.parametrize("schedule, lazy", MODES)
@pytest.mark.parametrize("pair", PAIRS)
def test_consumers_in_turn(pair, schedule, lazy):
    """One block, or one pair of them: more tiles than two, of one half and of both, and fp16."""
    given, (dy, h), _ = experts(F16, 136, 264, 150, 3, 2)

    def call():
        return list(raw._experts_dact(*given, dy, h.clone(), True, True))

    grid = 1 if pair == "none" else 2
    both(call, "pingpong", {"schedule": schedule, "lazy": lazy}, pair=pair, grid=grid, stages=2)


# ---- weights' gradients added to sums
def sums(dtype, m: int, n: int, *counts: int, unused: bool = False):
    """Gradients [E, m, n] added to a total; of unused rows, which hold what is not finite."""
    r = sum(counts)
    a, b = randn(dtype, r, m, seed=2), randn(dtype, r, n)
    seen = (None, 0)
    if unused:
        token_of = (torch.arange(r, dtype=torch.int32) * 7) % 5 - 1  # -1 to 3, of 3 tokens
        a[~((token_of >= 0) & (token_of < 3))] = float("nan")
        seen = (here(token_of), 3)
    given = here(b, a, offsets_of(*counts))

    def call():
        total = here(randn(torch.float32, len(counts), m, n, seed=3))
        raw._grouped_gemm_wgrad_(total, *given, False, *seen, False)
        return [total]

    return call


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "m, n, counts",
    [
        (136, 264, (0, 40, 129, 1)),  # empty, ragged, one row; odd numbers of tiles along both
        (8, 40, (5, 0)),  # less than a box, and an odd number of them
    ],
    ids=["ragged", "tiny"],
)
def test_pingpong_sums(m, n, counts, pair):
    both(sums(BF16, m, n, *counts), "pingpong", pair=pair)


@pytest.mark.parametrize("schedule, lazy", MODES)
@pytest.mark.parametrize("pair", PAIRS)
def test_sums_in_turn(pair, schedule, lazy):
    """One block, or one pair of them: boxes of a tile wait for those of the last."""
    call = sums(F16, 200, 264, 70, 0, 130, unused=True)
    grid = 1 if pair == "none" else 2
    both(call, "pingpong", {"schedule": schedule, "lazy": lazy}, pair=pair, grid=grid, stages=2)


# ---- what there is not
def test_styles_that_a_product_has_not_are_refused():
    call = rows(BF16, 16, 24, 5)
    given, (dy, h), _ = experts(BF16, 16, 24, 5, 2, 1)
    grad = here(randn(BF16, 5, 16), randn(BF16, 5, 24), offsets_of(5))
    total = sums(BF16, 16, 24, 5)
    for setting, fn, words in (
        ({"style": "pingpong"}, call, "grouped_gemm_sm90: there is no style pingpong, only direct"),
        ({"pair": "n"}, call, "grouped_gemm_sm90: the direct style has no pairs of blocks"),
        (
            {"style": "hidden"},
            lambda: raw._experts_dact(*given, dy, h, True, True),
            "experts_dact_sm90: there is no style hidden, only direct and pingpong",
        ),
        (
            {"style": "hidden"},
            lambda: ops.grouped_gemm_wgrad(*grad),
            "grouped_wgrad_sm90: there is no style hidden, only direct",
        ),
        (
            {"style": "pingpong", "bulk_sums": False},
            total,
            "grouped_wgrad_sm90: there is no style pingpong, only direct",
        ),
        (
            {"style": "hidden"},
            total,
            "grouped_wgrad_sm90: there is no style hidden, only direct and pingpong",
        ),
        ({"style": "hidden", "stages": 4}, call, "room for 3 stages of a tile of 256 columns"),
    ):
        with settings(**setting), hopper(), pytest.raises(RuntimeError, match=words):
            fn()


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            {"style": "fast"},
            "style must be direct, hidden, pingpong or empty (the table's), got fast",
        ),
        ({"pair": "k"}, "pair must be none, n, m or empty (the table's), got k"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(RuntimeError) as error, settings(**setting):
        pass
    assert str(error.value) == f"sm90_settings: {message}"


# ---- planted
@pytest.fixture
def plant(monkeypatch, tmp_path, where):  # noqa: F811
    if where == "gpu":
        pytest.skip("the emulator is what has to find it")
    return lambda name: emulated.style_as(monkeypatch, name, tmp_path)


def hidden(pair: str = "none", **how):
    with hopper(**how):
        ops.grouped_gemm(**product(BF16, 320, 520, 100, 40))


def pingpong(**how):
    given, (dy, h), _ = experts(BF16, 136, 264, 150, 2, 2)
    with hopper(**how):
        raw._experts_dact(*given, dy, h, True, True)


def sums_in_turn(**how):
    with hopper(**how):
        sums(BF16, 136, 200, 70, 70)()


CALLS = {"hidden": hidden, "pingpong": pingpong, "sums": sums_in_turn}
RACE = (ptx.SharedRace, ptx.AsyncHazard, ptx.UninitializedRead)
SEEN = ({}, {"lazy": True}, *({"schedule": seed, "lazy": seed % 2 == 0} for seed in range(4)))


@pytest.mark.parametrize("name", planted.STYLES)
def test_planted_bugs_are_caught(plant, name):
    plant(name)
    bug = planted.STYLES[name]
    call = CALLS[bug.kernel or bug.style]
    found, blocks = 0, 1 if bug.pair == "none" else 2
    for how in SEEN:
        with settings(style=bug.style, pair=bug.pair, grid=blocks, stages=2):
            try:
                call(**how)
            except ptx.PtxError as error:
                expected = RACE if bug.error == "race" else getattr(ptx, bug.error)
                assert isinstance(error, expected) and bug.words in str(error)
                found += 1
    assert found, "no order of the warps shows it"
