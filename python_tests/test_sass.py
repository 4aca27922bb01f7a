"""The machine code of the Hopper kernels, read from the built library: no spills, tensor cores and
TMA in use, products that are not forced to wait for one another."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "moekernels" / "_C.so"
# Where the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put their programs.
WHEELS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), str(WHEELS)])
KERNELS = ("StoreRows", "StoreGradient", "StoreUp", "StoreDAct")


def cuobjdump(*args: str) -> str:
    program = shutil.which("cuobjdump", path=SEARCH)
    env = {**os.environ, "PATH": SEARCH}  # without nvdisasm on PATH it prints nothing
    done = subprocess.run([program, *args, str(LIBRARY)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def resources() -> dict[str, dict[str, int]]:
    """What every kernel of sm_90a uses: name -> {"REG": 168, "STACK": 0, ...}."""
    found, name = {}, None
    for line in cuobjdump("-res-usage", "-arch", "sm_90a").splitlines():
        if match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif name:
            found[name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            name = None
    return found


def why_not() -> str | None:
    for program in ("cuobjdump", "nvdisasm"):
        if shutil.which(program, path=SEARCH) is None:
            return f"{program} is not on PATH: pip install nvidia-cuda-{program}"
    if not LIBRARY.exists():
        return f"{LIBRARY} is not built"
    if not any("cuda4sm90" in name for name in resources()):
        return f"{LIBRARY.name} holds no kernels for sm_90a"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def products(kind: str) -> list[str]:
    return [n for n in resources() if "cuda4sm907product" in n and re.search(rf"\d+{kind}I", n)]


def test_no_kernel_of_the_products_spills():
    for kind in KERNELS:
        assert products(kind)
        for name in products(kind):
            assert resources()[name]["STACK"] == 0, name
            assert resources()[name]["LOCAL"] == 0, name


@pytest.mark.parametrize("kind", KERNELS)
def test_tensor_cores_and_bulk_copies(kind):
    """One kernel of each kind and orientation: its wgmmas go out in groups of four, of which only
    the last is waited for; where ptxas has to serialise them, every one carries a barrier."""
    for name in (n for n in products(kind) if "bfloat16" in n):
        code = cuobjdump("-sass", "-fun", name, "-arch", "sm_90a")
        wgmmas = re.findall(r"HGMMA\.64x(?:128|256)x16\.F32\.BF16 [^;]*;", code)
        assert wgmmas and len(wgmmas) % 4 == 0
        assert sum("gsb0" in w for w in wgmmas) == len(wgmmas) // 4
        assert re.search(r"UTMALDG\.[23]D", code)
        assert "USETMAXREG" in code and "SYNCS.PHASECHK" in code
        assert not re.search(r"\b(LDL|STL)\b", code)


def test_epilogues_store_whole_vectors():
    """What leaves for global memory is 16 bytes a lane, but for the fp32 gradient (a sector for
    every four lanes) and the dots of 64 columns (one number a row)."""
    limits = {"StoreRows": {"128"}, "StoreUp": {"128"}, "StoreDAct": {"128", "32"}}
    for kind, allowed in limits.items():
        name = next(n for n in products(kind) if "bfloat16" in n)
        code = cuobjdump("-sass", "-fun", name, "-arch", "sm_90a")
        stores = re.findall(r"\bSTG[.\w]* ", code)
        assert stores and {(re.findall(r"\.(\d+) ", s) or ["32"])[0] for s in stores} <= allowed
