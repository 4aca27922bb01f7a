"""Loads, and the selection bias that evens them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.balance import dead_experts, max_over_mean, update_selection_biases
from moekernels.data.batch import MicroBatch
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.nn.router import _counts
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from python_tests.support.distributed import RankPool
from python_tests.support.layouts import TINY, assemble, compare, micro_batches, run_model, variant


def test_load_statistics() -> None:
    loads = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])
    assert max_over_mean(loads).tolist() == [1.0, 4.0, 1.0]
    assert dead_experts(loads).tolist() == [0, 3, 4]


def test_bias_moves_towards_the_mean_by_the_rate() -> None:
    biases = [torch.zeros(4), torch.full((4,), 0.5)]
    update_selection_biases(biases, torch.tensor([[9, 1, 5, 5], [4, 4, 4, 4]]), 0.1)
    torch.testing.assert_close(biases[0], torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    torch.testing.assert_close(biases[1], torch.full((4,), 0.5))


def test_bias_evens_a_skewed_router() -> None:
    torch.manual_seed(0)
    logits = torch.randn(512, 8) + torch.linspace(-2, 2, 8)
    bias = torch.zeros(8)

    def loads() -> torch.Tensor:
        return ops.gate(logits, 2, score="sigmoid", bias=bias).counts

    before = max_over_mean(loads()).item()
    for _ in range(200):
        update_selection_biases([bias], loads(), 0.01)
    assert before > 2 > 1.2 > max_over_mean(loads()).item()


def test_weights_do_not_see_the_bias() -> None:
    logits = torch.randn(16, 4)
    bias = torch.tensor([100.0, 100.0, 0.0, 0.0])
    out = ops.gate(logits, 2, score="sigmoid", bias=bias)
    assert set(out.ids.flatten().tolist()) == {0, 1}
    torch.testing.assert_close(out.weights, torch.sigmoid(logits).gather(1, out.ids.long()))


def test_padding_loads_nothing() -> None:
    batch = micro_batches([[5]], align=4)[0]
    model = StageModel(TINY, Mesh(Layout()), range(1, 3), True, True)
    model(batch).backward()
    loads, _ = model.take_statistics()
    assert loads.sum(-1).tolist() == [5 * TINY.top_k] * 2
    assert model.take_statistics()[0].sum() == 0


@pytest.mark.parametrize("evaluate", [True, False])
def test_only_training_counts(evaluate: bool) -> None:
    batch = micro_batches([[8]])[0]
    model = StageModel(TINY, Mesh(Layout()), range(1, 3), True, True, checkpoint_layers={1})
    with torch.set_grad_enabled(not evaluate):
        loss = model(batch)
    if not evaluate:
        loss.backward()  # computing layer 1 again does not count it again
    loads, losses = model.take_statistics()
    assert loads.sum().item() == (0 if evaluate else 8 * TINY.top_k * 2)
    assert (losses.sum() > 0) != evaluate


def test_selection_bias_exists_where_it_moves() -> None:
    with_bias = variant(score="sigmoid", bias_update_rate=0.01)
    model = StageModel(with_bias, Mesh(Layout()), range(1, 3), True, True)
    assert [b.shape for b in model.selection_biases] == [(8,), (8,)]
    assert StageModel(TINY, Mesh(Layout()), range(1, 3), True, True).selection_biases == []


def test_losses_of_an_even_router_are_one_a_layer() -> None:
    """With logits all alike every score is 1/E; counts go to the first experts, so the loss is
    exactly 1.
    """
    model = StageModel(TINY, Mesh(Layout()), range(1, 3), True, True, dtype=torch.float64)
    for block in model.layers.values():
        torch.nn.init.zeros_(block.moe.router.weight)
    model(micro_batches([[8, 4]])[0]).backward()
    _, losses = model.take_statistics()
    expected = torch.tensor([2.0, 2 * torch.log(torch.tensor(8.0)).item() ** 2])
    torch.testing.assert_close(losses, expected.double(), rtol=1e-6, atol=0)


SEQUENCES = [7, 2, 12, 5, 1, 9, 3, 3]
SPLITS = {  # places of the sequences in each microbatch, and rows that each segment is padded to
    "one": ([[0, 1, 2, 3, 4, 5, 6, 7]], None),
    "two": ([[0, 1, 2], [3, 4, 5, 6, 7]], None),
    "each": ([[i] for i in range(8)], None),
    "another order": ([[7, 4, 1], [6, 0], [5, 3, 2]], None),
    "padded": ([[6, 0, 1, 2], [4, 3, 5, 7]], 12),
}


def split(name: str) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, 61, (n + 1,), generator=generator) for n in SEQUENCES]
    groups, pad = SPLITS[name]
    return [
        MicroBatch.pack(
            [(texts[i][:-1], texts[i][1:]) for i in group],
            loss_scale=1 / sum(SEQUENCES),
            align=4,
            pad_to=pad,
        )
        for group in groups
    ]


def step_of(config: DecoderSpec, name: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Both losses of the router, and every gradient."""
    torch.set_num_threads(1)  # threads of so small a model only wait for each other
    result = run_model(Layout(), config, split(name), {"dtype": torch.float64, **options})
    return result["losses"], {key: x for key, (x, _) in result["gradients"].items()}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a)


@pytest.mark.parametrize("name", [n for n in SPLITS if n != "one"])
def test_balance_by_sequence_does_not_depend_on_the_split(name: str) -> None:
    config = replace(TINY, balance_coef=1.0, z_coef=0.0, balance_scope="sequence")
    losses, gradients = step_of(config, "one")
    other, others = step_of(config, name, checkpoint_layers={1})
    torch.testing.assert_close(other, losses, rtol=1e-12, atol=0)
    assert apart(gradients, others) < 1e-12
    by_batch = replace(TINY, balance_coef=1.0, z_coef=0.0)
    if name != "padded":
        assert apart(step_of(by_batch, "one")[1], step_of(by_batch, name)[1]) > 1e-4


def test_balance_by_sequence_is_each_sequences_own_loss() -> None:
    """Weighted by its tokens: what one microbatch a sequence gives in the other scope."""
    losses, gradients = step_of(replace(TINY, balance_coef=1.0, z_coef=0.0), "each")
    config = replace(TINY, balance_coef=1.0, z_coef=0.0, balance_scope="sequence")
    other, others = step_of(config, "one")
    torch.testing.assert_close(other, losses, rtol=1e-12, atol=0)
    assert apart(gradients, others) < 1e-12


def test_counts_of_replaced_choices_by_segment() -> None:
    ids = torch.tensor([[0, 1], [2, -1], [1, 1], [3, 0]])
    segments = torch.tensor([0, 2, 2, 4])
    expected = [[1, 1, 1, 0], [0, 0, 0, 0], [1, 2, 0, 1]]
    assert _counts(ids, 4, segments).tolist() == expected
    assert _counts(ids, 4, None).tolist() == [[2, 3, 1, 1]]


def test_losses_do_not_depend_on_how_ranks_share_tokens() -> None:
    config = replace(TINY, balance_coef=1.0, z_coef=1.0)
    batches = micro_batches([[7, 2], [12]])
    with RankPool(2) as pool:
        for layout in (Layout(tp=2, ep=2), Layout(dp=2, ep=2)):
            assemble(compare(pool, layout, config, batches), "gradients")
