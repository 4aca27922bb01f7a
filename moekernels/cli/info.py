"""What this build holds and what this machine has, as `moekernels info` prints it."""

from __future__ import annotations

import os
import platform
import re
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
    rows += _machine() + _nccl()
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _nccl() -> list[tuple[str, str]]:
    """What NCCL's groups are told, and what of it the environment says."""
    from moekernels.parallel import nccl

    rows = nccl.described()
    found = nccl.environment_of(os.environ)
    if found:
        rows.append(("nccl set", ", ".join(f"{name}={value}" for name, value in found.items())))
    return rows


def _build() -> list[tuple[str, str]]:
    try:
        from moekernels.ops._library import LIBRARY, raw
        from moekernels.parallel.launch import has_cuda_kernels
    except ImportError as error:
        return [("kernels", f"not built: {error}")]
    backends = "cpu, cuda" if has_cuda_kernels() else "cpu"
    rows = [
        ("backends", backends),
        ("library", f"{LIBRARY.name}, {LIBRARY.stat().st_size / 1e6:.1f} MB"),
    ]
    rows.append(("cpu kernels", raw._cpu_isa()))
    rows.append(("cuda archs", raw._cuda_archs() or "none: MOEKERNELS_CUDA=0, or no nvcc"))
    rows.append(("cuda ops", cuda_ops()))
    if backends != "cpu":
        from moekernels import _host

        kernels = "mma.sync, fma and tf32 for fp32"
        if _host.build["wgmma"]:
            kernels += ", wgmma with TMA (sm_90a)"
        if _host.build["cutlass"]:
            kernels += ", CUTLASS where MOEKERNELS_GEMM=cutlass"
        rows.append(("cuda gemms", kernels))
    return rows


def cuda_ops() -> str:
    """The ops that have CUDA kernels in this build, and those that run on the CPU alone."""
    import moekernels.ops  # noqa: F401  registers them

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("moekernels::")]
    names = sorted({n for n in names if has(n, "CPU")})
    with_cuda = [n.split("::_")[1] for n in names if has(n, "CUDA")]
    without = [n.split("::_")[1] for n in names if not has(n, "CUDA")]
    if not with_cuda:
        return "none"
    return ", ".join(with_cuda) + (f"; cpu only: {', '.join(without)}" if without else "")


def runs_on(archs: str, major: int, minor: int) -> bool:
    """Whether one of the archs ("sm_80, sm_90a") runs on a card of that capability: the same
    generation, no later than the card, and exactly its own where the arch ends in a letter."""
    for digits, letter in re.findall(r"sm_(\d+)([af]?)", archs):
        of = divmod(int(digits), 10)
        if of == (major, minor) or (not letter and of[0] == major and of[1] < minor):
            return True
    return False


def _gpus() -> list[tuple[str, str]]:
    try:
        from moekernels.ops._library import raw

        archs = raw._cuda_archs()
    except ImportError:
        archs = None  # said above
    rows = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        facts = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        if archs is not None and not runs_on(archs, card.major, card.minor):
            facts += (
                "; this build has no kernels for it: rebuild with MOEKERNELS_CUDA=1 "
                f"MOEKERNELS_CUDA_ARCHS={card.major}{card.minor}-real"
            )
        rows.append((f"gpu {i}", facts))
    why = "torch sees none" if torch.version.cuda else "this torch is a CPU build"
    return rows or [("gpu", f"none: {why}")]


def _machine() -> list[tuple[str, str]]:
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
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
    return rows + _gpus()
