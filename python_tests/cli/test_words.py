"""Environment variables: a word that none of them knows is one line that names the variable and
what it may hold, whether the build reads it, the library or a command."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from moekernels.errors import UsageError
from moekernels.parallel import launcher

ROOT = Path(__file__).parents[2]
BUILD = {
    "MOEKERNELS_CUDA": (("auto", "0", "1"), ("x", "", "AUTO", "2", "on"), "auto, 0 or 1"),
    "MOEKERNELS_CUDA_ARCHS": (
        ("90a", "80-real;90a-real", "100f-real", "75-virtual"),
        ("foo", "", "90a,80", "90a;", "sm_90a", "90a-reel", "all", "9"),
        "'80-real;90a-real'",
    ),
    "MOEKERNELS_EMULATED": (("0", "1"), ("maybe", "", "yes"), "0 or 1"),
    "MOEKERNELS_CUTLASS": (("0", "1"), ("ON", "true"), "0 or 1"),
    "MOEKERNELS_WATCHDOG": (("0", "1"), ("2", "off"), "0 or 1"),
    "MOEKERNELS_TRACE": (("0", "1"), ("-1", "x" * 60_000), "0 or 1"),
}
LIBRARY = {
    "MOEKERNELS_ISA": ("sse", "", "avx512|amx"),
    "MOEKERNELS_GEMM": ("cublas", ""),
    "MOEKERNELS_LIBRARY": ("/no/such/_C.so", __file__),
    "LOCAL_WORLD_SIZE": ("two", "0", "9" * 30),
}
LAUNCHER = {  # beside LOCAL_WORLD_SIZE
    "RANK": ("first", "-1", "³"),
    "WORLD_SIZE": ("many", "0"),
    "LOCAL_RANK": ("x",),
    "MASTER_PORT": ("http",),
    "TORCHELASTIC_RESTART_COUNT": ("once",),
}
OTHERS = {  # any text will do: a folder, a list, what is only set and never read
    "XDG_CACHE_HOME",
    "MASTER_ADDR",
    "MPLBACKEND",  # matplotlib's own; test_output holds that no word of it fails a run
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY",
    "CUDA_DEVICE_MAX_CONNECTIONS",  # CUDA's own; 1 is refused on a GPU
    "GLOO_SOCKET_IFNAME",
    "TOKENIZERS_PARALLELISM",
}


def options(monkeypatch):
    """The function of setup.py that reads the variables of a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["options"]


@pytest.mark.parametrize("name", BUILD)
def test_words_of_the_build(name, monkeypatch):
    read = options(monkeypatch)
    good, bad, allowed = BUILD[name]
    assert len(read({})) == len(BUILD)
    for word in good:
        assert f"-D{name}={word}" in read({name: word})
    for word in bad:
        with pytest.raises(SystemExit) as stopped:
            read({name: word})
        line = stopped.value.code
        assert line.startswith(f"moekernels: {name} must be ") and allowed in line
        assert "got '" in line and "\n" not in line and len(line) < 1700


@pytest.mark.parametrize("name", [*BUILD, "MOEKERNELS_CUTLAS"])
def test_words_given_to_cmake_itself(name, tmp_path):
    """Also a variable that there is not; nothing is looked for before."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no cmake")
    known = name in BUILD
    wanted = f"{name} must be " if known else f"{name}: no variable of this build; they are "
    for word in BUILD[name][1] if known else ("1",):
        if word == "ON":  # as CMake spells 1
            continue
        done = subprocess.run(
            [cmake, "-S", ROOT, "-B", tmp_path / "build", f"-D{name}={word}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1 and wanted in " ".join(done.stderr.split()), word
        assert "compiler" not in done.stdout


def test_a_build_stops_before_it_begins(tmp_path):
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "MOEKERNELS_CUDA": "x"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "moekernels: MOEKERNELS_CUDA must be auto, 0 or 1, got 'x'\n"
    assert os.listdir(tmp_path) == ["setup.py"]


# A fork for each word: the library reads its variables once, when it is loaded.
COMMANDS = """
import json, os, sys
import torch
from moekernels.cli import main
for name, words in json.loads(sys.argv[1]).items():
    for word in words:
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.environ[name] = word
            os.dup2(writer, 2)
            os._exit(main(["info"]))
        os.close(writer)
        err = open(reader, encoding="utf-8").read()
        print(json.dumps([name, os.waitstatus_to_exitcode(os.wait()[1]), err]))
"""


def test_words_of_the_library():
    words = json.dumps(LIBRARY)
    env = {name: value for name, value in os.environ.items() if name not in LIBRARY}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, words],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert [name for name, _, _ in said] == [name for name in LIBRARY for _ in LIBRARY[name]]
    for name, code, err in said:
        assert code == 2 and err.startswith(f"moekernels: {name} "), (name, err)
        assert re.search("must be|which does not exist|no library of ours: ", err), err
        assert err.count("\n") == 1 and len(err) < 1700


@pytest.mark.parametrize("name", LAUNCHER)
def test_words_of_a_launcher(name, monkeypatch):
    whole = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for word in LAUNCHER[name]:
        for key, value in {**whole, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", name: word}.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(UsageError, match=f"^{name} must be a whole number"):
            launcher.launched()


def test_words_of_make():
    done = subprocess.run(
        ["make", "-n", "setup", "NEWEST=yes"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "NEWEST must be 1 or not be given, got yes" in done.stderr


def test_every_variable_that_is_read_is_here():
    """And those of our own are in CONTRIBUTING.md's table."""
    reads = r"(?:environ(?:ment)?(?:\.get\(|\.pop\(|\[)|getenv\(|_number\()\"([A-Z_]+)\""
    sources = [ROOT / "setup.py", *ROOT.glob("moekernels/**/*.py"), *ROOT.glob("csrc/**/*.*")]
    texts = [p.read_text(encoding="utf-8") for p in sources if p.suffix in (".py", ".cpp", ".h")]
    found = {name for text in texts for name in re.findall(reads, text)}
    known = BUILD.keys() | LIBRARY.keys() | LAUNCHER.keys() | OTHERS
    assert len(found) > 10 and found <= known, found - known
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ours = {name for name in BUILD.keys() | LIBRARY.keys() if name.startswith("MOEKERNELS_")}
    assert all(f"`{name}`" in told for name in ours)
