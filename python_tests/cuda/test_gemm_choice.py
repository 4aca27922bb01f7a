"""Which CUDA kernel a product takes, and the walk over its tiles: plain functions, no GPU."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from moekernels import _host
from moekernels.cli.explain import explain

ROOT = Path(__file__).parents[2]
SPEC = {"m": 32768, "n": 8192, "k": 2048, "experts": 64, "capability": 80, "wgmma": False}


def choose(op="forward", dtype="bf16", **changes) -> dict:
    return _host.choose_gemm(op, dtype, **{**SPEC, **changes})


def test_many_rows_take_the_large_tile_and_few_the_small():
    assert choose()["tile"] == (128, 128, 32) and choose()["kernel"] == "mma"
    assert choose(m=64 * 65)["tile"] == (128, 128, 32)
    few = choose(m=64 * 64)
    assert few["tile"] == (64, 64, 32) and "few rows" in few["reason"]


def test_wgrad_counts_rows_along_k():
    wide = {"m": 8192, "n": 2048, "experts": 64}
    assert choose("wgrad", **wide, k=32768)["tile"] == (128, 128, 32)
    assert choose("wgrad", **wide, k=64)["tile"] == (64, 64, 32)


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_follows_torchs_precision(tf32):
    chosen = choose(dtype="fp32", tf32=tf32, capability=90, wgmma=True)
    assert chosen["kernel"] == "fma" and ("tf32" in chosen["reason"]) == tf32
    assert "16-bit" in chosen["obstacle"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"capability": 80, "wgmma": True}, "sm_90 alone"),
        ({"capability": 100, "wgmma": True}, "sm_90 alone"),
        ({"capability": 90, "wgmma": False}, "this build holds no wgmma"),
        ({"capability": 90, "wgmma": True, "alignment": 8}, "16 bytes"),
    ],
)
def test_what_wgmma_cannot_take_says_why(changes, reason):
    chosen = choose(**changes)
    assert chosen["kernel"] == "mma" and reason in chosen["obstacle"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("op", ["forward", "up", "down", "dgrad", "dact", "wgrad"])
def test_hopper_takes_wgmma(op, dtype):
    """In the tile that the shape names, whatever the balance: few rows an expert included."""
    for rows in (64, 32768):
        chosen = choose(op, dtype, capability=90, wgmma=True, m=rows)
        assert chosen["kernel"] == "wgmma" and chosen["obstacle"] is None
        tile = (128, 128, 64) if chosen["order"]["style"] == "pingpong" else (128, 256, 64)
        assert chosen["tile"] == tile and chosen["stages"] >= 3
        wanted = {"band", "grid", "promotion", "prefetch", "bulk_sums", "style", "pair", "gather"}
        wanted |= {"join"}
        assert set(chosen["order"]) == wanted


def test_every_op_of_the_table_is_asked_for_by_a_launch():
    """A row for an op that no launcher names would be measured, written and never read."""
    header = (ROOT / "csrc" / "include" / "moekernels" / "gemm_tuned.h").read_text()
    named = re.search(r"enum class GemmOp : int \{([^}]*)\}", header)[1]
    launchers = "".join(p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
    asked = re.findall(r"GemmOp::(\w+)", launchers)
    assert set(asked) == {name.strip() for name in named.split(",")}


def test_every_problem_has_one_choice_and_always_the_same():
    draw = random.Random(0)
    for _ in range(2000):
        op = draw.choice(["forward", "up", "down", "dgrad", "dact", "wgrad"])
        sizes = {n: draw.choice([0, 1, 63, 64, 65, 4096, 2**40]) for n in ("m", "n", "k")}
        problem = {
            **sizes,
            "experts": draw.choice([0, 1, 64]),
            "capability": draw.choice([80, 86, 89, 90, 100, 120]),
            "wgmma": draw.random() < 0.5,
            "alignment": draw.choice([1, 2, 4, 8, 16]),
            "tf32": draw.random() < 0.5,
        }
        dtype = draw.choice(["bf16", "fp16", "fp32"])
        chosen = _host.choose_gemm(op, dtype, **problem)
        assert chosen == _host.choose_gemm(op, dtype, **problem)
        assert chosen["reason"] and chosen["stages"] >= 2 and min(chosen["tile"]) > 0
        assert (chosen["kernel"] == "fma") == (dtype == "fp32")
        assert (chosen["kernel"] == "wgmma") == (chosen["obstacle"] is None)


def walk(offsets: list[int], rows: int, tile: int) -> list[tuple[int, int, int]]:
    bound = _host.row_tiles_bound(rows, len(offsets) - 1, tile)
    tiles = [_host.row_tile(offsets, rows, tile, i) for i in range(bound + 3)]
    found = [t for t in tiles if t[0] >= 0]
    assert tiles[: len(found)] == found, "tiles that do not exist come last"
    assert len(found) <= bound
    return found


def test_tiles_cover_every_row_once():
    draw = random.Random(1)
    for _ in range(300):
        rows, experts = draw.randrange(0, 400), draw.randrange(0, 9)
        cuts = sorted(draw.choice([0, rows, draw.randrange(rows + 1)]) for _ in range(experts))
        offsets = [0, *cuts]
        at = 0
        for group, begin, end in walk(offsets, rows, 64):
            assert begin == at and begin < end <= begin + 64
            low = offsets[group]
            high = offsets[group + 1] if group < experts else rows
            assert low <= begin and end <= high, "a tile is of one group"
            at = end
        assert at == rows


@pytest.mark.parametrize("offsets", [[5, 3, -7, 90], [0, 100, 50, 60], [-(2**62), 2**62, 2, 4]])
def test_hostile_offsets_stay_inside(offsets):
    for index in range(_host.row_tiles_bound(60, 3, 16)):
        group, begin, end = _host.row_tile(offsets, 60, 16, index)
        assert 0 <= begin < end <= 60 and end - begin <= 16 or group == -1


def test_tiles_past_32_bits():
    rows = 2**34 + 5
    assert _host.row_tiles_bound(rows, 2, 128) == 2**27 + 3
    offsets = [0, 2**33 + 1, rows - 2]
    assert _host.row_tile(offsets, rows, 128, 2**26) == (0, 2**33, 2**33 + 1)
    assert _host.row_tile(offsets, rows, 128, 2**26 + 1) == (1, 2**33 + 1, 2**33 + 129)
    assert _host.row_tile(offsets, rows, 128, 2**27 + 2)[0] == 2


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("ffn", [1, 31, 32, 33, 80])
def test_gated_tiles_cover_gate_and_up_once(ffn, interleaved):
    seen = []
    for index in range(-(-ffn // 32)):
        tile = _host.gated_tile(64, index, ffn, interleaved, 8)
        assert all(valid <= 8 for _, valid in tile)
        seen += [column for column, valid in tile if valid > 0]
        halves = [[c for c, v in tile[i : i + 32] if v > 0] for i in (0, 32)]
        if not interleaved:  # the up column of a gate column is ffn further and 32 columns on
            assert [c + ffn for c in halves[0]] == halves[1]
    assert sorted(seen) == list(range(2 * ffn))


def test_explain():
    out = explain("T=16384 H=2048 F=4096 E=64 K=2", "sm_80")
    lines = out.splitlines()
    assert lines[0].startswith("T=16384 H=2048 F=4096 E=64 K=2 bf16 on sm_80: R=32768 rows, 512 an")
    names = ("up (forward)", "down (forward)", "down dgrad + dact", "down wgrad", "up dgrad")
    for name, line in zip((*names, "up wgrad"), lines[1:]):
        assert line.startswith(name) and "mma   128x128x32" in line
        assert line.endswith("no wgmma: wgmma is of sm_90 alone")
    assert "32768 x 8192 x 2048" in lines[1] and "1.100 TFLOP" in lines[1]
    assert "64 of 8192 x 2048, k 32768 in all" in lines[6]
    assert "not measured" in lines[-1]
    narrow = explain("K=1,E=2,F=6,H=10,T=7,dtype=fp16", "sm_90a")
    assert "fp16 on sm_90" in narrow and "64x64x32" in narrow
    assert "fma" in explain("T=7 H=8 F=8 E=2 K=1 dtype=fp32", "sm_100")


@pytest.mark.skipif(not _host.build["wgmma"], reason="this build holds no wgmma kernels")
def test_explain_says_what_is_predicted_of_all_that_is_built():
    """Of a layer whose table names styles, and of one whose rows are gathered."""
    lines = explain("T=2048 H=512 F=512 E=2 K=1", "sm_90").splitlines()
    dact = next(i for i, line in enumerate(lines) if line.startswith("down dgrad"))
    assert "style pingpong, pair n" in lines[dact] and "direct" in lines[dact + 1]
    wgrad = next(line for line in lines if "pairs along M, bulk sums, bands of 4" in line)
    assert wgrad.split()[0] == "built:"
    (layer,) = (line for line in lines if "in the fastest built of each" in line)
    forward, backward = zip(*re.findall(r"([\d.]+) / ([\d.]+)", layer))
    assert float(forward[0]) <= float(forward[1]) and float(backward[0]) < float(backward[1])
