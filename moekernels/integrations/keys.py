"""Where our tensors lie in the files of a Hugging Face folder: each is boxes, one a key.

transformers joins in memory what its files hold apart (the experts of a layer); here the files
count, so that a rank reads the slices that it holds and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moekernels.integrations.families import FAMILIES, file_names, form_of
from moekernels.model import tensors
from moekernels.model.decoder import DecoderSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A key of the files and the box of our tensor `name` that it is; leading ones of the box's
    size that the file's shape has not are left out there. form: as in `families.form_of`."""

    key: str
    shape: Shape  # in the file
    name: str
    begin: Shape
    size: Shape
    form: str = ""
    wide: bool = False  # in fp32, whatever the others are in


def parts(spec: DecoderSpec, family: str) -> Iterator[Part]:
    """Every key that a model of the family has in its files, in the order of the layers."""
    for name, full in {**tensors.parameters(spec), **tensors.biases(spec)}.items():
        groups, form = file_names(name, family, full), form_of(name, family)
        wide = name.endswith(tensors.SELECTION_BIAS)
        wide |= FAMILIES[family].wide_router and name.endswith("router.weight")
        apart = len(full) == 3 and not form and len(groups) == full[0]  # an expert, or the one FFN
        for expert, keys in enumerate(groups):
            row = 0
            for key, rows in zip(keys, _rows(spec, name, full[1 if apart else 0], len(keys))):
                if apart:
                    yield Part(key, (rows, full[2]), name, (expert, row, 0), (1, rows, full[2]))
                else:
                    size = (rows, *full[1:])
                    shape = (*size[:-2], size[-1], size[-2]) if "transposed" in form else size
                    begin = (row, *(0 for _ in full[1:]))
                    yield Part(key, shape, name, begin, size, form, wide)
                row += rows


def _rows(spec: DecoderSpec, name: str, rows: int, count: int) -> list[int]:
    """How many rows each of the tensors has that lie one behind the other in ours."""
    if name.endswith(("attention.qkv", "attention.qkv_bias")):
        heads, kv = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
        return [heads, kv, kv]
    return [rows // count] * count
