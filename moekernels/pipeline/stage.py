"""What one rank keeps between the forward and the backward of a microbatch: autograd at the border
of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .interleave import Passes, passes

Chunk = Callable[[Any, Tensor | None], Tensor]
"""`chunk(batch, x)`: x [rows, H], None on the first virtual stage; returns [rows, H], the last one
the loss (a scalar). One that exchanges rows in some layers and may be stopped there names them as
`exchanged_layers`, numbers in order.
"""


class Owed(Protocol):
    def run(self) -> object: ...


class Joined(Protocol):
    """Within `taking` backwards leave it gradients of weights; `run` computes what it has taken."""

    def taking(self) -> AbstractContextManager[object]: ...

    def run(self) -> object: ...

    def clear(self) -> None: ...


PutOff = Callable[[], AbstractContextManager[Owed]]
"""Within it a backward puts gradients of weights off; `run` of what it gives computes them."""


class Stage:
    """The chunks of one rank and their saved state.

    Between F and B only the input and the graph are kept. The output itself goes when it has been
    sent: backward starts from its gradient edge, which does not hold the data.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        put_off: PutOff | None = None,
        joined: Sequence[Joined] = (),
        at_once: int = 1,
    ):
        """Without `put_off` an I computes all gradients, and nothing is left to W. With `joined`,
        one a chunk, the gradients of weights of `at_once` backwards are computed together."""
        self.chunks = chunks
        self._put_off = put_off
        self._joined, self._at_once = joined, at_once
        self._waiting = [0] * len(chunks)  # backwards whose gradients of weights are kept
        self._saved: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}
        self._owed: dict[tuple[int, int], Owed | None] = {}

    def pieces(self, chunk: int) -> Passes | None:
        """A chunk's forward and backward in pieces that may take turns with another's; None where
        it has but one."""
        layers = getattr(self.chunks[chunk], "exchanged_layers", ())
        return passes(layers) if layers else None

    @property
    def in_flight(self) -> int:
        return len(self._saved)

    def forward(self, chunk: int, microbatch: int, batch: Any, x: Tensor | None) -> Tensor:
        """The detached output; x becomes a leaf whose gradient `backward` returns."""
        if x is not None:
            x.requires_grad_()
        with torch.enable_grad():
            output = self.chunks[chunk](batch, x)
        if not output.requires_grad:
            raise ValueError("the output needs no gradient: nothing in this chunk can be trained")
        self._saved[chunk, microbatch] = x, get_gradient_edge(output)
        return output.detach()

    def backward(
        self, chunk: int, microbatch: int, grad: Tensor | None, *, split: bool = False
    ) -> Tensor | None:
        """Accumulate the parameters' gradients, unless they are to be `joined` with others'; the
        gradient of the input, None on the first virtual stage.

        `grad` is the output's gradient; None on the last virtual stage, where the loss counts as it
        is (the batch has scaled it), so that its gradient is 1.
        """
        x, edge = self._saved.pop((chunk, microbatch))
        if self._joined and not split:
            with self._joined[chunk].taking():
                torch.autograd.backward([edge], [grad])
            self._waiting[chunk] += 1
            if self._waiting[chunk] == self._at_once:
                self.join(chunk)
        else:
            torch.autograd.backward([edge], [grad])
        if x is None:
            return None
        return torch.zeros_like(x) if x.grad is None else x.grad

    def backward_input(self, chunk: int, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """`backward` without the gradients of weights that can be put off: those stay owed."""
        with nullcontext() if self._put_off is None else self._put_off() as owed:
            result = self.backward(chunk, microbatch, grad, split=True)
        self._owed[chunk, microbatch] = owed
        return result

    def backward_weight(self, chunk: int, microbatch: int) -> Tensor | None:
        """The gradients that `backward_input` has put off; nothing leaves."""
        owed = self._owed.pop((chunk, microbatch))
        if owed is not None:
            owed.run()
        return None

    def join(self, chunk: int) -> None:
        """Compute the gradients of weights that are kept."""
        if self._joined:
            self._waiting[chunk] = 0
            self._joined[chunk].run()

    def clear(self) -> None:
        """Forget the microbatches of a step that failed."""
        self._saved.clear()
        self._owed.clear()
        for joined in self._joined:
            joined.clear()
        self._waiting = [0] * len(self.chunks)
