"""Text that somebody else has tokenised: numpy's .npy, and Megatron's .bin with its .idx.

A one-dimensional .npy is one stream, whose documents end at the tokenizer's end of text; the rows
of a two-dimensional one are documents. An .idx says where documents lie in the .bin beside it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moekernels.data.sources import TextFile, Unfit, refuse_if_named, unreadable
from moekernels.data.tokenizer import Tokenizer
from moekernels.errors import UsageError

_BLOCK = 1 << 22  # tokens looked at at once
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document bounds
_CODES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}  # those of whole numbers


class _Array(NamedTuple):
    """The tokens of a file, and where its documents begin and end in them."""

    tokens: np.ndarray  # [N], memory-mapped
    spans: np.ndarray  # [D, 2] int64


@dataclass
class Tokenised:
    """All documents of some files of tokens, in the files' order; as `documents.Documents`."""

    files: list[TextFile]
    file: np.ndarray  # [D] int64, into files
    spans: np.ndarray  # [D, 2] int64, into the file's tokens
    arrays: dict[int, np.ndarray]
    skipped: dict[str, int]  # files that hold no tokens, by reason
    characters: np.ndarray = field(init=False)  # [D] int64: nobody knows

    def __post_init__(self) -> None:
        self.characters = np.zeros(len(self.file), np.int64)

    def __len__(self) -> int:
        return len(self.file)

    def encoded(
        self, order: Sequence[int] | np.ndarray, tokenizer: Tokenizer, dtype: np.dtype
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Documents in that order -> (its place there, tokens), piece by piece; behind each the end
        of text, where it does not end so already. UsageError for an id that is no token."""
        for number, one in enumerate(order):
            index = int(self.file[one])
            begin, end = map(int, self.spans[one])
            tokens = self.arrays[index]
            for first in range(begin, end, _BLOCK):
                piece = np.asarray(tokens[first : min(first + _BLOCK, end)])
                bad = (piece < 0) | (piece >= tokenizer.vocab_size)
                if bad.any():
                    place = int(bad.argmax())
                    raise UsageError(
                        f"data: {self.files[index].path}: token {first + place} is {piece[place]}, "
                        f"but the tokenizer has {tokenizer.vocab_size} entries; name the one that "
                        "made them with --tokenizer"
                    )
                yield number, piece.astype(dtype)
            if begin == end or tokens[end - 1] != tokenizer.end_of_text:
                yield number, np.array([tokenizer.end_of_text], dtype)

    def close(self) -> None:
        self.arrays.clear()


def is_tokenised(path: Path) -> bool:
    """Whether a file holds tokens, by its name."""
    return path.suffix.lower() in (".npy", ".idx") or _is_half(path)


def _is_half(path: Path) -> bool:
    """Whether it is a .bin that an .idx speaks of."""
    return path.suffix.lower() == ".bin" and os.path.exists(path.with_suffix(".idx"))


def survey(files: list[TextFile], end_of_text: int) -> Tokenised:
    """Where the documents of files of tokens lie. Text beside them is skipped, or refused where it
    is named."""
    file, spans, arrays = [], [], {}
    skipped: dict[str, int] = {}
    for index, one in enumerate(files):
        if _is_half(one.path):
            continue  # the .idx beside it speaks for both
        try:
            if not is_tokenised(one.path):
                raise Unfit("text beside tokens", "; give either")
            found = _npy(one.path, end_of_text) if _is_npy(one.path) else _megatron(one.path)
        except (Unfit, OSError) as error:
            fault = error if isinstance(error, Unfit) else unreadable(error)
            refuse_if_named(one, fault)
            skipped[fault.reason] = skipped.get(fault.reason, 0) + 1
            continue
        arrays[index] = found.tokens
        file.append(np.full(len(found.spans), index, np.int64))
        spans.append(found.spans)
    if not file or not sum(map(len, file)):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UsageError(f"data: no tokens in any of the {len(files)} files ({reasons})")
    return Tokenised(files, np.concatenate(file), np.concatenate(spans), arrays, skipped)


def _is_npy(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def _npy(path: Path, end_of_text: int) -> _Array:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise Unfit("no .npy file", f" ({error})") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        what = f" ({tokens.dtype} {list(tokens.shape)})"
        raise Unfit("not an array of token ids, [N] or [documents, length]", what)
    if tokens.ndim == 2:
        rows, length = tokens.shape
        begins = np.arange(rows, dtype=np.int64) * length
        return _Array(tokens.reshape(-1), np.stack([begins, begins + length], axis=1))
    ends = [
        first + 1 + np.flatnonzero(tokens[first : first + _BLOCK] == end_of_text)
        for first in range(0, len(tokens), _BLOCK)
    ]
    bounds = np.concatenate([[0], *ends, [len(tokens)]]).astype(np.int64)
    bounds = np.unique(bounds)
    return _Array(tokens, np.stack([bounds[:-1], bounds[1:]], axis=1))


def _megatron(index: Path) -> _Array:
    """Of Megatron-Core's IndexedDataset: the .idx holds the header, the sequences' lengths (int32)
    and places in bytes (int64), and the first sequence of every document (int64) with their number
    behind it."""
    data = index.with_suffix(".bin")
    try:
        raw = index.read_bytes()
        magic, version, code, sequences, bounds = _HEADER.unpack_from(raw)
    except struct.error:
        raise Unfit("no .idx file of Megatron", " (it is too short)") from None
    except FileNotFoundError:
        raise Unfit("half of a pair", f" ({index.name} is missing)") from None
    if magic != _MAGIC or version != 1 or code not in _CODES:
        said = f" (magic {magic!r}, version {version}, dtype {code})"
        raise Unfit("no .idx file of Megatron that holds whole numbers", said)
    if len(raw) < _HEADER.size + 12 * sequences + 8 * bounds:
        raise Unfit("cut short", f" ({len(raw)} bytes for {sequences} sequences)")
    at = _HEADER.size
    lengths = np.frombuffer(raw, "<i4", sequences, at).astype(np.int64)
    places = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
    firsts = np.frombuffer(raw, "<i8", bounds, at + 12 * sequences)
    dtype = np.dtype("<" + _CODES[code])
    if not data.exists():
        raise Unfit("half of a pair", f" ({data.name} is missing)")
    held = data.stat().st_size
    ends = places + lengths * dtype.itemsize
    whole = (lengths >= 0).all() and (places >= 0).all() and (places % dtype.itemsize == 0).all()
    joined = np.array_equal(places[1:], ends[:-1])
    in_order = bounds > 0 and firsts[0] == 0 and firsts[-1] == sequences
    if not (whole and joined and in_order and (np.diff(firsts) >= 0).all()):
        raise Unfit("damaged", " (its sequences do not lie one behind the other)")
    if sequences and ends[-1] > held:
        raise Unfit("cut short", f" ({data.name} has {held} bytes, {ends[-1]} are spoken of)")
    if not sequences:
        return _Array(np.zeros(0, dtype), np.zeros((0, 2), np.int64))
    places = np.append(places, ends[-1]) // dtype.itemsize
    spans = np.stack([places[firsts[:-1]], places[firsts[1:]]], axis=1)
    return _Array(np.memmap(data, dtype, "r"), spans[spans[:, 1] > spans[:, 0]])
