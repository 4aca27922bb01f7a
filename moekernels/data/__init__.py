"""Text in, micro-batches out: corpus -> tokenizer -> batch plan -> loader."""

from moekernels.data.batch import NO_LABEL, MicroBatch

__all__ = ["NO_LABEL", "MicroBatch"]
