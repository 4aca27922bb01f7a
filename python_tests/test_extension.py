"""What it costs to add a part: toys are added to a copy of the tree, counted by the files that they
touch, and used. Nothing else may list an op, a schedule, a dispatcher."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from python_tests.support.toys import COMPILER, ROOT, Tree


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path / "tree")


HEADER = """#pragma once

#include "moekernels/common.h"

namespace moekernels {

struct NegateArgs {
  const float* x;  // [T]
  float* out;      // [T]
};

namespace cuda {
void negate(const NegateArgs& args, int64_t tokens, Stream stream);
}

}  // namespace moekernels

MOEKERNELS_CPU_KERNEL(negate, const NegateArgs& args, int64_t begin, int64_t end)
"""
KERNEL = """#include "moekernels/negate.h"

namespace moekernels::cpu::MOEKERNELS_ISA {

void negate(const NegateArgs& args, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) args.out[t] = -args.x[t];
}

}  // namespace moekernels::cpu::MOEKERNELS_ISA
"""
CUDA = """#include "moekernels/negate.h"

#include "common/launch.cuh"

namespace moekernels::cuda {
namespace {

__global__ void negate_all(const NegateArgs args, int64_t tokens) {
  const int64_t t = blockIdx.x * int64_t{256} + threadIdx.x;
  if (t < tokens) args.out[t] = -args.x[t];
}

}  // namespace

void negate(const NegateArgs& args, int64_t tokens, Stream stream) {
  launch("negate", negate_all, (tokens + 255) / 256, 256, 0, stream, args, tokens);
}

}  // namespace moekernels::cuda
"""
BINDING = """#include "moekernels/negate.h"

#include "device.h"

namespace moekernels::binding {
namespace {

Tensor negate(const Tensor& x) {
  check_tensor("negate", "x", x, {ScalarType::Float}, {{"T"}});
  Tensor out = empty({x.size(0)}, x.scalar_type(), x);
  const NegateArgs args{.x = x.const_data_ptr<float>(), .out = out.mutable_data_ptr<float>()};
  run(x, [&](auto stream) { cuda::negate(args, x.size(0), stream); }, [&] {
    parallel(x.size(0), 1024, [&](int64_t begin, int64_t end) { cpu::negate(args, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) { m.def("_negate(Tensor x) -> Tensor"); }

MOEKERNELS_IMPL(m) { m.impl("_negate", TORCH_BOX(&negate)); }

}  // namespace moekernels::binding
"""
OP = '''from torch import Tensor

from moekernels import reference
from moekernels.ops._library import fake, raw
from moekernels.ops._op import op

__all__ = ["negate"]


@fake("_negate")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@op(reference.negate)
def negate(x: Tensor) -> Tensor:
    """x [T] -> -x."""
    return raw._negate.default(x)
'''
CASES = """import torch

from moekernels import ops, reference
from python_tests.support.spec import Case, OpSpec, randn, register

register(
    OpSpec(
        name="negate",
        fn=ops.negate,
        reference=reference.negate,
        cases=lambda dtype: [Case("five", {"x": randn(dtype, 5)})],
        sized=lambda tokens: {"x": randn(torch.float32, tokens)},
        dtypes=(torch.float32,),
        exact=True,
    )
)
"""
USE_OP = """
import runpy

import torch

# The library of this machine was built without the toy: its kernel is the reference.
torch.library.define("moekernels::_negate", "(Tensor x) -> Tensor")
torch.library.impl("moekernels::_negate", "CPU", lambda x: reference.negate(x))
from moekernels import ops, reference
from python_tests import test_layering as layering
from python_tests.support.contract import SPECS, evaluate, hold

assert "negate" in ops.__all__ and "negate" in layering.STEMS
layering.test_stem_is_present_in_every_layer("negate")
layering.test_no_op_lacks_its_python()
spec = next(spec for spec in SPECS if spec.name == "negate")
for case in spec.cases(torch.float32):
    hold(spec, case.inputs, evaluate(spec.fn, spec, case.inputs))
assert ops.negate(torch.empty(7, device="meta")).shape == (7,)
compiled = torch.compile(ops.negate, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(torch.ones(3)), -torch.ones(3))
page = runpy.run_path("docs/hooks.py")["on_page_markdown"]("<!-- ops -->")
assert "::: moekernels.ops.negate.negate" in page
"""


def test_an_op_is_six_files_and_its_cases(tree):
    tree.new("csrc/include/moekernels/negate.h", HEADER)
    tree.new("csrc/cpu/negate.cpp", KERNEL)
    tree.new("csrc/cuda/negate.cu", CUDA)
    tree.new("csrc/torch/negate.cpp", BINDING)
    tree.new("moekernels/ops/negate.py", OP)
    text = "def negate(x: Tensor) -> Tensor:\n    return -x\n\n\n"
    tree.insert("moekernels/reference/__init__.py", "def grouped_gemm(\n", text)
    assert tree.files == 6
    tree.new("python_tests/support/cases/negate.py", CASES)
    tree.run(USE_OP)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    if COMPILER:  # and the CPU kernel is one, found by CMake's own pattern
        assert "GLOB cpu_sources CONFIGURE_DEPENDS csrc/cpu/*.cpp" in cmake
        flags = ["-std=c++20", "-fsyntax-only", "-DMOEKERNELS_ISA=generic", "-Icsrc/include"]
        subprocess.run([COMPILER, *flags, "csrc/cpu/negate.cpp"], cwd=tree.path, check=True)
    if shutil.which("cmake"):  # the sanitizers take its kernel, and no product
        assert "include(csrc/simt/stems.cmake)" in cmake
        command = ["cmake", "-P", "csrc/simt/stems.cmake"]
        told = subprocess.run(command, cwd=tree.path, capture_output=True, text=True, check=True)
        stems = told.stdout.split()[-1].split(";")
        assert "negate" in stems and "gate" in stems
        assert not {"exchange", "experts", "grouped_gemm", "state_sm90"} & set(stems)


USE_SCHEDULE = """
from moekernels.cli.parser import build_parser
from moekernels.pipeline.check import check
from moekernels.pipeline.build import SCHEDULES, build, offered
from moekernels.run import files as cfg
from moekernels.verify.command import verify_layout
from moekernels.verify.variants import Variant, variants_of

assert "eager" in offered(several=False)  # what the planner searches
assert "eager" in {variant.schedule for variant in variants_of({"pp": 2}, 1)}
check(build("eager", 3, 7))
given = build_parser().parse_args(["train", "--schedule", "eager", "--pp", "2"])
assert cfg.resolve(None, None, given.flags).layout.schedule == "eager"
assert verify_layout({"pp": 2}, [Variant("eager", steps=1)], "fp64", "cpu") == 0
"""


def test_a_schedule_is_one_file(tree):
    entry = '    "eager": ScheduleKind(lambda rank, stages, groups, virtual: stages - rank),\n'
    tree.insert("moekernels/pipeline/build.py", '    "interleaved": ScheduleKind(', entry)
    assert tree.files <= 2
    assert "eager, 8 experts" in tree.run(USE_SCHEDULE)


DISPATCHER = '''class ReversedDispatcher(AllGatherDispatcher):
    """Tokens meet their experts in the opposite order."""

    def dispatch(
        self, x: Tensor, ids: Tensor, weights: Tensor, kept: expert.Kept | None = None
    ) -> tuple[Tensor, Routed]:
        return super().dispatch(x, ids.flip(1), weights.flip(1), kept)


'''
USE_DISPATCHER = """
from moekernels.cli.parser import build_parser
from moekernels.plan import problem, search
from moekernels.run import files as cfg
from moekernels.verify.command import verify_layout
from moekernels.verify.variants import Variant, variants_of

assert "reversed" in {variant.dispatcher for variant in variants_of({"dp": 2, "ep": 2}, 1)}
given = build_parser().parse_args(["train", "--dispatcher", "reversed"])
run = cfg.resolve("spec-30b", None, given.flags)
assert run.layout.dispatcher == "reversed"
asked = problem.problem_of(cfg.resolve("spec-30b", None, {}))
assert "reversed" in {s.dispatcher for s in search.candidates(asked, 8, search.Space(gpus=8))}
layout = {"dp": 2, "ep": 2}
assert verify_layout(layout, [Variant(dispatcher="reversed", steps=1)], "fp64", "cpu") == 0
"""


def test_a_dispatcher_is_two_files(tree):
    model, nn = "moekernels/model/dispatch.py", "moekernels/nn/dispatcher.py"
    tree.insert(nn, "DISPATCHERS: dict[str, type] = {", DISPATCHER)
    tree.insert(
        nn, '    "all_gather": AllGatherDispatcher,', '    "reversed": ReversedDispatcher,\n'
    )
    tree.insert(model, "def choose(kind: str", 'WAYS["reversed"] = ALL_GATHER\n\n\n')
    assert tree.files <= 3
    assert "1 steps, reversed" in tree.run(USE_DISPATCHER)
