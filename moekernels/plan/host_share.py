"""`--offload-optimizer auto`: as little of the optimiser's state in the host's memory as lets a run
fit its cards."""

from __future__ import annotations

import dataclasses

import torch

from moekernels.plan.evaluate import Problem, batch_sizes, memory_of
from moekernels.plan.problem import configured, problem_of
from moekernels.plan.strategy import Strategy
from moekernels.run import files as cfg

STEPS = 20  # a twentieth of the state is as fine as the counts of memory are


def least(problem: Problem, s: Strategy) -> tuple[float, float, float]:
    """(share, bytes a card with it, bytes a card without it); the share is 1 where even that is too
    little."""
    room = problem.cluster.memory - problem.cluster.reserve
    sizes = batch_sizes(problem.model, problem.batch, s.layout.dp, s.microbatches, s.layout.tp)

    def needs(share: float) -> float:
        trial = dataclasses.replace(s, offload_optimizer=share)
        ranks = range(s.layout.pp)
        return max(memory_of(problem, trial, rank, sizes.largest).total for rank in ranks)

    tried = [n / STEPS for n in range(STEPS + 1)]
    share = next((x for x in tried if needs(x) <= room), 1.0)
    return share, needs(share), needs(0.0)


def memory_of_cards() -> float:
    """Bytes of the smallest card that this process sees."""
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return float(min(card.total_memory for card in cards))


def choose(run: cfg.RunConfig, device: str) -> tuple[float, str]:
    """The share, and what to tell of it."""
    if device != "cuda":
        return 0.0, "offload  auto: 0 of the optimizer's state, a CPU has no other memory"
    problem = problem_of(run)
    card = memory_of_cards()
    problem = dataclasses.replace(
        problem, cluster=dataclasses.replace(problem.cluster, memory=card)
    )
    share, needs, without = least(problem, configured(run))
    text = f"offload  auto: {share:g} of the optimizer's state, {needs / 1e9:.1f} GB a card"
    if share:
        text += f" ({without / 1e9:.1f} GB without)"
    text += f" of {card / 1e9:.1f}"
    if needs > card - problem.cluster.reserve:
        text += ", which may be too little; use fewer tokens a microbatch, or --checkpoint-layers"
    return share, text


def with_share(run: cfg.RunConfig, share: float) -> cfg.RunConfig:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, offload_optimizer=share))
