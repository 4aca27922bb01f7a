"""Whether a run can fit into memory at all, asked before anything of it is allocated.

A lower bound: what certainly will be there. What passes here may still not fit; what does not pass
never would, and would take the machine with it before it failed.
"""

from __future__ import annotations

import os

import torch

from moekernels.errors import UsageError
from moekernels.model.experts import one_expert
from moekernels.model.spec import WIDTH
from moekernels.parallel.host import available
from moekernels.run import files as cfg
from moekernels.run.sections import RunConfig

RANK = 100e6  # bytes of a process that has imported torch, shared pages left out
SEQUENCE = 400  # bytes of an empty tensor pair and its place in a plan
RANKS_A_CORE, RANKS = 8, 64


def needed(run: RunConfig) -> dict[str, float]:
    """Bytes over all ranks, by what takes them."""
    lay, b, t = run.layout, run.batch, run.train
    model = run.model
    experts = model.moe_layers * model.num_experts * one_expert(model)
    everything = model.parameters_count()
    edp = max(1, lay.tp * lay.dp // (lay.ep * lay.etp))
    copies = (everything - experts) * lay.dp + experts * edp
    if model.tie_embeddings and lay.pp > 1:  # the table lies at both ends
        copies += model.vocab_size * model.d_model * lay.dp
    moments = 2 * (2 if t.optimizer_state == "bf16" else max(4, WIDTH[t.dtype]))
    gradient = max(4, WIDTH[t.dtype])
    low = (cfg.length_range(b.lengths, b.context) or (2, 2))[0]
    batch = (b.sequences + t.eval_sequences) * (SEQUENCE + 16.0 * low)
    return {
        "weights and gradients": float(copies * (WIDTH[t.dtype] + gradient)),
        "moments of the optimizer": float(everything * moments),
        "copies of experts": t.replicas
        * model.moe_layers
        * one_expert(model)
        * lay.ep
        * edp
        * (WIDTH[t.dtype] + gradient),
        "batches": batch,
        "processes": RANK * (lay.tp * lay.dp * lay.pp - 1),
    }


def check(run: RunConfig, world: int | None, local: int | None, device: str = "cpu") -> None:
    """UsageError where this machine's part of the run fits into no memory. `world`, `local`: ranks
    that torchrun started, in all and here; None: all are started here."""
    lay = run.layout
    ranks = lay.tp * lay.dp * lay.pp
    cores = os.cpu_count() or 1
    if world is None and ranks > max(RANKS, RANKS_A_CORE * cores):
        raise UsageError(
            f"tp {lay.tp} x dp {lay.dp} x pp {lay.pp} = {ranks} ranks are too many for the {cores} "
            f"cores of one machine; give smaller degrees, or start them on more with torchrun"
        )
    share = 1.0 if world is None else (local or world) / world
    parts = needed(run)
    if device == "cuda":
        parts.pop("processes")
        parts["moments of the optimizer"] *= 1 - run.train.offload_optimizer
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        here = float(sum(card.total_memory for card in cards))
    else:
        here = available()
    total = share * sum(parts.values())
    if total <= here:
        return
    worst = max(parts, key=parts.__getitem__)
    flags = {
        "batches": "a smaller --sequences, --eval-sequences or --lengths",
        "processes": "smaller degrees",
        "copies of experts": "fewer --replicas",
    }
    instead = flags.get(worst, "fewer --layers or --experts, a smaller width or vocabulary")
    raise UsageError(
        f"the run needs at least {total / 1e9:,.1f} GB here, {share * parts[worst] / 1e9:,.1f} GB "
        f"of it for {worst}, and {here / 1e9:,.1f} GB are free; use {instead}, or more machines"
    )
