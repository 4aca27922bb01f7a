"""Attention: a register of its kinds, and the fields of all of them.

`nn.transformer` holds the module of each. A model has one kind: the first that its fields ask for.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.errors import UsageError
from moekernels.model import grouped, latent
from moekernels.model.grouped import GroupedSpec
from moekernels.model.latent import LatentSpec
from moekernels.model.spec import Part

ATTENTIONS: dict[str, Part] = {
    "latent": latent.PART,
    "grouped": grouped.PART,  # what is left, where no other is asked for
}


@dataclass(frozen=True)
class AttentionSpec(GroupedSpec, LatentSpec):
    @property
    def attention(self) -> str:
        """The kind's name in `ATTENTIONS`."""
        return next(name for name, kind in ATTENTIONS.items() if kind.asked(self))

    def check_attention(self) -> None:
        self.check_rotary(self.head_dim)
        *asked, _ = [name for name, kind in ATTENTIONS.items() if kind.asked(self)]
        if len(asked) > 1:
            raise UsageError(f"model: attention of several kinds, {', '.join(asked)}; ask for one")
        for kind in ATTENTIONS.values():
            kind.check(self)
