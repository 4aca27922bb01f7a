"""A Mixture-of-Experts layer in a torch model, trained with torch's own optimiser.

python examples/moe_layer.py
"""

import torch
from torch import nn

from moekernels import ops


class MoE(nn.Module):
    """x [T, H] -> [T, H], and the load-balancing loss."""

    def __init__(self, hidden: int, ffn: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.experts = top_k, experts
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, 2 * ffn, hidden) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, ffn) * ffn**-0.5)

    def forward(self, x):
        gate = ops.gate(self.router(x), self.top_k, renormalize=True)
        routing = ops.route(gate.ids, self.experts)
        weights = ops.permute_weights(gate.weights, routing)
        view = {"token_of": routing.token_of, "row_of": routing.row_of}
        rows = ops.experts(x, weights, self.w1, self.w2, routing.offsets, **view)
        balance = ops.load_balancing_loss(gate.score_sum, gate.counts, self.top_k)
        return ops.combine(rows, routing.row_of, routing.token_of), balance


def main(steps: int = 40) -> list[float]:
    x = torch.randn(256, 32)
    target = torch.where(x[:, :1] > 0, x, -x.flip(1))  # two kinds of tokens: work for experts
    layer = MoE(32, 64, experts=8, top_k=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        y, balance = layer(x)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
