"""Text in, microbatches out: sources -> corpus (tokenised, cached) -> batch plan -> loader.

Only `MicroBatch` is exported here: models take it and need torch alone, while the rest of the
package is imported from its modules and needs numpy and tokenizers.
"""

from moekernels.data.batch import NO_LABEL, MicroBatch

__all__ = ["NO_LABEL", "MicroBatch"]
