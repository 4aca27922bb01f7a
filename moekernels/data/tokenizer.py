"""Byte-level BPE: any text in, the same text out, a vocabulary of the size that the model wants."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

from moekernels import files
from moekernels.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
BESIDE = "tokenizer_config.json"  # of a Hugging Face tokenizer: which token ends a text, say
LARGEST = 1 << 29  # bytes of a tokenizer.json
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of a text
_CHUNK = 1 << 17  # characters
_CHUNKS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = _CHUNK * min(max(os.cpu_count() or 1, 4), 16)  # about 30 bytes for each
_SAMPLE_PIECE = 1 << 18  # characters
_LONG_RUN = re.compile(r"\S{256}|\s{256}")  # longer than any word: data, or one letter repeated


def library_version() -> str:
    """Part of the cache's key: another release may learn other merges."""
    try:
        return metadata.version("tokenizers")
    except metadata.PackageNotFoundError:
        raise UsageError(
            "data: the package tokenizers is missing; run pip install tokenizers"
        ) from None


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"data: a vocabulary of {vocab_size} cannot hold the 256 bytes and the end of text; "
            f"use at least {SMALLEST_VOCABULARY}"
        )


def find_tokenizer(name: str) -> Path:
    """The tokenizer.json that a user names, or that lies in the folder that he names; UsageError
    where there is none."""
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"--tokenizer {name}: {path} is no file; give a tokenizer.json")
    return path


class Tokenizer:
    """A vocabulary: one that was trained here, or a Hugging Face tokenizer.

    `end_of_text`: the id that ends a text. `beside`: what a tokenizer_config.json says beside it.
    """

    def __init__(self, model, text: str | None = None, beside: str | None = None) -> None:
        self._model = model  # tokenizers.Tokenizer, imported only when one is needed
        self._beside = beside
        self.end_of_text = _end_of_text(model, beside)
        # As it was written: another release may write the same tokenizer in other words.
        self._json = model.to_str() if text is None else text
        # A text that spells END_OF_TEXT does not end there.
        self._model.encode_special_tokens = True

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
        model.train_from_iterator(_bounded(texts), trainer)
        return cls(model)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        library_version()
        from tokenizers import Tokenizer as Model

        beside = Path(path).with_name(BESIDE)
        try:
            text = files.read(path, LARGEST)
            more = files.read(beside) if beside.is_file() else None
            return cls(Model.from_str(text), text, more)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except Exception as error:  # noqa: BLE001, tokenizers raises nothing more specific
            raise UsageError(
                f"{path}: no tokenizer that can be read: {files.said(error)}"
            ) from None

    def save(self, path: str | os.PathLike) -> None:
        files.write(path, self._json)
        if self._beside is not None:
            files.write(Path(path).with_name(BESIDE), self._beside)

    def hash(self) -> str:
        """Of all that decides how a text is encoded."""
        beside = "" if self._beside is None else f"\n{self.end_of_text}"
        return hashlib.sha256((self._json + beside).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def encode_documents(
        self, documents: Iterable[Iterable[str]], dtype
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Documents, each in parts of any size -> (its number, tokens), piece by piece and in
        order; behind each document the end of text.

        The encoder gets chunks that end at a line, several at once: its memory stays small and all
        cores are busy.
        """
        for group in _groups(_numbered_chunks(documents)):
            encoded = self._model.encode_batch_fast(
                [chunk for _, chunk, _ in group], add_special_tokens=False
            )
            for (number, _, last), encoding in zip(group, encoded):
                ids = [*encoding.ids, self.end_of_text] if last else encoding.ids
                yield number, np.array(ids, dtype=dtype)


def _end_of_text(model, beside: str | None) -> int:
    """The id that ends a text: what `beside` calls eos_token, else ours; UsageError for neither."""
    token = END_OF_TEXT
    if beside is not None:
        said = json.loads(beside).get("eos_token")
        said = said.get("content") if isinstance(said, dict) else said
        token = said or token
    number = model.token_to_id(token)
    if number is None:
        raise UsageError(
            f"no token {token} that ends a text; say in {BESIDE} beside it which is the eos_token"
        )
    return number


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut within words of hundreds of letters: learning takes the square of a word's
    length. And cut behind a line where they are long: it takes 100 bytes for each letter."""
    for piece in (piece for text in texts for piece in _chunks([text], _SAMPLE_PIECE)):
        start = 0
        for run in _LONG_RUN.finditer(piece):
            yield piece[start : run.end()]
            start = run.end()
        yield piece[start:]


def _numbered_chunks(documents: Iterable[Iterable[str]]) -> Iterator[tuple[int, str, bool]]:
    """(document, chunk, whether it is the document's last)."""
    for number, parts in enumerate(documents):
        before: str | None = None
        for chunk in _chunks(parts):
            if before is not None:
                yield number, before, False
            before = chunk
        assert before is not None, "_chunks yields one at least"
        yield number, before, True


def _chunks(parts: Iterable[str], most: int = _CHUNK) -> Iterator[str]:
    """At least one, each of at most so many characters, cut behind a line where there is one."""
    text = ""
    for part in parts:
        text, start = text + part, 0
        while len(text) - start > most:
            cut = text.rfind("\n", start, start + most) + 1 or start + most
            yield text[start:cut]
            start = cut
        text = text[start:]
    yield text


def _groups(chunks: Iterable[tuple[int, str, bool]]) -> Iterator[list[tuple[int, str, bool]]]:
    group, size = [], 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk[1])
        if size >= _CHARACTERS_AT_ONCE or len(group) == _CHUNKS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group
