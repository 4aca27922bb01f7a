"""The package as such: what importing it costs, where it finds its libraries, what it ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import moekernels
from moekernels.ops._library import LIBRARY

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -c code` in `cwd`, one thread, the folder's own package first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_importing_the_ops_costs_what_torch_costs_and_nothing_beside():
    code = (
        "import sys, torch; before = set(sys.modules); import moekernels.ops; "
        "print(*(set(sys.modules) - before))"
    )
    found = run(code)
    assert not found.returncode, found.stderr
    beside = {name for name in found.stdout.split() if name.split(".")[0] != "moekernels"}
    assert not beside


def test_parts_are_there_once_they_are_asked_for():
    code = (
        "import sys, moekernels as m; before = 'torch' in sys.modules; "
        "print(before, m.ops.gate.__name__, m.nn.__name__, m.reference.__name__, "
        "{'ops', 'nn', 'plan'} <= set(dir(m)))"
    )
    assert run(code).stdout.split() == "False gate moekernels.nn moekernels.reference True".split()
    with pytest.raises(AttributeError, match="module 'moekernels' has no attribute 'opps'"):
        _ = moekernels.opps


# ---- a source tree that is not built, in the current folder, and an installed package

PROGRAMS = {
    "import": ["-c", "from moekernels import _host, ops; print(ops._library.LIBRARY)"],
    "torchrun": [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "1",
        "-m",
        "moekernels",
        "info",
    ],
}


@pytest.fixture
def not_built(tmp_path) -> Path:
    """A source tree without libraries, and `site/`, where the package is installed."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in (tmp_path / "tree", tmp_path / "site"):
        shutil.copytree(ROOT / "moekernels", folder / "moekernels", ignore=ignore)
    for library in LIBRARY.parent.glob("*.so"):
        (tmp_path / "site" / "moekernels" / library.name).symlink_to(library)
    info = tmp_path / "site" / f"moekernels-{moekernels.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: moekernels\nVersion: {moekernels.__version__}\n")
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS)
def test_source_tree_uses_the_installed_libraries(not_built, program):
    found = subprocess.run(
        [sys.executable, *PROGRAMS[program]],
        cwd=not_built / "tree",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(not_built / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not found.returncode, found.stderr
    assert "not built" not in found.stdout
    if program == "import":
        assert found.stdout.strip() == str(not_built / "site" / "moekernels" / "_C.so")


@pytest.mark.parametrize("version, used", [(moekernels.__version__, True), ("0.0.7", False)])
def test_only_libraries_of_the_same_version_are_used(not_built, version, used, monkeypatch):
    site, tree = not_built / "site", str(not_built / "tree" / "moekernels")
    (metadata,) = site.glob("*.dist-info/METADATA")
    metadata.write_text(f"Name: moekernels\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(site)])
    found = moekernels._with_installed_libraries([tree])
    assert found == [tree, str(site / "moekernels")][: 1 + used]


def test_libraries_of_other_sources_are_told(not_built):
    """As after a pull: the sources have an op that the library does not know."""
    ops = not_built / "site" / "moekernels" / "ops"
    (ops / "zzz.py").write_text(
        "from moekernels.ops._library import raw\n__all__ = []\nraw._of_tomorrow.default\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "moekernels", "train", "--steps", "1"],
        cwd=not_built / "site",
        env={**os.environ, "PYTHONPATH": str(not_built / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode and found.stderr.count("\n") == 1, found.stderr
    assert "was built from other sources than this Python's: it has no _of_tomorrow" in found.stderr


# ---- what is shipped


def test_source_distribution_holds_what_the_build_needs(tmp_path):
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source tree")
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
        + ["sdist", "--dist-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not made.returncode, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "moekernels/py.typed"}
    for folder, pattern in (
        ("csrc", "**/*.*"),
        ("moekernels", "**/*.py"),
        ("moekernels", "*/*.toml"),
    ):
        needed |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)}
    assert needed - held == set()
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


CMAKE = """#!/bin/sh
# Stands for CMake: keeps its first answer, as CMake does.
while [ $# -gt 0 ]; do [ "$1" = -B ] && { mkdir -p "$2"; cache=$2/CMakeCache.txt; }; shift; done
[ -z "$cache" ] || [ -e "$cache" ] || date +%N > "$cache"
"""


def test_another_python_builds_in_the_same_tree(tmp_path):
    tree, tools = tmp_path / "tree", tmp_path / "bin"
    shutil.copytree(ROOT / "moekernels", tree / "moekernels")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    tools.mkdir()
    (tools / "cmake").write_text(CMAKE)
    (tools / "cmake").chmod(0o755)
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    path = [p for p in sys.path if "site-packages" in p]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = ":".join(path)
    answers = []
    for python in (sys.executable, sys.executable, str(other)):
        subprocess.run(
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=tree,
            env=environment,
            check=True,
            timeout=300,
        )
        answers.append((tree / "build" / "cmake" / "CMakeCache.txt").read_text())
    assert answers[0] == answers[1] != answers[2]
