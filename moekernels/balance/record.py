"""What a run leaves about its experts, `experts.safetensors`: loads, who is chosen with whom, where
experts lie.

Legend: L layers with experts, E experts, P ranks that share a layer's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekernels import files
from moekernels.balance import placement
from moekernels.errors import UsageError

FILE = "experts.safetensors"


@dataclass(frozen=True)
class Record:
    """loads [L, E] fp64 of the last steps; pairs [L, E, E] int64, tokens that chose both, of the
    steps among them that were watched; slot_of [L, E] and node_of [L, P] int64, see
    `placement`."""

    loads: Tensor
    pairs: Tensor
    slot_of: Tensor
    node_of: Tensor

    @property
    def ranks(self) -> int:
        """P."""
        return self.node_of.shape[1]

    def write(self, folder: Path) -> None:
        from safetensors.torch import save

        tensors = {key: value.contiguous() for key, value in vars(self).items()}
        files.write(folder / FILE, save(tensors))

    @staticmethod
    def read(folder: Path) -> Record:
        """UsageError where the folder has none, or it cannot be right."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / FILE
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file; a run of `moekernels train` writes it at its end"
            )
        try:
            record = Record(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from None
        layers, experts = record.loads.shape
        shapes = {
            "pairs": (layers, experts, experts),
            "slot_of": (layers, experts),
            "node_of": (layers, record.ranks),
        }
        for key, shape in shapes.items():
            if tuple(getattr(record, key).shape) != shape:
                raise UsageError(f"{path}: {key} is not of {layers} layers and {experts} experts")
        placement.from_facts(record.slot_of.tolist(), layers, experts, str(path))
        return record

    @property
    def rank_loads(self) -> Tensor:
        """[L, P]."""
        return placement.rank_loads(self.loads, self.slot_of, self.ranks)

    def together(self) -> Tensor:
        """[L, E, E]: how many times as often as by chance two experts are chosen by one token; 0
        where nothing was watched, and on the diagonal."""
        pairs = self.pairs.double()
        alone = pairs.diagonal(dim1=1, dim2=2)  # [L, E]
        expected = alone[:, :, None] * alone[:, None, :]
        # Two draws without replacement from the same popularity: the sums over pairs agree.
        apart = 1 - torch.eye(pairs.shape[-1], dtype=torch.float64)
        scale = (expected * apart).sum((1, 2)) / (pairs * apart).sum((1, 2)).clamp_min(1)
        lift = pairs * scale[:, None, None] / expected.clamp_min(1e-300)
        return torch.where((expected > 0) & (apart > 0), lift, 0.0)
