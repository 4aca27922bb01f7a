"""Experts in slots: the bits of the resident model, counts that a replay repeats, and models that
do not fit in memory."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from moekernels.errors import UsageError
from moekernels.integrations import _slots
from moekernels.integrations._slots import Event, Slots, belady, replay
from moekernels.integrations.cache import cached
from python_tests.support.transformers_models import tiny_model

TOKENS = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(4))


def model_of(family="Qwen3Moe"):
    model = tiny_model(family)
    model.set_experts_implementation("moekernels")
    return model.eval()


def outputs(model):
    """Logits of a prompt and of what is generated behind it."""
    with torch.no_grad():
        first = model(TOKENS).logits
        said = model.generate(
            TOKENS[:, :5], max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    return [first, said.sequences, *said.logits]


@pytest.mark.parametrize("family", ("Qwen3Moe", "Qwen2Moe", "GptOss", "DeepseekV3"))
def test_outputs_have_the_bits_of_the_resident_model(family, tmp_path):
    expected = outputs(model_of(family))
    for policy, slots, prefetch, folder in (
        ("lru", 1, True, None),
        ("lfu", 2, False, None),
        ("least-stale", 4, True, tmp_path),
    ):
        model = model_of(family)
        cache = cached(model, slots, policy, prefetch=prefetch, folder=folder)
        for ours, theirs in zip(outputs(model), expected, strict=True):
            assert torch.equal(ours, theirs)
        counts = cache.counts
        assert counts == replay(cache.trace, slots, policy)
        assert counts.misses > 0 and cache.fetched >= counts.misses * cache.layers[0].expert_bytes
        assert (counts.ahead > 0) == cache.prefetch
        report = cache.report()
        asked = counts.hits + counts.misses
        assert f"{100 * counts.hits / asked:.1f} % of {asked}" in report and "Belady" in report


def test_everything_in_slots_is_fetched_once():
    model = model_of()
    experts = model.config.num_experts
    cache = cached(model, experts, prefetch=False)
    outputs(model)
    fetched = {(e.layer, x) for e in cache.trace for x in e.experts}
    assert cache.counts.misses == len(fetched) == belady_misses(cache.trace, experts)
    assert cache.break_even() is None or cache.break_even() >= 1


def belady_misses(trace, size):
    return sum(len(set(e.experts)) for e in trace if not e.ahead) - belady(trace, size)


def best_hits(asked, size):
    """By trying every eviction."""
    states = {frozenset(): 0}
    for expert in asked:
        after = {}
        for held, hits in states.items():
            if expert in held:
                choices = [(held, hits + 1)]
            elif len(held) < size:
                choices = [(held | {expert}, hits)]
            else:
                choices = [(held - {gone} | {expert}, hits) for gone in held]
            for state, count in choices:
                after[state] = max(after.get(state, 0), count)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(4))
def test_belady_is_the_best_of_all(seed):
    rng = random.Random(seed)
    asked = [rng.randrange(5) for _ in range(14)]
    trace = [Event(0, (x,)) for x in asked]
    for size in (1, 2, 3, 5):
        assert belady(trace, size) == best_hits(asked, size)
        for policy in _slots.POLICIES:
            assert replay(trace, size, policy).hits <= belady(trace, size)


def held_after(policy, passes, size=2):
    slots = Slots(size, policy)
    for experts in passes:
        slots.use(experts)
    return sorted(slots.held)


def test_policies_differ():
    assert held_after("lru", [[1], [1], [2], [3]]) == [2, 3]
    assert held_after("lfu", [[1], [1], [2], [3]]) == [1, 3]
    # 1 came first and was used again, 2 not: both are stale, the oldest comer goes.
    assert held_after("least-stale", [[1], [2], [1], [4], [4], [3]]) == [3, 4]
    assert held_after("lru", [[1, 2], [1], [2], [3]]) == [2, 3]


def test_rounds_hold_no_more_than_the_slots():
    for policy, size in product(_slots.POLICIES, (1, 2, 3)):
        slots, rng = Slots(size, policy), random.Random(size)
        for _ in range(30):
            needed = rng.sample(range(7), rng.randint(0, 7))
            rounds = slots.use(needed)
            assert sorted(x for r in rounds for x in r.places) == sorted(needed)
            for r in rounds:
                assert len(set(r.places.values())) == len(r.places) <= size
                assert all(r.places[f.expert] == f.slot for f in r.fetches)
            ahead = slots.ahead(rng.sample(range(7), 3))
            assert len({f.slot for f in ahead}) == len(ahead) <= size
        assert slots.counts.useless <= slots.counts.ahead


@pytest.mark.parametrize(
    "ask, said",
    [
        ({"slots": 0}, "0 slots; a layer has 6 experts, use 1 to 6"),
        ({"slots": 7}, "7 slots; a layer has 6 experts"),
        ({"slots": 2, "policy": "fifo"}, "policy 'fifo'; it is one of lru, lfu, least-stale"),
        ({"slots": 2, "folder": "/proc/nothing"}, "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(ask, said):
    model = model_of()
    expected = outputs(model)
    with pytest.raises(UsageError, match=said):
        cached(model, **ask)
    for ours, theirs in zip(outputs(model), expected, strict=True):
        assert torch.equal(ours, theirs), "nothing was lost"


def test_a_full_disk_says_what_is_missing_and_leaves_nothing(tmp_path):
    model = model_of()
    expected = outputs(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UsageError, match="bin: cannot be written: File too large; it needs "):
            cached(model, slots=2, folder=str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    for ours, theirs in zip(outputs(model), expected, strict=True):
        assert torch.equal(ours, theirs), "nothing was lost"


def test_more_slots_than_memory(monkeypatch):
    monkeypatch.setattr("moekernels.integrations._cache.available", lambda: 5000)
    with pytest.raises(UsageError, match="6 slots in each of 2 layers need .* 5,000 are free"):
        cached(model_of(), 6)


def test_other_ways_are_refused():
    model = model_of()
    with pytest.raises(UsageError, match="no layer of the model has experts"):
        cached(torch.nn.Linear(2, 2), 1)
    cached(model, 2)
    with pytest.raises(UsageError, match="cached already"):
        cached(model, 2)
    with pytest.raises(UsageError, match=r"under torch.no_grad\(\)"):
        model(TOKENS)
    model = model_of()
    model.set_experts_implementation("eager")
    with pytest.raises(UsageError, match="run as 'eager'"):
        cached(model, 2)


def test_the_folder_of_no_name_is_the_one_we_are_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached(model_of(), 2, folder="")
    assert list(tmp_path.glob("layer-0000-*.bin"))


def test_a_folder_is_not_written_over(tmp_path):
    model = model_of()
    cached(model_of(), 2, folder=tmp_path)
    with pytest.raises(UsageError, match="is there already; give another folder"):
        cached(model, 2, folder=tmp_path)
    outputs(model)
    next(tmp_path.glob("layer-0001-w2.bin")).write_bytes(b"cut")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                setattr(module, name, torch.nn.Parameter(parameter.to("meta")))
    with pytest.raises(UsageError, match="layer-0001-w2.bin: has 3 bytes of"):
        cached(model, 2, folder=tmp_path)
    with pytest.raises(UsageError, match="give the folder they are in"):
        cached(model, 2)


LIMITED = """
import resource, sys
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
import moekernels.integrations.transformers
from moekernels.integrations.cache import cached
folder, mode = sys.argv[1:]
config = Qwen3MoeConfig(vocab_size=64, hidden_size=64, intermediate_size=64,
    moe_intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, num_experts=128, num_experts_per_tok=2, experts_implementation="moekernels")
config._experts_implementation = "moekernels"
tokens = torch.arange(3, 13)[None]
if mode == "write":
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        torch.save(model(tokens).logits, folder + "/expected")
    rest = {k: v for k, v in model.state_dict().items() if ".experts." not in k}
    torch.save(rest, folder + "/rest")
    cached(model, 4, folder=folder + "/experts")
else:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(torch.load(folder + "/rest"), assign=True, strict=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    used = next(x for x in open("/proc/self/status") if x.startswith("VmData"))
    used = int(used.split()[1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + (100 << 20),) * 2)
    try:
        torch.ones(4 * 128 * 3 * 64 * 512)
        sys.exit("the limit does not bind")
    except RuntimeError:
        pass  # all experts in memory are too many
    cache = cached(model, 4, folder=folder + "/experts")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, torch.load(folder + "/expected"))
    print(cache.report())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_model_larger_than_the_allowed_memory_runs(tmp_path):
    """200 MB of experts where 100 MB more may be had."""
    assert resource.RLIMIT_DATA
    for mode in ("write", "read"):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(tmp_path), mode],
            capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "of 201.3 MB" in done.stdout
