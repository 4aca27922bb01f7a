"""A copy of the tree to which tests add parts, and the kernels of one formula compiled from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("moekernels", "csrc", "python_tests", "docs")
COMPILER = shutil.which("g++")


class Tree:
    """A copy of the tree that notes which files were written."""

    def __init__(self, path: Path) -> None:
        self.path, self.touched = path, []
        for folder in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "*.so", ".*")
            shutil.copytree(ROOT / folder, path / folder, ignore=ignored)
        for library in (ROOT / "moekernels").glob("*.so"):
            (path / "moekernels" / library.name).symlink_to(library)

    def new(self, name: str, text: str) -> None:
        assert not (self.path / name).exists()
        (self.path / name).write_text(text)
        self.touched.append(name)

    def insert(self, name: str, before: str, text: str) -> None:
        """`text` in front of the one place where `before` stands."""
        old = (self.path / name).read_text()
        assert old.count(before) == 1, f"{name}: {before!r}"
        (self.path / name).write_text(old.replace(before, text + before))
        self.touched.append(name)

    @property
    def files(self) -> int:
        """How many files were touched."""
        return len(set(self.touched))

    def run(self, program: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.path)}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


class Formulas:
    """formulas.cpp with the kernels of a tree: on the CPU and, where CUDA's headers are, what CUDA
    compiles. The files named in `kernels` are csrc/cpu's, those in `plain` csrc/cuda's that g++
    compiles as they are (csrc/simt)."""

    def __init__(self, tree: Path, kernels: list[str], plain: list[str]) -> None:
        self.program = tree / "formulas"
        csrc = tree / "csrc"
        nvcc = shutil.which("nvcc")
        cuda = Path(nvcc).resolve().parents[1] / "include" if nvcc else None
        self.cuda = cuda is not None and (cuda / "cuda_runtime.h").exists()
        flags = [f"-I{csrc / folder}" for folder in ("include", "cpu", "cuda", "emulated")]
        flags += ["-std=c++20", "-O0", "-w", "-DMOEKERNELS_ISA=generic", "-DMOEKERNELS_EMULATED"]
        sources = {Path(__file__).with_name("formulas.cpp"): flags}
        sources |= {csrc / "cpu" / f"{name}.cpp": flags for name in kernels}
        sources[csrc / "cpu" / "isa.cpp"] = flags
        linking = ["-Wl,--unresolved-symbols=ignore-all"]  # the other instruction sets' kernels
        gathered = tree / "simt_kernels"  # whose statics shared.ld takes for shared memory
        if self.cuda:
            flags += [f"-isystem{cuda}", "-DWITH_CUDA", "-DMOEKERNELS_WITH_CUDA"]
            plainly = [*flags, "-x", "c++", "-include", str(csrc / "simt" / "simt.h")]
            sources |= {csrc / "cuda" / f"{name}.cu": plainly for name in plain}
        if self.cuda and plain:
            sources[csrc / "simt" / "runtime.cpp"] = flags
            linking += ["-Wl,-T," + str(csrc / "simt" / "shared.ld")]
        gathered.mkdir()
        objects, running = [], []
        for source, words in sources.items():
            is_kernel = source.suffix == ".cu"
            objects.append(
                gathered / f"{source.stem}.cpp.o" if is_kernel else tree / f"{source.name}.o"
            )
            command = [COMPILER, *words, "-c", str(source), "-o", str(objects[-1])]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-4000:]
        subprocess.run([COMPILER, *linking, *objects, "-o", self.program], check=True, timeout=300)

    def __call__(self, *words: str | int, given: tuple[Tensor, ...] = ()) -> bytes:
        stdin = b"".join(t.detach().float().numpy().tobytes() for t in given)
        command = [self.program, *map(str, words)]
        done = subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=60)
        return done.stdout

    def names(self) -> list[list[str]]:
        """The registers: activations, scores."""
        return [line.split() for line in self("names").decode().splitlines()]

    def hold(self, words: tuple, given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        """Each set of results is `wanted` but for the last digits."""
        found = torch.frombuffer(bytearray(self(*words, given=given)), dtype=torch.float32)
        expected = torch.cat([t.detach().float().flatten() for t in wanted])
        sets = found.view(1 + self.cuda, -1)
        torch.testing.assert_close(sets, expected.expand_as(sets), rtol=2e-5, atol=2e-5)
