"""What the optimiser is told, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class AdamWConfig:
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 0
    steps: int = 1
    clip: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    state_dtype: torch.dtype = torch.float32
    shard_optimizer: bool = False  # masters and moments lie on one rank each
    whole_experts: bool = False  # but those of experts, which move as wholes
    offload_optimizer: float = 0.0  # part of masters and moments that lies in the host's memory
    seed: int = 0  # of the rounding of bf16 moments
    lr_schedule: str = "cosine"
    decay_steps: int = 0  # of wsd; 0: a fifth of all steps
    optimizer: str = "adamw"  # muon: of the matrices of hidden layers, see there
    momentum: float = 0.95  # of muon
    ema: float = 0.0  # decay of a moving average of the masters; 0: there is none

    def lr_at(self, step: int) -> float:
        """Learning rate of step 1, 2, ...: a line up over `warmup` steps, then to the last step
        half a cosine down ("cosine"), a line down ("linear"), level and then a line down over
        `decay_steps` ("wsd"), or level ("constant")."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        first = self.warmup
        if self.lr_schedule == "wsd":
            last = self.decay_steps or -(-self.steps // 5)
            first = max(first, self.steps - last)
        done = min(1.0, max(0, step - first) / max(1, self.steps - first))
        if self.lr_schedule == "constant":
            height = 1.0
        elif self.lr_schedule == "cosine":
            height = 0.5 * (1 + math.cos(math.pi * done))
        else:
            height = 1 - done
        low = self.lr * self.min_lr_ratio
        return low + (self.lr - low) * height

    @classmethod
    def of(cls, section: Mapping[str, Any], **more: Any) -> AdamWConfig:
        """What of a run's [train] says it, keys that it has not at their defaults."""
        names = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in section.items() if k in names}, **more)
