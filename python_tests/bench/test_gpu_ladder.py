"""The ladder of the GPU suite (bench/ladder), rehearsed: each rung passes under the emulator and
fails by its own check under the bug that it is there for, with the emulator's race tracking off, as
hardware has none."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

import ptx_emulator as ptx
from python_tests.support import emulated, planted

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")

if emulated.why_not() is None:
    from ladder import climb, diagnose, exchange_rungs, kit, probe_rungs, product_rungs, whole_rungs
    from ladder.kit import RUNGS, Kit, RungFailed, RungSkipped

    climb.load_rungs(True)
NAMES = list(RUNGS) if emulated.why_not() is None else []


@pytest.fixture
def as_hardware(monkeypatch):
    """The emulator tracks no races: what a bug does to the numbers is what is left of it."""
    launch = ptx.Module.launch
    monkeypatch.setattr(ptx.Module, "launch", functools.partialmethod(launch, races=False))


@pytest.mark.parametrize("name", NAMES)
def test_every_rung_passes(name):
    assert isinstance(RUNGS[name].fn(Kit()), dict)


def test_probes_pass_in_any_order():
    for name in ("mbarrier", "tma_2d", "wgmma_k_major", "ring"):
        RUNGS[name].fn(Kit(how={"schedule": 1, "lazy": True}))


# ---- planted in what the probes are told
@pytest.mark.parametrize(
    "name, planted, words",
    [
        (
            "driver",
            {"facts": {"capability": [8, 0], "encoder": True, "driver": 13000}},
            "not sm_90",
        ),
        ("driver", {"facts": {"capability": [9, 0], "encoder": False, "driver": 13000}}, "Encode"),
        ("attributes", {"kernels": {"k": {"local": 8, "registers": 168}}}, "8 bytes of local"),
        ("mbarrier", {"arrivals": 4}, "Only 4|arrivals|out of order"),
        ("mbarrier", {"arrivals": 9}, "wait"),
        ("tma_2d", {"swizzle": 0}, "lies in no swizzle"),
        ("tma_2d", {"order": lambda at: at}, "no layout known"),
        ("tma_3d", {"order": lambda at: (at[2], at[1], 0)}, "no layout known"),
        ("tma_edges", {"bytes": 128 * 128 + 16}, "16 bytes that no copy brings"),
        ("wgmma_k_major", {"layout_b_k": (32, 8192, 2048)}, r"\(n 8, k 0\).* at \(n 16, k 0\)"),
        ("wgmma_k_major", {"layout_a_k": (64, 8192, 1024)}, "A is read in another order"),
        (
            "wgmma_mn_major",
            {"layout_b_mn": (2048, 1024, 8192)},
            r"\(n 0, k 8\) holds what lies at \(n 64, k 0\)",
        ),
        ("wgmma_mn_major", {"layout_a_mn": (1024, 8192, 1024)}, r"\(m 0, k 16\).*\(m 0, k 8\)"),
        ("wgmma_n128", {"layout_b_k": (32, 8192, 2048)}, r"\(n 8, k 0\)"),
        ("ring", {"waits": 0}, "another stage|expects|arriv"),
        ("ring", {"arrivals": 9}, "wait"),
    ],
)
def test_planted_in_a_probe(as_hardware, name, planted, words):
    with pytest.raises((RungFailed, ptx.PtxError), match=words):
        RUNGS[name].fn(Kit(planted=planted, how={"schedule": 0, "lazy": True}))


def test_fp16_read_as_bf16(as_hardware, monkeypatch):
    launch = Kit.launch
    monkeypatch.setattr(
        Kit, "launch", lambda self, name, *args: launch(self, name.replace("f16", "bf16"), *args)
    )
    with pytest.raises(RungFailed, match="A is read|B is read"):
        probe_rungs.wgmma_f16(Kit())


def test_more_registers_than_a_launch_has():
    text = kit.probes(None).text.replace(
        "setmaxnreg.inc.sync.aligned.u32 232", "setmaxnreg.inc.sync.aligned.u32 240"
    )
    with pytest.raises(RungFailed, match="wait for ever"):
        probe_rungs.setmaxnreg(Kit(planted={"text": text}))


# ---- planted in the products
INSTANCE = """
#include "sm90/gather.cuh"
#include "sm90/kernel.cuh"
#include "{header}"
namespace moekernels::cuda::sm90 {{
const void* planted() {{ return reinterpret_cast<const void*>({kernel}); }}
}}
"""
ROWS = ("sm90/rows.cuh", "StoreRows<__nv_bfloat16, 256>", "false, false", "grouped_gemm_sm90")
ALONG_N = ("sm90/rows.cuh", "StoreRows<__nv_bfloat16, 256>", "false, true", "grouped_gemm_sm90")
ROWS128 = ("sm90/rows.cuh", "StoreRows<__nv_bfloat16, 128>", "false, false", "grouped_gemm_sm90")
ADD = (
    "sm90/rows.cuh",
    "StoreGradient<__nv_bfloat16, 256, true>",
    "true, true",
    "grouped_gemm_sm90",
)
SUMS = ("sm90/add.cuh", "AddGradient<__nv_bfloat16>", "", "grouped_gemm_sm90")
GATHERED = (
    "sm90/gather.cuh",
    "StoreGradient<__nv_bfloat16, 256, false>",
    "true, true, true",
    "gathered_sm90",
)
SEGMENTS = ("sm90/segments.cuh", "AddGradient<__nv_bfloat16>", "", "segments_sm90")
UP_GATHERED = ("sm90/up.cuh", "StoreUp<__nv_bfloat16>", "false, false, false", "gathered_sm90")
FP8 = ("sm90/fp8.cuh", "__nv_bfloat16", "", "grouped_gemm_fp8_sm90", "fp8_")
SET = (
    "sm90/rows.cuh",
    "StoreGradient<__nv_bfloat16, 256, false>",
    "true, true",
    "grouped_gemm_sm90",
)
UP = ("sm90/up.cuh", "StoreUp<__nv_bfloat16>", "false, false", "experts_sm90")
DACT = ("sm90/dact.cuh", "StoreDAct<__nv_bfloat16>", "false, true", "experts_sm90")
HIDDEN_ROWS = (
    "sm90/hidden.cuh",
    "Hidden<StoreRows<__nv_bfloat16, 256>>",
    "false",
    "grouped_gemm_styles_sm90",
    "hidden_",
)
HIDDEN_UP = (
    "sm90/hidden.cuh",
    "Hidden<StoreUp<__nv_bfloat16>>",
    "false",
    "experts_styles_sm90",
    "hidden_",
)
PINGPONG = (
    "sm90/pingpong.cuh",
    "StoreDAct<__nv_bfloat16, 128>",
    "true",
    "experts_styles_sm90",
    "pingpong_",
)
SUMS_IN_TURN = (
    "sm90/sums_in_turn.cuh",
    "AddGradientInTurn<__nv_bfloat16>",
    "",
    "grouped_wgrad_styles_sm90",
    "pingpong_",
)


def plant(monkeypatch, folder: Path, product: tuple, file: str, right: str, wrong: str) -> None:
    """One product of the library compiled again with a line exchanged, in the library's place."""
    header, kind, flags, stem, *style = product
    planted.copy_headers(ROOT, folder)
    planted.plant(folder, file, (right, wrong))
    source = folder / "planted.cu"
    kernel = f"product<{kind}, {flags}>" if flags else f"product_into_sums<{kind}>"
    if stem == "grouped_gemm_fp8_sm90":
        kernel = f"product<{kind}>"
    if stem == "gathered_sm90":
        kernel = f"product_gathered<{kind}, {flags}>"
    if stem == "segments_sm90":
        kernel = f"product_of_segments<{kind}>"
    source.write_text(INSTANCE.format(header=header, kernel="".join([*style, kernel])))
    buggy = ptx.Module(
        ptx.compile_ptx(
            source,
            emulated.ARCH,
            defines=['MOEKERNELS_CUDA_ARCHS="PTX"'],
            include=[ROOT / "csrc" / "include", folder],
            lines=False,
        )
    )
    module = emulated.module

    class Both:
        """The planted product before the library's others."""

        def __init__(self, stem: str):
            self.kernels = {**module(stem).kernels, **buggy.kernels}

        def launch(self, kernel, *args, **how):
            home = buggy if kernel.name in buggy.kernels else module(stem)
            return home.launch(kernel, *args, **how)

    both = Both(stem)
    monkeypatch.setattr(emulated, "module", lambda s: both if s == stem else module(s))


@pytest.mark.parametrize(
    "name, product, file, right, wrong, words",
    [
        (
            "rows_one_tile",
            ROWS128,
            "sm90/rows.cuh",
            "staged_at(lane % 16, 2 * i + lane / 16)",
            "staged_at(lane % 16, 2 * i + 1 - lane / 16)",
            "128 columns, K 320 is wrong",
        ),
        (
            "rows_ragged",
            ROWS,
            "sm90/product.cuh",
            ".row_end = kOverRows ? INT32_MAX : static_cast<int32_t>(rows.end),",
            ".row_end = kOverRows ? INT32_MAX : static_cast<int32_t>(rows.end) - 1,",
            "ragged rows",
        ),
        (
            "rows_transposed",
            ALONG_N,
            "sm90/product.cuh",
            "kStepB = (kOverRows || kAlongN ? 16 * kLine : 32) >> 4;",
            "kStepB = (kOverRows ? 16 * kLine : 32) >> 4;",
            "w along N is wrong",
        ),
        (
            "rows_many_tiles",
            ROWS,
            "sm90/product.cuh",
            "  uint64_t rows_in = kOverRows",
            "  ring = {args.stages};\n  uint64_t rows_in = kOverRows",
            "many tiles a block is wrong|wait",
        ),
        (
            "rows_fp8",
            FP8,
            "sm90/fp8.cuh",
            "const float scale[2] = {first * w, second * w};",
            "const float scale[2] = {second * w, first * w};",
            r"row \d+, column \d+ is .*, not",
        ),
        (
            "wgrad",
            ADD,
            "sm90/rows.cuh",
            "= {sum[j][half].x + part[0],",
            "= {part[0],",
            r"fp32 \+= is wrong.*column % 8 in \{0, 2, 4, 6\}",
        ),
        (
            "wgrad_sums",
            SUMS,
            "sm90/add.cuh",
            "^ (odd << 2)",
            "",
            "sums of 136 x 264 has other bits",
        ),
        (
            "wgrad_gathered",
            GATHERED,
            "sm90/gather.cuh",
            "tokens[i % kRows]",
            "tokens[(i + 1) % kRows]",
            "dw has other bits",
        ),
        (
            "wgrad_segments",
            SEGMENTS,
            "sm90/segments.cuh",
            "segments.b + i, args,",
            "segments.b, args,",
            "sums of four microbatches has other bits",
        ),
        (
            "up_gathered",
            UP_GATHERED,
            "sm90/gather.cuh",
            "(chunk ^ (line % 8)) << 4",
            "chunk << 4",
            "y has other bits",
        ),
        (
            "wgrad_tail",
            SET,
            "sm90/product.cuh",
            "if (!(rows_in >> row & 1)) {",
            "if (!(rows_in >> row & 1) && row > 62) {",
            "dw is wrong",
        ),
        (
            "up",
            UP,
            "sm90/up.cuh",
            "const float* c = d + column_of(kPart, block) / 2 + half * 2;",
            "const float* c = d + column_of(1 - kPart, block) / 2 + half * 2;",
            "swiglu: y is wrong",
        ),
        (
            "dact",
            DACT,
            "sm90/dact.cuh",
            "const float* c = d + (kPart * 8 + block) * 4 + half * 2;",
            "const float* c = d + (kPart * 8 + 7 - block) * 4 + half * 2;",
            "swiglu: d.* is wrong",
        ),
        (
            "hidden_rows",
            HIDDEN_ROWS,
            "sm90/hidden.cuh",
            "stage_rows(strip + part * kStagingBytes",
            "stage_rows(strip + (1 - part) * kStagingBytes",
            "rows, torch.bfloat16, hidden, pair none: result 0 has other bits",
        ),
        (
            "hidden_up",
            HIDDEN_UP,
            "sm90/hidden.cuh",
            "stage<1>(d, strip + kStagingBytes, lane)",
            "stage<0>(d, strip + kStagingBytes, lane)",
            "up, swiglu, hidden, pair none: result . has other bits",
        ),
        (
            "pingpong_dact",
            PINGPONG,
            "sm90/pingpong.cuh",
            "a + half * (kBox >> 4) + k * kStepA",
            "a + (1 - half) * (kBox >> 4) + k * kStepA",
            "dact, pingpong, pair none: result 0 has other bits",
        ),
        (
            "pingpong_sums",
            SUMS_IN_TURN,
            "sm90/sums_in_turn.cuh",
            "first = row + part / kAcross * 64",
            "first = row + 64 - part / kAcross * 64",
            "sums, pingpong, pair none: result 0 has other bits",
        ),
        (
            "pairs",
            HIDDEN_ROWS,
            "sm90/pair.cuh",
            "a_map, k, tile.row + half, full",
            "a_map, k, tile.row, full",
            "pair n: result 0 has other bits",
        ),
        # The end of the walk is wrong too, so that the first number of experts shows it.
        ("limits", ROWS, "sm90/product.cuh", "    before += total;\n", "", r"E \d+ is wrong"),
    ],
    ids=lambda v: v if isinstance(v, str) and v in NAMES else "",
)
def test_planted_in_a_product(
    as_hardware, monkeypatch, tmp_path, name, product, file, right, wrong, words
):
    plant(monkeypatch, tmp_path, product, file, right, wrong)
    with pytest.raises((RungFailed, ptx.PtxError), match=words):
        RUNGS[name].fn(Kit())


# ---- planted in what stands above the products
def wavering(after: int, result: int):
    """The layer, one bit of a result other from the given call on."""
    calls = []

    def layer(**inputs):
        calls.append(1)
        out = whole_rungs._layer(**inputs)
        if len(calls) > after:
            out[result].detach().view(-1)[7] += 1
        return out

    return layer


def misplaced(ids, experts, **options):
    routing = product_rungs.ops.route(ids, experts, **options)
    return routing._replace(token_of=routing.token_of.flip(0))


def backwards(x, *others):
    exchange_rungs.kernels.put(x.flip(0), *others)


def swapped(record):
    return record[1:] + record[:1]


def negative(ffn, *others):
    return exchange_rungs.products.up(ffn._replace(w1=-ffn.w1), *others)


@pytest.mark.parametrize(
    "name, planted, words",
    [
        ("headline", lambda: {"layer": wavering(1, 2)}, "dw1 has other bits: 1 of"),
        ("headline", lambda: {"layer": wavering(0, 1)}, "dx is wrong at 1 of"),
        ("capture", lambda: {"capture": lambda kit, fn: (fn(), lambda: None)}, "replayed result 0"),
        ("simt", lambda: {"route": misplaced}, "route's token_of has other bits"),
        ("route_at_once", lambda: {"route": misplaced}, "token_of has other bits"),
        ("chained", lambda: {"layer": wavering(1, 1)}, "dx has other bits"),
        ("exchange", lambda: {"put": backwards}, "rows that came to rank 0 has other bits"),
        ("put", lambda: {"put": backwards}, "rows that came to rank 1 has other bits"),
        ("stamps", lambda: {"record": swapped}, "bytes came"),
        ("straight", lambda: {"up": negative}, "h of rank 0 has other bits"),
    ],
)
def test_planted_above_the_products(name, planted, words):
    with pytest.raises(RungFailed, match=words):
        RUNGS[name].fn(Kit(planted=planted()))


def test_rows_are_put_as_fast_as_a_copy_or_the_rung_fails():
    exchange_rungs.judge(405, 420, "NVIDIA H100 80GB HBM3")
    exchange_rungs.judge(300, 320, "NVIDIA A100-SXM4-40GB")
    exchange_rungs.judge(50, 54, "NVIDIA H100 PCIe")
    with pytest.raises(RungFailed, match="put 370 GB/s, a copy 420: it must reach 0.9 of that"):
        exchange_rungs.judge(370, 420, "NVIDIA A100-SXM4-40GB")
    with pytest.raises(RungFailed, match="put 395 GB/s over NVLink, an H100 must reach 400"):
        exchange_rungs.judge(395, 420, "NVIDIA H100 80GB HBM3")


def test_one_card_has_nobody_to_put_rows_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RungSkipped, match="there is one card here"):
        exchange_rungs.put(Kit(hardware=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    with pytest.raises(RungSkipped, match="do not reach one another's memory"):
        exchange_rungs.put(Kit(hardware=True))


def test_every_rung_has_its_bug():
    planted = {"wgmma_f16", "setmaxnreg"}  # by tests of their own
    for test in (
        test_planted_in_a_probe,
        test_planted_in_a_product,
        test_planted_above_the_products,
    ):
        (cases,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
        planted |= {case[0] for case in cases}
    assert planted == set(RUNGS)


def test_portable_products_do_not_pass_for_hopper_ones():
    with pytest.raises(RungFailed, match="launched were none"):
        kit.expect_products(Kit(), kit.products(["_ZN10moekernels4cuda3mmaE"]), {"StoreRows"})


# ---- the climb
@pytest.fixture
def rungs(monkeypatch):
    """A ladder of our own in the place of the real one."""
    monkeypatch.setattr(kit, "RUNGS", {})
    for module in (climb, kit):
        monkeypatch.setattr(module, "RUNGS", kit.RUNGS)
    monkeypatch.setattr(climb, "load_rungs", lambda products: None)

    def fine(kit):
        return {"answer": 42}

    def broken(kit):
        raise RuntimeError("CUDA error: misaligned address")

    def dies(kit):
        import os

        os._exit(9)

    def hangs(kit):
        import time

        time.sleep(60)

    def above(kit):
        return {}

    def beside(kit):
        return {}

    def lonely(kit):
        raise RungSkipped("there is one card here")

    def behind(kit):
        return {}

    for fn, needs in (
        (fine, ()),
        (broken, ("fine",)),
        (dies, ("fine",)),
        (hangs, ("fine",)),
        (above, ("fine", "broken")),
        (beside, ("fine",)),
        (lonely, ("fine",)),
        (behind, ("lonely",)),
    ):
        kit.rung(1, *needs, look=f"look at {fn.__name__}", limit=1.0)(fn)


def test_a_failure_stops_its_branch_alone_and_says_where_to_look(rungs, tmp_path, capsys):
    path = tmp_path / "ladder.jsonl"
    with path.open("w") as out:
        assert not climb.climb(["sass"], True, None, [], out, None)
    lines = {line["rung"]: line for line in map(json.loads, path.read_text().splitlines())}
    status = {name: line["status"] for name, line in lines.items()}
    assert status == {
        "fine": "pass",
        "broken": "fail",
        "dies": "fail",
        "hangs": "hang",
        "above": "stopped",
        "beside": "pass",
        "lonely": "skipped",
        "behind": "pass",
    }
    assert lines["lonely"]["why"] == "there is one card here" and "look" not in lines["lonely"]
    assert lines["fine"]["facts"] == {"answer": 42}
    assert lines["broken"]["legend"].startswith("716") and lines["broken"]["look"]
    assert "exit code 9" in lines["dies"]["error"]
    assert "bytes announced" in lines["hangs"]["legend"]
    assert "broken did not pass" in lines["above"]["error"]
    assert "look at hangs" in capsys.readouterr().out


def test_rungs_need_rungs_that_come_before():
    order = sorted(RUNGS.values(), key=lambda r: r.number)
    for i, rung in enumerate(order):
        assert set(rung.needs) <= {r.name for r in order[:i]}, rung.name
    assert {r.number for r in order} == set(range(1, order[-1].number + 1)), "a gap"


def test_what_is_wrong_is_said_where():
    ours, exact = torch.zeros(64, 32), torch.zeros(64, 32).double()
    exact[8::16, 5] = 1
    with pytest.raises(
        RungFailed, match=r"4 of 2048 elements, rows 8, 24, 40, 56; columns 5; row % 8"
    ):
        diagnose.close("y", ours, exact, torch.bfloat16)
    with pytest.raises(RungFailed, match="y is wrong"):
        diagnose.close("y", ours * float("nan"), exact * 0, torch.bfloat16)
