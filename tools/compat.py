"""`make compat`: what pyproject.toml's ranges promise. Not part of `make test`: it downloads torch
twice, and takes minutes.

`lowest` installs exactly the lower bound of every range, `newest` the newest of everything. Each
in an environment of its own (build/compat/NAME/venv) builds a wheel out of the source
distribution against its own torch, and runs the tests that touch torch, transformers, numpy and
tokenizers against that wheel, away from this source tree. `compat.py lowest` runs only that one;
what follows `--` goes to pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "compat"
SETS = ("lowest", "newest")
TESTS = (
    "ops/contract ops/grouped_gemm ops/gate integrations/transformers "
    "integrations/transformers_gates integrations/transformers_inputs integrations/expert_parallel "
    "nn/nn_against_transformers nn/nn_layers data/data_corpus data/data_loader "
    "parallel/optimizer parallel/parallel_expert pipeline/pipeline_runtime "
    "train/checkpoint train/folder train/train"
).split()
# The lower ISA levels run the contract again, which says nothing of versions.
LEFT_OUT = "not isa_level"
REPORTED = "torch transformers tokenizers numpy"


def lower_bounds() -> str:
    """Every `name>=version` of the package, its extras and its build tools, as pip constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *extras["train"], *extras["test"]]
    asked += [*extras["transformers"], *(ROOT / "requirements" / "lock.in").read_text().split("\n")]
    bounds = (re.match(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in asked)
    return "".join(f"{bound[1]}=={bound[2]}\n" for bound in bounds if bound)


def run(command: list[str | Path], cwd: Path = ROOT, **environment: str) -> None:
    print("+", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(f"compat: this failed: {' '.join(map(str, command))}")


def hold(name: str, pytest_arguments: list[str]) -> None:
    """Set up, build, install and test one set of versions."""
    work = WORK / name
    shutil.rmtree(work / "dist", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    constraints = work / "constraints.txt"
    constraints.write_text(lower_bounds() if name == "lowest" else "", encoding="utf-8")
    versions = str(constraints) if name == "lowest" else "newest"
    setup = {"PYTHON": sys.executable, "VENV": str(work / "venv"), "VERSIONS": versions}
    run(["tools/setup_env.sh"], **setup, PACKAGE="no")

    tools = work / "venv" / "bin"
    python = [tools / "python", "-m"]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    run([tools / "python", "setup.py", "-q", "sdist", "--dist-dir", work / "dist"])
    (archive,) = (work / "dist").glob("*.tar.gz")
    pip = [*python, "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", work / "dist", archive]
    run([*pip, *wheel], PATH=path, MOEKERNELS_CUDA="0")
    (wheel,) = (work / "dist").glob("*.whl")
    run([*pip, "install", "--force-reinstall", "--no-deps", wheel])
    newer = ["--upgrade", "--upgrade-strategy", "eager"] if name == "newest" else []
    run([*pip, "install", *newer, "-c", constraints, f"moekernels[test] @ {wheel.as_uri()}"])
    run([*pip, "check"])

    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("python_tests", "ptx_emulator"):
        shutil.rmtree(work / folder, ignore_errors=True)
        shutil.copytree(ROOT / folder, work / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", work)
    facts = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in '%s'.split()))"
    run([tools / "python", "-c", facts % REPORTED])
    tests = [f"python_tests/{test.replace('/', '/test_')}.py" for test in TESTS]
    command = [*python, "pytest", "-q", "-n", "auto", "--dist", "loadgroup", "-k", LEFT_OUT, *tests]
    run([*command, *pytest_arguments], cwd=work, PATH=path)


def main() -> None:
    own, _, rest = " ".join(sys.argv[1:]).partition("--")
    for name in own.split() or SETS:
        if name not in SETS:
            sys.exit(f"compat: {name!r} is none of {', '.join(SETS)}")
        hold(name, rest.split())


if __name__ == "__main__":
    main()
