"""Numbers that are not finite: the step that has them is not applied, the state that has them is
not saved.

Every decision comes from numbers that are summed over all ranks, so every rank takes the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moekernels.errors import RunError
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import gather
from moekernels.parallel.optimizer import main_grad_of
from moekernels.parallel.shard import ShardInfo
from moekernels.parallel.tensor import all_reduce

Shards = Sequence[tuple[str, Tensor, ShardInfo]]

WORDS = {
    "loss": "its loss",
    "aux": "its load-balancing loss",
    "z": "its router's z-loss",
    "grad_norm": "its gradient's norm",
}


class Guard:
    """Judges each step and each state of a run, on all ranks alike.

    `allowed` steps in a row may be skipped; `in_a_row` were, up to where the run begins.
    """

    def __init__(self, shards: Shards, mesh: Mesh, allowed: int, in_a_row: int = 0) -> None:
        self.shards, self.mesh, self.allowed, self.in_a_row = shards, mesh, allowed, in_a_row
        self.why = ""

    def passes(self, line: dict, largest_norm: float, clip: float) -> bool:
        """Whether a step may be applied, by its line of metrics; `line["skipped"]` says it too.

        `largest_norm`: of a (clipped) gradient whose squares the optimiser's moments can hold.
        """
        bad = [key for key in WORDS if not math.isfinite(line[key])]
        if bad:
            self.why = f"{WORDS[bad[0]]} is {line[bad[0]]}, {self._where('loss' in bad)}"
        elif min(line["grad_norm"], clip or math.inf) > largest_norm:
            self.why = "AdamW cannot hold the square of its gradient; use --clip 1"
        else:
            self.why = ""
        self.in_a_row = self.in_a_row + 1 if self.why else 0
        line["skipped"] = int(bool(self.why))
        return not self.why

    def stop_or_say(self, line: dict) -> str:
        """After a step: RunError where it ends the run, else what to tell the user, or nothing."""
        step = line["step"]
        if self.why and self.in_a_row > self.allowed:
            others = f" {self.allowed} before it were skipped;" if self.allowed else ""
            more = f"--skip-bad-steps {max(1, 2 * self.allowed)} would let more of them pass"
            raise RunError(
                f"step {step} is not applied: {self.why} (loss {line['loss']:.6g}, gradient's "
                f"norm {line['grad_norm']:.6g});{others} the checkpoints before it are as they "
                f"were; use a lower --lr, a longer --warmup or a smaller --clip; {more}"
            )
        if not math.isfinite(held_out := line.get("eval_loss", 0.0)):
            raise RunError(
                f"the held-out loss after step {step} is {held_out}, {self._where(True)}; nothing "
                f"of this step is saved; use a lower --lr or a longer --warmup"
            )
        return f"step {step} skipped: {self.why}" if self.why else ""

    def check_state(self, step: int, state: Iterable[tuple[str, Tensor, ShardInfo]]) -> None:
        """Before anything is saved: RunError where a tensor of the state is not finite. Reads the
        state once."""
        bad = self._first([(name, x, info) for name, x, info in state if not _finite(x)])
        if bad:
            raise RunError(
                f"the state after step {step} is not finite, first in {bad}; it is not saved, the "
                f"checkpoints before it are as they were; use a lower --lr"
            )

    def _where(self, in_forward: bool) -> str:
        """The parameter to look at: one that is not finite itself, else the gradient that a
        backward pass reached first. A loss that is not finite spoils every gradient."""
        bad = self._first([x for x in self.shards if not _finite(x[1])])
        if bad:
            return f"and {bad} itself is not finite"
        if in_forward:
            return "though every parameter is finite"
        gradients = [(name, main_grad_of(p), info) for name, p, info in self.shards]
        bad = self._first([x for x in gradients if not _finite(x[1])])
        return f"first in {bad}" if bad else "though every gradient is finite"

    def _first(self, bad: Shards) -> str:
        """Of all ranks' tensors that are not finite, the one nearest to the loss: its name, layer
        and expert. Empty where there is none."""
        mine = max((_place(*x, number) for number, x in enumerate(bad)), default=None)
        count = torch.tensor([len(bad)], dtype=torch.float64, device=self.mesh.device)
        if not all_reduce(count, self.mesh.world).item():
            return ""
        places = gather(mine, self.mesh.world.size)
        return max(place for place in places if place is not None)[-1]


def _finite(x: Tensor) -> bool:
    if not x.numel():
        return True
    low, high = torch.aminmax(x.detach())  # one pass, and NaN comes through
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _place(name: str, x: Tensor, info: ShardInfo, number: int) -> tuple[int, int, int, str]:
    """Sorts by nearness to the loss: layer, place within the layer, and the lower expert first."""
    parts = name.split(".")
    layer = expert = None
    if "layers" in parts:
        layer = int(parts[parts.index("layers") + 1])
    if "experts" in parts:
        local = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        piece = next(p for p in info.pieces if 0 <= local - p.local[0] < p.size[0])
        expert = piece.full[0] + local - piece.local[0]
    text = name
    if layer is not None:
        text += f" (layer {layer}" + (f", expert {expert})" if expert is not None else ")")
    depth = layer if layer is not None else 0 if "embedding" in name else 1 << 30
    return depth, number, -(expert or 0), text
