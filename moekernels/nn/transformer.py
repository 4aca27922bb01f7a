"""The decoder, one pipeline chunk at a time."""

from __future__ import annotations

from moekernels.nn.config import ExpertSpec, ModelConfig, RouterConfig

__all__ = ["ExpertSpec", "ModelConfig", "RouterConfig"]
