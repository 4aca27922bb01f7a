"""A moving average of the masters: after every update it comes `1 - decay` of the way closer.

It lies as they do: in their dtype, in slices where the optimiser is sharded, partly in the host's
memory where they are, and it moves with the experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from moekernels.parallel.optimizer import Optimizer
    from moekernels.parallel.update import Bucket

EMA = "ema"
SIZE = 1 << 18  # elements at a time: what fits a cache


def approach(average: Tensor, master: Tensor, decay: float) -> None:
    """average [n] becomes decay * average + (1 - decay) * master [n].

    Products and their sum are rounded one by one: no bit hangs on where an element lies, as it
    does where some of a tensor's are fused and the last ones not.
    """
    for mean, now in zip(average.split(SIZE), master.split(SIZE)):
        mean.mul_(decay).add_(now * (1 - decay))


def begin(bucket: Bucket) -> None:
    """Where there is an average, with the masters as they are."""
    if bucket.ema is not None:
        for (low, high), mean in bucket.ema.parts(0, bucket.own.stop - bucket.own.start):
            for (a, b), master in bucket.master.parts(low, high):
                mean[a - low : b - low].copy_(master)


@contextlib.contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Have the model compute with the averages meanwhile. The gradients keep its weights, and are
    zero afterwards. All ranks enter together."""
    for bucket in optimizer.buckets:
        assert bucket.ema is not None, "--ema is checked before"
        bucket.grads.copy_(bucket.weights)
        own = bucket.weights[bucket.own]
        for (low, high), mean in bucket.ema.parts(0, len(own)):
            own[low:high].copy_(mean)
    optimizer.gather_weights()
    try:
        yield
    finally:
        for bucket in optimizer.buckets:
            bucket.weights.copy_(bucket.grads)
        optimizer.zero_grad()
