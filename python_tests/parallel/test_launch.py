"""Ranks: they answer, they fail under their own name, and they never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moekernels.errors import UsageError
from moekernels.parallel.launch import RankFailure, choose_device, run_local

ROOT = Path(__file__).resolve().parents[2]


def name(rank):
    return f"rank {rank} (tp {rank % 2}, pp {rank // 2})"


def wait_for_rank_1(env, act):
    """Rank 1 acts, the others wait for it in a collective."""
    if env.rank == 1:
        act()
    dist.all_reduce(torch.ones(1))
    time.sleep(600)


def fail():
    raise ValueError("no luck\ntoday")


def misuse():
    raise UsageError("give more")


def test_rank_0_answers_and_all_know_their_place():
    def work(env):
        x = torch.tensor([env.rank, env.local_rank, env.world])
        dist.all_reduce(x)
        return x.tolist(), env.leader, str(env.device)

    assert run_local(4, "cpu", work) == ([6, 6, 16], True, "cpu")


def test_one_rank_runs_here_without_torch_distributed():
    assert run_local(1, "cpu", lambda env: (os.getpid(), env.world, dist.is_initialized())) == (
        os.getpid(),
        1,
        False,
    )


@pytest.mark.parametrize("set_before", [None, "true"])
def test_ranks_are_forked_without_tokenizers_threads(monkeypatch, set_before):
    """Its lowest release warns otherwise, on the stderr of a run that is well."""
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.setenv(name, set_before or "")
    if not set_before:
        monkeypatch.delenv(name)
    inside = run_local(2, "cpu", lambda env: os.environ.get(name))
    assert inside == (set_before or "false") and os.environ.get(name) == set_before


@pytest.mark.parametrize(
    "act, message",
    [
        (fail, "rank 1 (tp 1, pp 0): ValueError: no luck today"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 (tp 1, pp 0): killed by SIGKILL"),
        (lambda: os._exit(7), "rank 1 (tp 1, pp 0): left with exit code 7"),
    ],
    ids=["raises", "killed", "exits"],
)
def test_a_rank_that_fails_ends_all_under_its_name(act, message):
    start = time.monotonic()
    with pytest.raises(RankFailure) as error:
        run_local(4, "cpu", wait_for_rank_1, act, describe=name)
    assert message in str(error.value)
    assert time.monotonic() - start < 300


def test_a_usage_error_in_a_rank_stays_one():
    with pytest.raises(UsageError, match="^give more$"):
        run_local(4, "cpu", wait_for_rank_1, misuse, describe=name)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_ranks_die_with_their_parent(tmp_path, how):
    program = f"""
import os, time, pathlib
from moekernels.parallel.launch import run_local
def work(env):
    pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(600)
run_local(3, "cpu", work)
"""
    temporary = tmp_path / ".tmp"
    temporary.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("[0-9]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(p.name) for p in tmp_path.glob("[0-9]*")]
    assert len(ranks) == 3 and all(alive(p) for p in ranks)
    parent.send_signal(how)
    parent.wait(120)
    deadline = time.monotonic() + 120
    while any(alive(p) for p in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(p) for p in ranks)
    assert how == signal.SIGKILL or not list(temporary.iterdir()), "temporary folders go with it"


def test_a_device_that_is_not_here(monkeypatch):
    assert choose_device("cpu", 8) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("moekernels.parallel.launch.has_cuda_kernels", lambda: True)
    assert choose_device("auto", 1) == "cuda" and choose_device("auto", 2) == "cpu"
    with pytest.raises(UsageError, match="2 ranks need a card each, 1 are here"):
        choose_device("cuda", 2)
    monkeypatch.setattr("moekernels.parallel.launch.has_cuda_kernels", lambda: False)
    assert choose_device("auto", 1) == "cpu"
    with pytest.raises(UsageError, match="MOEKERNELS_CUDA=1"):
        choose_device("cuda", 1)
