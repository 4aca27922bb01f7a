"""What the CPU kernels keep of the memory of freed outputs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

VARYING = """
import torch
from moekernels import ops
from moekernels.ops._library import raw

MIB = 1 << 20
size, most = 0, 0
for step in range(60):
    rows = 4000 + 977 * step % 4001
    token_of = torch.zeros(rows, dtype=torch.int32)
    out = ops.permute(torch.ones(1, 4096), token_of, token_of.view(1, -1))
    most = max(most, out.numel() * 4)
    del out
print(raw._pool_held() // MIB, most // MIB)
"""


@pytest.mark.parametrize("processes", [1, 10**9])
def test_what_is_held_is_bounded(processes):
    """Outputs of 60 sizes, one alive at a time: a handful of sizes is held, and nothing where many
    ranks share the machine."""
    done = subprocess.run(
        [sys.executable, "-c", VARYING],
        env={**os.environ, "LOCAL_WORLD_SIZE": str(processes)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    held, most = map(int, done.stdout.split())
    assert most > 100
    assert held <= (0 if processes > 1 else 9 * most)
