"""attention over packed segments, positions included, on the CPU: held to plain torch in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.ops.attention import How, attention, plain

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-13}
# Segments: of one token, of none, of less, as much and more than a block of queries.
LENGTHS = [1, 0, 5, 24, 25, 61, 130]
# (query heads, key heads, width, elements that turn)
SHAPES = [(2, 2, 16, 16), (4, 2, 8, 4), (3, 1, 20, 0), (2, 1, 37, 36), (1, 1, 64, 64)]


def draw(dtype: torch.dtype, shape: tuple[int, ...], normed: bool, lengths=LENGTHS):
    """What is learnt, and the other arguments."""
    heads, kv_heads, width, turning = shape
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, width, generator=generator, dtype=torch.float64)
    angles = torch.rand(tokens, turning // 2, generator=generator, dtype=torch.float64) * 7
    wide = torch.promote_types(dtype, torch.float32)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    turns = angles.cos().to(wide), angles.sin().to(wide)
    weights = 1 + torch.randn(2, width, generator=generator, dtype=torch.float64).to(dtype) / 4
    learnt = [qkv.to(dtype), *(weights if normed else (None, None))]
    return learnt, [*turns, bounds, How(heads, kv_heads, width**-0.5, 1e-5)]


def with_gradients(fn, learnt: list[Tensor | None], others: list) -> list[Tensor]:
    leaves = [x if x is None else x.clone().requires_grad_() for x in learnt]
    y = fn(*leaves, *others)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x for x in leaves if x is not None], dy)]


def widened(learnt: list[Tensor | None], others: list) -> tuple[list, list]:
    cos, sin, *rest = others
    return [x if x is None else x.double() for x in learnt], [cos.double(), sin.double(), *rest]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, normed, dtype):
    learnt, others = draw(dtype, shape, normed)
    ours = with_gradients(attention, learnt, others)
    want = with_gradients(plain, *widened(learnt, others))
    for got, wanted in zip(ours, want, strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).abs().max() <= DTYPES[dtype] * wanted.abs().max()
    assert torch.equal(attention(*learnt, *others), ours[0])


@pytest.mark.parametrize("normed", [False, True])
def test_gradients_of_any_order(normed):
    learnt, others = draw(torch.float64, (2, 1, 4, 4), normed, lengths=[3, 1])
    given = tuple(x.requires_grad_() for x in learnt if x is not None)

    def fn(qkv: Tensor, *weights: Tensor) -> Tensor:
        return attention(qkv, *(weights or (None, None)), *others)

    assert torch.autograd.gradcheck(fn, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, given)


def test_large_scores_and_nothing_at_all():
    (qkv, *weights), others = draw(torch.float32, (2, 2, 16, 16), False)
    large = [qkv * 200, *weights]  # far beyond what exponentials hold
    got, (wide, more) = attention(*large, *others), widened(large, others)
    wanted = plain(*wide, *more)
    assert (got.double() - wanted).abs().max() <= 1e-2 * wanted.abs().max()
    learnt, others = draw(torch.float32, (2, 2, 16, 16), True, lengths=[])
    y, *grads = with_gradients(attention, learnt, others)
    assert y.shape == (0, 2, 16) and not any(g.any() for g in grads)


def test_threads_change_no_bit():
    inputs = draw(torch.float32, (4, 2, 16, 16), True)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(with_gradients(attention, *inputs))
    torch.set_num_threads(threads)
    for one, three in zip(*found):
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {0: torch.zeros(4, 3, 8)},
            r"qkv must be .*\[T, hq \+ 2 hk=4, hd\], got float32 \[4, 3, 8\]",
        ),
        ({3: torch.zeros(4, 5)}, r"cos must be of at most half of hd=8, got \[4, 5\]"),
        ({4: torch.zeros(4, 2)}, r"sin must be float32 \[T=4, rd/2=4\], got float32 \[4, 2\]"),
        ({5: torch.tensor([0, 3])}, "bounds must end at T=4, got 3"),
        ({5: torch.tensor([0, 3, 2, 4])}, "offsets must ascend, got offsets"),
        ({6: How(2, 3, 1.0, 0.0)}, "kv_heads must divide heads, got 3 and 2"),
        ({1: torch.ones(8)}, "q_weight and k_weight must be given together"),
        (
            {1: torch.ones(8), 2: torch.ones(7)},
            r"k_weight must be float32 \[hd=8\], got float32 \[7\]",
        ),
        ({6: How(2, 1, 0.0, 0.0)}, "scale must be above 0, got 0"),
    ],
    ids=range(9),
)
def test_messages(change, message):
    angles = [torch.ones(4, 4), torch.zeros(4, 4)]
    bounds, how = torch.tensor([0, 4]), How(2, 1, 1.0, 0.0)
    arguments = [torch.zeros(4, 4, 8), None, None, *angles, bounds, how]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        attention(*arguments)
