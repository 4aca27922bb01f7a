"""What ranks do to the process that they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
START = {
    "nothing": "products(None)",
    "two ranks": "run_local(2, 'cpu', products)",
    "a launcher's": """
store = torch.distributed.HashStore()
run_launched(Launched(0, 1, 0, 1, 0, store, store), 'cpu', products, describe=str)""",
}
# Products of 80 sizes, twice, by oneDNN on any processor; one of them once more at the end.
PRODUCTS = """
import torch
from moekernels.parallel.launch import run_launched, run_local
from moekernels.parallel.launcher import Launched
def products(rank):
    if not (rank and rank.rank):
        w = torch.zeros(8, 16).to_mkldnn()
        for rows in [*range(1, 81), *range(1, 81), 80]:
            torch.nn.functional.linear(torch.zeros(rows, 16).to_mkldnn(), w)
    if rank and rank.world > 1:  # neither leaves while the other may still be connecting
        torch.distributed.barrier()
    return 0
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
@pytest.mark.parametrize("start", START)
def test_few_kernels_are_kept(start):
    """As oneDNN counts them: of 80 sizes in turn the 64 newest are kept, so that each is made anew;
    the last is still there."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env |= {"ONEDNN_VERBOSE": "profile_create", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRODUCTS + START[start]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ",inner_product," in line]
    made = Counter("miss" if "create:cache_miss" in line else "hit" for line in lines)
    bounded, free = {"miss": 160, "hit": 1}, {"miss": 80, "hit": 81}
    assert made == (free if start == "nothing" else bounded)


def test_ranks_inherit_the_bounds(monkeypatch):
    """torch's own cache counts nothing that can be read; its variable stands beside oneDNN's."""
    from moekernels.parallel.launch import run_local

    for name in VARIABLES:
        monkeypatch.setenv(name, "gone")  # so that it is restored
        monkeypatch.delenv(name)
    assert run_local(2, "cpu", lambda rank: [os.environ[name] for name in VARIABLES]) == ["64"] * 2


def test_what_the_user_has_set_stays(monkeypatch):
    from moekernels.parallel.host import bound_primitives

    for name in VARIABLES:
        monkeypatch.setenv(name, "gone")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv(VARIABLES[0], "7")
    bound_primitives()
    assert [os.environ[name] for name in VARIABLES] == ["7", "64"]
