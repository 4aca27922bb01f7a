"""dense products on the CPU: held to torch's in fp64."""

from __future__ import annotations

import pytest
import torch

from moekernels.ops import _dense

SHAPES = [(0, 3, 5), (1, 1, 1), (5, 7, 3), (256, 64, 96), (128, 64, 64), (200, 33, 130)]
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape, dtype):
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x, w, dy = draw(tokens, inputs), draw(outputs, inputs), draw(tokens, outputs)
    wide = torch.promote_types(dtype, torch.float32)
    main_grad = draw(outputs, inputs).to(wide)
    wanted = main_grad.double() + dy.double().t() @ x.double()
    _dense.add_wgrad(main_grad, x, dy, dtype)
    found = [_dense.product(x, w), _dense.dgrad(dy, w), main_grad]
    exact = [x.double() @ w.double().t(), dy.double() @ w.double(), wanted]
    for got, want, kind in zip(found, exact, (dtype, dtype, wide), strict=True):
        assert got.dtype == kind and got.shape == want.shape
        largest = want.abs().max() if want.numel() else 0
        assert ((got.double() - want).abs() <= DTYPES[dtype] * largest).all()


def test_small_ones_are_ours_and_others_torchs(monkeypatch):
    x, w = torch.randn(8, 16), torch.randn(4, 16)
    ours = []
    monkeypatch.setattr(_dense, "_product", lambda *given: ours.append(given) or x @ w.t())
    _dense.product(x, w)
    assert len(ours) == 1
    monkeypatch.setattr(_dense, "SMALL", 8 * 16 * 4 - 1)
    _dense.product(x, w)
    _dense.product(x.bfloat16(), w.bfloat16())
    assert len(ours) == 1


def test_messages():
    x, w = torch.zeros(3, 4), torch.zeros(5, 6)
    with pytest.raises(RuntimeError, match=r"^dense: w must be float32 \[O, I=4\], got .*5, 6"):
        _dense.product(x, w)
    with pytest.raises(RuntimeError, match=r"^dense: w must be float32 \[I=4, O\], got .*5, 6"):
        _dense.dgrad(x, w)
