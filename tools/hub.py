"""`make hub`: a folder for the `kernels` hub, build/hub, from this source tree.

    build.toml, flake.nix, README.md     what kernel-builder reads
    csrc/  torch-ext/moekernels/         C++ and CUDA; the ops, the experts function, the layers
    build/VARIANT/                       the same Python beside a library for this machine

What a kernel imports is itself, torch and the standard library: the ops' package is copied with
relative imports, and the ops get a name of their own, so that a hub kernel and an installed
moekernels may be loaded together. `kernels.get_local_kernel` loads the folder as it is.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moekernels"
REPO = "moekernels/moekernels"
# What is copied; what they import of ours comes along.
ROOTS = ("ops/__init__.py", *sorted(f"ops/{p.name}" for p in (PACKAGE / "ops").glob("_*.py")))
ROOTS += tuple(sorted(f"ops/{p.name}" for p in (PACKAGE / "ops").glob("[a-z]*.py")))
ROOTS += ("integrations/transformers.py",)
ISA = {"generic": "", "avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"}


def version() -> str:
    found = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())
    assert found is not None
    return found[1]


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, as paths in the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] != "moekernels":
            continue
        folder = "/".join(node.module.split(".")[1:])
        for name in ("", *(alias.name for alias in node.names)):
            stem = "/".join(part for part in (folder, name) if part)
            for path in (f"{stem}.py", f"{stem}/__init__.py") if stem else ():
                if (PACKAGE / path).exists():
                    yield path


def closure() -> list[str]:
    found: dict[str, None] = {}
    waiting = [*ROOTS]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting += imported(PACKAGE / name)
    return sorted(found)


def namespace(files: list[str]) -> str:
    """A name for the ops that changes with what they are."""
    digest = hashlib.sha256()
    for path in [*(PACKAGE / f for f in files), *sorted((ROOT / "csrc").rglob("*.*"))]:
        digest.update(path.read_bytes())
    return f"moekernels_{digest.hexdigest()[:8]}"


def relative(text: str, depth: int, ops: str) -> str:
    """A file of the package with relative imports, its ops under another name."""
    dots = "." * (depth + 1)
    text = re.sub(
        r"^(\s*)from moekernels\.([\w.]+) import", rf"\1from {dots}\2 import", text, flags=re.M
    )
    text = re.sub(r"^(\s*)from moekernels import", rf"\1from {dots} import", text, flags=re.M)
    itself = "import importlib\n\nmoekernels = importlib.import_module('..', __package__)\n"
    text = text.replace("import moekernels\n", itself)
    text = text.replace("raw = torch.ops.moekernels", f"raw = torch.ops.{ops}")
    text = text.replace('"moekernels::', f'"{ops}::').replace(
        'Library("moekernels"', f'Library("{ops}"'
    )
    return text


def write_python(folder: Path, files: list[str], ops: str) -> None:
    """The kernel's Python package in `folder`."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (PACKAGE / name).read_text(encoding="utf-8")
        path.write_text(relative(text, name.count("/"), ops), encoding="utf-8")
    (folder / "integrations" / "__init__.py").touch()
    for name in ("__init__.py", "_experts.py", "layers.py"):
        text = (ROOT / "tools" / "hub" / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("@VERSION@", version()), encoding="utf-8")


def build_toml(ops: str) -> str:
    """One kernel for each instruction set of the CPU, one for CUDA; the bindings are common."""

    def files(pattern: str) -> str:
        names = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern))
        return "[\n" + "".join(f'  "{name}",\n' for name in names) + "]"

    text = f"""[general]
name = "moekernels"
version = 1
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[general.hub]
repo-id = "{REPO}"

[torch]
include = ["csrc/include", "csrc/torch"]
src = {files("csrc/torch/*.*")}

[torch.stable-abi]
cuda = "2.11"
cpu = "2.11"
"""
    for level, flags in ISA.items():
        options = [f"-DMOEKERNELS_ISA={level}", f"-DMOEKERNELS_ISA_{level}=1", *flags.split()]
        options += [f"-DMOEKERNELS_OPS={ops}"]
        text += f"""
[kernel.cpu_{level}]
backend = "cpu"
depends = ["torch"]
include = ["csrc/include", "csrc/cpu"]
cxx-flags = {json.dumps(options)}
src = {files("csrc/cpu/*.*")}
"""
    return (
        text
        + f"""
[kernel.cuda]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = ["8.0", "9.0a"]
include = ["csrc/include", "csrc/cuda"]
cxx-flags = {json.dumps([f"-DMOEKERNELS_OPS={ops}", "-DMOEKERNELS_WITH_CUDA"])}
src = {files("csrc/cuda/**/*.cu*")}
"""
    )


FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""


def library_under(ops: str) -> Path:
    """The bindings compiled again under that name, with the kernels that are built."""
    build = ROOT / "build" / "cmake"
    if not (build / "CMakeCache.txt").exists():
        sys.exit("hub: nothing is built here; run `make build` first, or give --library")
    subprocess.run(["cmake", f"-DMOEKERNELS_HUB={ops}", str(build)], check=True)
    subprocess.run(["cmake", "--build", str(build), "--target", "_C_hub"], check=True)
    return build / "_C_hub.so"


def write(out: Path, library: Path | None) -> None:
    """The folder. With a `library` its ops keep the name moekernels."""
    files = closure()
    ops = "moekernels" if library else namespace(files)
    library = library or library_under(ops)
    shutil.rmtree(out, ignore_errors=True)
    write_python(out / "torch-ext" / "moekernels", files, ops)
    for name in ("cpu", "cuda", "include", "torch"):
        shutil.copytree(ROOT / "csrc" / name, out / "csrc" / name)
    (out / "build.toml").write_text(build_toml(ops), encoding="utf-8")
    (out / "flake.nix").write_text(FLAKE, encoding="utf-8")
    card = (ROOT / "tools" / "hub" / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(card.replace("@REPO@", REPO), encoding="utf-8")

    variant = out / "build" / f"torch-stable-abi211-cpu-{platform.machine()}-linux"
    write_python(variant, files, ops)
    shutil.copyfile(library, variant / "_C.so")
    metadata = {
        "id": f"_{ops}_cpu",
        "name": "moekernels",
        "version": 1,
        "license": "Apache-2.0",
        "backend": {"type": "cpu"},
        "python-depends": [],
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    print(f"{out}: {len(files) + 3} Python files, ops as torch.ops.{ops}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A folder for the kernels hub.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub")
    parser.add_argument("--library", type=Path, help="take this one, as it is, for the variant")
    arguments = parser.parse_args()
    write(arguments.out, arguments.library)
