"""Keys and values of what was generated so far, a list of sequences a layer.

Legend: n new tokens of a sequence, m of them all, hq/hk heads, hd, hv widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.nn.masked import attend_last


class Cache:
    """`cu_seqlens` says which of the tokens of a forward pass are whose; `keep` says which
    sequences go on."""

    def __init__(self) -> None:
        self.cu_seqlens: list[int] = []
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        window: int,
        scale: float,
    ) -> Tensor:
        """q, k, v of all sequences' new tokens -> [T, hq, hv], over what is held and them."""
        held = self._held.get(layer, [])
        now, outputs = [], []
        for number, (a, b) in enumerate(zip(self.cu_seqlens, self.cu_seqlens[1:])):
            keys, values = k[a:b], v[a:b]
            if number < len(held):
                keys = torch.cat([held[number][0], keys])
                values = torch.cat([held[number][1], values])
            now.append((keys, values))
            outputs.append(attend_last(q[a:b], keys, values, sinks, window, scale))
        self._held[layer] = now
        return torch.cat(outputs)

    def keep(self, numbers: list[int]) -> None:
        """Only these sequences, by their places, from now on."""
        for layer, held in self._held.items():
            self._held[layer] = [held[number] for number in numbers]
