"""Gradients of flat buffers, summed over the ranks that computed parts of them.

What is split over ranks, each of which gets the sum of its own slice, is begun when the last
backward of its chunk is over, and goes on beside what the rank and other stages still compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from moekernels.parallel.measure import Flight
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.tensor import (
    UNDER_WAY,
    all_reduce,
    begin_reduce_scatter,
    in_rank_order,
    reduce_scatter,
)
from moekernels.parallel.update import Bucket


class Reduction:
    def __init__(self, buckets: Sequence[Bucket], mesh: Mesh) -> None:
        self.buckets, self.mesh = buckets, mesh
        self._begun: dict[int, Callable[[], Tensor]] = {}  # by number of the bucket
        self._spans: dict[int, list[float]] = {}  # by chunk: when its sums began, and were there

    def _group(self, bucket: Bucket) -> Group:
        group: Group = getattr(self.mesh, bucket.reduce_over)
        return group

    def begin(self, chunk: int) -> None:
        """The gradients of a chunk are all there: begin to sum those that are split, within stages.
        The ranks of a stage call it in one order; `finish` waits."""
        self._spans[chunk] = [time.perf_counter(), 0.0]
        for number, bucket in enumerate(self.buckets):
            inside = bucket.reduce_over != "ends"  # the other end is still computing
            if bucket.chunk != chunk or not (bucket.sharded and inside):
                continue
            if len(self._begun) < UNDER_WAY:
                group = self._group(bucket)
                self._begun[number] = begin_reduce_scatter(bucket.grads, group, number)

    def finish(self) -> None:
        """All gradients, or those of this rank's slices, are sums."""
        for number, bucket in enumerate(self.buckets):
            group = self._group(bucket)
            if begun := self._begun.pop(number, None):
                bucket.grads[bucket.own].copy_(begun())
                self._spans[bucket.chunk][1] = time.perf_counter()
            elif bucket.sharded:
                bucket.grads[bucket.own].copy_(reduce_scatter(bucket.grads, group))
            elif group.size > 1:
                add = in_rank_order if bucket.apart else all_reduce
                bucket.grads.copy_(add(bucket.grads, group))

    def flights(self, origin: float) -> dict[int, Flight]:
        """By chunk, the sums of the last step that were begun: from then until they were there, by
        the host's clock, in seconds since `origin`, a moment of time.perf_counter()."""
        found = {}
        for chunk, (start, end) in self._spans.items():
            size = sum(b.grads.nbytes for b in self.buckets if b.sharded and b.chunk == chunk)
            if end:
                name = f"gradients of chunk {chunk}"
                found[chunk] = Flight(
                    name, start - origin, end - origin, size, 0, 0, start - origin
                )
        return found
