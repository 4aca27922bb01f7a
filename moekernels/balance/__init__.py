"""How evenly experts are loaded, and what evens it. Legend: E experts, L layers."""

from moekernels.balance.loads import (
    dead_experts,
    max_over_mean,
    update_selection_biases,
)

__all__ = ["dead_experts", "max_over_mean", "update_selection_biases"]
