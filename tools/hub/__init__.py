"""Mixture-of-Experts kernels: the ops, the experts function of transformers' registry
(`experts_forward`), and layers for `kernelize` (`layers`)."""

__version__ = "@VERSION@"

from . import layers, ops
from ._experts import experts_forward
from .ops import *  # noqa: F403

__all__ = ["experts_forward", "layers", "ops", *ops.__all__]
