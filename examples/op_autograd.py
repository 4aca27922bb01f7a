"""One op with autograd: tokens into expert order, a product an expert, back again.

    python examples/op_autograd.py

The same in plain torch beside it, values and gradients.
"""

import torch

from moekernels import ops

T, H, E, K = 32, 16, 4, 2  # tokens, width, experts, experts of a token


def ours(x, w, ids):
    routing = ops.route(ids, E)
    rows = ops.permute(x, routing.token_of, routing.row_of)
    rows = ops.grouped_gemm(rows, w, routing.offsets)  # w[e] times the rows of expert e
    return ops.combine(rows, routing.row_of, routing.token_of)


def plain(x, w, ids):
    return torch.stack([sum(w[e] @ token for e in row) for token, row in zip(x, ids)])


def main() -> float:
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    w = torch.randn(E, H, H, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(T, E).topk(K).indices
    y, expected = ours(x, w, ids), plain(x, w, ids)
    upstream = torch.randn_like(y)
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, w), upstream)),
        (expected, *torch.autograd.grad(expected, (x, w), upstream)),
    )
    error = max((a - b).abs().max().item() for a, b in pairs)
    print(f"largest difference of y, dx and dw: {error:.1e}")
    return error


if __name__ == "__main__":
    main()
