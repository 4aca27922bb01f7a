"""What this build holds and what this machine has, as `moekernels info` prints it."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from moekernels import __version__

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
)


def info() -> str:
    """Facts, one a line: `name    value`."""
    rows = [("moekernels", f"{__version__}, {Path(__file__).resolve().parents[1]}")]
    rows += _build()
    rows += [
        (
            "torch",
            f"{torch.__version__}"
            + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build"),
        ),
        ("python", f"{platform.python_version()}, {sys.executable}"),
    ]
    for package in ("transformers", "tokenizers", "pytest-benchmark"):
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows += _machine()
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _build() -> list[tuple[str, str]]:
    try:
        from moekernels.ops._library import LIBRARY, raw
        from moekernels.train.launch import has_cuda_kernels
    except ImportError as error:
        return [("kernels", f"not built: {error}")]
    backends = "cpu, cuda" if has_cuda_kernels() else "cpu"
    rows = [
        ("backends", backends),
        ("library", f"{LIBRARY.name}, {LIBRARY.stat().st_size / 1e6:.1f} MB"),
    ]
    for name, op in (("cpu kernels", "_cpu_isa"), ("cuda archs", "_cuda_archs")):
        if hasattr(raw, op):
            rows.append((name, str(getattr(raw, op)()) or "none"))
    if backends != "cpu":
        from moekernels import _host

        kernels = "mma.sync, fma and tf32 for fp32"
        if _host.build["wgmma"]:
            kernels += ", wgmma with TMA (sm_90a)"
        rows.append(("cuda gemms", kernels))
    return rows


def _machine() -> list[tuple[str, str]]:
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip().lower() in ("flags", "features"):
                flags = set(value.split())
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        (
            "cpu",
            f"{model}, {cores} cores, {' '.join(f for f in CPU_FLAGS if f in flags)}".rstrip(", "),
        )
    ]
    if hasattr(os, "sysconf"):
        rows.append(
            (
                "memory",
                f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
            )
        )
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        rows.append(
            (
                f"gpu {i}",
                f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB",
            )
        )
    if torch.cuda.device_count() == 0:
        rows.append(("gpu", "none"))
    return rows
