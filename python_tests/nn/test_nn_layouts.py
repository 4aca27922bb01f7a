"""One process == every layout: loss, every gradient, loads, norm, in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moekernels.model.layout import Layout
from python_tests.support.distributed import RankPool
from python_tests.support.layouts import compare, micro_batches, variant


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4, timeout=120) as pool:
        yield pool


UNEVEN = micro_batches([[7, 7, 3], [5], [1, 9, 2], [11]])

LAYOUTS = {
    "tp4 ep4": Layout(tp=4, ep=4),
    "tp4 ep2": Layout(tp=4, ep=2),
    "tp4": Layout(tp=4),
    "dp4 ep4": Layout(dp=4, ep=4),
    "dp4": Layout(dp=4),
    "dp4 ep2 etp2": Layout(dp=4, ep=2, etp=2),
    "tp2 dp2 ep2": Layout(tp=2, dp=2, ep=2),
    "tp2 dp2 ep4": Layout(tp=2, dp=2, ep=4),
    "tp2 dp2 etp2 ep2": Layout(tp=2, dp=2, etp=2, ep=2),
    "tp2 dp2 etp2": Layout(tp=2, dp=2, etp=2),
    "tp4 etp4": Layout(tp=4, etp=4),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_layout_computes_what_one_process_computes(
    four: RankPool, name: str, dispatcher: str
) -> None:
    compare(four, LAYOUTS[name], variant(), UNEVEN, dispatcher=dispatcher)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("name", ["tp4 ep4", "tp2 dp2 ep4", "tp2 dp2 etp2 ep2"])
def test_without_sequence_parallel(four: RankPool, name: str, dispatcher: str) -> None:
    config = variant(qk_norm=True)
    compare(four, LAYOUTS[name], config, UNEVEN, dispatcher=dispatcher, sequence_parallel=False)


@pytest.mark.parametrize("name", ["tp4 ep4", "tp2 dp2 etp2 ep2", "dp4 ep2 etp2"])
def test_lifted_experts_grouped_queries_and_tied_embeddings(four: RankPool, name: str) -> None:
    config = variant(
        expert_d_in=20,
        num_heads=8,
        qk_norm=True,
        tie_embeddings=True,
        recompute_experts=True,
    )
    compare(four, LAYOUTS[name], config, UNEVEN)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_choices_from_one_to_all(four: RankPool, top_k: int) -> None:
    compare(four, LAYOUTS["tp2 dp2 ep4"], variant(top_k=top_k), UNEVEN)


def test_experts_that_are_not_a_power_of_two(four: RankPool) -> None:
    config = variant(num_experts=6, top_k=3)
    compare(four, Layout(tp=2, dp=2, ep=2), config, UNEVEN)
    compare(four, Layout(tp=2, dp=2, ep=2, etp=2), config, UNEVEN, dispatcher="all_to_all")


@pytest.mark.parametrize(
    "router",
    [
        dict(score="sigmoid", renormalize=True, scale=2.5, num_groups=4, groups_kept=2),
        dict(score="softmax_topk", balance_coef=0.0),
        dict(score="sqrtsoftplus", bias_update_rate=0.01),
        dict(score="softmax", balance_coef=1.0, balance_scope="sequence"),
    ],
    ids=lambda r: f"{r['score']}-{r.get('balance_scope', 'microbatch')}",
)
def test_routers(four: RankPool, router: dict) -> None:
    compare(four, LAYOUTS["tp2 dp2 ep4"], variant(**router), UNEVEN)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("layout", ["tp2 dp2 ep4", "tp2 dp2 etp2 ep2"])
def test_shared_experts_and_dense_layers(four: RankPool, layout: str, sequence_parallel) -> None:
    config = variant(shared_d_ff=8, shared_gate=True, dense_layers=1, dense_d_ff=20)
    compare(four, LAYOUTS[layout], config, UNEVEN, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_checkpointed_layers_give_the_same_bits(four: RankPool, dispatcher: str) -> None:
    layout = LAYOUTS["tp2 dp2 etp2 ep2"]
    plain = compare(four, layout, variant(), UNEVEN, dispatcher=dispatcher)
    again = compare(
        four, layout, variant(), UNEVEN, dispatcher=dispatcher, checkpoint_layers={1, 2}
    )
    for a, b in zip(plain, again):
        assert a["loss"] == b["loss"]
        for name, (gradient, _) in a["gradients"].items():
            assert torch.equal(gradient, b["gradients"][name][0]), name


def test_a_rank_without_tokens_of_its_own_to_route(four: RankPool) -> None:
    """Sequences of one token leave whole ranks with padding only, and most experts with nothing."""
    compare(four, LAYOUTS["tp4 ep4"], variant(), micro_batches([[1], [2]]))
    compare(four, LAYOUTS["dp4 ep4"], variant(), micro_batches([[1], [2], [1], [3]]))


def test_single_precision(four: RankPool) -> None:
    compare(four, LAYOUTS["tp2 dp2 ep4"], variant(), UNEVEN, dtype=torch.float32, tolerance=1e-5)
