"""Byte-level BPE: any text in, the same text out, a vocabulary of the size that the model wants."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from moekernels.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of a text
_CHUNK = 1 << 17  # characters
_CHUNKS_AT_ONCE = 64


def library_version() -> str:
    """Part of the cache's key: another release may learn other merges."""
    try:
        return metadata.version("tokenizers")
    except metadata.PackageNotFoundError:
        raise UsageError(
            "data: the package tokenizers is missing; pip install tokenizers would do"
        ) from None


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"data: a vocabulary of {vocab_size} cannot hold the 256 bytes and the end of text; "
            f"at least {SMALLEST_VOCABULARY} would do"
        )


class Tokenizer:
    """A trained vocabulary. Id 0 ends a text."""

    end_of_text = 0

    def __init__(self, model) -> None:
        self._model = model  # tokenizers.Tokenizer, imported only when one is needed
        self._model.encode_special_tokens = (
            True  # a text that spells END_OF_TEXT does not end there
        )

    @property
    def vocab_size(self) -> int:
        """What training reached: a small text may not fill the vocabulary that was asked for."""
        return self._model.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        check_vocab_size(vocab_size)
        library_version()
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        library_version()
        from tokenizers import Tokenizer as Model

        return cls(Model.from_file(str(path)))

    def save(self, path: str | os.PathLike) -> None:
        Path(path).write_text(self._model.to_str(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def encode_documents(self, texts: Sequence[str], dtype) -> tuple[np.ndarray, np.ndarray]:
        """Documents -> (tokens [N], lengths [documents] int64), the end of text behind each.

        Long documents go in chunks that end at a line, which keeps the encoder's memory small and
        all cores busy.
        """
        chunks = [(i, chunk) for i, text in enumerate(texts) for chunk in _chunks(text)]
        parts: list[np.ndarray] = []
        lengths = np.zeros(len(texts), dtype=np.int64)
        for first in range(0, len(chunks), _CHUNKS_AT_ONCE):
            group = chunks[first : first + _CHUNKS_AT_ONCE]
            following = [i for i, _ in chunks[first + 1 : first + 1 + len(group)]] + [-1]
            encoded = self._model.encode_batch_fast(
                [chunk for _, chunk in group], add_special_tokens=False
            )
            for (document, _), after, encoding in zip(group, following, encoded):
                ids = encoding.ids if after == document else [*encoding.ids, self.end_of_text]
                parts.append(np.array(ids, dtype=dtype))
                lengths[document] += len(ids)
        return np.concatenate(parts), lengths


def _chunks(text: str) -> Iterable[str]:
    start = 0
    while len(text) - start > _CHUNK:
        cut = text.rfind("\n", start, start + _CHUNK) + 1 or start + _CHUNK
        yield text[start:cut]
        start = cut
    yield text[start:]
