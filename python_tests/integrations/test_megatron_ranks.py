"""A Megatron-Core layer on our experts over two ranks of expert parallelism, and its experts in
Megatron's own distributed checkpoints."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs megatron-core (pip install --no-deps will do)")

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.moe import moe_utils

from python_tests.support.distributed import run_ranks
from python_tests.support.megatron_layers import assert_same_layer, layer

EP2 = {"expert_model_parallel_size": 2}
PARENTS = []


def begin() -> None:
    """In a rank's own process: Megatron as on a machine without a GPU, which it does not ask for
    everywhere, and with processes of its own to write files."""
    # Megatron forgets some groups of what ended before the fork only when it begins anew; to let
    # one go waits for threads, which did not come along.
    PARENTS.append(dict(vars(parallel_state)))
    multiprocessing.current_process()._config["daemon"] = False
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: False
    torch.cuda.synchronize = lambda *_: None
    moe_utils.te_general_gemm = None
    filesystem_async._process_memory = lambda: 0  # for its log; asks psutil
    torch.compiler.set_stance("force_eager")
    parallel_state.initialize_model_parallel(**EP2)


def same_layer(rank: int) -> None:
    begin()
    theirs, ours = (layer(own, seed=rank, **EP2) for own in (False, True))
    assert ours.experts.num_local_experts == 2
    assert_same_layer(theirs, ours, seed=10 + rank)


def test_a_layer_over_two_ranks_is_megatrons():
    """Each rank with experts and tokens of its own."""
    run_ranks(2, same_layer)


def through_a_checkpoint(rank: int, folder: str, own: bool) -> bool:
    """Experts of one class saved, and loaded into the other's; whether both compute the same."""
    begin()
    saved, other = layer(own, seed=rank, **EP2), layer(not own, seed=7, **EP2)
    about = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def state(moe):
        return moe.experts.sharded_state_dict("experts.", (), about)

    dist_checkpointing.save(state(saved), folder)
    found = dist_checkpointing.load(state(other), folder)
    other.experts.load_state_dict({k.removeprefix("experts."): v for k, v in found.items()})
    torch.manual_seed(20 + rank)
    x = torch.randn(12, 16)
    counts, weights = torch.tensor([5, 7]), torch.rand(12)
    a, b = (moe.experts(x, counts, weights)[0] for moe in (saved, other))
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [True, False], ids=["ours", "theirs"])
def test_experts_go_through_a_distributed_checkpoint(own, tmp_path):
    assert run_ranks(2, through_a_checkpoint, str(tmp_path), own) == [True, True]
