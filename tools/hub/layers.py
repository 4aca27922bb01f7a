"""Layers for `kernelize`: they replace the forward of a transformers module, whose parameters they
read. Each maps to the classes named; nothing else is kept in them."""

from __future__ import annotations

import torch
from torch import nn

from ._experts import experts_forward


class Experts(nn.Module):
    """An experts class of transformers (Qwen3MoeExperts and any other of its registry)."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class SparseMoeBlock(nn.Module):
    """Qwen3MoeSparseMoeBlock, OlmoeSparseMoeBlock and others with a `gate` that returns (logits,
    weights, ids), and `experts`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x)
        return experts_forward(self.experts, x, ids, weights).reshape(hidden_states.shape)
