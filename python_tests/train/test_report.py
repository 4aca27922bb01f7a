"""What a run says of nodes before it begins."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.nodes import Nodes
from moekernels.plan.cost import border_bytes
from moekernels.plan.problem import configured
from moekernels.run import files as cfg
from moekernels.run.folder import read_metrics
from moekernels.run.sections import RunConfig
from moekernels.train.report import _topology
from python_tests.support.small_runs import train_here


def topology(layout, nodes):
    run = RunConfig(model=DecoderSpec(top_k=2, d_model=1000, num_layers=4))
    run.hardware.network_gbps, run.layout.dp, run.layout.ep = 10.0, layout.dp, layout.ep
    run.layout.pp, run.train.dtype, run.batch.accumulation = layout.pp, "fp32", 1
    order = nodes.order()
    groups = [order[i : i + layout.exchange] for i in range(0, layout.world, layout.exchange)]
    members = {"exchange": groups, "tp": [order[:1]], "pp": [order]}
    mesh = SimpleNamespace(
        layout=layout, nodes=nodes, members=members, rail=Group(None, 0, 1, (0,))
    )
    mesh.across = lambda name: Mesh.across(mesh, name)
    return _topology(run, mesh, tokens=8000)


def test_one_node_needs_no_word():
    assert topology(Layout(dp=4, ep=4), Nodes((0,) * 4)) == []


def test_an_exchange_inside_a_node():
    lines = topology(Layout(dp=2, pp=2, ep=2), Nodes((0, 1, 0, 1)))
    assert lines == ["nodes    2 of 2 ranks; inside a node: experts' exchange; across: pipeline"]


def test_an_exchange_over_the_network_says_what_it_costs():
    first, second = topology(Layout(dp=4, ep=4), Nodes((0, 0, 1, 1)))
    assert first.endswith("inside a node: nothing; across: experts' exchange")
    # 2000 tokens a rank, two choices each, half of them to the other node; 4 layers, 4 times 4 kB.
    wanted = (
        "EP 4 over the network, all_to_all: about 0.128 GB per rank and step, 0.0128 s at 10 GB/s"
    )
    assert wanted in second
    assert second.endswith("an ep*etp that divides 2 ranks stays inside a node")
    assert float(second.split("about ")[1].split()[0]) == pytest.approx(2000 * 4 * 4 * 4000 / 1e9)


def two_of_two(names):
    return Nodes(tuple(rank // 2 for rank, _ in enumerate(names)))


def test_a_run_sends_over_the_border_what_the_planner_says(text, tmp_path, monkeypatch, capsys):
    """Every token chooses every expert, so that nothing is left to chance; a layer is computed
    again, beside an expert that all tokens meet up to its end."""
    monkeypatch.setattr("moekernels.parallel.mesh.Nodes.named", two_of_two)
    flags = "--dp 4 --ep 4 --top-k 8 --sequences 16 --microbatches 2 --steps 2 --warmup 1"
    flags += " --checkpoint-layers 2 --eval-sequences 1"
    losses = []
    for way in ("hierarchical", "all_to_all", "auto"):
        out = tmp_path / way
        more = ["--dispatcher", way] if way != "auto" else ["--shared-d-ff", "16"]
        assert train_here(text, out, *flags.split(), *more) == 0, capsys.readouterr()
        run = cfg.resolve(None, out / "config.toml", {})
        chosen = "hierarchical" if way == "auto" else way
        strategy = replace(configured(run), dispatcher=chosen, nodes=2)
        lines = read_metrics(out)
        losses.append([line["loss"] for line in lines])
        for line in lines:
            wanted = border_bytes(run.model, strategy, line["tokens"])
            assert line["border_bytes"] == wanted > 0, way
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
