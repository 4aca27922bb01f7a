"""The PTX emulator's clusters: ranks, remote arrivals, multicast, their barrier, and what is wrong
with each."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import ptx_emulator as ptx

KERNELS = Path(__file__).parent / "kernels"
pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on PATH")
ROUNDS = 4
MODES = [{}, {"lazy": True}, {"schedule": 0}, {"schedule": 1, "lazy": True}, {"schedule": 2}]


def exchange(bug: str = "none", clusters: int = 2, **how) -> tuple[np.ndarray, np.ndarray]:
    """What every block read, and what it should have."""
    module = ptx.load(KERNELS / "clusters.cu", arch="90a", defines=[f"PLANTED={bug}"])
    rows = np.arange(ROUNDS * 2 * 256, dtype=np.float32).reshape(-1, 256)
    out = np.full((ROUNDS, 2, 2, 256), -1, np.int32)
    tiles = ptx.TensorMap(rows, (1, 256), 0)
    module.launch("exchange", 2, 64, [tiles, out, ROUNDS], cluster=clusters, **how)
    expected = np.repeat(rows.view(np.int32).reshape(ROUNDS, 1, 2, 256), 2, axis=1)
    return out, expected


@pytest.mark.parametrize("how", MODES)
def test_halves_reach_both_blocks(how):
    out, expected = exchange(**how)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "bug, errors, words",
    [
        ("no_first_sync", ptx.ClusterError, "nothing orders this after block . initialised"),
        ("no_last_sync", ptx.ClusterError, "which has exited"),
        ("own_arrivals", ptx.AsyncHazard, "race"),
        ("own_bytes", ptx.PtxError, "announced too few|race|which nothing has written"),
        ("own_half", (ptx.AsyncHazard, ptx.UninitializedRead), "race|nothing has written"),
    ],
)
def test_planted_bugs_are_caught(bug, errors, words):
    found = 0
    for how in [*MODES, *({"schedule": seed, "lazy": True} for seed in range(2, 5))]:
        try:
            exchange(bug, **how)
        except errors as error:
            found += 1
            assert re.search(words, str(error)), error
    assert found, "no order of the warps shows it"


def test_a_block_outside_the_cluster_is_refused():
    with pytest.raises(ptx.ClusterError, match="block 1 of a cluster of 1|multicast to 0b11"):
        exchange(clusters=1)
    with pytest.raises(ptx.PtxError, match="3 blocks|4 blocks in clusters of 3"):
        meet(BOTH, clusters=3)


BARRIER = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry meet(.param .u64 out)
{
  .reg .u32 %r<8>; .reg .u64 %rd<4>; .reg .pred %p;
  mov.u32 %r0, %cluster_ctarank;
  mov.u32 %r1, %cluster_nctarank;
  mov.u32 %r2, %clusterid.x;
  mov.u32 %r3, %ctaid.x;
  BODY
  ld.param.u64 %rd0, [out];
  mad.wide.u32 %rd1, %r3, 12, %rd0;
  st.global.u32 [%rd1], %r0;
  st.global.u32 [%rd1+4], %r1;
  st.global.u32 [%rd1+8], %r2;
  ret;
}
"""


def meet(body: str, clusters: int = 2) -> np.ndarray:
    out = np.zeros((4, 3), np.uint32)
    module = ptx.Module(BARRIER.replace("BODY", body))
    module.launch("meet", 4, 1, [out], cluster=clusters)
    return out


BOTH = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def test_ranks_and_barriers_that_follow_one_another():
    expected = [[0, 2, 0], [1, 2, 0], [0, 2, 1], [1, 2, 1]]
    assert meet(BOTH * 3).tolist() == expected
    # A thread that has exited is not waited for.
    assert meet(f"setp.eq.u32 %p, %r0, 1; @%p ret; {BOTH}")[[0, 2]].tolist() == expected[::2]


def test_a_barrier_used_wrongly_is_refused():
    with pytest.raises(ptx.ClusterError, match="without having arrived"):
        meet("barrier.cluster.wait.aligned;")
    with pytest.raises(ptx.ClusterError, match="arrives twice"):
        meet("barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;")
    with pytest.raises(ptx.Deadlock, match="cluster's barrier"):
        meet(
            "setp.eq.u32 %p, %r0, 1; @%p bra skip; barrier.cluster.arrive.aligned; "
            "barrier.cluster.wait.aligned; skip: @!%p bra end; loop: bar.sync 1, 32; end:"
        )
