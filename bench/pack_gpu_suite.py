"""Makes the folder of wheels that bench/gpu_suite.sh needs on a machine without a network: at
most 64 MiB.

python bench/pack_gpu_suite.py gpu_pack [--with liger_kernel==0.8.5 ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# With what they need that a CUDA torch does not bring; the CUTLASS headers are a wheel too.
WHEELS = (
    "pybind11",
    "pytest",
    "iniconfig",
    "pluggy",
    "packaging",
    "pygments",
    "hypothesis",
    "sortedcontainers",
    "pytest-benchmark",
    "py-cpuinfo",
    "setuptools<82",
    "numpy",
    "nvidia-cutlass==4.2.0.0",
)
LIMIT = 64 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with", dest="extra", nargs="*", default=[], help="more, NAME==VERSION")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    abi = f"cp{args.python.replace('.', '')}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", args.python]
    command += ["--implementation", "cp", "--abi", abi, "--abi", "abi3", "--abi", "none"]
    for glibc in (17, 27, 28, 34):
        command += ["--platform", f"manylinux_2_{glibc}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--platform", "any"]
    command += ["--dest", str(args.folder), *WHEELS, *args.extra]
    if (rc := subprocess.run(command).returncode) != 0:
        return rc
    wheels = sorted(args.folder.glob("*.whl"))
    total = sum(w.stat().st_size for w in wheels)
    print(f"{len(wheels)} wheels, {total / 2**20:.1f} MiB in {args.folder}")
    if total > LIMIT:
        print(f"pack_gpu_suite: more than {LIMIT >> 20} MiB; leave something out", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
