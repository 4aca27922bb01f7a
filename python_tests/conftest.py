"""What every test has: a seed from its own name, few threads, the device it runs on, and the
tests that may run beside it."""

from __future__ import annotations

import os

# Threads that wait sleep instead of spinning (read when torch is loaded, inherited by children):
# on a busy machine that halves what a test costs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
import zlib

import pytest
import torch

pytest.register_assert_rewrite("python_tests.support")

# What the suite is budgeted for; more only makes ranks fight. Workers of pytest-xdist share it.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
GIB_A_WORKER = 4  # half of it the emulator's largest kernels, the rest 8 ranks of the tiny model
SPAWNS_RANKS = (
    "test_checkpoint",
    "test_cli",
    "test_examples",
    "test_extension",
    "test_launch",
    "test_train",
    "test_verify",
)


def pytest_xdist_auto_num_workers(config) -> int:
    """`-n auto`: a worker a core, as far as memory allows; 0 is this process alone."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    workers = min(len(os.sched_getaffinity(0)), int(memory / 2**30 / GIB_A_WORKER))
    return workers if workers > 1 else 0


def pytest_collection_modifyitems(items):
    """With `--dist loadgroup` a file stays together, for its fixtures and caches; and whatever
    spawns ranks, or limits the time they take, runs in one worker, never beside its like."""
    for item in items:
        spawns = item.path.name.startswith(SPAWNS_RANKS)
        spawns |= not {"RankPool", "run_ranks"}.isdisjoint(vars(item.module))
        item.add_marker(pytest.mark.xdist_group("ranks" if spawns else item.module.__name__))


def pytest_addoption(parser):
    parser.addoption("--draws", type=int, help="how many calls test_fuzz draws of each op")


def pytest_configure(config):
    # A shell starts what goes to its background with SIGINT ignored, and children inherit that:
    # programs that tests interrupt would not notice.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed_and_threads(request):
    """The same numbers in every run and order of tests, and no setting that leaks into the next."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.rpartition("/")[2].encode()))
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    """The activation of every call of the fused experts."""
    from moekernels import ops  # here: tests that need no build run without one

    calls, fused = [], ops.experts
    monkeypatch.setattr(
        ops, "experts", lambda *a, **k: calls.append(k["activation"]) or fused(*a, **k)
    )
    return calls


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text of its own, and a cache that leaves the user's alone."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"line {i}: {'spam and eggs ' * (i % 5)}{i * i}" for i in range(3000)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def cache(text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(text / "cache"))
