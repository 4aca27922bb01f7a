"""Single layers in one process, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moekernels import ops
from moekernels.errors import UsageError
from moekernels.model.decoder import DecoderSpec
from moekernels.model.experts import one_expert
from moekernels.model.layout import Layout
from moekernels.model.rotary import RotarySpec, frequencies
from moekernels.model.router import SCORES
from moekernels.nn import loss as loss_module
from moekernels.nn.attention import causal_attention
from moekernels.nn.auxiliary import slopes
from moekernels.nn.home import Home
from moekernels.nn.loss import cross_entropy
from moekernels.nn.norm import RMSNorm
from moekernels.nn.rotary import Packing, rotate
from moekernels.nn.transformer import StageModel
from moekernels.ops import _dense
from moekernels.parallel.mesh import Group, Mesh
from python_tests.support.layouts import TINY, micro_batches, variant

ALONE = Group(None, 0, 1, (0,))
MATRIX_PRODUCTS = (_dense._product, torch.ops.aten.addmm_.default)
DOUBLE = Home(torch.float64)


def radians(head_dim: int, theta: float = 1e4) -> list[float]:
    return frequencies(RotarySpec(rope_theta=theta), head_dim)


def whole_model(config: DecoderSpec = TINY, **options) -> StageModel:
    layers = range(1, config.num_layers + 1)
    options = {"dtype": torch.float64, **options}
    return StageModel(config, Mesh(Layout()), layers, True, True, **options)


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 6), (0, 4)])
def test_norm_is_torchs(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], 1e-6, DOUBLE, partial=False)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), F.rms_norm(x, shape[-1:], norm.weight, 1e-6))
    torch.autograd.gradcheck(norm, (x,))
    norm(x).sum().backward()
    mine, norm.weight.grad = norm.weight.grad, None
    F.rms_norm(x, shape[-1:], norm.weight, 1e-6).sum().backward()
    torch.testing.assert_close(mine, norm.weight.grad)


def test_rotation_keeps_norms_and_relative_angles() -> None:
    positions = torch.arange(9)
    packing = Packing.make(positions, [0, 9], radians(8, 100.0), torch.float64)
    x = torch.randn(1, 2, 8, dtype=torch.float64).expand(9, 2, 8)
    turned = rotate(x, packing)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[0], x[0])
    products = torch.einsum("ihd,jhd->hij", turned, turned)
    for distance in range(1, 4):  # the product depends on the distance alone
        diagonal = products.diagonal(distance, dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))
    y = torch.randn(9, 2, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda y: rotate(y, packing), (y,))


@pytest.mark.parametrize("lengths", [[12], [3, 3, 3], [1, 5, 5, 2], [4, 0, 4]])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_sees_its_own_segment_and_the_past(lengths: list[int], kv_heads: int) -> None:
    total = sum(lengths)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    packing = Packing.make(torch.arange(total), bounds, radians(6), torch.float64)
    q = torch.randn(total, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(total, kv_heads, 6, dtype=torch.float64) for _ in range(2))
    out = causal_attention(q, k, v, packing)

    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (segment[:, None] == segment[None]) & torch.ones(total, total).tril().bool()
    k, v = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / 6**0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = torch.einsum("hij,jhd->ihd", probabilities, v)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad(y, q, grad, retain_graph=True)[0] for y in (out, wanted))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_cross_entropy_in_chunks_is_torchs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda vocabulary: chunk)
    hidden = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (10,))
    labels[::4] = -100
    mine = cross_entropy(hidden, head, labels, 0, ALONE, split=True)
    wanted = F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    torch.testing.assert_close(mine, wanted)
    scaled, inputs = 3 * mine, (hidden, head)
    gradients = torch.autograd.grad(scaled, inputs, retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(3 * wanted, inputs)):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(scaled, inputs)
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy(hidden, head, labels, 0, ALONE, split=True), wanted
        )


def test_logits_held_at_a_time() -> None:
    """A few megabytes for a small vocabulary, tokens enough for a product, 32 MiB at the most."""
    assert loss_module.chunk_tokens(1024) == 2048
    assert loss_module.chunk_tokens(32000) == 128
    assert loss_module.chunk_tokens(1 << 20) == 8 and loss_module.chunk_tokens(1 << 24) == 1


def test_cross_entropy_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda vocabulary: 8)
    largest, products = 0, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest, products
            out = func(*args, **(kwargs or {}))
            products += func in MATRIX_PRODUCTS
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(256, 4, requires_grad=True)
    head = torch.randn(64, 4, requires_grad=True)
    with Watch():
        cross_entropy(hidden, head, torch.randint(0, 64, (256,)), 0, ALONE, split=True).backward()
    assert largest <= 256 * 4  # the hidden states themselves; all logits would be 256 x 64
    chunks = 256 // 8
    assert products == 3 * chunks
    with Watch(), torch.no_grad():
        cross_entropy(hidden, head, torch.randint(0, 64, (256,)), 0, ALONE, split=True)
    assert products == 4 * chunks  # evaluation makes no gradients


def test_slopes_are_those_of_the_load_balancing_loss() -> None:
    counts, scores = torch.randint(0, 9, (3, 4)).double(), torch.randn(3, 4, dtype=torch.float64)
    counts[1] = 0  # a segment without tokens
    loss = ops.load_balancing_loss(scores.requires_grad_(), counts, 2)
    torch.testing.assert_close(slopes(counts, 2), torch.autograd.grad(loss, scores)[0])


@pytest.mark.parametrize("score", SCORES)
def test_replayed_choices_give_the_gates_own_weights(score: str) -> None:
    """Replaying what the gate chose, but as if it had not, changes no gradient."""
    config = variant(score=score, renormalize=True, scale=1.5)
    batch = micro_batches([[7, 5]])[0]
    gradients = []
    for swap in (False, True):
        model = whole_model(config)
        if swap:  # the same experts in another order: not equal to the gate's own ids

            def swapped(batch, layer, logits, ids):
                return ids.flip(1)

            model.route_hook = swapped
        model(batch).backward()
        gradients.append({n: p.grad for n, p, _ in model.named_shards()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-13)


def test_hook_sees_every_layer_and_decides() -> None:
    model, seen = whole_model(), []

    def hook(batch, layer, logits, ids):
        seen.append((layer, tuple(logits.shape), tuple(ids.shape)))
        return torch.where(ids < 0, -1, torch.tensor([3, 5], dtype=torch.int32))

    model.route_hook = hook
    model(micro_batches([[5]])[0]).backward()
    assert seen == [(1, (8, 8), (8, 2)), (2, (8, 8), (8, 2))]
    loads, _ = model.take_statistics()
    assert loads.tolist() == [[0, 0, 0, 5, 0, 5, 0, 0]] * 2


def test_stages_in_a_row_are_the_model() -> None:
    batch = micro_batches([[7, 5]])[0]
    whole = whole_model()
    whole(batch).backward()
    mesh = Mesh(Layout())
    first = StageModel(TINY, mesh, range(1, 2), True, False, dtype=torch.float64)
    last = StageModel(TINY, mesh, range(2, 3), False, True, dtype=torch.float64)
    x = first(batch)
    y = x.detach().requires_grad_()
    last(batch, y).backward()
    x.backward(y.grad)
    wanted = {name: p.grad for name, p, _ in whole.named_shards()}
    for stage in (first, last):
        for name, p, _ in stage.named_shards():
            assert torch.equal(p.grad, wanted.pop(name)), name
    assert not wanted


@pytest.mark.parametrize("lifted", [True, False])
@pytest.mark.parametrize("embedding_std", [0.0, 1.0])
def test_weights_begin_at_their_deviation(lifted: bool, embedding_std: float) -> None:
    """What ends in the residual stream begins narrower by the root of twice the layers."""
    config = variant(
        num_layers=8,
        d_model=64,
        vocab_size=512,
        qk_norm=True,
        init_std=0.05,
        embedding_std=embedding_std,
        expert_d_in=96 if lifted else 64,
        expert_d_ff=48,
    )
    narrow = 0.05 / (2 * config.num_layers) ** 0.5
    wanted = {
        "embedding.weight": embedding_std or 0.05,
        "head.weight": 0.05,
        "attention.qkv": 0.05,
        "attention.out": narrow,
        "router.weight": 0.05,
        "experts.w1": 0.05,
        "experts.w2": 0.05 if lifted else narrow,
        "experts.w_in": 0.05,
        "experts.w_out": narrow,
    }
    seen = set()
    for name, parameter, _ in whole_model(config).named_shards():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        kind = next(kind for kind in wanted if name.endswith(kind))
        spread = 5 / (2 * parameter.numel()) ** 0.5  # of a deviation found in so many numbers
        assert parameter.std().item() == pytest.approx(wanted[kind], rel=spread), name
        assert parameter.mean().item() == pytest.approx(0, abs=wanted[kind] * 2 * spread), name
        seen.add(kind)
    assert seen == (set(wanted) if lifted else set(wanted) - {"experts.w_in", "experts.w_out"})


@pytest.mark.parametrize("lifted", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_count_counts_the_model(lifted: bool, qk_norm: bool) -> None:
    config = variant(expert_d_in=24 if lifted else 16, qk_norm=qk_norm)
    assert sum(p.numel() for p in whole_model(config).parameters()) == config.parameters_count()


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    idle = TINY.num_layers * (TINY.num_experts - TINY.top_k) * one_expert(TINY)
    assert TINY.parameters_count() - TINY.parameters_count(active=True) == idle


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "relu2", "silu", "gelu"])
def test_activations(activation: str) -> None:
    gated = activation.endswith("glu")
    config = variant(activation=activation, gated=gated)
    model = whole_model(config)
    model(micro_batches([[9]])[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "use 8 or less"),
        ({"num_heads": 6}, "num_kv_heads 4 does not divide num_heads 6"),
        ({"head_dim": 5}, "rotary positions need it even"),
        ({"activation": "gelu"}, "but the experts are gated"),
        ({"score": "argmax"}, f"use one of {', '.join(SCORES)}"),
        ({"num_groups": 3}, "groups of experts cannot be kept"),
        ({"num_groups": 8}, "exceeds the 1 experts of the kept groups"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ],
)
def test_impossible_models_say_why(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        variant(**changes)


def test_two_chunks_of_a_rank_share_a_tied_embedding() -> None:
    """One parameter, whose gradient is what one chunk's is."""
    config, mesh, batch = variant(tie_embeddings=True), Mesh(Layout()), micro_batches([[9]])[0]
    kept = {"dtype": torch.float64}
    first = StageModel(config, mesh, range(1, 2), True, False, **kept)
    last = StageModel(config, mesh, range(2, 3), False, True, tied_to=first.embedding, **kept)
    assert "embedding.weight" not in {name for name, _, _ in last.named_shards()}
    whole = whole_model(config)
    for model in (whole, lambda batch: last(batch, first(batch))):
        model(batch).backward()
    assert torch.equal(first.embedding.weight.grad, whole.embedding.weight.grad)


def test_a_last_stage_begins_with_the_first_ones_table() -> None:
    config, mesh = variant(tie_embeddings=True, embedding_std=0.7), Mesh(Layout())
    first = StageModel(config, mesh, range(1, 2), True, False)
    last = StageModel(config, mesh, range(2, 3), False, True)
    assert torch.equal(first.embedding.weight, last.output_table.weight)
    assert [name for name, _, _ in last.named_shards()][0] == "embedding.weight"


def test_unknown_dispatcher() -> None:
    with pytest.raises(UsageError, match="use one of auto, all_to_all, all_gather"):
        whole_model(dispatcher="deepep")
