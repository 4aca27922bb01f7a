"""Copies of hot experts: the run they are copied in is the run without, evener; in two messages a
step, and never in a checkpoint."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moekernels.balance.replicas import Copy
from moekernels.model.layout import Layout
from moekernels.nn.replicas import Replicas
from moekernels.nn.transformer import StageModel
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import Nodes
from moekernels.parallel.optimizer import Optimizer, main_grad_of
from moekernels.run.folder import read_metrics
from moekernels.train import manifest
from moekernels.verify import compare
from moekernels.verify.variants import Variant, configure
from python_tests.support.distributed import run_ranks
from python_tests.support.layouts import TINY
from python_tests.support.small_runs import losses, train_here

# One expert a rank, one choice a token, and no loss that evens them.
HOT = (
    "--experts 2 --top-k 1 --balance-coef 0 --sequences 24 --microbatches 2 --dp 2 --ep 2 "
    "--steps 8 --replan 3"
).split()


def train(text, out, *more):
    assert train_here(text, out, *HOT, *more) == 0
    return read_metrics(out)


def test_a_run_with_copies_is_the_run_without_to_rounding(text, cache, tmp_path, capfd):
    plain = train(text, tmp_path / "plain", "--dtype", "fp64")
    lines = train(text, tmp_path / "copies", "--dtype", "fp64", "--replicas", "1")
    for line, expected in zip(lines, plain, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-12)
    assert lines[-1]["eval_loss"] == pytest.approx(plain[-1]["eval_loss"], rel=1e-12)
    copied = [x for x in lines if x["replicas"]]
    assert [x["step"] for x in copied] == [4, 5, 6, 7, 8]
    assert lines[2]["replicated"] and not any("replicated" in x for x in plain)
    for line in lines[:3]:
        assert line["rank_load_with_replicas"] == line["rank_load_max_over_mean"]
    without, with_ = (
        sum(x[key] for x in copied) / len(copied)
        for key in ("rank_load_max_over_mean", "rank_load_with_replicas")
    )
    assert without > 1.2 and with_ - 1 < (without - 1) / 2
    assert "copies of" in capfd.readouterr().out
    names = [
        manifest.read(tmp_path / run / "checkpoints" / "step-0000008").tensors.keys()
        for run in ("plain", "copies")
    ]
    assert names[0] == names[1]


def test_runs_repeat_bit_for_bit_through_a_resume_and_over_any_exchange(text, cache, tmp_path):
    """And their checkpoints are any layout's."""
    more = ("--replicas", "1", "--save-every", "5", "--keep", "9")
    expected = train(text, tmp_path / "a", *more)
    assert expected[-1]["replicas"] > 0
    for run in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / run)
        shutil.rmtree(tmp_path / run / "checkpoints" / "step-0000008")
    train(text, tmp_path / "b", *more, "--resume")
    train(text, tmp_path / "d", *more, "--exchange", "collective", "--exchange-parts", "2")
    for run in ("b", "d"):
        for line, other in zip(read_metrics(tmp_path / run), expected, strict=True):
            for key in ("loss", "grad_norm", "replicas", "rank_load_with_replicas"):
                assert line[key] == other[key], (run, key, line["step"])
    alone = ("--dp", "1", "--ep", "1", "--replicas", "0", "--replan", "never", "--resume")
    assert losses(tmp_path / "c")[:5] == [x["loss"] for x in expected[:5]]
    train(text, tmp_path / "c", *more, *alone)
    assert losses(tmp_path / "c")[5:] == pytest.approx([x["loss"] for x in expected[5:]], rel=1e-4)


def test_where_placement_suffices_none_is_made(text, cache, tmp_path, capfd):
    """Four experts a rank of even loads."""
    even = ("--experts", "8", "--balance-coef", "0.1", "--steps", "4", "--replicas", "1")
    lines = train(text, tmp_path / "run", *even)
    assert not any(x["replicas"] for x in lines) and not any("replicated" in x for x in lines)
    assert "replicas none at step 3: placement suffices" in capfd.readouterr().out


@pytest.mark.parametrize(
    "more, reason",
    [
        ("--top-k 2", "placement suffices: a token chooses 2 experts"),
        ("--dp 2 --ep 1 --replan never", "placement suffices: a token chooses 1 experts"),
        ("--replicas 2", "the other ranks have 1 experts of a layer"),
        ("--dispatcher all_gather", "give --dispatcher all_to_all"),
        ("--exchange-buffers bounded:2", "bounded buffers read no counts"),
        ("--replan auto", "--replan auto reckons with one place"),
    ],
)
def test_it_is_refused_with_a_reason(text, tmp_path, capfd, more, reason):
    assert train_here(text, tmp_path / "run", *HOT, "--replicas", "1", *more.split()) == 2
    said = capfd.readouterr().err
    assert reason in said and "--replicas" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def order(rank):
    """Gradients that tell in which order they were added; and how many messages there are."""
    mesh = Mesh(Layout(dp=4, ep=4))
    chunk = StageModel(TINY, mesh, range(1, 3), True, True, replicas=1)
    shards = list(chunk.named_shards())
    Optimizer(shards, mesh, AdamWConfig())
    replicas = Replicas(mesh, chunk.experts_layers)
    copies = [Copy(0, rank, 0, 4) for rank in (3, 1, 2)]
    for number in range(2):
        replicas.hold(number, copies, torch.arange(8), [0] * 4)
    sent, send = Counter(), dist.all_to_all_single

    def counted(out, x, receive=None, send_=None, **more):
        sent.update(len([n for n in send_ if n]) * ["peers"] + ["calls"])
        return send(out, x, receive, send_, **more)

    dist.all_to_all_single = counted
    try:
        replicas.refresh()
        refreshed, sent = sent, Counter()
        first = chunk.experts_layers[1].experts
        weights = {key: w[0].clone() for key, w in first.spare.weights.items()}
        for moe in chunk.experts_layers:
            for w in moe.experts.spare.weights.values():
                main_grad_of(w).fill_((0.0, 1e8, 1.0, -1e8)[rank])
            for w in moe.experts.weights.values():
                main_grad_of(w).fill_(1.0)
        replicas.bring_home()
    finally:
        dist.all_to_all_single = send
    owned = [main_grad_of(w) for moe in chunk.experts_layers for w in moe.experts.weights.values()]
    left = [main_grad_of(w).abs().max().item() for w in first.spare.weights.values()]
    theirs = {key: w.detach()[0].clone() for key, w in first.weights.items()}
    return weights, theirs, [g[:, ...].unique().tolist() for g in owned], left, refreshed, sent


def test_weights_come_in_one_message_and_gradients_return_in_one_in_rank_order():
    ranks = run_ranks(4, order)
    owner = ranks[0]
    in_order = ((torch.tensor(1.0) + 1e8) + 1.0) - 1e8
    assert in_order == 0.0
    for number, (weights, _, owned, left, refreshed, sent) in enumerate(ranks):
        for key, weight in weights.items():
            assert torch.equal(weight, owner[1][key]) == (number > 0)
        assert all(values == ([0.0, 1.0] if number == 0 else [1.0]) for values in owned)
        assert left == ([0.0] * len(left) if number else left)
        assert refreshed == ({"calls": 1, "peers": 3} if number == 0 else {"calls": 1})
        assert sent == ({"calls": 1} if number == 0 else {"calls": 1, "peers": 1})


def biased(rank, parts, degrees, dispatcher="all_to_all"):
    run = configure(
        degrees, Variant(top_k=1, steps=1, replicas=3, dispatcher=dispatcher), "fp64", None
    )
    run.model = replace(run.model, expert_bias=True, num_layers=2)
    run.batch.microbatches, run.batch.context = 2, 24
    run.train.exchange_parts, run.train.steps = parts, 1
    run.layout.checkpoint_layers = "none" if parts > 1 else "all"
    steps = compare.record(run, torch.device("cpu"))
    lay = run.layout
    nodes = Nodes((0, 0, 1, 1)) if dispatcher == "hierarchical" else None
    mesh = Mesh(Layout(lay.tp, lay.dp, lay.pp, lay.ep, lay.etp), nodes=nodes)
    verdict = compare.compare(run, mesh, steps)
    return verdict.loss, verdict.gradient, verdict.name, set(steps[0].gradients) - verdict.seen


@pytest.mark.parametrize(
    "parts, degrees", [(1, {"tp": 2, "dp": 2, "etp": 2, "ep": 2}), (3, {"tp": 2}), (2, {"tp": 4})]
)
def test_biases_parts_and_recomputation(parts, degrees):
    world = degrees.get("tp", 1) * degrees.get("dp", 1)
    for loss, gradient, name, _ in run_ranks(world, biased, parts, degrees):
        assert loss < 1e-12 and gradient < 1e-9, name


def test_one_copy_of_a_token_a_node():
    for loss, gradient, name, _ in run_ranks(4, biased, 1, {"dp": 4, "ep": 4}, "hierarchical"):
        assert loss < 1e-12 and gradient < 1e-9, name


@pytest.mark.parametrize("mistake", ["refresh", "bring_home"])
def test_a_mistake_would_be_seen(mistake, monkeypatch):
    monkeypatch.setattr(Replicas, mistake, lambda self: None)
    worst = max(gradient for _, gradient, _, _ in run_ranks(2, biased, 1, {"tp": 2}))
    assert worst > 1e-3
