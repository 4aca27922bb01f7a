"""The set-up: locks hold what pyproject.toml asks for, and what cannot be is said in one line."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("lock-*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lines) -> list[Requirement]:
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def asked_for() -> list[Requirement]:
    """What `make test` needs: the package, its extras for it, the tools of set-up and build."""
    extras = PROJECT["optional-dependencies"]
    named = [*PROJECT["dependencies"], *extras["train"], *extras["transformers"], *extras["test"]]
    tools = (ROOT / "requirements" / "lock.in").read_text(encoding="utf-8").splitlines()
    return [r for r in requirements([*named, *tools]) if r.name != PROJECT["name"]]


def test_there_is_a_lock_for_every_python_that_is_tested():
    assert [lock.stem for lock in LOCKS] == ["lock-3.11", "lock-3.12", "lock-3.13"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_holds_exactly_one_version_of_all_that_is_asked_for(lock):
    locked = requirements(lock.read_text(encoding="utf-8").splitlines())
    versions = {canonicalize_name(r.name): str(r.specifier) for r in locked}
    assert len(versions) == len(locked)
    assert all(re.fullmatch(r"==[\w.]+", version) for version in versions.values()), versions
    for asked in asked_for():
        version = versions.get(canonicalize_name(asked.name), "")
        assert asked.specifier.contains(version.removeprefix("==") or "0"), (
            f"{lock.name} holds {asked.name}{version}, asked for is {asked}: run `make lock`"
        )


def test_the_tools_of_the_documentation_are_exact_and_as_asked_for():
    lines = (ROOT / "requirements" / "docs.txt").read_text(encoding="utf-8").splitlines()
    versions = {canonicalize_name(r.name): str(r.specifier) for r in requirements(lines)}
    assert all(re.fullmatch(r"==[\w.]+", version) for version in versions.values()), versions
    for asked in requirements(PROJECT["optional-dependencies"]["docs"]):
        assert asked.specifier.contains(versions[canonicalize_name(asked.name)].removeprefix("=="))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_machine_without_a_gpu_installs_nothing_of_cuda(lock):
    """Beside the two tools, a few MB, that read what nvcc made."""
    tools = {"nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"}
    names = {r.name for r in requirements(lock.read_text(encoding="utf-8").splitlines())}
    assert {n for n in names if n.startswith(("nvidia", "cuda", "triton"))} == tools


def test_torch_that_is_named_to_users_is_the_one_that_is_tested():
    (tested,) = (r for r in asked_for() if r.name == "torch" and "==" in str(r.specifier))
    for name in ("README.md", "setup.py"):
        named = re.findall(r"torch(==[\d.]+)", (ROOT / name).read_text(encoding="utf-8"))
        assert named and {*named} == {str(tested.specifier)}, name


def test_what_is_held_at_the_lowest_and_newest_versions():
    """The files of `make compat` are there, and every range has a lower bound that it installs."""
    compat = runpy.run_path(str(ROOT / "tools" / "compat.py"))
    for test in compat["TESTS"]:
        assert (ROOT / "python_tests" / f"{test.replace('/', '/test_')}.py").is_file(), test
    bounds = dict(line.split("==") for line in compat["lower_bounds"]().split())
    ranges = {r.name for r in asked_for() if ">=" in str(r.specifier)}
    assert {"torch", "transformers", "numpy", "tokenizers"} <= ranges & bounds.keys()
    assert all(
        Requirement(f"x{r.specifier}").specifier.contains(bounds[r.name])
        for r in asked_for()
        if r.name in bounds and ">=" in str(r.specifier)
    )


PYTHON = """#!/bin/sh
case "$*" in *sys.exit*) exit {too_old};; *print*) echo {version};; *) echo Python {version}; esac
"""


@pytest.mark.parametrize(
    "version, too_old, venv, says",
    [
        ("3.10", 1, None, "needs Python 3.11 or newer"),
        ("3.99", 0, None, "no tested versions for Python 3.99 (there are 3.11 3.12 3.13)"),
        ("3.12", 0, "3.11", "is of Python 3.11, "),
    ],
)
def test_set_up_says_in_one_line_what_it_cannot_do(tmp_path, version, too_old, venv, says):
    python, place = tmp_path / "python", tmp_path / "venv"
    python.write_text(PYTHON.format(too_old=too_old, version=version))
    python.chmod(0o755)
    if venv:
        (place / "bin").mkdir(parents=True)
        (place / "bin" / "python").write_text(PYTHON.format(too_old=0, version=venv))
        (place / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        [ROOT / "tools" / "setup_env.sh"],
        env={**os.environ, "PYTHON": str(python), "VENV": str(place), "VERSIONS": "locked"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("moekernels: ") and says in done.stderr
    assert done.stderr.count("\n") == 1
