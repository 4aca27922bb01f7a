"""A share of the optimiser's state in the host's memory, brought to the device in chunks.

Of every flat tensor of masters and moments the first elements lie on the device, the others in
memory of the host. An update takes those through two sets of buffers: while it works on one chunk
the next one comes and the one before goes back. It works on whole lines with the function that
works on the device's own, so no bit hangs on the share. A CPU takes the same way, one thing after
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moekernels.errors import RunError

CHUNK = 1 << 22  # elements: 16 MB of fp32, at which a PCIe link is at its rate
KINDS = ("master", "exp_avg", "exp_avg_sq")

Span = tuple[int, int]  # from, to: of a flat tensor


@dataclass
class Held:
    """Masters or moments of a bucket, flat: `near` on the device, what follows `far` away."""

    near: Tensor
    far: Tensor

    @classmethod
    def zeros(cls, near: int, far: int, dtype: torch.dtype, device: torch.device) -> Held:
        return cls(torch.zeros(near, dtype=dtype, device=device), host_zeros(far, dtype, device))

    @property
    def dtype(self) -> torch.dtype:
        return self.near.dtype

    def parts(self, begin: int, end: int) -> Iterator[tuple[Span, Tensor]]:
        """What elements begin ... end-1 lie in: one tensor or two, each with its elements."""
        cut = len(self.near)
        if begin < min(end, cut):
            yield (begin, min(end, cut)), self.near[begin : min(end, cut)]
        if max(begin, cut) < end:
            yield (max(begin, cut), end), self.far[max(begin, cut) - cut : end - cut]


def host_zeros(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [length] in the host's memory, where `device` can read and write them by itself."""
    x = torch.zeros(length, dtype=dtype)
    if device.type == "cuda" and length:
        # torch's own pinned memory comes in powers of two, up to twice of what is asked for.
        size = length * x.element_size()
        error = torch.cuda.cudart().cudaHostRegister(x.data_ptr(), size, 0)
        if int(error):
            raise RunError(
                f"--offload-optimizer: the host cannot pin {size / 1e9:.1f} GB for a card (CUDA "
                f"error {int(error)}); use a smaller share, or raise `ulimit -l`"
            )
    return x


class Lanes(Protocol):
    """Where work is put in order: each lane's by itself, besides what it has to wait for."""

    def do(self, lane: str, work: Callable[[], None], after: Sequence[Any]) -> Any:
        """Have a lane work once all of `after` has come to pass; what tells that it is done."""

    def mark(self) -> Any:
        """What tells that all that the update was given so far is done."""

    def wait(self, event: Any) -> None:
        """Have what the update is given next wait."""

    def settle(self) -> None:
        """Wait until all lanes are done: the host reads what they wrote."""


class OneLane:
    """Of a CPU: all is done when it is asked for."""

    def do(self, lane: str, work: Callable[[], None], after: Sequence[Any]) -> None:
        work()

    def mark(self) -> None:
        pass

    def wait(self, event: Any) -> None:
        pass

    def settle(self) -> None:
        pass


class StreamLanes:
    """Of a GPU: a stream for each way of the link, beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = {lane: torch.cuda.Stream(device) for lane in ("in", "out")}

    def do(self, lane: str, work: Callable[[], None], after: Sequence[Any]) -> torch.cuda.Event:
        stream = self.streams[lane]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            work()
            return stream.record_event()

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        for stream in self.streams.values():
            stream.synchronize()


class Streamed:
    """Two sets of buffers, and the lanes that fill and empty them."""

    def __init__(self, device: torch.device, lanes: Lanes | None = None) -> None:
        self.device = device
        self.lanes = lanes or (StreamLanes(device) if device.type == "cuda" else OneLane())
        self._buffers: list[list[Tensor]] = [[], []]
        self._free: list[Any] = [None, None]  # when what a set held is back in the host's memory

    def brought(self, spans: Sequence[Span], far: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """For each span the same elements of all of `far`, on the device; what is written into
        them goes back."""
        self._make_room(max((end - begin for begin, end in spans), default=0), far)
        arrived = self._bring(0, spans[0], far) if spans else None
        for number, span in enumerate(spans):
            later = None
            if number + 1 < len(spans):
                later = self._bring(number + 1, spans[number + 1], far)
            here = self._views(number, span, far)
            self.lanes.wait(arrived)
            yield here
            self._free[number % 2] = self._send(span, here, far)
            arrived = later

    def _make_room(self, longest: int, far: Sequence[Tensor]) -> None:
        """Buffers are kept as bytes: of any dtype that a bucket has."""
        needed = [longest * x.element_size() for x in far]
        for buffers in self._buffers:
            for place, size in enumerate(needed):
                if place == len(buffers):
                    buffers.append(torch.empty(0, dtype=torch.uint8, device=self.device))
                if len(buffers[place]) < size:
                    self.lanes.settle()
                    buffers[place] = torch.empty(size, dtype=torch.uint8, device=self.device)
                    # Memory that something may still compute in.
                    self._free = [self.lanes.mark()] * 2

    def _views(self, number: int, span: Span, far: Sequence[Tensor]) -> list[Tensor]:
        length = span[1] - span[0]
        return [
            buffer[: length * x.element_size()].view(x.dtype)
            for buffer, x in zip(self._buffers[number % 2], far)
        ]

    def _bring(self, number: int, span: Span, far: Sequence[Tensor]) -> Any:
        here = self._views(number, span, far)

        def copy() -> None:
            for to, x in zip(here, far):
                to.copy_(x[slice(*span)], non_blocking=True)

        free = self._free[number % 2]
        return self.lanes.do("in", copy, [] if free is None else [free])

    def _send(self, span: Span, here: list[Tensor], far: Sequence[Tensor]) -> Any:
        def copy() -> None:
            for x, came in zip(far, here):
                x[slice(*span)].copy_(came, non_blocking=True)

        return self.lanes.do("out", copy, [self.lanes.mark()])

    @property
    def bytes(self) -> int:
        return sum(len(x) for buffers in self._buffers for x in buffers)
