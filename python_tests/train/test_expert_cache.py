"""A whole model behind a cache of its experts says what it says without, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekernels.errors import UsageError
from moekernels.integrations import _slots
from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.nn.decode import Decoding
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.train.expert_cache import cached

SPEC = DecoderSpec(
    vocab_size=131,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    top_k=2,
    expert_d_ff=24,
    init_std=0.2,
)
SPECS = {
    "lifted": {"expert_d_in": 48},
    "biased": {"expert_bias": True},
    "shared, a dense layer": {"dense_layers": 1, "dense_d_ff": 24, "shared_d_ff": 16},
}


def model(spec, dtype):
    layers = range(1, spec.num_layers + 1)
    return StageModel(spec, Mesh(Layout()), layers, True, True, dtype=dtype, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("slots, policy", [(1, "lru"), (3, "lfu"), (5, "least-stale"), (8, "lru")])
def test_logits_have_the_bits_of_the_resident_model(dtype, kind, slots, policy):
    spec = replace(SPEC, **SPECS[kind])
    resident, behind = Decoding(model(spec, dtype)), model(spec, dtype)
    held = sum(p.numel() for moe in behind.experts_layers for p in moe.experts.parameters())
    cache = cached(behind, slots, policy, torch.device("cpu"))
    decoding = Decoding(behind)
    generator = torch.Generator().manual_seed(1)
    for count in (9, 1, 1, 2):
        new = [torch.randint(0, 131, (count,), generator=generator) for _ in range(3)]
        assert torch.equal(decoding.feed(new), resident.feed(new))
    kept = sum(x.numel() for layer in cache.layers for x in layer.kept.values())
    assert kept * spec.num_experts == held * slots
    assert all(p.is_meta for moe in behind.experts_layers for p in moe.experts.parameters())
    again = _slots.replay(cache.trace, slots, policy)
    assert cache.counts == again and again.hits + again.misses > 0


def test_more_slots_than_experts_leave_the_model_as_it_was():
    whole = model(SPEC, torch.float32)
    with pytest.raises(UsageError, match="use 1 to 8"):
        cached(whole, 9, "lru", torch.device("cpu"))
    assert not any(p.is_meta for p in whole.parameters())
