"""A shim over CMake: it builds the two libraries into the package. Everything else is in
pyproject.toml and CMakeLists.txt."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
RIGHT_COMMAND = (
    "pip install torch==2.13.0 setuptools cmake ninja pybind11 && "
    "pip install --no-build-isolation ."
)


# What each variable of the build may hold; the first is the default.
WORDS = {
    "CUDA": ("auto", "0", "1"),
    "EMULATED": ("0", "1"),
    "CUTLASS": ("0", "1"),
    "WATCHDOG": ("0", "1"),
    "TRACE": ("0", "1"),
}
ARCHITECTURE = r"[1-9]\d{1,2}[af]?(-real|-virtual)?"


def options(environment: Mapping[str, str]) -> list[str]:
    """CMake's flags for the variables of the build; stops at a word that is none of theirs."""
    flags = []
    for name, words in WORDS.items():
        value = environment.get(f"MOEKERNELS_{name}", words[0])
        if value not in words:
            allowed = f"{', '.join(words[:-1])} or {words[-1]}"
            sys.exit(f"moekernels: MOEKERNELS_{name} must be {allowed}, got {value[:300]!r}")
        flags.append(f"-DMOEKERNELS_{name}={value}")
    archs = environment.get("MOEKERNELS_CUDA_ARCHS")
    if archs is None:
        return [*flags, "-UMOEKERNELS_CUDA_ARCHS"]
    if not re.fullmatch(f"{ARCHITECTURE}(;{ARCHITECTURE})*", archs):
        sys.exit(
            "moekernels: MOEKERNELS_CUDA_ARCHS must be architectures with ';' between them, such "
            f"as '80-real;90a-real', got {archs[:300]!r}"
        )
    return [*flags, f"-DMOEKERNELS_CUDA_ARCHS={archs}"]


def require_environment() -> None:
    """Stop with one line where the build would go wrong, as in an isolated environment."""
    try:
        import pybind11  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"moekernels builds against the torch you have, but {error.name} is not importable "
            f"here (an isolated build environment hides it). Run: {RIGHT_COMMAND}"
        )


def forget_another_environment(build: Path) -> None:
    """Drop CMake's cached answers (interpreter, headers, flags) where they are of another Python,
    another torch or another place of this checkout; what is compiled stays and is reused."""
    import torch

    made_for = build / "made-for.txt"
    now = [str(ROOT), sys.executable, sys.version, *torch.__path__, torch.__version__]
    now = "\n".join(now) + "\n"
    if not made_for.exists() or made_for.read_text(encoding="utf-8") != now:
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        made_for.write_text(now, encoding="utf-8")


class CMakeBuild(build_ext):
    def run(self) -> None:
        flags = options(os.environ)
        require_environment()
        output = ROOT / "moekernels" if self.editable_mode or self.inplace else None
        output = output or Path(self.build_lib).resolve() / "moekernels"
        build = ROOT / "build" / "cmake"
        forget_another_environment(build)
        command = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        command += [f"-DMOEKERNELS_OUTPUT={output}", f"-DPython_EXECUTABLE={sys.executable}"]
        command += flags
        subprocess.run(command, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("moekernels._C", [])], cmdclass={"build_ext": CMakeBuild})
