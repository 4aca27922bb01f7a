"""Makes the folder that bench/gpu_suite.sh needs on a machine without a network and without time to
compile: at most 64 MiB.

python bench/pack_gpu_suite.py gpu_pack [--built] [--wheels | --peers | --sonic] [--with ...]

--built packs what is built here: the library, its watchdog and trace builds, the host module for
--host-python, the probes' PTX and machine code, the products' cubins. --wheels adds what the tests
need beside torch, --peers also Liger and DeepGEMM. --sonic packs SonicMoE and what it needs, as one
archive that leaves room for little else: a call of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moekernels import jsonio  # noqa: E402

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
)
CUTLASS = ("nvidia-cutlass==4.2.0.0",)  # the headers
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
# Of xz: what is built here is little; of SonicMoE 190 MB, 9 takes a quarter of an hour.
BUILT_PRESET, WHEELS_PRESET = 6, 3
LIBRARIES = ("_C.so", "_C_watch.so", "_C_trace.so")
KERNELS = {"probes": "bench/ladder/probes.cu", "calibrate": "bench/calibrate.cu"}


def fail(text: str) -> None:
    print(f"pack_gpu_suite: {text}", file=sys.stderr)
    sys.exit(2)


def run(*command: str | Path) -> str:
    """A command's output; a failure ends the packing."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=tools())
    if done.returncode != 0:
        fail(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def tools() -> dict[str, str]:
    """The environment with the CUDA wheels' programs on PATH."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    extra = [str(wheels)] if wheels.exists() else []
    for entry in sys.path:
        programs = Path(entry) / "nvidia" / "cu13" / "bin"
        extra += [str(programs)] if programs.exists() else []
    return {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), *extra])}


# ---- wheels
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


@contextlib.contextmanager
def packed(target: Path, preset: int) -> Iterator[tarfile.TarFile]:
    """A tar.xz to add to. Nearly all of it is machine code, for which the filter of its branches is
    worth more than a higher preset, which takes many times as long."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset}]
    with (
        lzma.open(target, "wb", filters=filters) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        yield tar


def archive(wheels: tuple[str, ...], target: Path, python: str) -> None:
    """The wheels' contents in one tar.xz, a quarter smaller than the wheels."""
    with tempfile.TemporaryDirectory() as folder:
        download(wheels, Path(folder), python)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(Path(folder) / "site")
        with packed(target, WHEELS_PRESET) as tar:
            tar.add(Path(folder) / "site", arcname=".")


# ---- what is built here
def host_module(python: str, folder: Path) -> Path:
    """moekernels._host compiled for another Python: it is tied to one, the library is not."""
    facts = "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'))"
    include, suffix = run(python, "-c", facts).split()
    import pybind11

    from moekernels import _host

    defines = {
        "MOEKERNELS_COMPILER": f'"{_host.build["compiler"]}"',
        "MOEKERNELS_TORCH_VERSION": f'"{_host.build["torch"]}"',
        "MOEKERNELS_CUDA_ARCHS": f'"{_host.build["cuda_archs"]}"',
    }
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    flags += ["-DMOEKERNELS_SM90"] if _host.build["wgmma"] else []
    target = folder / f"_host{suffix}"
    run(
        os.environ.get("CXX", "g++"),
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", *flags),
        *(f"-I{include}", f"-I{pybind11.get_include()}", f"-I{ROOT / 'csrc' / 'include'}"),
        *sorted((ROOT / "csrc" / "host").glob("*.cpp")),
        *("-o", target),
    )
    return target


def probe_kernels(folder: Path) -> None:
    """PTX for the driver to compile, and the machine code that nvcc makes of it."""
    for name, source in KERNELS.items():
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        common = ["nvcc", "-std=c++17", "-O3", *include, ROOT / source]
        ptx, cubin = folder / f"{name}.ptx", folder / f"{name}.cubin"
        run(*common, "-ptx", "-gencode=arch=compute_90a,code=compute_90a", "-o", ptx)
        run(*common, "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-o", cubin)


def product_cubins(library: Path, folder: Path) -> int:
    """The cubins of the library that hold Hopper products, and products.json: what they use."""
    if shutil.which("cuobjdump", path=tools()["PATH"]) is None:
        fail("cuobjdump is not on PATH: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    named: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        command = ["cuobjdump", "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=scratch, env=tools(), check=True, stdout=subprocess.DEVNULL)
        for cubin in sorted(Path(scratch).glob("*sm_90a*.cubin")):
            kernels, name = {}, None
            for line in run("cuobjdump", "-res-usage", cubin).splitlines():
                if match := re.match(r"\s*Function (\w+):", line):
                    name = match[1]
                elif name:
                    used = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
                    if re.search(r"cuda4sm90\d+(\w+_)?product", name):
                        kernels[name] = {"registers": used["REG"], "local": used["LOCAL"]}
                    name = None
            if kernels:
                target = folder / f"products{len(named)}.cubin"
                shutil.copy(cubin, target)
                named[target.name] = kernels
    if not named:
        fail(f"{library} holds no products for sm_90a; build with MOEKERNELS_CUDA_ARCHS=90a-real")
    (folder / "products.json").write_text(jsonio.dumps(named))
    return sum(map(len, named.values()))


def built(folder: Path, python: str) -> None:
    package = ROOT / "moekernels"
    missing = [name for name in LIBRARIES if not (package / name).exists()]
    if missing:
        fail(
            f"{', '.join(missing)} not built: MOEKERNELS_CUDA_ARCHS=90a-real MOEKERNELS_WATCHDOG=1 "
            "MOEKERNELS_TRACE=1 make build"
        )
    probe_kernels(folder)
    count = product_cubins(package / "_C.so", folder)
    with tempfile.TemporaryDirectory() as scratch:
        host = host_module(python, Path(scratch))
        with packed(folder / "built.tar.xz", BUILT_PRESET) as tar:
            for path in [*(package / name for name in LIBRARIES), host]:
                tar.add(path, arcname=f"moekernels/{path.name}")
        print(f"{', '.join(LIBRARIES)}, {host.name}, {count} products")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--built", action="store_true", help="the libraries and kernels built here")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--wheels", action="store_true", help="what building and testing need")
    what.add_argument("--peers", action="store_true", help="--wheels, and Liger and DeepGEMM")
    what.add_argument("--sonic", action="store_true", help="SonicMoE, and what the build needs")
    parser.add_argument("--with", dest="extra", nargs="*", default=[], help="more, NAME==VERSION")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument(
        "--host-python", default="python3.12", help="an interpreter of that version"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if stale := sorted(p.name for p in args.folder.iterdir()):
        fail(f"{args.folder} holds {stale[0]}; give an empty one")
    if args.built:
        sys.path.insert(0, str(ROOT))
        built(args.folder, args.host_python)
    wheels = BUILD if args.sonic else ()
    if args.wheels or args.peers:
        wheels = BUILD + TEST + CUTLASS + (PEERS if args.peers else ())
    if wheels := (*wheels, *args.extra):
        download(wheels, args.folder, args.python)
    if args.sonic:
        archive(SONIC, args.folder / "sonic.tar.xz", args.python)
    total = sum(p.stat().st_size for p in args.folder.iterdir())
    print(f"{len(list(args.folder.iterdir()))} files, {total / 2**20:.1f} MiB in {args.folder}")
    if total > LIMIT:
        fail(f"more than {LIMIT >> 20} MiB; leave something out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
