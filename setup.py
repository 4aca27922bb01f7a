"""A shim over CMake: it builds the two libraries into the package. Everything else is in
pyproject.toml and CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
RIGHT_COMMAND = (
    "pip install torch==2.13.0 setuptools cmake ninja pybind11 && "
    "pip install --no-build-isolation ."
)


def require_environment() -> None:
    """Stop with one line where the build would go wrong, above all in an isolated build
    environment."""
    try:
        import pybind11  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"moekernels builds against the torch you have, but {error.name} is not importable "
            f"here (an isolated build environment hides it). Run: {RIGHT_COMMAND}"
        )


class CMakeBuild(build_ext):
    def run(self) -> None:
        output = ROOT / "moekernels" if self.editable_mode or self.inplace else None
        output = output or Path(self.build_lib).resolve() / "moekernels"
        build = ROOT / "build" / "cmake"
        cuda = os.environ.get("MOEKERNELS_CUDA", "auto")
        command = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        command += [f"-DMOEKERNELS_OUTPUT={output}", f"-DMOEKERNELS_CUDA={cuda}"]
        command += [f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-DMOEKERNELS_EMULATED={os.environ.get('MOEKERNELS_EMULATED', '0')}"]
        command += [f"-DMOEKERNELS_CUTLASS={os.environ.get('MOEKERNELS_CUTLASS', '0')}"]
        if archs := os.environ.get("MOEKERNELS_CUDA_ARCHS"):
            command += [f"-DMOEKERNELS_CUDA_ARCHS={archs}"]
        subprocess.run(command, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return []


require_environment()
setup(ext_modules=[Extension("moekernels._C", [])], cmdclass={"build_ext": CMakeBuild})
