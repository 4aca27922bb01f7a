"""What ranks do to the process that they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# Megabytes by which a process grows over bf16 products of 80 numbers of rows.
GROW = """
import torch
from moekernels.parallel.host import bound_primitives
{before}
torch.set_num_threads(1)
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
w = torch.zeros(2048, 512, dtype=torch.bfloat16)
def products(rows):
    x = torch.zeros(rows, 512, dtype=torch.bfloat16)
    y = torch.nn.functional.linear(x, w)
    (y @ w, y.T @ x)
products(64)
start = held()
for rows in range(65, 145):
    products(rows)
print(held() - start)
"""


def growth(before: str) -> float:
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", GROW.format(before=before)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_bf16_products_of_many_sizes_keep_little():
    free = growth("")
    if free < 60:
        pytest.skip(f"torch keeps {free:.0f} MB on this processor")
    assert growth("bound_primitives()") < free / 2


def test_what_the_user_has_set_stays(monkeypatch):
    from moekernels.parallel.host import bound_primitives

    for name in VARIABLES:
        monkeypatch.setenv(name, "gone")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv(VARIABLES[0], "7")
    bound_primitives()
    assert [os.environ[name] for name in VARIABLES] == ["7", "64"]
