"""What a chunk's activations take: measured by torch's MemTracker, and as the planner counts it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from moekernels.data.batch import MicroBatch
from moekernels.model.decoder import DecoderSpec
from moekernels.nn.transformer import StageModel
from moekernels.plan.memory import chunk_bytes, layer_bytes, place_of

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def small(d_in: int = 64, **options) -> DecoderSpec:
    options = {"num_kv_heads": 4, "num_experts": 8, "qk_norm": False, **options}
    return DecoderSpec(
        vocab_size=515,
        d_model=64,
        num_layers=4,
        num_heads=4,
        head_dim=16,
        top_k=2,
        expert_d_in=d_in,
        expert_d_ff=128,
        **options,
    )


def pack(tokens: int, segments: int = 4) -> MicroBatch:
    one = torch.zeros(tokens // segments, dtype=torch.int64)
    return MicroBatch.pack([(one, one)] * segments, loss_scale=1 / tokens)


def total(tracker: MemTracker, kind: str) -> int:
    return tracker.get_tracker_snapshot(kind)[CPU]["Total"]


@contextlib.contextmanager
def tracking(chunk: StageModel, batch: MicroBatch) -> Iterator[MemTracker]:
    """What runs within is seen by a tracker that knows the batch, parameters and gradients."""
    for p in chunk.parameters():
        p.main_grad = torch.zeros_like(p, dtype=torch.float32)
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # as the optimiser
    tracker = MemTracker()
    known = [batch.tokens, batch.labels, batch.positions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker.track_external(chunk, *known, *[p.main_grad for p in chunk.parameters()])
        with tracker:
            yield tracker


def measure(
    model, mesh, layers, first, last, dtype, tokens, checkpoint, dispatcher="all_to_all", parts=1
):
    """(kept after forward, peak of forward and backward) above parameters and gradients."""
    batch = pack(tokens)
    chunk = StageModel(
        model, mesh, range(1, layers + 1), first, last,
        dtype=DTYPES[dtype], checkpoint_layers=checkpoint, dispatcher=dispatcher,
        exchange_parts=parts,
    )  # fmt: skip
    own = tokens // mesh.tp.size
    x = None if first else torch.zeros(own, model.d_model, dtype=DTYPES[dtype])
    with tracking(chunk, batch) as tracker:
        before = total(tracker, "current")
        if x is not None:
            x = x.clone().requires_grad_()
        y = chunk(batch, x)
        edge, grad = torch.autograd.graph.get_gradient_edge(y), torch.ones_like(y)
        del y
        kept = total(tracker, "current") - before - grad.numel() * grad.element_size()
        torch.autograd.backward([edge], [grad])
    return kept, total(tracker, "peak") - before


def counted(model, s, tokens, first, last, device="cpu", parts=1, squares=0.0):
    beside, loss, besides = chunk_bytes(model, place_of(s, tokens), first, last)
    kept, most = beside + loss, besides
    for layer, count, again in s.kinds_of_layers(model, 0):
        at = place_of(s, tokens, device=device, parts=parts, squares=squares)
        one = layer_bytes(model, at, layer)
        kept += again * one.checkpointed + (count - again) * one.total
        most = max(most, one.besides(again > 0) - loss)
    return kept, kept + most
