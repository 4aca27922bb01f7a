"""The step's number and the seed alone decide a batch, so a resumed run needs no other state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from moekernels.data.batch import MicroBatch
from moekernels.data.batch_plan import BatchPlan, Cost, plan_batch
from moekernels.data.corpus import Corpus
from moekernels.data.mixture import Mixture
from moekernels.data.shuffle import integers, permutation
from moekernels.errors import UsageError

_ORDER, _LENGTHS, _OFFSETS = 1 << 40, 2 << 40, 3 << 40  # streams of random numbers, plus the epoch


@dataclass(frozen=True)
class Pieces:
    """Documents cut into sequences of at most the context.

    Each reads one token more than it is long, the next piece's first or the end of the text, so
    every token has a label. Nothing is truncated: the last piece holds what remains.
    """

    starts: np.ndarray  # [n] int64, into the corpus' tokens
    lengths: np.ndarray  # [n] int64
    documents: int
    cut: int  # documents longer than the context
    context: int

    @staticmethod
    def of(spans: np.ndarray, context: int) -> Pieces:
        sizes = spans[:, 1] - spans[:, 0] - 1
        counts = -(-sizes // context)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Pieces(
            starts=np.repeat(spans[:, 0], counts) + within * context,
            lengths=np.minimum(np.repeat(sizes, counts) - within * context, context),
            documents=len(spans),
            cut=int((counts > 1).sum()),
            context=context,
        )

    def __len__(self) -> int:
        return len(self.starts)

    def describe(self) -> str:
        cut = f"{self.cut} of {self.documents} training documents are longer and cut"
        return f"{len(self)} sequences of at most {self.context} tokens ({cut})"

    def draw(self, first: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of sequences first ... first+count-1 of all epochs laid end to end."""
        chosen = _chosen(len(self), first, count, seed)
        return self.starts[chosen], self.lengths[chosen]


@dataclass(frozen=True)
class Sampler:
    """Sequences of random lengths, low ... high uniformly, cut from the stream of all documents.

    The stream is divided into windows of `high` tokens; an epoch visits each once, in random order,
    and takes a sequence of the drawn length from a random place in it.
    """

    start: int
    count: int
    low: int
    high: int

    def __len__(self) -> int:
        return self.count

    def describe(self) -> str:
        return f"lengths drawn from {self.low} to {self.high}"

    def draw(self, first: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = integers(self.low, self.high, count, seed, _LENGTHS, first)
        slack = self.high - lengths + 1
        offsets = integers(0, (1 << 62) - 1, count, seed, _OFFSETS, first) % slack
        chosen = _chosen(self.count, first, count, seed)
        return self.start + chosen * self.high + offsets, lengths


@lru_cache(maxsize=8)
def _epoch(size: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(size, seed, _ORDER + epoch)


def _chosen(size: int, first: int, count: int, seed: int) -> np.ndarray:
    epochs, places = np.divmod(np.arange(first, first + count), size)
    parts = [_epoch(size, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(parts)


def _extent(spans: np.ndarray) -> int:
    """Tokens from the first document to the last; they lie side by side."""
    return int(spans[-1, 1] - spans[0, 0]) if len(spans) else 0


@dataclass
class BatchLoader:
    """Microbatches of one data-parallel rank.

    sequences: in a step, over all data-parallel ranks. microbatches: in a step on each rank,
    accumulation steps included. align: the tensor-parallel size. Other options: see `plan_batch`.
    """

    corpus: Corpus
    sequences: int
    microbatches: int
    context: int | None = None  # the longest sequence; documents beyond are cut
    lengths: tuple[int, int] | None = None  # instead of a context: random lengths, low ... high
    dp: int = 1
    dp_rank: int = 0
    align: int = 1
    policy: str = "packed"
    cost: Cost = field(default_factory=Cost)
    max_tokens: int | None = None
    makespan: Callable[[list[float]], float] | None = None
    seed: int = 0
    held_out: float = 0.02

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise UsageError(f"batch: {self.sequences} sequences per step; use at least 1")
        if (self.context is None) == (self.lengths is None):
            raise UsageError("batch: use either a context or a range of lengths")
        own = self.corpus.evaluation
        if own is not None:
            self.held_out = 0.0  # the whole text is for training
        train, held_out = zip(*(part.split(self.held_out) for part in self.corpus.parts()))
        self.train = self._pool(self.corpus, train, self.lengths, "training")
        self._eval: Pieces | Sampler | Mixture | None = None
        if own is not None or self.held_out > 0:
            source = own or self.corpus
            spans = [part.split(0)[0] for part in own.parts()] if own else held_out
            self._eval = self._pool(source, spans, self.lengths, "the held-out loss", shorten=True)
        self.plan(1)  # what cannot be planned shows before anything else is set up

    def _pool(
        self,
        corpus: Corpus,
        spans: Sequence[np.ndarray],
        lengths: tuple[int, int] | None,
        purpose: str,
        shorten: bool = False,
    ) -> Pieces | Sampler | Mixture:
        """What sequences are drawn from, of the spans of each part of a corpus."""
        pools = []
        for part, own in zip(corpus.parts(), spans):
            fitting = lengths
            if shorten and lengths:
                # Fewer tokens than the longest sequence: shorter sequences, never refused.
                low, high = (max(min(n, _extent(own) - 1), 1) for n in lengths)
                fitting = low, high
            pools.append(self._one_pool(part, own, fitting, purpose))
        return Mixture.of(pools, corpus.sources) if corpus.sources else pools[0]

    def _one_pool(
        self, corpus: Corpus, spans: np.ndarray, lengths: tuple[int, int] | None, purpose: str
    ) -> Pieces | Sampler:
        tokens = _extent(spans)
        left = f"data: {corpus.stats.source} leaves {tokens} tokens for {purpose}"
        if lengths is None:
            if self.context is None or self.context < 1:
                raise UsageError(f"batch: the context is {self.context}; use at least 1")
            pool = Pieces.of(spans, self.context)
            if not len(pool):
                raise UsageError(f"{left}; use a longer text")
            return pool
        low, high = lengths
        if not 1 <= low <= high:
            raise UsageError(f"batch: lengths {low}:{high}; use low:high with 1 <= low <= high")
        if tokens <= high:
            raise UsageError(
                f"{left}, too few for lengths {low}:{high}; "
                f"use a longer text, or lengths up to {max(tokens - 1, 1)}"
            )
        return Sampler(start=int(spans[0, 0]), count=(tokens - 1) // high, low=low, high=high)

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's microbatches of a step; steps count from 1."""
        return self._microbatches(*self._drawn(step), self.corpus.tokens)

    def plan(self, step: int) -> BatchPlan:
        """The plan of a step over all data-parallel ranks."""
        return self._plan(self._drawn(step)[1])

    def sequence_lengths(self, step: int) -> tuple[int, ...]:
        """Of the sequences that the plan of a step deals out."""
        return tuple(self._drawn(step)[1].tolist())

    def global_tokens(self, step: int) -> int:
        """Labels in a step over all data-parallel ranks."""
        return int(self._drawn(step)[1].sum())

    def eval_batches(self, count: int) -> Iterator[list[MicroBatch]]:
        """Held-out steps, the same at every call and for every seed; a small text repeats."""
        if self._eval is None:
            raise UsageError("data: nothing is held out; use a held-out share above 0")
        tokens = (self.corpus.evaluation or self.corpus).tokens
        for number in range(count):
            first = number * self.sequences
            yield self._microbatches(*self._eval.draw(first, self.sequences, seed=0), tokens)

    def describe(self) -> str:
        """One line for the user: what is trained on, and what was cut and skipped."""
        stats = self.corpus.stats
        text = f"{stats.source}: {stats.documents} documents, {stats.tokens} tokens"
        if stats.skipped:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(stats.skipped.items()))
            text += f", {sum(stats.skipped.values())} files skipped ({reasons})"
        if isinstance(self.train, Mixture):
            for source, pool in zip(self.corpus.sources, self.train.pools):
                text += f"; {source.weight:.4g} of it {source.name}: {pool.describe()}"
        else:
            text += f"; {self.train.describe()}"
        if (own := self.corpus.evaluation) is not None:
            text += f"; held-out loss of {own.stats.source}, {own.stats.tokens} tokens"
        return text

    def held_out_tokens(self, count: int) -> list[int]:
        """The beginning of the first text that was held out."""
        own = self.corpus.evaluation
        begin, end = (
            own.split(0)[0][0] if own else self.corpus.parts()[0].split(self.held_out)[1][0]
        )
        return (own or self.corpus).tokens[begin : min(end - 1, begin + count)].tolist()

    def state_dict(self) -> dict:
        """What decides the batches beside the step: saved, and compared on resume."""
        own = self.corpus.evaluation
        return {
            "corpus": self.corpus.identity,
            "sequences": self.sequences,
            "context": self.context,
            "lengths": None if self.lengths is None else list(self.lengths),
            "seed": self.seed,
            "weights": [one.weight for one in self.corpus.sources] or None,
            "evaluation": None if own is None else own.identity,
            "held_out": self.held_out,
        }

    def load_state_dict(self, state: dict) -> None:
        own = self.corpus.evaluation
        for name, here in self.state_dict().items():
            if (saved := state.get(name)) == here:
                continue
            if name == "corpus":
                raise UsageError(
                    f"data: {self.corpus.stats.source} is not the text that the checkpoint was "
                    "trained on; use the same files and vocabulary"
                )
            if name == "evaluation":
                there = "another" if saved and here else "one" if saved else "none"
                raise UsageError(
                    f"data: --eval-data names {own.stats.source if own else 'no text'}, but the "
                    f"checkpoint's run had {there}; use the same files"
                )
            raise UsageError(
                f"batch: {name} is {here}, but was {saved} when the checkpoint was saved; "
                "use the same value"
            )

    def _drawn(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        return self.train.draw((step - 1) * self.sequences, self.sequences, self.seed)

    def _plan(self, lengths: np.ndarray) -> BatchPlan:
        return plan_batch(
            lengths.tolist(),
            self.microbatches,
            dp=self.dp,
            align=self.align,
            policy=self.policy,
            cost=self.cost,
            max_tokens=self.max_tokens,
            makespan=self.makespan,
        )

    def _microbatches(
        self, starts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray
    ) -> list[MicroBatch]:
        plan = self._plan(lengths)
        loss_scale = 1.0 / int(lengths.sum())
        return [
            MicroBatch.pack(
                [_sequence(tokens, int(starts[i]), int(lengths[i])) for i in group],
                loss_scale=loss_scale,
                align=self.align,
                pad_to=pad_to,
            )
            for group, pad_to in zip(plan.groups[self.dp_rank], plan.pad_to[self.dp_rank])
        ]


def _sequence(tokens: np.ndarray, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence and its labels."""
    one = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
    return one[:-1], one[1:]
