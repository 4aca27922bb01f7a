"""What a launcher leaves in the environment: all of it, a part of it, nonsense."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekernels.cli import main
from moekernels.errors import UsageError
from moekernels.parallel.launcher import launched
from python_tests.support.small_runs import ROOT

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return lambda given: [monkeypatch.setenv(*item) for item in given.items()]


def test_by_hand(environment):
    assert launched() is None
    environment({"MASTER_ADDR": "localhost", "LOCAL_RANK": "0"})
    assert launched() is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"RANK": None}, "WORLD_SIZE is set and RANK is not"),
        ({"WORLD_SIZE": None}, "RANK is set and WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR, where rank 0 is met, is not"),
        ({"MASTER_PORT": ""}, "MASTER_PORT, where rank 0 is met, is not"),
        ({"RANK": "x"}, "RANK must be a whole number of at least 0, got 'x'"),
        ({"RANK": "-1"}, "RANK must be a whole number of at least 0, got '-1'"),
        ({"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE must be a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number"),
        ({"MASTER_PORT": "70000"}, "cannot be met at MASTER_ADDR localhost, MASTER_PORT 70000"),
        ({"LOCAL_RANK": "\u0663"}, "LOCAL_RANK must be a whole number"),
        ({"LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE must be a whole number"),
        ({"TORCHELASTIC_RESTART_COUNT": "?"}, "TORCHELASTIC_RESTART_COUNT must be a whole"),
    ],
)
def test_half_of_a_launcher_is_one_line(environment, capsys, change, said):
    environment({k: v for k, v in {**WHOLE, **change}.items() if v is not None})
    with pytest.raises(UsageError, match=said):
        launched()
    for command in ("train", "verify"):
        assert main([command]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err


PROGRAM = """
import json
from moekernels.parallel.launcher import launched
me = launched()
heard = me.tell("word", {"from": me.rank}), me.first("x", f"rank {me.rank}" if me.rank else None)
print(json.dumps([me.rank, me.size, me.local_rank, me.local_size, me.attempt, *heard]))
me.tell("end", me.first("all", None))  # rank 0 holds the store: it goes last
if me.rank == 0:
    me.store.wait(["gone"])
else:
    me.store.set("gone", "")
"""


def test_a_restart_reads_nothing_of_the_attempt_before(environment, monkeypatch):
    """torchrun's store outlives its workers: what they said of themselves does, and must not be
    taken for their successors'. Only the run's folder is kept."""
    store, attempts = torch.distributed.HashStore(), []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    for attempt in ("0", "1"):
        place = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": attempt}
        environment(WHOLE | place)
        attempts.append(launched())
    first, second = attempts
    first.tell("digest", "of a checkpoint that is gone")
    assert first.store.check(["tell/digest"]) and not second.store.check(["tell/digest"])
    assert first.folder(lambda: Path("a")) == second.folder(lambda: Path("b")) == Path("a")


def test_a_scheduler_that_sets_ranks_alone():
    """The place on the machine follows from who else is on it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    base = {k: v for k, v in os.environ.items() if k not in NAMES}
    base |= {**WHOLE, "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env={**base, "RANK": str(r)}, stdout=-1, text=True
        )
        for r in range(2)
    ]
    said = [json.loads(process.communicate(timeout=120)[0]) for process in ranks]
    assert said == [[r, 2, r, 2, 0, {"from": 0}, "rank 1"] for r in range(2)]
