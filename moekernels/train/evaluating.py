"""The loss of held-out text, by the model's weights or by their moving average."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from moekernels import assembly
from moekernels.parallel.average import averaged
from moekernels.parallel.bound import stands
from moekernels.parallel.tensor import all_reduce

if TYPE_CHECKING:
    from moekernels.train.loop import Trainer


def evaluate(trainer: Trainer) -> float:
    """Loss of the held-out sequences, in nats per token; every rank calls it."""
    run, env = trainer.run, trainer.env
    if trainer.held_out is None:
        count = -(-run.train.eval_sequences // run.batch.sequences)
        steps = trainer.loader.eval_batches(count)
        trainer.held_out = [[b.to(env.device) for b in step] for step in steps]
    average = run.train.eval_weights == "ema"
    with averaged(trainer.optimizer) if average else contextlib.nullcontext():
        if average:  # copies of experts are copies of those that compute
            trainer.hot.held.refresh()
        loss = _loss(trainer)
    if average:
        trainer.hot.held.refresh()
    return loss


def _loss(trainer: Trainer) -> float:
    mesh, runtime = trainer.mesh, trainer.runtime
    assert trainer.held_out is not None
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.env.device)
    for batches in trainer.held_out:
        assembly.begin_bound(trainer.run, mesh, batches)
        losses = runtime.evaluate(batches).losses
        while not stands(mesh.exchange.bound, mesh.world):
            losses = runtime.evaluate(batches).losses
        if losses and mesh.tp.rank == 0:
            tokens = 1 / batches[0].loss_scale  # of the step, over all data-parallel ranks
            sums += torch.stack(
                [
                    torch.stack(losses).double().sum() * tokens,
                    sums.new_tensor(tokens / mesh.dp.size),
                ]
            )
    total, tokens = all_reduce(sums, mesh.world).tolist()
    return total / tokens
