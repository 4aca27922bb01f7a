"""torchtitan's layer under our overrides, held to its own, on the CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "torchtitan.models.common.moe",
    reason="needs torchtitan 0.3 (pip install --no-deps -r requirements/peers.txt)",
    exc_type=ImportError,
)

import spmd_types
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.distributed.spmd_types import set_spmd_meshes
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import (
    GroupedExperts,
    MoE,
    RoutedExperts,
    TokenChoiceTopKRouter,
)
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    LocalTokenDispatcher,
)

from moekernels.errors import UsageError
from moekernels.integrations import torchtitan
from python_tests.support.distributed import run_ranks

EXPERTS, TOP_K, DIM, WIDTH = 6, 2, 16, 8
OURS = [
    f"{torchtitan.__name__}.{name}"
    for name in ("experts", "local_dispatcher", "all_to_all_dispatcher")
]


NAMES = ("w1_EFD", "w2_EDF", "w3_EFD", "weight")
INIT = dict.fromkeys(NAMES, lambda p: nn.init.normal_(p, std=0.3))


def layer(own: bool, dispatcher=LocalTokenDispatcher) -> MoE:
    """Random weights, the same for both."""
    config = MoE.Config(
        num_experts=EXPERTS,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(
                dim=DIM, hidden_dim=WIDTH, num_experts=EXPERTS, param_init=INIT
            ),
            token_dispatcher=dispatcher.Config(num_experts=EXPERTS, top_k=TOP_K),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS,
            top_k=TOP_K,
            gate=Linear.Config(in_features=DIM, out_features=EXPERTS, param_init=INIT),
        ),
    )
    if own:
        replaced = apply_overrides(OverrideConfig(imports=OURS), config)
        assert len(replaced) == 2, replaced
    torch.manual_seed(0)
    moe = config.build()
    moe.init_states()  # by `INIT`, fused or not
    if own:
        moe.load_state_dict(layer(False, dispatcher).state_dict())
    return moe


def tokens(rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x, dy = torch.randn(2, 2, 7, DIM, generator=generator)
    return x.requires_grad_(), dy


def found(moe: MoE, rank: int = 0) -> dict[str, Tensor]:
    """Output and gradients, by torchtitan's names of the parameters."""
    x, dy = tokens(rank)
    y = moe(x)
    y.backward(dy)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(p.grad)
    return {"y": y.detach(), "x": x.grad, **moe.state_dict()}


def in_fp64(moe: MoE) -> dict[str, Tensor]:
    """torchtitan's layer on one process in fp64, its products in plain torch."""

    def product(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        begins = [0, *offs.tolist()[:-1]]
        return torch.cat([a[i:j] @ b[e] for e, (i, j) in enumerate(zip(begins, offs.tolist()))])

    def grouped(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        return product(A, B_t, offs)

    with mock.patch.object(GroupedExperts, "_grouped_mm", grouped):
        with mock.patch.object(Tensor, "bfloat16", Tensor.double):
            return found(moe)


@pytest.mark.parametrize("dispatcher", [LocalTokenDispatcher, AllToAllTokenDispatcher])
def test_layer_is_torchtitans(dispatcher):
    """Both round to bf16; ours no worse."""
    theirs, ours = found(layer(False, dispatcher)), found(layer(True, dispatcher))
    exact = in_fp64(layer(False, dispatcher))
    assert exact.keys() == ours.keys() == theirs.keys()
    for name, wanted in exact.items():
        error, allowed = ((t[name] - wanted).abs().max() for t in (ours, theirs))
        assert error <= 2 * allowed + 1e-6, f"{name}: {error:.1e}, torchtitan's {allowed:.1e}"
    assert theirs["y"].abs().max() > 0.1


def test_checkpoints_go_both_ways():
    theirs, ours = layer(False), layer(True)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for p in source.parameters():
                p.normal_()
        target.load_state_dict(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value), name


def all_to_all(outputs: list[Tensor], inputs: list[Tensor], group) -> None:
    """Of any sizes: gloo's own takes even ones alone."""
    sent, got = torch.cat(inputs), torch.cat(outputs)
    sizes = [len(t) for t in outputs], [len(t) for t in inputs]
    dist.all_to_all_single(got, sent, *sizes, group=group)
    for output, part in zip(outputs, got.split(sizes[0])):
        output.copy_(part)


def exchanged(rank: int, backend: str, own: bool) -> list[Tensor]:
    """What a dispatcher of two ranks yields, and its gradients; the experts multiply by their
    number."""
    set_spmd_backend(backend)
    dist.all_to_all = all_to_all  # in this process, which ends here
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    set_spmd_meshes(dense_mesh=mesh, sparse_mesh=mesh)
    dispatcher = layer(own, AllToAllTokenDispatcher).routed_experts.token_dispatcher
    dispatcher.wire_meshes(ep_mesh=mesh)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5 + 4 * rank, DIM, generator=generator).requires_grad_()
    scores = torch.rand(len(x), TOP_K, generator=generator).requires_grad_()
    ids = torch.rand(len(x), EXPERTS - 1, generator=generator).topk(TOP_K).indices
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    rows, local, kept = dispatcher.dispatch(x, scores, ids, counts)
    assert len(rows) == local.sum() and len(local) == EXPERTS // 2
    expert = torch.repeat_interleave(torch.arange(1, 1 + len(local)) + 3 * rank, local)
    y = dispatcher.combine(rows * expert[:, None], kept, x)
    y.backward(torch.randn(y.shape, generator=generator))
    return [rows.detach() + 0, local, y.detach(), x.grad, scores.grad]


@pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor"])
def test_exchange_of_two_ranks_is_torchtitans(backend):
    theirs = run_ranks(2, exchanged, backend, False)
    ours = run_ranks(2, exchanged, backend, True)
    for mine, other in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    x, dy = theirs[0][2:4]
    assert x.any() and dy.any()


def test_checking_of_types_is_refused(monkeypatch):
    dispatcher = layer(True, AllToAllTokenDispatcher).routed_experts.token_dispatcher
    monkeypatch.setattr(spmd_types, "is_type_checking", lambda: True)
    x, ids = torch.ones(2, DIM), torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(UsageError, match="no SPMD types to check"):
        dispatcher.dispatch(x, torch.ones(2, 2), ids, torch.bincount(ids.flatten(), minlength=6))
