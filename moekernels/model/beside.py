"""What stands beside the routed experts: a register of kinds, and the fields of all of them.

Every token visits each kind that the specification asks for, and their results are added to the
routed experts'. `nn.moe` holds the module of each.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.model import shared
from moekernels.model.shared import SharedSpec
from moekernels.model.spec import Part

BESIDE: dict[str, Part] = {"shared": shared.PART}


@dataclass(frozen=True)
class BesideSpec(SharedSpec):
    @property
    def beside(self) -> list[str]:
        """The names in `BESIDE` of what a layer with experts has."""
        return [name for name, kind in BESIDE.items() if kind.asked(self)]

    def check_beside(self) -> None:
        for kind in BESIDE.values():
            kind.check(self)
