"""Where our tensors lie in the files of a Hugging Face folder: each is boxes, one a key.

transformers joins in memory what its files hold apart (the experts of a layer); here the files
count, so that a rank reads the slices that it holds and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moekernels.integrations.families import FAMILIES, file_names
from moekernels.model import tensors
from moekernels.model.decoder import DecoderSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A key of the files and the box of our tensor `name` that it is; leading ones of the box's
    size that the file's shape has not are left out there."""

    key: str
    shape: Shape  # in the file
    name: str
    begin: Shape
    size: Shape


def parts(spec: DecoderSpec, family: str) -> Iterator[Part]:
    """Every key that a model of the family has in its files, in the order of the layers."""
    if family not in FAMILIES:
        raise KeyError(family)
    for name, full in {**tensors.parameters(spec), **tensors.biases(spec)}.items():
        for expert, keys in enumerate(file_names(name, family, full)):
            axis = 1 if len(full) == 3 else 0  # 3: one box an expert, or the one FFN
            row = 0
            for key, rows in zip(keys, _rows(spec, name, full[axis], len(keys))):
                begin = (expert, row, 0) if len(full) == 3 else (row, 0)[: len(full)]
                size = (1, rows, full[2]) if len(full) == 3 else (rows, *full[1:])
                shape = size[1:] if len(full) == 3 else size
                yield Part(key, shape, name, begin, size)
                row += rows


def _rows(spec: DecoderSpec, name: str, rows: int, count: int) -> list[int]:
    """How many rows each of the tensors has that lie one behind the other in ours."""
    if name.endswith("attention.qkv"):
        heads, kv = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
        return [heads, kv, kv]
    return [rows // count] * count
