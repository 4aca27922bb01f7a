"""Embedding, final norm, head and loss, split by the vocabulary's rows over tp."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.model.spec import LONGEST, Place, Width, key

CACHED = 1 << 21  # logits held at a time, where that many fit a cache: 8 MiB of fp32
MOST = 1 << 23  # and at the most, where the vocabulary is large
FEW = 128  # tokens: with fewer the products with the head slow down


@dataclass(frozen=True)
class VocabularySpec(Width):
    vocab_size: int = key(
        1024,
        "entries of the vocabulary; the tokenizer is trained to this size",
        low=258,
        high=LONGEST,
    )
    tie_embeddings: bool = key(False, "one matrix for the embedding and the head")
    embedding_std: float = key(
        0.0, "standard deviation of the initial embedding; 0: init_std", low=0, high=100
    )


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits of a vocabulary's shard are held at a time."""
    return max(1, CACHED // vocabulary, min(FEW, MOST // vocabulary))


def parameters(
    spec: VocabularySpec, at: Place, first: bool, last: bool, tp_index: int | None = None
) -> int:
    """Of the tables that a chunk holds; without `tp_index`, on the rank that holds most."""
    tp = at.layout.tp
    if tp_index is None:
        rows = -(-spec.vocab_size // tp)
    else:
        rows = spec.vocab_size * (tp_index + 1) // tp - spec.vocab_size * tp_index // tp
    tables = int(first) + int(last and not (spec.tie_embeddings and first))
    return tables * rows * spec.d_model


def loss_bytes(spec: VocabularySpec, at: Place) -> tuple[float, float, float]:
    """(kept by the final norm, kept by the loss, held by the loss besides while it runs)."""
    b, wide, hidden = at.width, at.wide, spec.d_model
    vocabulary = -(-spec.vocab_size // at.layout.tp)
    norm = at.residual * (hidden * b + wide)
    loss = at.residual * hidden * b + vocabulary * hidden * wide  # both gradients, made in forward
    # Of a chunk of tokens the logits, and the softmax where it is another tensor; while the next
    # one's are made, both's. Below fp32 the head's gradient is a product first.
    chunk, narrow = min(at.tokens, chunk_tokens(vocabulary)), b < wide
    logits = chunk * vocabulary * (wide + (b if narrow else 0))
    product = vocabulary * hidden * b if narrow else 0
    besides = max(2 * logits if at.tokens > chunk else 0, logits + product)
    return norm, loss, besides + (2 * at.tokens - at.residual) * hidden * b
