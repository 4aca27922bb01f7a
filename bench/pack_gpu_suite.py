"""Makes the folder that bench/gpu_suite.sh needs on a machine without a network: at most 64 MiB.

python bench/pack_gpu_suite.py gpu_pack [--peers | --sonic] [--with NAME==VERSION ...]

--peers adds Liger and DeepGEMM to the wheels that the suite needs. --sonic packs SonicMoE and what
it needs, as one archive that leaves room for little else: a call of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# With what they need that a CUDA torch does not bring.
BUILD = ("pybind11", "setuptools<82")
TEST = (
    "pytest",
    "iniconfig",
    "pluggy",
    "packaging",
    "pygments",
    "hypothesis",
    "sortedcontainers",
    "pytest-benchmark",
    "py-cpuinfo",
    "numpy",
    "nvidia-cutlass==4.2.0.0",  # the headers
)
PEERS = ("liger-kernel==0.8.5", "sgl_deep_gemm==0.1.5", "apache-tvm-ffi==0.1.11")
SONIC = (
    "sonic-moe==0.1.2.post1",
    "quack-kernels==0.3.11",
    "nvidia-cutlass-dsl==4.4.2",
    "nvidia-cutlass-dsl-libs-base==4.4.2",
    "apache-tvm-ffi==0.1.11",
    "torch-c-dlpack-ext",
)
LIMIT = 64 << 20


def download(wheels: tuple[str, ...], folder: Path, python: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", python]
    abi = f"cp{python.replace('.', '')}"
    command += ["--implementation", "cp", "--abi", abi, "--abi", "abi3", "--abi", "none"]
    for glibc in (17, 24, 27, 28, 34):
        command += ["--platform", f"manylinux_2_{glibc}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--platform", "any"]
    if (rc := subprocess.run([*command, "--dest", str(folder), *wheels]).returncode) != 0:
        sys.exit(rc)


def archive(wheels: tuple[str, ...], target: Path, python: str) -> None:
    """The wheels' contents in one tar.xz, a third smaller than the wheels."""
    with tempfile.TemporaryDirectory() as folder:
        download(wheels, Path(folder), python)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(Path(folder) / "site")
        with tarfile.open(target, "w:xz", preset=9) as tar:
            tar.add(Path(folder) / "site", arcname=".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peers", action="store_true", help="Liger and DeepGEMM too")
    what.add_argument("--sonic", action="store_true", help="SonicMoE, and what the build needs")
    parser.add_argument("--with", dest="extra", nargs="*", default=[], help="more, NAME==VERSION")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if stale := [p.name for p in args.folder.iterdir() if p.suffix in (".whl", ".xz")]:
        print(f"pack_gpu_suite: {args.folder} holds {stale[0]}; give an empty one", file=sys.stderr)
        return 2
    wheels = BUILD if args.sonic else BUILD + TEST + (PEERS if args.peers else ())
    download((*wheels, *args.extra), args.folder, args.python)
    if args.sonic:
        archive(SONIC, args.folder / "sonic.tar.xz", args.python)
    files = [p for p in args.folder.iterdir() if p.suffix in (".whl", ".xz")]
    total = sum(p.stat().st_size for p in files)
    print(f"{len(files)} files, {total / 2**20:.1f} MiB in {args.folder}")
    if total > LIMIT:
        print(f"pack_gpu_suite: more than {LIMIT >> 20} MiB; leave something out", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
