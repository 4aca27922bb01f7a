"""What is watched of the experts' choices, what a run leaves of it, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moekernels.balance.record import FILE, Record
from moekernels.cli import main
from moekernels.errors import UsageError
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.nn.watch import Watch
from moekernels.parallel.mesh import Mesh
from python_tests.support.layouts import TINY, micro_batches


def test_pairs_and_nodes_are_counted():
    watch = Watch(5, torch.tensor([0, 0, 1, 2, 2]), torch.device("cpu"))
    watch.see(torch.tensor([[0, 1], [0, 2], [3, -1], [-1, -1], [4, 2]], dtype=torch.int32))
    watch.see(torch.tensor([[1, 0]]))
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for token in ([0, 1], [0, 2], [3], [4, 2], [1, 0]):
        for a in token:
            for b in token:
                expected[a, b] += 1
    assert torch.equal(watch.pairs, expected)
    assert watch.nodes.tolist() == [1 + 2 + 1 + 2 + 1, 5]


@pytest.mark.parametrize("recomputed", ((), (1, 2)))
def test_a_layer_is_seen_once(recomputed):
    """Recomputing a layer for backward is no second look."""
    model = StageModel(TINY, Mesh(Layout()), range(1, 3), True, True, checkpoint_layers=recomputed)
    for moe in model.experts_layers:
        moe.watch = Watch(TINY.num_experts, torch.zeros(8, dtype=torch.int64), torch.device("cpu"))
    for batch in micro_batches([[9, 7], [12]]):
        model(batch).backward()
    loads, _ = model.take_statistics()
    for moe, load in zip(model.experts_layers, loads, strict=True):
        assert torch.equal(moe.watch.pairs.diagonal(), load)
        assert torch.equal(moe.watch.pairs, moe.watch.pairs.T)
        assert moe.watch.pairs.sum() == load.sum() * TINY.top_k
        assert moe.watch.nodes.tolist() == [load.sum() // TINY.top_k] * 2


def record(layers=2, experts=8, ranks=2):
    """Choices by popularity alone, but that 1 and 6 of the first layer often come together."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.zeros(layers, experts, experts, dtype=torch.int64)
    popular = torch.arange(1, experts + 1).double()
    for layer in range(layers):
        ids = torch.multinomial(popular.expand(4000, -1), 2, generator=generator)
        if layer == 0:
            ids[:1500] = torch.tensor([1, 6])
        chosen = torch.nn.functional.one_hot(ids, experts).sum(1)
        pairs[layer] = chosen.T @ chosen
    loads = pairs.diagonal(dim1=1, dim2=2).double().clone()
    slots = torch.arange(experts).repeat(layers, 1)
    return Record(loads, pairs, slots, torch.zeros(layers, ranks, dtype=torch.int64))


def test_what_chance_brings_together_counts_one():
    together = record().together()
    assert together[0, 1, 6] == together[0].max() > 2
    others = together[1][~torch.eye(8, dtype=torch.bool)]
    assert 0.5 < others.min() and others.max() < 1.4
    assert not together.diagonal(dim1=1, dim2=2).any()
    silent = record()
    assert (
        not Record(silent.loads, 0 * silent.pairs, silent.slot_of, silent.node_of).together().any()
    )


def test_a_record_comes_back(tmp_path):
    left = record()
    left.write(tmp_path)
    for key, value in vars(Record.read(tmp_path)).items():
        assert torch.equal(value, getattr(left, key))
    assert left.rank_loads.sum() == left.loads.sum()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"slot_of": torch.zeros(2, 8, dtype=torch.int64)}, "not one of 2 layers with 8 experts"),
        ({"pairs": torch.zeros(2, 7, 8)}, "pairs is not of 2 layers and 8 experts"),
        ({"node_of": torch.zeros(3, 2)}, "node_of is not of 2 layers"),
    ],
)
def test_a_record_that_cannot_be_is_refused(change, said, tmp_path):
    replace(record(), **change).write(tmp_path)
    with pytest.raises(UsageError, match=said):
        Record.read(tmp_path)


def test_the_command_shows_every_layer(tmp_path, capsys):
    left = record()
    left.loads[1, 3] = 0
    left.write(tmp_path)
    assert main(["experts", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 layers x 8 experts on 2 ranks of 1 node" in shown and "1+6" in shown
    assert (tmp_path / "experts.png").stat().st_size > 10_000
    assert main(["experts", str(tmp_path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["layers"]
    assert first["together"][0][:2] == [1, 6] and second["dead"] == [3]
    assert [first["hot"][0][0], second["cold"][0][0]] == [6, 3]
    assert first["ranks_placed_anew"] < first["ranks_max_over_mean"]


def test_nothing_to_show_is_one_line(tmp_path, capsys):
    assert main(["experts", str(tmp_path)]) == 2
    assert "experts.safetensors: no such file" in capsys.readouterr().err
    (tmp_path / FILE).write_bytes(b"junk")
    assert main(["experts", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
