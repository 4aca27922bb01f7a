"""Virtual ranks on one machine: what each gives its device is recorded, and all devices run
together in the emulator, over memory that they share.

    with emulated_devices(P, schedule=seed) as devices:
        for rank in range(P):
            with devices.on(rank):
                outputs[rank] = some_raw_op(...)   # allocated, not yet computed
        devices.run()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

import ptx_emulator as ptx
from python_tests.support import emulated


@cache
def _delay() -> ptx.Module:
    return ptx.Module(""".version 8.5
.target sm_80
.address_size 64
.visible .entry delay(.param .u64 delay_param_0) {
  .reg .pred %p<2>;
  .reg .b64 %rd<5>;
  ld.param.u64 %rd1, [delay_param_0];
  mov.u64 %rd2, %globaltimer;
$more:
  mov.u64 %rd3, %globaltimer;
  sub.s64 %rd4, %rd3, %rd2;
  setp.lt.s64 %p1, %rd4, %rd1;
  @%p1 bra $more;
  ret;
}
""")


class Devices:
    def __init__(self, emulator: emulated._Device, schedule: int | None, lazy: bool, resident):
        self.emulator, self.schedule, self.lazy = emulator, schedule, lazy
        self.resident = resident
        self.time, self.ahead = 1, {}  # of %globaltimer; and what some devices' shows beyond it
        self.launches: list[ptx.Launch] = []
        self.kept: list = []  # memory that recorded launches will touch

    @contextmanager
    def keeping(self) -> Iterator[Devices]:
        """Arrays that ops allocate within themselves live as long as this."""
        self.emulator.library.moekernels_emulate_keep(1)
        try:
            yield self
        finally:
            self.emulator.library.moekernels_emulate_keep(0)

    @contextmanager
    def on(self, rank: int, stream: int = 0) -> Iterator[None]:
        """Ops of this rank are recorded for its device."""

        def record(module, kernel, blocks, threads, packed, shared_bytes, how):
            shape = (blocks, threads, packed, shared_bytes)
            self.launches.append(ptx.Launch(rank, module, kernel, *shape, stream, **how))

        self.emulator.record, self.emulator.keep = record, self.kept.append
        try:
            yield
        finally:
            self.emulator.record = self.emulator.keep = None

    def delay(self, rank: int, ticks: int, stream: int = 0) -> None:
        """What this rank's stream is given next comes as much later."""
        launch = ptx.Launch(rank, _delay(), "delay", 1, 1, [np.uint64(ticks)], stream=stream)
        self.launches.append(launch)

    def run(self, *, again: bool = False) -> list[ptx.Stats]:
        """All that was recorded; `again`: it stays, as a graph does, to be run once more."""
        launches = self.launches
        try:
            stats = ptx.launch_together(
                launches,
                schedule=self.schedule,
                lazy=self.lazy,
                resident=self.resident,
                began=self.time,
                ahead=self.ahead,
            )
            self.time += sum(s.steps for s in stats)
            return stats
        finally:
            if not again:
                self.launches = []
                self.kept.clear()


@contextmanager
def emulated_devices(
    schedule: int | None = None, lazy: bool = False, resident: int | None = None
) -> Iterator[Devices]:
    with emulated.emulated_cuda(capability=90) as emulator:
        with Devices(emulator, schedule, lazy, resident).keeping() as devices:
            yield devices
