"""What it costs to add an attention or what stands beside the experts: four files each, and flags,
tensors, planner, verify and training know of it."""

from __future__ import annotations

import pytest

from python_tests.support.toys import Tree


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path / "tree")


MEAN = '''"""Attention to all tokens before alike: the mean of their values."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.errors import UsageError
from moekernels.model.heads import HeadsSpec
from moekernels.model.spec import Part, Place, Shape, Work, key, norm_kept


@dataclass(frozen=True)
class MeanSpec(HeadsSpec):
    mean: bool = key(False, "attention that takes the mean of the values")


def check(spec) -> None:
    if spec.mean and spec.qk_norm:
        raise UsageError("model: qk_norm with mean, which has neither queries nor keys")


def shapes(spec: MeanSpec) -> dict[str, Shape]:
    width = spec.attention_width
    return {"value": (width, spec.d_model), "out": (spec.d_model, width)}


def parameters(spec: MeanSpec, at: Place, active: bool = False) -> int:
    return 2 * spec.d_model * spec.attention_width // at.layout.tp


def kept(spec: MeanSpec, at: Place) -> float:
    """The gathered input, the means, and how many tokens each is of."""
    width = spec.d_model + spec.attention_width / at.layout.tp
    return norm_kept(spec, at) + at.tokens * (width + 1) * at.width


def work(spec: MeanSpec, at: Place) -> Work:
    width = spec.attention_width / at.layout.tp
    return Work(dense=4.0 * spec.d_model * width, traffic=4 * width * at.width)


PART = Part(
    parameters,
    kept,
    work,
    shapes,
    asked=lambda spec: spec.mean,
    check=check,
    example={"mean": True, "qk_norm": False},
)
'''
MEAN_MODULE = '''"""The mean of the values before."""

import torch
import torch.nn.functional as F
from torch import nn

from moekernels.parallel.shard import shard
from moekernels.parallel.tensor import copy_to, gather_tokens, reduce_from, scatter_tokens


class MeanAttention(nn.Module):
    def __init__(self, config, mesh, layer, home, *, name):
        super().__init__()
        mesh.layout.validate(num_heads=config.num_heads)
        self.tp, self.sequence_parallel = mesh.tp, home.sequence_parallel
        width, part = config.attention_width, config.attention_width // mesh.tp.size
        mine = [(mesh.tp.rank * part, (mesh.tp.rank + 1) * part)]
        self.shards = {
            "value": shard((width, config.d_model), {0: mine}),
            "out": shard((config.d_model, width), {1: mine}),
        }
        for key, info in self.shards.items():
            setattr(self, key, home.normal(info, config.init_std, f"{name}.{key}"))

    def forward(self, x, packing):
        x = gather_tokens(x, self.tp) if self.sequence_parallel else copy_to(x, self.tp)
        bounds = packing.cu_seqlens
        sizes = [b - a for a, b in zip(bounds, bounds[1:])]
        sums = [part.cumsum(0) for part in F.linear(x, self.value).split(sizes)]
        count = torch.cat([torch.arange(1, n + 1, device=x.device) for n in sizes])
        y = F.linear(torch.cat(sums) / count[:, None].to(x.dtype), self.out)
        return scatter_tokens(y, self.tp) if self.sequence_parallel else reduce_from(y, self.tp)
'''
CONSTANT = '''"""An expert that every token visits and none changes: a vector of its own."""

from __future__ import annotations

from dataclasses import dataclass

from moekernels.model.experts import ExpertsSpec
from moekernels.model.spec import Part, Place, Work, key


@dataclass(frozen=True)
class ConstantSpec(ExpertsSpec):
    constant: bool = key(False, "a vector beside the routed experts' results")


def parameters(spec: ConstantSpec, at: Place, active: bool = False) -> int:
    return spec.d_model


def work(spec: ConstantSpec, at: Place) -> Work:
    return Work(traffic=2 * spec.d_model * at.width / at.layout.tp)


PART = Part(
    parameters,
    kept=lambda spec, at: 0.0,
    work=work,
    shapes=lambda spec: {"value": (1, spec.d_model)},
    asked=lambda spec: spec.constant,
    copies=lambda layout: (layout.stage_ranks, 1),
    example={"constant": True},
)
'''
CONSTANT_MODULE = '''"""A vector beside the routed experts' results."""

from torch import nn

from moekernels.parallel.shard import shard


class ConstantExpert(nn.Module):
    def __init__(self, config, mesh, home, *, name):
        super().__init__()
        over = "stage" if home.sequence_parallel else "dp"
        info = shard((1, config.d_model), reduce_over=over, copies="stage")
        self.shards = {"value": info}
        self.value = home.normal(info, config.init_std, f"{name}.value")

    def forward(self, x):
        return self.value.expand(len(x), -1)
'''
USE = """
import dataclasses

import torch

from moekernels.cli.parser import build_parser
from moekernels.model import tensors
from moekernels.model.decoder import chunk_parameters, layer_parts
from moekernels.model.layout import Layout
from moekernels.model.spec import Place
from moekernels.nn.rotary import Packing
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.plan import cost, memory, problem, search
from moekernels.run import files as cfg
from moekernels.verify.command import verify_layout
from moekernels.verify.variants import Variant, configure, variants_of

words, part, variant = {words}, {part!r}, Variant({variant}, steps=1)
given = build_parser().parse_args(["train", *words])
assert cfg.resolve("tiny", None, given.flags).model.{field}
given = build_parser().parse_args(["plan", *words])
asked = problem.problem_of(cfg.resolve("spec-30b", None, given.flags))
assert "{part}" in dict(layer_parts(asked.model, 1)) and asked.model.{field}
plan = next(search.candidates(asked, 8, search.Space(gpus=8)))
assert sum(memory.rank_parameters(asked.model, plan, 0).values()) > 0
assert cost.layer_cost(asked.model, asked.cluster, plan).forward["{time}"].per_token > 0

model = configure({{}}, variant, "fp32", None).model
chunk = StageModel(model, Mesh(Layout()), range(1, model.num_layers + 1), True, True)
named = {{name: info.full_shape for name, _, info in chunk.named_shards()}}
assert tensors.parameters(model).keys() == named.keys()
assert any(name.endswith(".{home}") for name in named), named
assert sum(p.numel() for p in chunk.parameters()) == model.parameters_count()
{check}
assert variant in variants_of({{"tp": 2}}, 1)
assert verify_layout({{"tp": 2}}, [variant], "fp64", "cpu") == 0
"""
KEPT = """
# What the planner counts is what is kept, to the byte.
block, kept = chunk.layers["1"], {}
own = {p.untyped_storage().data_ptr() for p in block.parameters()}


def note(t):
    storage = t.untyped_storage()
    if storage.data_ptr() not in own:
        kept[storage.data_ptr()] = storage.nbytes()
    return t


x = torch.randn(12, model.d_model, requires_grad=True)
packing = Packing.make(torch.arange(12), [0, 5, 12], [1.0, 0.5], torch.float32)
with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
    block.attention(block.attention_norm(x), packing)
at = Place(tokens=12.0, dtype="fp32", device="cpu", runs=2)
assert sum(kept.values()) == memory.layer_bytes(model, at, 1).kept["attention"], kept
"""


def test_an_attention_is_four_files(tree):
    tree.new("moekernels/model/mean.py", MEAN)
    register = "moekernels/model/attention.py"
    tree.insert(register, '    "grouped": grouped.PART', '    "mean": mean.PART,\n')
    tree.insert(register, "GroupedSpec, LatentSpec)", "MeanSpec, ")
    imported = "from moekernels.model import mean\nfrom moekernels.model.mean import MeanSpec\n"
    tree.insert(register, "from moekernels.model import grouped", imported)
    tree.new("moekernels/nn/mean.py", MEAN_MODULE)
    modules = "moekernels/nn/transformer.py"
    tree.insert(modules, '"grouped": Attention, ', '"mean": MeanAttention, ')
    imported = "from moekernels.nn.mean import MeanAttention\n"
    tree.insert(modules, "from moekernels.nn.moe import", imported)
    assert tree.files <= 4
    facts = {"words": ["--mean", "--no-qk-norm"], "part": "attention", "field": "mean"}
    facts |= {"variant": 'attention="mean"', "time": "attention", "home": "attention.value"}
    tree.run(USE.format(**facts, check=KEPT))


def test_an_expert_beside_is_four_files(tree):
    tree.new("moekernels/model/constant.py", CONSTANT)
    register = "moekernels/model/beside.py"
    tree.insert(register, '"shared": shared.PART', '"constant": constant.PART, ')
    tree.insert(register, "SharedSpec):", "ConstantSpec, ")
    imported = "from moekernels.model.constant import ConstantSpec\n"
    tree.insert(register, "from moekernels.model.shared", imported)
    tree.insert(register, "shared\nfrom", "constant, ")
    tree.new("moekernels/nn/constant.py", CONSTANT_MODULE)
    modules = "moekernels/nn/moe.py"
    tree.insert(modules, '"shared": SharedExpert', '"constant": ConstantExpert, ')
    imported = "from moekernels.nn.constant import ConstantExpert\n"
    tree.insert(modules, "from moekernels.nn.dispatcher", imported)
    assert tree.files <= 4
    facts = {"words": ["--constant"], "part": "constant", "field": "constant"}
    facts |= {"variant": "guests=True", "time": "memory-bound", "home": "moe.constant.value"}
    tree.run(USE.format(**facts, check=""))
