"""Shapes and routings drawn by Hypothesis: ops against the reference and each other."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moekernels import ops, reference
from python_tests.support.spec import randn, wide

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SEEDS = st.integers(0, 2**31)
fast = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def routings(draw):
    """ids with any number of dropped ones, and the options of route."""
    experts, top_k = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    spread = draw(st.sampled_from([1, 3, experts + 4]))
    ids = torch.randint(-2, spread, (draw(st.integers(0, 70)), top_k), generator=generator)
    options = {"alignment": draw(st.sampled_from([1, 4, 16]))}
    if draw(st.booleans()):
        options["capacity"] = draw(st.integers(0, 20))
        options["drop"] = draw(st.sampled_from(["position", "weight"]))
        options["weights"] = torch.randint(0, 5, ids.shape, generator=generator).float()
    if draw(st.booleans()):
        ids = ids.int()
    return ids, experts, options


@fast
@given(routings())
def test_route(drawn):
    ids, experts, options = drawn
    ours, expected = (f.route(ids, experts, **options) for f in (ops, reference))
    for name, a, b in zip(ours._fields, ours, expected):
        assert torch.equal(a, b), name


@fast
@given(routings(), st.integers(0, 130), DTYPES, st.booleans(), SEEDS)
def test_permute_and_combine(drawn, hidden, dtype, weighted, seed):
    ids, experts, options = drawn
    routing = reference.route(ids, experts, **options)
    assume(len(routing.token_of))  # without rows the reference has nothing to differentiate
    x = randn(dtype, len(ids), hidden, seed=seed)
    rows = ops.permute(x, routing.token_of, routing.row_of)
    assert torch.equal(rows, reference.permute(x, routing.token_of, routing.row_of))
    weights = randn(wide(dtype), *ids.shape, seed=seed) if weighted else None
    outs = []
    for f in (ops, reference):
        leaf = rows.clone().requires_grad_()
        out = f.combine(leaf, routing.row_of, routing.token_of, weights)
        outs.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b)


@fast
@given(routings(), st.integers(1, 40), DTYPES, SEEDS)
def test_pack_holds_what_permute_gives(drawn, hidden, dtype, seed):
    ids, experts, options = drawn
    routing = reference.route(ids, experts, **options)
    x = randn(dtype, len(ids), hidden, seed=seed)
    weights = randn(wide(dtype), *ids.shape, seed=seed)
    message = ops.pack(x, weights, routing.slot_of, ids.shape[1])
    counts = torch.tensor([[len(message)]])
    rows, row_weights, _ = ops.regroup(message, counts, hidden)
    assert torch.equal(rows, ops.permute(x, routing.token_of, routing.row_of))
    assert torch.equal(row_weights, ops.permute_weights(weights, routing))


@fast
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 20), DTYPES, SEEDS)
def test_ungroup_undoes_regroup(peers, experts, hidden, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 7, (peers, experts), generator=generator)
    counts *= torch.randint(0, 2, (peers, experts), generator=generator)
    rows = int(counts.sum())
    message = reference.pack(
        randn(dtype, rows, hidden, seed=seed),
        randn(wide(dtype), rows, 1, seed=seed),
        torch.arange(rows, dtype=torch.int32),
        1,
    )
    grouped, weights, offsets = ops.regroup(message, counts, hidden)
    assert offsets.tolist() == [0, *counts.sum(0).cumsum(0).tolist()]
    back = ops.ungroup(grouped, counts, weights)
    assert torch.equal(back.view(torch.uint8), message.view(torch.uint8))


@fast
@given(st.data())
def test_gate(data):
    groups = data.draw(st.integers(1, 5))
    experts = groups * data.draw(st.integers(1, 9))
    kept = data.draw(st.integers(1, groups))
    options = {
        "score": data.draw(st.sampled_from(list(reference.SCORES))),
        "num_groups": groups,
        "groups_kept": kept,
        "group_score": data.draw(st.sampled_from(["max", "sum2"])),
        "renormalize": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
    }
    top_k = data.draw(st.integers(1, kept * (experts // groups)))
    tokens, seed = data.draw(st.integers(0, 150)), data.draw(SEEDS)
    x = randn(torch.float64, tokens, experts, seed=seed)
    if data.draw(st.booleans()):
        options["bias"] = randn(torch.float64, experts, seed=seed + 1)
    if data.draw(st.booleans()):
        cuts = sorted(data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=4)))
        options["segments"] = torch.tensor([0, *cuts])
    if data.draw(st.booleans()):
        options["valid"] = randn(torch.float64, tokens, seed=seed + 2) > 0
    results = []
    for f in (ops, reference):
        leaf = x.clone().requires_grad_()
        out = f.gate(leaf, top_k, **options)
        loss = (out.weights**2).sum() + (out.score_sum**2).sum() + out.z_sum.sum()
        results.append((*(t.detach() for t in out), *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
