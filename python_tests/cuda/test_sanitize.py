"""The plain SIMT kernels as g++ compiles them under its sanitizers (csrc/simt; `make sanitize`).

The contract of test_cuda_emulated.py runs once more, over the same launchers, with AddressSanitizer
and UndefinedBehaviorSanitizer and with ThreadSanitizer, to which every CUDA thread is a thread. So
that a clean run means something, bugs are planted into copies of the kernels: each must be caught.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # torch's own threads and arrays are none of its business
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def library(name: str) -> Path:
    return ROOT / "build" / "cmake" / f"_C_{name}.so"


def why_not() -> str:
    missing = [str(library(name)) for name in FLAGS if not library(name).exists()]
    return f"{' and '.join(missing)} are not built: `make sanitize`" if missing else ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@cache
def commands() -> dict[tuple[str, str], list[str]]:
    """How CMake compiles for each sanitizer: {(sanitizer, stem): command without source, -o}."""
    found = {}
    for entry in json.loads((ROOT / "build" / "cmake" / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        target, stem = words[words.index("-o") + 1], Path(entry["file"]).stem
        pattern = r"CMakeFiles/_C_(asan|tsan)(_kernels\.dir/|\.dir/csrc/simt/)"
        if match := re.match(pattern, target):
            found[match[1], stem] = words[: words.index("-o")]
    return found


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    """The contract's runs under both sanitizers, begun side by side: (process, log) by name."""
    running = {}
    for name in FLAGS:
        preload = [
            subprocess.run(
                ["g++", f"-print-file-name={file}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for file in (f"lib{name}.so", "libstdc++.so")
        ]
        command = [sys.executable, "-m", "pytest", "-v", "-x", "-s", "-p", "no:cacheprovider"]
        log = tmp_path_factory.mktemp(name) / "log"
        environment = {"MOEKERNELS_SANITIZER": name, "LD_PRELOAD": " ".join(preload), **OPTIONS}
        with log.open("w") as out:
            running[name] = (
                subprocess.Popen(
                    [*command, "python_tests/cuda/test_cuda_emulated.py"],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                ),
                log,
            )
    yield running
    for process, _ in running.values():
        process.kill()


@dataclass(frozen=True)
class Bug:
    name: str
    sanitizer: str
    file: str  # in csrc/cuda
    right: str
    wrong: str
    report: str  # what must be said of it


BUGS = [
    Bug(
        "missing_syncthreads",
        "tsan",
        "common/scan.cuh",
        "if (lane == 31) scratch[warp] = sum;\n  __syncthreads();",
        "if (lane == 31) scratch[warp] = sum;",
        "data race",
    ),
    Bug(
        "missing_syncwarp",
        "tsan",
        "route.cu",
        "    __syncwarp();\n    if (e >= 0 && rank == 0)",
        "    if (e >= 0 && rank == 0)",
        "data race",
    ),
    Bug(
        "histogram_without_atomics",
        "tsan",
        "route.cu",
        "atomicAdd(counters + e, 1)",
        "counters[e] += 1",
        "data race",
    ),
    Bug(
        "race_between_blocks",
        "tsan",
        "route.cu",
        "const int64_t e = static_cast<int64_t>(blockIdx.x) * kWarp + lane;",
        "const int64_t e = lane;",
        "data race",
    ),
    Bug(
        "shared_out_of_bounds",
        "asan",
        "common/scan.cuh",
        "scratch[warp] = sum",
        "scratch[warp + 1] = sum",
        "global-buffer-overflow",
    ),
    Bug(
        "dynamic_shared_out_of_bounds",
        "asan",
        "route.cu",
        "shared + (threadIdx.x / kWarp) * args.experts",
        "shared + (threadIdx.x / kWarp + 1) * args.experts",
        "heap-buffer-overflow",
    ),
    Bug(
        "global_out_of_bounds",
        "asan",
        "permute.cuh",
        "if (piece.row >= args.num_rows) return;",
        "if (piece.row > args.num_rows) return;",
        "heap-buffer-overflow",
    ),
    Bug(
        "unchecked_id",
        "asan",
        "route.cuh",
        "return inside(id, args.experts) ? static_cast<int>(id) : -1;",
        "return static_cast<int>(id);",
        "AddressSanitizer",
    ),
    Bug(
        "misaligned_vector",
        "asan",
        "common/move.cuh",
        "if (bits % 16 == 0) return f(uint4{});",
        "if (bits % 8 == 0) return f(uint4{});",
        "misaligned address",
    ),
    Bug(
        "uninitialised_shared",
        "asan",
        "route.cu",
        "counters[e] = 0;",
        "(void)counters;",
        "signed integer overflow",
    ),
    Bug(
        "lanes_apart",
        "asan",
        "route.cu",
        "const unsigned same = __match_any_sync(kAllLanes, e);",
        "const unsigned same = s < end ? __match_any_sync(kAllLanes, e) : 0;",
        "the lanes of a warp meet in different collectives",
    ),
    Bug(
        "mask_with_a_lane_that_returns",
        "asan",
        "permute.cuh",
        "const int64_t token = args.token_of[piece.row];",
        "if (lane_id() == 3) return;\n  __syncwarp();\n"
        "  const int64_t token = args.token_of[piece.row];",
        "deadlock: thread 0 waits for lanes of its warp",
    ),
    Bug(
        "barrier_that_some_miss",
        "asan",
        "all_to_all.cu",
        "  if (threadIdx.x != 0) return;\n",
        "  if (threadIdx.x < 32) __syncthreads();\n  else __syncwarp(1);\n"
        "  if (threadIdx.x != 0) return;\n",
        "leaves the calling lane out",
    ),
]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(sanitizer, cuda, changed) -> the driver over the kernels that CMake made, but for the
    changed ones of another csrc/cuda."""
    made = ROOT / "build" / "cmake" / "CMakeFiles"
    drivers: dict[str, Path] = {}

    def compiled(flags: list[str], source: Path, target: Path) -> Path:
        run([*flags, "-o", str(target), "-c", str(source)])
        return target

    def build(name: str, cuda: Path | None = None, changed: str = "") -> Path:
        folder = tmp_path_factory.mktemp("driver")
        if name not in drivers:
            source = ROOT / "python_tests" / "cuda" / "simt" / "drive.cpp"
            drivers[name] = compiled(commands()[name, "runtime"], source, folder / "drive.o")
        kernels = {
            path.name.split(".")[0]: path
            for path in (made / f"_C_{name}_kernels.dir" / "simt_kernels").glob("*.o")
        }
        if changed:
            source = folder / "simt_kernels" / f"{changed}.cpp"  # the folder that shared.ld knows
            source.parent.mkdir()
            source.write_text(f'#include "{cuda / changed}.cu"\n')
            ours = str(ROOT / "csrc" / "cuda")
            flags = [word.replace(ours, str(cuda)) for word in commands()[name, changed]]
            kernels[changed] = compiled(flags, source, source.with_suffix(".cpp.o"))
        # The launchers' headers name the CPU kernels too.
        rest = [drivers[name], *made.glob("cpu_*.dir/csrc/cpu/*.o")]
        rest += [
            made / f"_C_{name}.dir" / "csrc" / f for f in ("cpu/isa.cpp.o", "simt/runtime.cpp.o")
        ]
        script = f"-Wl,-T,{ROOT / 'csrc' / 'simt' / 'shared.ld'}"
        objects = map(str, [*kernels.values(), *rest])
        run(["g++", FLAGS[name], script, *objects, "-o", str(folder / "driver")])
        return folder / "driver"

    return build


def drive(driver: Path) -> tuple[int, str]:
    done = subprocess.run(
        [str(driver)],
        env={**os.environ, **OPTIONS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", FLAGS)
def test_right_kernels_are_clean(contract, build, name):
    rc, text = drive(build(name))
    assert rc == 0, text[-4000:]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(contract, build, tmp_path, bug):
    cuda = tmp_path / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", cuda)
    text = (cuda / bug.file).read_text()
    assert text.count(bug.right) == 1, f"{bug.file} no longer holds what {bug.name} changes"
    (cuda / bug.file).write_text(text.replace(bug.right, bug.wrong))
    users = {"common/scan.cuh": "all_to_all", "common/move.cuh": "permute"}
    changed = users.get(bug.file, Path(bug.file).stem)
    rc, text = drive(build(bug.sanitizer, cuda, changed))
    assert rc != 0, f"{bug.name} was not caught"
    assert bug.report in text, text[-4000:]


@pytest.mark.parametrize("name", FLAGS)
def test_contract_is_clean(contract, name):
    process, log = contract[name]
    rc = process.wait(timeout=900)
    text = log.read_text()
    assert rc == 0, text[-8000:]
    assert " passed" in text.splitlines()[-1], text[-2000:]
