"""Second derivatives, forward mode and scaled losses of the model's own functions: right, or
refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from moekernels import ops
from moekernels.model.layout import Layout
from moekernels.model.rotary import RotarySpec, frequencies
from moekernels.nn.home import Home
from moekernels.nn.linear import linear
from moekernels.nn.loss import cross_entropy
from moekernels.nn.masked import masked_attention
from moekernels.nn.norm import RMSNorm
from moekernels.nn.rotary import Packing, rotate
from moekernels.nn.transformer import StageModel
from moekernels.parallel import expert, tensor
from moekernels.parallel.mesh import Group, Mesh
from python_tests.support.distributed import RankPool
from python_tests.support.layouts import TINY, micro_batches

ALONE = Group(None, 0, 1, (0,))
DOUBLE = Home(torch.float64)
RADIANS = frequencies(RotarySpec(rope_theta=100.0), 8)
PACKING = Packing.make(torch.arange(5), [0, 5], RADIANS, torch.float64)
PAIRS = Packing.make(torch.arange(5), [0, 5], RADIANS, torch.float64, magnitude=1.3, pairs=True)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    layer = RMSNorm(x.shape[-1], 1e-6, DOUBLE, partial=False)
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def masked(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return masked_attention(q, k, v, sinks, [(1, 3), (1, 4)], 3, 0.5)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight.main_grad = torch.zeros_like(weight)
    return linear(x, weight, bias)


@pytest.mark.parametrize(
    "fn, shapes",
    [
        (norm, [(5, 8), (8,)]),
        (lambda x: rotate(x, PACKING), [(5, 2, 8)]),
        (lambda x: rotate(x, PAIRS), [(5, 2, 10)]),  # of which the last two stay
        (masked, [(7, 4, 4), (7, 2, 4), (7, 2, 3), (4,)]),
        (product, [(5, 4), (3, 4), (3,)]),
    ],
    ids=["norm", "rotate", "rotate pairs", "masked", "product"],
)
def test_layers_in_every_mode(fn, shapes) -> None:
    values = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(fn, values, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, values, fast_mode=True)
    hessian = torch.func.hessian(lambda x: fn(x, *values[1:]).square().sum())(values[0])
    assert torch.isfinite(hessian).all() and hessian.any()


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_product_adds_to_the_main_gradient_alone(create_graph) -> None:
    x, weight = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    weight.main_grad = torch.ones_like(weight)
    linear(x, weight).square().sum().backward(create_graph=create_graph)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + 2 * (x @ weight.detach().T).T @ x)


def test_cross_entropy_is_differentiated_once() -> None:
    hidden = torch.randn(4, 6, requires_grad=True)
    weight, labels = torch.randn(9, 6), torch.tensor([1, 8, -100, 0])

    def loss(hidden: Tensor) -> Tensor:
        return cross_entropy(hidden, weight, labels, 0, ALONE, split=False)

    with pytest.raises(RuntimeError, match="^cross_entropy: its gradient is not differentiable"):
        torch.autograd.grad(loss(hidden), hidden, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="^cross_entropy: has no forw"):
        loss(forward_ad.make_dual(hidden.detach(), weight[:4]))
    with pytest.raises(RuntimeError, match="^cross_entropy: has no forward-mode derivative"):
        torch.func.grad(loss)(hidden)
    (found,) = torch.autograd.grad(loss(hidden), hidden)
    wanted = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(found, torch.autograd.grad(wanted, hidden)[0])


def chunk(layers: range, first: bool, last: bool) -> StageModel:
    return StageModel(TINY, Mesh(Layout()), layers, first, last, dtype=torch.float64)


def gradients(*chunks: StageModel) -> list[Tensor]:
    found = [p.grad.clone() for one in chunks for p in one.parameters()]
    for one in chunks:
        one.zero_grad()
    return found


def test_a_scaled_loss_scales_the_auxiliary_losses() -> None:
    (batch,) = micro_batches([[9, 6]])
    model = chunk(range(1, 3), True, True)
    model(batch).backward()
    plain = gradients(model)
    (model(batch) * 0.25).backward()
    for got, wanted in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(got, wanted * 0.25)


@pytest.mark.parametrize("split", [2, 3], ids=["a layer each", "no layer in the last"])
def test_chunks_count_the_auxiliary_losses_as_the_whole_does(split: int) -> None:
    (batch,) = micro_batches([[9, 6]])
    whole = chunk(range(1, 3), True, True)
    parts = [chunk(range(1, split), True, False), chunk(range(split, 3), False, True)]
    whole(batch).backward()
    parts[1](batch, parts[0](batch)).backward()
    for got, wanted in zip(gradients(*parts), gradients(whole), strict=True):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(RuntimeError, match="scale batch.loss_scale instead"):
        (parts[1](batch, parts[0](batch)) * 0.25).backward()


WORLD = 3
CONJUGATES = {  # with the rows that each takes
    "copy_to": 6,
    "reduce_from": 6,
    "gather_tokens": 2,
    "scatter_tokens": 6,
    "split_tokens": 6,
    "join_tokens": 2,
    "swap_columns": 6,
}


@pytest.fixture(scope="module")
def three() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


def _linear_twice(name: str, fn, values: list[Tensor]) -> None:
    """The derivative of <fn's gradients, directions> by fn's cotangents is fn(directions)."""
    outputs = [t for t in fn(*values) if t.is_floating_point()]
    cotangents = [torch.randn_like(t).requires_grad_() for t in outputs]
    first = torch.autograd.grad(outputs, values, cotangents, create_graph=True)
    along = [torch.randn_like(v).requires_grad_() for v in values]
    number = sum((g * a).sum() for g, a in zip(first, along))
    second = torch.autograd.grad(number, cotangents, create_graph=True)
    for a, b in zip(second, fn(*along)):
        torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")
    # And once more: the derivative of that by the directions is the first again.
    third = torch.autograd.grad(sum((s * c).sum() for s, c in zip(second, cotangents)), along)
    for a, b in zip(third, first):
        torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")
    with forward_ad.dual_level():
        try:
            fn(*values)
        except RuntimeError as error:
            assert str(error).startswith(f"{name}: has no forward-mode derivative")
        else:
            raise AssertionError(f"{name} takes part in forward mode")


def _all_collectives(rank: int) -> None:
    torch.manual_seed(rank)
    group = Mesh(Layout(tp=WORLD)).tp
    for name, rows in CONJUGATES.items():
        fn = getattr(tensor, name)
        x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
        _linear_twice(name, lambda x, fn=fn: [fn(x, group)], [x])
    mesh = Mesh(Layout(dp=WORLD, ep=WORLD))
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(4 + rank)]).int()
    ids[0, 0] = -1
    plan = expert.ExchangePlan.make(ids, 2, mesh.exchange)
    x = torch.randn(4 + rank, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4 + rank, 2, dtype=torch.float64, requires_grad=True)
    _linear_twice("dispatch", lambda *v: expert.dispatch(*v, plan), [x, weights])
    rows = torch.randn(int(plan.came(plan.whole).sum()), 5, dtype=torch.float64, requires_grad=True)
    _linear_twice("combine", lambda v: [expert.combine(v, plan)], [rows])
    sizes = expert.token_counts(x, mesh.exchange, alike=False)
    _linear_twice(
        "gather_tokens",
        lambda *v: expert.gather_tokens(*v, ids, sizes, mesh.exchange),
        [x, weights],
    )
    partial = torch.randn(sum(sizes), 5, dtype=torch.float64, requires_grad=True)
    _linear_twice("sum_tokens", lambda v: [expert.sum_tokens(v, sizes, mesh.exchange)], [partial])


def test_collectives_twice(three: RankPool) -> None:
    three.run(_all_collectives)


def test_gradient_penalty_through_transformers() -> None:
    """As the experts' own loop has it, in fp64."""
    pytest.importorskip("transformers")
    import moekernels.integrations.transformers  # noqa: F401
    from python_tests.support.transformers_models import EXPERTS, HIDDEN, TOP_K, qwen3, routed_input

    module, config = qwen3()
    module.double()
    found = []
    for implementation in ("eager", "moekernels"):
        config._experts_implementation = implementation
        x, ids, weights = routed_input(12, HIDDEN, EXPERTS, TOP_K)
        x = x.double().detach().requires_grad_()
        y = module(x, ids, weights.double())
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        wanted = [x, *module.parameters()]
        found.append(torch.autograd.grad(slope.square().sum(), wanted))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_every_autograd_function_is_held_here_or_beside() -> None:
    """A new autograd.Function belongs into one of these tests."""
    root = Path(ops.__file__).parents[1]
    held = {p.stem for p in (root / "ops").glob("*.py")}
    held |= {"norm", "linear", "masked", "rotary", "auxiliary", "loss", "expert", "tensor"}
    held |= {"choice", "half"}
    held |= {"chunks", "border", "straight", "megatron", "fp8"}  # beside their rooms
    with_functions = {
        path.stem for path in root.rglob("*.py") if "(torch.autograd.Function)" in path.read_text()
    }
    assert with_functions <= held
