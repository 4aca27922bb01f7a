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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moekernels import jsonio
from moekernels.data import tokenised
from moekernels.data.documents import Documents, survey
from moekernels.data.mixture import Source
from moekernels.data.progress import Progress
from moekernels.data.shuffle import permutation
from moekernels.data.sources import REMEDY, STDLIB, TextFile, fingerprint, list_files
from moekernels.data.tokenised import Tokenised
from moekernels.data.tokenizer import Tokenizer, check_vocab_size, library_version
from moekernels.errors import UsageError
from moekernels.files import cache_folder, lock_file, no_room, read

_FORMAT = 2  # part of the cache's key; raise it when the files or the way to them change
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
    unigram_entropy: float  # nats per token: the loss of a model that knows the frequencies only


@dataclass(frozen=True)
class Corpus:
    """`tokens[offsets[d]:offsets[d+1]]` is document d, the end of text last, in shuffled order.

    Where sources have weights, the documents of each lie together, in the sources' order.
    """

    folder: Path
    identity: str  # equal identities hold equal tokens
    stats: CorpusStats
    tokens: np.ndarray  # [N] uint16 or uint32, memory-mapped
    offsets: np.ndarray  # [documents+1] int64
    sources: tuple[Source, ...] = ()  # those that have weights
    firsts: tuple[int, ...] = ()  # the first document of each
    evaluation: Corpus | None = None  # text of its own for the held-out loss

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    def split(self, held_out: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
        """Documents for training and documents held out, as spans [n, 2] of `tokens`.

        Whole documents from the end are held out until their share is reached; where the last of
        them alone is much more than that (a single text file), its tail is.
        """
        if not 0 <= held_out < 1:
            raise UsageError(f"data: the held-out share is {held_out}; use 0 up to less than 1")
        spans = np.stack([self.offsets[:-1], self.offsets[1:]], axis=1)
        begin, end = int(self.offsets[0]), int(self.offsets[-1])
        target = int((end - begin) * held_out)
        if held_out > 0:
            target = max(target, 2)  # a token and its label
        first = int(np.searchsorted(self.offsets, end - target))
        if 2 * (end - self.offsets[first]) >= target:
            return spans[:first], spans[first:]
        cut = end - target
        train, held = spans[:first].copy(), spans[first - 1 :].copy()
        train[-1, 1] = held[0, 0] = cut
        return train, held

    def parts(self) -> list[Corpus]:
        """What comes from each source that has a weight; else the corpus as it is."""
        if not self.sources:
            return [self]
        ends = (*self.firsts[1:], len(self.offsets) - 1)
        return [
            replace(
                self,
                stats=replace(self.stats, source=source.name, documents=end - first),
                offsets=self.offsets[first : end + 1],
                sources=(),
                firsts=(),
            )
            for source, first, end in zip(self.sources, self.firsts, ends)
        ]


def load_corpus(
    source: str | Sequence[str] | Sequence[Source] = STDLIB,
    *,
    vocab_size: int,
    cache: str | os.PathLike | None = None,
    text_field: str = "text",
    log: Callable[[str], None] | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> Corpus:
    """The tokenised corpus: from the cache, or built there once, whoever comes first.

    Every rank may call this; a lock lets one of them build and the others wait for it.
    `source`: files and folders; those that are drawn from by weight as `mixture.parse` gives them.
    `tokenizer`: a file that a run keeps, to be used instead of learning one.
    """
    check_vocab_size(vocab_size)  # before any work, and where a cache would hide it
    named = [source] if isinstance(source, str) else source
    several = [Source(one) if isinstance(one, str) else one for one in named]
    weighted = tuple(one for one in several if one.weight is not None)
    name = ", ".join(one.name for one in several)
    files = list_files([one.name for one in several])
    text: list[object] = [_FORMAT, text_field, fingerprint(files)]
    if weighted:  # which file is whose decides the order
        text.append(
            [sum(file.source == number for file in files) for number in range(len(several))]
        )
    key = [*text, library_version(), _SAMPLE_BYTES, vocab_size]
    tokens = [file.path for file in files if tokenised.is_tokenised(file.path)]
    if tokens and tokenizer is None:
        raise UsageError(
            f"data: {tokens[0]} holds tokens; name the tokenizer that made them with --tokenizer"
        )
    root = Path(cache) if cache is not None else cache_folder()
    given = None
    if tokenizer is not None:
        given = Tokenizer.load(tokenizer)
        if given.vocab_size > vocab_size:
            raise UsageError(
                f"{tokenizer}: {given.vocab_size} entries, but the vocabulary has {vocab_size}; "
                f"give --vocab-size {given.vocab_size}"
            )
        known = _open(root / f"corpus-{_hash(key)}")  # of the same release, as a rule
        if isinstance(known, Corpus) and known.identity == _identity(text, given):
            return replace(known, sources=weighted)
        key = [*text, given.hash()]
    folder = root / f"corpus-{_hash(key)}"
    corpus = _open(folder)
    if isinstance(corpus, Corpus):
        return replace(corpus, sources=weighted)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            corpus = _open(folder)
            if not isinstance(corpus, Corpus):
                if log is not None:
                    what = f"{len(files)} files" if len(files) > 1 else str(files[0].path)
                    damage = f"{folder} is damaged ({corpus}); " if corpus else ""
                    log(f"{damage}tokenising {what}, once; the result is kept in {folder}")
                with Progress(log) as progress:
                    progress.stage("reading", sum(map(_size, files)))
                    documents = (
                        tokenised.survey(files, given.end_of_text)
                        if given is not None and tokens
                        else survey(files, text_field, progress.advance)
                    )
                    _build(folder, name, documents, vocab_size, given, text, progress, weighted)
                corpus = _open(folder)
    except OSError as error:
        said = no_room(folder, error, remedy="set XDG_CACHE_HOME to another folder")
        raise UsageError(f"data: the tokenised corpus cannot be kept: {said}") from error
    if not isinstance(corpus, Corpus):
        raise RuntimeError(f"data: {folder} was written, but does not read back whole: {corpus}")
    return replace(corpus, sources=weighted)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of tokens that occur so often, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with lock_file(path) as file:  # never deleted: who waits for it must see the same file
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash(key: list[object]) -> str:
    return hashlib.sha256(jsonio.dumps(key).encode()).hexdigest()[:24]


def _identity(text: list[object], tokenizer: Tokenizer) -> str:
    """Of the same text in the same tokens, whichever release of tokenizers made them."""
    return _hash([*text, tokenizer.hash()])


def _size(file: TextFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError:
        return 0


def _build(
    folder: Path,
    source: str,
    documents: Documents | Tokenised,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    text: list[object],
    progress: Progress,
    weighted: tuple[Source, ...],
) -> None:
    """Write everything beside the folder, then rename: a folder of this name is always whole."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):  # ours alone: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # what is there did not open
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        order = permutation(len(documents), _SHUFFLE_SEED, 0)
        firsts: list[int] = []
        if weighted:
            order, firsts = _by_source(documents, order, weighted)
        characters = int(documents.characters.sum())
        if tokenizer is None:
            assert isinstance(documents, Documents)
            progress.stage(f"learning {vocab_size} tokens")
            sample = _sample(documents, order, characters)
            tokenizer = progress.wait_for(lambda: Tokenizer.train(sample, vocab_size))
        progress.stage("tokenising", len(documents))
        dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        lengths, counts = np.zeros(len(order), np.int64), np.zeros(vocab_size, np.int64)
        pieces = documents.encoded(order, tokenizer, dtype)
        with open(partial / "tokens.npy", "wb") as file:
            begin = _header(file, 0, dtype)
            done = 0
            for number, tokens in pieces:
                file.write(tokens.tobytes())
                lengths[number] += len(tokens)
                counts += np.bincount(tokens, minlength=vocab_size)
                progress.advance(number - done)
                done = number
            file.seek(0)
            if _header(file, int(lengths.sum()), dtype) != begin:
                raise RuntimeError("data: numpy's header is not as long for every length")
        documents.close()
        stats = CorpusStats(
            source=source,
            files=len(documents.files),
            skipped=documents.skipped,
            documents=len(documents),
            characters=characters,
            tokens=int(lengths.sum()),
            vocab_size=tokenizer.vocab_size,
            unigram_entropy=unigram_entropy(counts),
        )
        tokenizer.save(partial / "tokenizer.json")
        np.save(partial / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        meta = {
            "identity": _identity(text, tokenizer),
            "stats": asdict(stats),
            "firsts": firsts,
            "hashes": {path.name: _hash_of(path) for path in sorted(partial.iterdir())},
        }
        meta["hash"] = _hash([meta])
        (partial / "corpus.json").write_text(jsonio.dumps(meta, indent=1), encoding="utf-8")
        for path in partial.iterdir():  # a name must not reach the disk before its contents
            with open(path) as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _by_source(
    documents: Documents | Tokenised, order: np.ndarray, weighted: tuple[Source, ...]
) -> tuple[np.ndarray, list[int]]:
    """The documents' order with those of each source together, and where each begins."""
    source_of = np.array([file.source for file in documents.files])[documents.file]
    counts = np.bincount(source_of, minlength=len(weighted))
    for source, count in zip(weighted, counts):
        if not count:
            raise UsageError(f"data: no text in any file of {source.name}; {REMEDY}")
    order = order[np.argsort(source_of[order], kind="stable")]
    return order, (np.cumsum(counts) - counts).tolist()


def _header(file: BinaryIO, length: int, dtype: np.dtype) -> int:
    """Begin a .npy file of so many tokens; the header's end. numpy leaves room for the length to
    grow in place."""
    shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, {**shape, "shape": (length,)})
    return file.tell()


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path) -> Corpus | str:
    """The corpus in a folder; else why it is not whole, empty where there is no folder."""
    if not folder.exists():
        return ""
    try:
        meta = json.loads(read(folder / "corpus.json", 1 << 30))
        if meta.pop("hash") != _hash([meta]):
            return "corpus.json is not as it was written"
        for name, value in meta["hashes"].items():
            if not (folder / name).is_file() or _hash_of(folder / name) != value:
                return f"{name} is not as it was written"
        return Corpus(
            folder=folder,
            identity=meta["identity"],
            stats=CorpusStats(**meta["stats"]),
            tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
            offsets=np.load(folder / "offsets.npy"),
            firsts=tuple(meta.get("firsts", ())),
        )
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "corpus.json is not as it was written"


def _sample(documents: Documents, order: np.ndarray, characters: int) -> Iterator[str]:
    """Up to _SAMPLE_BYTES of text: an equal share of the beginning of every document."""
    share = min(1.0, _SAMPLE_BYTES / characters)
    for number in order:
        yield documents.beginning(number, math.ceil(documents.characters[number] * share))
