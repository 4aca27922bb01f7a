"""What memory accesses would cost: bank conflicts of shared memory, sectors of global memory."""

from dataclasses import dataclass

import numpy as np

from .machine import Lanes, Machine


@dataclass
class Traffic:
    """Counts over a launch. Bulk copies and wgmma operands are left out."""

    shared_requests: int = 0  # the fewest wavefronts that the accesses could take
    shared_wavefronts: int = 0  # those they take: more of them are bank conflicts
    global_requests: int = 0  # instructions, once for every warp
    global_sectors: int = 0  # 32-byte sectors they touch

    def count(self, machine: Machine, space: str, address, nbytes: int, lanes: Lanes) -> None:
        warp = machine.warp[lanes.at].astype(np.int64)
        if space == "shared":
            self._count_shared(warp, machine.lane[lanes.at], address, nbytes)
        elif space == "global":
            self.global_requests += len(np.unique(warp))
            self.global_sectors += len(np.unique(warp << 44 | address >> 5))

    def _count_shared(self, warp, lane, address, nbytes: int) -> None:
        # 8-byte accesses go in two halves of a warp, 16-byte accesses in four quarters.
        phases = max(1, nbytes // 4)
        phase = warp * phases + lane // (32 // phases)
        words = (address[:, None] + np.arange(0, max(nbytes, 4), 4)) >> 2
        key = np.unique((phase[:, None] << 24 | words).reshape(-1))
        banks, distinct = np.unique((key >> 24) << 5 | key & 31, return_counts=True)
        worst = np.zeros(int(banks.max() >> 5) + 1, np.int64)
        np.maximum.at(worst, banks >> 5, distinct)
        self.shared_requests += int((worst > 0).sum())
        self.shared_wavefronts += int(worst.sum())
