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

import ptx_emulator as ptx
from python_tests.support import emulated


class Devices:
    def __init__(self, emulator: emulated._Device, schedule: int | None, lazy: bool, resident):
        self.emulator, self.schedule, self.lazy = emulator, schedule, lazy
        self.resident = resident
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

        def record(module, kernel, blocks, threads, packed, shared_bytes):
            shape = (blocks, threads, packed, shared_bytes)
            self.launches.append(ptx.Launch(rank, module, kernel, *shape, stream))

        self.emulator.record, self.emulator.keep = record, self.kept.append
        try:
            yield
        finally:
            self.emulator.record = self.emulator.keep = None

    def run(self, *, again: bool = False) -> list[ptx.Stats]:
        """All that was recorded; `again`: it stays, as a graph does, to be run once more."""
        launches = self.launches
        try:
            return ptx.launch_together(
                launches, schedule=self.schedule, lazy=self.lazy, resident=self.resident
            )
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
