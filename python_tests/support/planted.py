"""Bugs planted into copies of the wgmma product: name -> the lines that are exchanged."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

PRODUCT, ADD, GATHER, SEGMENTS = (
    f"sm90/{name}.cuh" for name in ("product", "add", "gather", "segments")
)
BUGS = {
    "freed_early": (
        ("wait_products<1>();", "release(s, ring.stage, lane);\n    wait_products<1>();"),
        ("if (step > 0) release(s, previous, lane);", ""),
        ("if (work.steps > 0) release(s, previous, lane);", ""),
    ),
    "wrong_stride": (
        ("operand(stage + warpgroup * kBox, kBox)", "operand(stage + warpgroup * kBox, kBox, 512)"),
    ),
    "no_last_wait": (("wait_products<0>();", ""),),
    "wrong_bytes": (
        (
            "arrive_and_expect(full, kStageBytes<kColumns>)",
            "arrive_and_expect(full, kStageBytes<kColumns> + 16)",
        ),
    ),
    "no_tail_fence": (("fence_async_proxy();\n  sync_named", "sync_named"),),
    "no_gather_fence": (("if (kGathers) fence_async_proxy();", ""),),
}
BUGS_OF_ADD = {
    "box_overwritten": (("part == 0 ? wait_bulk<0>() : wait_bulk_read<1>()", "wait_bulk<8>()"),),
    "last_box_overwritten": (("wait_bulk<0>() : ", "wait_bulk_read<1>() : "),),
    "no_add_fence": (("      fence_async_proxy();\n", ""),),
    "left_early": (("  wait_bulk_read<0>();  //", "  //"),),
    "sums_not_awaited": (("part == 0 ? wait_bulk<0>() :", "part == 0 ? wait_bulk_read<0>() :"),),
}
BUGS_OF_SEGMENTS = {
    "rows_of_the_first": (
        ("const ProductShared rows = segment(s, args, i);", "const ProductShared rows = s;"),
    ),
    "another_s_rows_counted": (("segments.of[i], rows, work,", "segments.of[0], rows, work,"),),
    "a_segment_not_loaded": (
        (
            "i < segments.count; ++i) {\n          const TileWork work",
            "i < segments.count - 1; ++i) {\n          const TileWork work",
        ),
    ),
    "no_room_of_its_own": (("of.row_begin += i * (args.experts + 2);", ""),),
    "left_before_the_sums": (("  wait_bulk_read<0>();  //", "  //"),),
}
BUGS_OF_GATHER = {
    "one_arrival_short": (("kArrivals = 1 + kWarpgroup", "kArrivals = kWarpgroup"),),
    "stage_not_waited_for": (("          wait(s.empty + 8 * ring.stage, ring.phase ^ 1);\n", ""),),
    "arrived_early": (
        ("        arrive_when_copied(full);\n", ""),
        ("        int32_t column = ", "        arrive(full);\n        int32_t column = "),
    ),
}
FP8 = "sm90/fp8.cuh"
BUGS_OF_FP8 = {
    "scale_of_another_block": (("w = scales.w[step],", "w = scales.w[step > 0 ? step - 1 : 0],"),),
    "scale_of_other_columns": (("+ tile.column_tile) * of.blocks;", ") * of.blocks;"),),
    "scale_of_other_rows": (("lane / 4 + 8 * half;  //", "lane / 4;  //"),),
    "no_promotion": (
        (
            "multiply_e4m3(d, a + k * kStep, b + k * kStep, k > 0);",
            "multiply_e4m3(d, a + k * kStep, b + k * kStep, step + k > 0);",
        ),
    ),
    "not_waited_for": (("    wait_products<0>();\n", ""),),
    "given_back_early": (
        ("    release(s, ring.stage, lane);\n", ""),
        ("    commit_products();\n", "    commit_products();\n    release(s, ring.stage, lane);\n"),
    ),
}


@dataclass(frozen=True)
class StyleBug:
    """A bug of a style's kernel, and what the emulator says of it; "race": any kind of one."""

    file: str
    exchanged: tuple[tuple[str, str], ...]
    style: str = "hidden"
    pair: str = "none"
    error: str = "race"
    words: str = ""
    kernel: str = ""  # the style's name, where it has more than one: "sums"


HIDDEN, PINGPONG, PAIR, SUMS = (
    f"sm90/{name}.cuh" for name in ("hidden", "pingpong", "pair", "sums_in_turn")
)
STORED = (
    "      Epilogue::store(to, work.tile, s.staging + strip * kStripBytes, row, lane);\n"
    "      __syncwarp();\n"
    "      if (lane == 0) arrive(stored(s, strip));\n"
)
STYLES = {
    "no_wait_for_room": StyleBug(
        HIDDEN,
        (
            (
                "observer.wait({stored(s, strip), phase, Awaited::stored, strip, work.steps});",
                "",
            ),
        ),
    ),
    "no_wait_for_a_tile": StyleBug(
        HIDDEN,
        (
            (
                "observer.wait({packed(s, strip), phases >> strip & 1, Awaited::packed, "
                "strip, 0});",
                "",
            ),
        ),
    ),
    "wrong_parity": StyleBug(HIDDEN, (("phases >> strip & 1,", "phases >> strip & 1 ^ 1,"),)),
    "one_parity": StyleBug(HIDDEN, (("phases ^= 1u << strip;", ""),), error="Deadlock"),
    "room_given_early": StyleBug(
        HIDDEN, ((STORED, "".join([*STORED.splitlines(True)[2:], *STORED.splitlines(True)[:2]])),)
    ),
    "room_never_given": StyleBug(
        HIDDEN,
        (("if (lane == 0) arrive(stored(s, strip));", ""),),
        error="Deadlock",
        words="1 of 1 arrivals",
    ),
    "own_arrivals": StyleBug(
        PAIR,
        (
            (
                "arrive_at(s.empty + 8 * stage, lane);",
                "arrive_at(s.empty + 8 * stage, rank_in_cluster());",
            ),
        ),
        pair="n",
    ),
    "too_few_arrivals": StyleBug(
        PAIR,
        (("arrivals * s.blocks);", "arrivals);"),),
        pair="n",
        error="PtxError",
    ),
    "wrong_mask": StyleBug(
        PAIR,
        (
            (
                '"l"(map), "r"(barrier), "r"(x), "r"(y), "h"(uint16_t{3})',
                '"l"(map), "r"(barrier), "r"(x), "r"(y), "h"(uint16_t{1})',
            ),
        ),
        pair="n",
        error="Deadlock",
        words="bytes",
    ),
    "a_mask_of_three": StyleBug(
        PAIR,
        (
            (
                '"l"(map), "r"(barrier), "r"(x), "r"(y), "h"(uint16_t{3})',
                '"l"(map), "r"(barrier), "r"(x), "r"(y), "h"(uint16_t{7})',
            ),
        ),
        pair="n",
        error="ClusterError",
        words="a multicast to 0b111 in a cluster of 2",
    ),
    "one_half_twice": StyleBug(
        PAIR,
        (("load_both(stage + half * kLine,", "load_both(stage,"),),
        pair="n",
    ),
    "no_first_meeting": StyleBug(
        PAIR,
        (("if (s.blocks > 1) meet_cluster();  // the other's barriers are there", ""),),
        pair="n",
        error="ClusterError",
        words="nothing orders this after block",
    ),
    "no_last_meeting": StyleBug(
        PAIR,
        (
            (
                "end_block(const PairShared& s) {\n  if (s.blocks > 1) meet_cluster();",
                "end_block(const PairShared& s) {",
            ),
        ),
        pair="n",
        error="ClusterError",
        words="which has exited",
    ),
    "no_turn": StyleBug(
        PINGPONG,
        (
            (
                "observer.wait({turn(s, warpgroup), phase, Awaited::turn, warpgroup, work.steps});",
                "",
            ),
        ),
        "pingpong",
    ),
    "turn_kept": StyleBug(
        PINGPONG,
        (("  give_turn(s, warpgroup, lane);\n  wait_products<0>();", "  wait_products<0>();"),),
        "pingpong",
        error="Deadlock",
        words="4 of 4 arrivals",
    ),
    "box_overwritten": StyleBug(
        SUMS,
        (("wait_bulk_read<1>();  // the box", "wait_bulk<8>();  // the box"),),
        "pingpong",
        kernel="sums",
    ),
    "first_box_overwritten": StyleBug(
        SUMS,
        (("used == 0 ? wait_bulk<0>() : ", ""),),
        "pingpong",
        pair="m",
        kernel="sums",
    ),
    "no_fence_of_a_box": StyleBug(
        SUMS,
        (("      fence_async_proxy();\n      __syncwarp();", "      __syncwarp();"),),
        "pingpong",
        error="ProxyFenceMissing",
        kernel="sums",
    ),
    "no_fence_of_zeros": StyleBug(
        SUMS,
        (("  fence_async_proxy();\n  sync_named", "  sync_named"),),
        "pingpong",
        error="ProxyFenceMissing",
        kernel="sums",
    ),
    "zeros_not_waited_for": StyleBug(
        SUMS,
        (("  sync_named<kWarpgroup>(kAloneBarrier + warpgroup);\n", ""),),
        "pingpong",
        pair="n",
        kernel="sums",
    ),
    "sums_left_early": StyleBug(
        SUMS,
        (("    wait_bulk_read<0>();  //", "    //"),),
        "pingpong",
        kernel="sums",
    ),
    "sums_turn_kept": StyleBug(
        SUMS,
        (("  give_turn(s, warpgroup, lane);\n  wait_products<0>();", "  wait_products<0>();"),),
        "pingpong",
        pair="n",
        error="Deadlock",
        words="4 of 4 arrivals",
        kernel="sums",
    ),
    "others_stages_not_passed": StyleBug(
        PINGPONG, (("ring.pass(work.steps);", ""),), "pingpong", error="PtxError"
    ),
}
# SwiGLU alone, so that a planted kernel compiles in seconds.
ONE_ACTIVATION = (
    (
        "  with_activation(style.activation, [&](auto kind) {",
        "  const auto only = [&](auto kind) {",
    ),
    ("      if (style.interleaved) return f(kind, Constant<true>{});\n", ""),
    (
        "    f(kind, Constant<false>{});\n  });",
        "    f(kind, Constant<false>{});\n  };\n  only(ActivationConstant<Activation::swiglu>{});",
    ),
)


KERNEL = "sm90/kernel.cuh"
BEGIN, COUNT = (
    "  source.begin();\n",
    "  const TileGrid grid = source.template count<kOverRows>(s, args);\n",
)
WAIT = '  asm volatile("griddepcontrol.wait;" ::: "memory");\n'
CHAINED = "sm90/chained.cuh"
# Of a chain of products.
CHAINS = {
    "no_wait": (CHAINED, ((WAIT, ""),)),
    "one_thread_waits": (CHAINED, ((WAIT, f"  if (threadIdx.x == 0)\n{WAIT}"),)),
    "waits_behind_offsets": (KERNEL, ((BEGIN, ""), (COUNT, COUNT + BEGIN))),
    "producer_alone_waits": (
        CHAINED,
        ((WAIT, f"  if (threadIdx.x / 128 == 2)\n{WAIT}"),),
    ),
    "consumers_alone_wait": (CHAINED, ((WAIT, f"  if (threadIdx.x / 128 < 2)\n{WAIT}"),)),
}


def chain_headers_with(name: str, root: Path, folder: Path) -> Path:
    """A copy of csrc/cuda's headers whose chained launches have this bug."""
    copy_headers(root, folder)
    file, exchanged = CHAINS[name]
    plant(folder, file, *exchanged)
    return folder


# Of the launch that routes alone.
ROUTES = {
    "no_meeting": ("  if (gridDim.x > 1) meet_cluster();\n", ""),
    "counted_while_read": (
        "    __syncwarp();\n    if (e >= 0 && rank == 0)",
        "    if (e >= 0 && rank == 0)",
    ),
}


def route_with(name: str, root: Path, folder: Path) -> Path:
    """A copy of csrc/cuda/route_sm90.cu with this bug, its headers beside it."""
    copy_headers(root, folder)
    shutil.copy(root / "csrc" / "cuda" / "route_sm90.cu", folder)
    plant(folder, "route_sm90.cu", ROUTES[name])
    return folder / "route_sm90.cu"


def style_headers_with(name: str, root: Path, folder: Path) -> Path:
    """A copy of csrc/cuda's headers whose styles have this bug, and one activation."""
    copy_headers(root, folder)
    plant(folder, "sm90/style.cuh", *ONE_ACTIVATION)
    plant(folder, STYLES[name].file, *STYLES[name].exchanged)
    return folder


def plant(headers: Path, file: str, *exchanged: tuple[str, str]) -> None:
    """Exchanges text of one of the headers, each of it there once."""
    target = headers / file
    text = target.read_text()
    for right, wrong in exchanged:
        assert text.count(right) == 1, f"{file} holds {text.count(right)} of {right!r}"
        text = text.replace(right, wrong)
    target.write_text(text)


def headers_with(bug: str, root: Path, folder: Path) -> Path:
    """A copy of csrc/cuda's headers whose product has this bug; "none": as it is."""
    copy_headers(root, folder)
    plant(folder, PRODUCT, *BUGS.get(bug, ()))
    plant(folder, ADD, *BUGS_OF_ADD.get(bug, ()))
    plant(folder, GATHER, *BUGS_OF_GATHER.get(bug, ()))
    plant(folder, SEGMENTS, *BUGS_OF_SEGMENTS.get(bug, ()))
    return folder


def fp8_headers_with(bug: str, root: Path, folder: Path) -> Path:
    """A copy of csrc/cuda's headers whose product in FP8 has this bug."""
    copy_headers(root, folder)
    plant(folder, FP8, *BUGS_OF_FP8[bug])
    return folder


def copy_headers(root: Path, folder: Path) -> None:
    sources = shutil.ignore_patterns("*.cu")
    shutil.copytree(root / "csrc" / "cuda", folder, ignore=sources, dirs_exist_ok=True)
