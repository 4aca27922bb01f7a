"""Buffers of the exchange that are sized before anybody knows how many rows come.

A rank takes in at most `factor` times the rows that the rank with the most tokens sends. Where more
come, those beyond are left out and everything goes on: nobody waits for what does not come, and
nothing is read back from a device. What the step computes then is wrong, and is thrown away: behind
it all ranks learn that it did not fit, and repeat it with larger buffers. So no token is ever
dropped, and the bits are those of buffers of the exact size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moekernels.parallel import tensor
from moekernels.parallel.mesh import Group

GROWTH = 1.25  # at least, at a repetition


class Bound:
    """Of one group of ranks that exchange rows; all of them call `begin` and `fits` together."""

    def __init__(self, factor: float, group: Group, device: torch.device) -> None:
        self.group, self.device, self.factor = group, device, factor
        self.rows = -1  # that the rank which sends the most sends in one exchange; -1: not known
        self._needed = 0.0  # the factor that exchanges would have needed which did not fit
        self._most: Tensor | None = None  # int64 [1]: the most rows that a device has seen come

    def begin(self, rows: int) -> None:
        """Before a step, or an evaluation: this rank sends `rows` at most in one exchange."""
        mine = torch.tensor([rows], dtype=torch.int64, device=self.device)
        self.rows = int(tensor.all_gather(mine, self.group).max().item())
        self._reset()

    def room(self, share: float = 1.0) -> int:
        """Rows that a rank takes in, for a share of its experts: no more than all there are."""
        if self.rows < 0:
            raise RuntimeError("bounded buffers have no size yet: Bound.begin was not called")
        return math.ceil(min(self.factor * share, self.group.size) * self.rows)

    def take(self, came: int, share: float = 1.0) -> int:
        """The room for `came` rows, which may be more."""
        room = self.room(share)
        if came > room:
            self._needed = max(self._needed, came / (share * self.rows))
        return room

    @property
    def counter(self) -> Tensor:
        """[1] int64 on the device, whose kernels let it grow to the most rows that come to a
        rank."""
        if self._most is None:
            self._most = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self._most

    def needed(self) -> Tensor:
        """The factor that this attempt would have needed here, a scalar in fp64; 0 where it
        fitted."""
        needed = torch.tensor(self._needed, dtype=torch.float64)
        if self._most is None:
            return needed
        over = self._most[0] > self.room()
        return torch.where(over, self._most[0].double() / max(self.rows, 1), needed)

    def fits(self, needed: float) -> bool:
        """Whether an attempt stands, by the largest `needed` of all ranks of the run; if not it is
        to be repeated, with larger buffers from now on."""
        if needed == 0:
            return True
        self.factor = max(needed, GROWTH * self.factor)
        self._reset()
        return False

    def _reset(self) -> None:
        self._needed = 0.0
        if self._most is not None:
            self._most.zero_()


def stands(bound: Bound | None, world: Group) -> bool:
    """Whether an attempt stands; all ranks of the run ask together."""
    if bound is None:
        return True
    needed = bound.needed().to(bound.device).view(1)
    return bound.fits(tensor.all_gather(needed, world).max().item())
