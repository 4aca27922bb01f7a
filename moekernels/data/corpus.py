"""Text, tokenised once and kept in a memory-mapped cache that all ranks of a machine share."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moekernels import jsonio
from moekernels.data.shuffle import permutation
from moekernels.data.sources import STDLIB, fingerprint, list_files, read_documents
from moekernels.data.tokenizer import Tokenizer, check_vocab_size, library_version
from moekernels.errors import UsageError

_FORMAT = 1  # part of the cache's key; raise it when the files or the way to them change
_SAMPLE_BYTES = 4_000_000  # what the tokenizer is trained on: more text hardly changes the merges
_SHUFFLE_SEED = 0  # the same documents are held out in every run, whatever the run's seed


@dataclass(frozen=True)
class CorpusStats:
    source: str
    files: int
    skipped: dict[str, int]  # files of a directory that hold no text, by reason
    documents: int
    characters: int
    tokens: int  # the end of each text included
    vocab_size: int  # what the tokenizer reached, at most what was asked for
    unigram_entropy: float  # nats a token: the loss of a model that knows the frequencies only


@dataclass(frozen=True)
class Corpus:
    """`tokens[offsets[d]:offsets[d+1]]` is document d, the end of text last, in shuffled order."""

    folder: Path
    identity: str  # equal identities hold equal tokens
    stats: CorpusStats
    tokens: np.ndarray  # [N] uint16 or uint32, memory-mapped
    offsets: np.ndarray  # [documents+1] int64

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    def split(self, held_out: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
        """Documents for training and documents held out, as spans [n, 2] of `tokens`.

        Whole documents from the end are held out until their share is reached; where the last of
        them alone is much more than that (a single text file), its tail is.
        """
        if not 0 <= held_out < 1:
            raise UsageError(
                f"data: the held-out share is {held_out}; 0 up to less than 1 would do"
            )
        spans = np.stack([self.offsets[:-1], self.offsets[1:]], axis=1)
        target = int(len(self.tokens) * held_out)
        if held_out > 0:
            target = max(target, 2)  # a token and its label
        first = int(np.searchsorted(self.offsets, len(self.tokens) - target))
        if 2 * (len(self.tokens) - self.offsets[first]) >= target:
            return spans[:first], spans[first:]
        cut = len(self.tokens) - target
        train, held = spans[:first].copy(), spans[first - 1 :].copy()
        train[-1, 1] = held[0, 0] = cut
        return train, held


def load_corpus(
    source: str | Sequence[str] = STDLIB,
    *,
    vocab_size: int,
    cache: str | os.PathLike | None = None,
    text_field: str = "text",
    log: Callable[[str], None] | None = None,
) -> Corpus:
    """The tokenised corpus: from the cache, or built there once, whoever comes first.

    Every rank may call this; a lock lets one of them build and the others wait for it.
    """
    check_vocab_size(vocab_size)  # before any work, and where a cache would hide it
    files = list_files(source)
    key = [_FORMAT, library_version(), _SAMPLE_BYTES, vocab_size, text_field, fingerprint(files)]
    identity = hashlib.sha256(jsonio.dumps(key).encode()).hexdigest()[:24]
    root = Path(cache) if cache is not None else default_cache()
    folder = root / f"corpus-{identity}"
    if (corpus := _open(folder, identity)) is not None:
        return corpus
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"corpus-{identity}.lock"):
            if (corpus := _open(folder, identity)) is None:
                if log is not None:
                    what = f"{len(files)} files" if len(files) > 1 else str(files[0].path)
                    log(f"tokenising {what}, once; the result is kept in {folder}")
                documents, skipped = read_documents(files, text_field)
                name = source if isinstance(source, str) else ", ".join(source)
                _build(folder, name, len(files), documents, skipped, vocab_size)
                corpus = _open(folder, identity)
    except OSError as error:
        raise UsageError(
            f"data: the tokenised corpus cannot be kept in {root} ({error.strerror}); "
            "another cache folder, or XDG_CACHE_HOME set to one, would do"
        ) from error
    if corpus is None:
        raise RuntimeError(f"data: {folder} was written, but does not read back whole")
    return corpus


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekernels"


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the token frequencies, in nats."""
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:  # never deleted: whoever waits for it must see the same file
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder, source, files, documents, skipped, vocab_size) -> None:
    """Write everything beside the folder, then rename: a folder of this name is always whole."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):  # ours alone: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # what is there did not open
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        documents = [documents[i] for i in permutation(len(documents), _SHUFFLE_SEED, 0)]
        tokenizer = Tokenizer.train(_sample(documents), vocab_size)
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        tokens, lengths = tokenizer.encode_documents(documents, dtype)
        stats = CorpusStats(
            source=source,
            files=files,
            skipped=skipped,
            documents=len(documents),
            characters=sum(map(len, documents)),
            tokens=len(tokens),
            vocab_size=tokenizer.vocab_size,
            unigram_entropy=unigram_entropy(tokens),
        )
        tokenizer.save(partial / "tokenizer.json")
        np.save(partial / "tokens.npy", tokens)
        np.save(partial / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        meta = {"stats": asdict(stats), "sizes": sizes}
        (partial / "corpus.json").write_text(jsonio.dumps(meta, indent=1))
        for path in partial.iterdir():  # a name must not reach the disk before its contents
            with open(path) as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open(folder: Path, identity: str) -> Corpus | None:
    """The corpus in a folder, or None if it is not there or not whole."""
    try:
        meta = json.loads((folder / "corpus.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        return Corpus(
            folder=folder,
            identity=identity,
            stats=CorpusStats(**meta["stats"]),
            tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
            offsets=np.load(folder / "offsets.npy"),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sample(documents: list[str]) -> list[str]:
    """Up to _SAMPLE_BYTES of text: an equal share of the beginning of every document."""
    total = sum(map(len, documents))
    share = min(1.0, _SAMPLE_BYTES / total)
    return [document[: math.ceil(len(document) * share)] for document in documents]
