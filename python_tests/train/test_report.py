"""What a run says of nodes before it begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moekernels.model.decoder import DecoderSpec
from moekernels.model.layout import Layout
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.nodes import Nodes
from moekernels.run.sections import RunConfig
from moekernels.train.report import _topology


def topology(layout, nodes):
    run = RunConfig(model=DecoderSpec(top_k=2, d_model=1000, num_layers=4))
    run.hardware.network_gbps = 10.0
    order = nodes.order()
    groups = [order[i : i + layout.exchange] for i in range(0, layout.world, layout.exchange)]
    members = {"exchange": groups, "tp": [order[:1]], "pp": [order]}
    mesh = SimpleNamespace(layout=layout, nodes=nodes, members=members)
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
    assert "EP 4 over the network: about 0.128 GB per rank and step, 0.0128 s at 10 GB/s" in second
    assert second.endswith("an ep*etp that divides 2 ranks stays inside a node")
    assert float(second.split("about ")[1].split()[0]) == pytest.approx(2000 * 4 * 4 * 4000 / 1e9)
