"""Bugs planted into copies of the wgmma product: name -> the lines that are exchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

PRODUCT, ADD = "sm90/product.cuh", "sm90/add.cuh"
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
}
BUGS_OF_ADD = {
    "box_overwritten": (("part == 0 ? wait_bulk<0>() : wait_bulk_read<1>()", "wait_bulk<8>()"),),
    "last_box_overwritten": (("wait_bulk<0>() : ", "wait_bulk_read<1>() : "),),
    "no_add_fence": (("      fence_async_proxy();\n", ""),),
    "left_early": (("  wait_bulk_read<0>();  //", "  //"),),
}


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
    return folder


def copy_headers(root: Path, folder: Path) -> None:
    sources = shutil.ignore_patterns("*.cu")
    shutil.copytree(root / "csrc" / "cuda", folder, ignore=sources, dirs_exist_ok=True)
