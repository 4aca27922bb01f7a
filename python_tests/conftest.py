"""What every test has: a seed from its own name, few threads, and the device it runs on."""

from __future__ import annotations

import signal
import zlib

import pytest
import torch

THREADS = 2  # what the suite is budgeted for; more only makes ranks fight


def pytest_configure(config):
    # A shell starts what goes to its background with SIGINT ignored, and children inherit that:
    # programs that tests interrupt would not notice.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed_and_threads(request):
    """The same numbers in every run and order of tests, and no setting that leaks into the next."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
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
