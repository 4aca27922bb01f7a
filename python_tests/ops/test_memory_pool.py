"""What the CPU kernels keep of the memory of freed outputs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moekernels import ops
from moekernels.ops._library import raw
from moekernels.plan import room

VARYING = """
import torch
from moekernels import ops
from moekernels.ops._library import raw

MIB = 1 << 20
size, most = 0, 0
for step in range(40):
    rows = 1000 + 977 * step % 1001
    token_of = torch.zeros(rows, dtype=torch.int32)
    out = ops.permute(torch.ones(1, 4096), token_of, token_of.view(1, -1))
    most = max(most, out.numel() * 4)
    del out
print(raw._pool_held() // MIB, most // MIB)
"""


@pytest.mark.parametrize("processes", [1, 10**9])
def test_what_is_held_is_bounded(processes):
    """Outputs of 40 sizes, one alive at a time: a handful of sizes is held, and nothing where many
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
    assert most > 25
    assert held <= (0 if processes > 1 else 9 * most)


def test_what_nobody_takes_for_ten_seconds_goes_back():
    """With the next that is freed; or at once where that is asked for."""
    ops.release_memory()

    def free(rows):
        token_of = torch.zeros(rows, dtype=torch.int32)
        ops.permute(torch.ones(1, 4096), token_of, token_of.view(1, -1))

    free(1000)
    first = raw._pool_held()
    raw._pool_idle(6.0)
    free(2000)
    both = raw._pool_held()
    assert 16_000_000 <= first < both
    raw._pool_idle(6.0)
    assert raw._pool_held() == both - first
    free(1000)
    assert raw._pool_held() == both
    ops.release_memory()
    assert raw._pool_held() == 0


GROUPS = {  # /proc/self/cgroup -> limits -> which holds
    "the root of version 2": ("0::/\n", {"memory.max": 3 << 20}, 3),
    "one's own group": ("0::/a/b\n", {"a/b/memory.max": 2 << 20, "memory.max": 3 << 20}, 2),
    "one around it": ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 5 << 20}, 5),
    "version 1": (
        "5:cpu,cpuacct:/\n4:hugetlb,memory:/docker/1\n",
        {"memory/memory.limit_in_bytes": 4 << 20},  # a container sees its own as the root
        4,
    ),
    "both": ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": 6 << 20}, 6),
    "none": ("0::/a\n", {"a/memory.max": "max"}, None),
    "none in version 1": ("4:memory:/\n", {"memory/memory.limit_in_bytes": 2**63 - 4096}, None),
    "nothing": ("", {}, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_memory_is_what_the_control_groups_allow(tmp_path, name):
    """As the pool asks, and as the check before a run asks, which takes off what is used."""
    lines, limits, held = GROUPS[name]
    names = {"memory.max": ("memory.current", "inactive_file")}
    names["memory.limit_in_bytes"] = ("memory.usage_in_bytes", "total_inactive_file")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8 kB\nMemAvailable: 9000 kB\n")
    for file, limit in limits.items():
        path = tmp_path / "sys/fs/cgroup" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
        used, cached = names[path.name]
        path.with_name(used).write_text(f"{1 << 20}\n")
        path.with_name("memory.stat").write_text(f"anon 5\n{cached} {1 << 19}\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert raw._memory_allowed(str(tmp_path)) == (held << 20 if held else machine)
    free = (held << 20) - (1 << 19) if held else 9000 * 1024
    assert room.available(tmp_path) == free


def test_memory_of_this_machine():
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < room.available() <= machine and 0 < raw._memory_allowed("") <= machine
