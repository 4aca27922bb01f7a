"""What it costs to add an activation or a score: four files each, and what those hold is one
formula for the reference, the CPU kernels and CUDA's."""

from __future__ import annotations

import pytest
import torch

from moekernels import reference
from python_tests.support.toys import COMPILER, Formulas, Tree


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path / "tree")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


USE_ACTIVATION = """
import runpy

import torch

from moekernels import ops, reference
from moekernels.cli.parser import build_parser
from moekernels.plan.evaluate import evaluate
from moekernels.run import files as cfg
from python_tests.support.contract import SPECS

words = ["train", "--activation", "cubic", "--no-gated", "--d-model", "64"]
model = cfg.resolve("tiny", None, build_parser().parse_args(words).flags).model
assert model.activation == "cubic" and model.up_rows == 1
x, w1, w2 = torch.randn(5, 3), torch.randn(2, 4, 3), torch.randn(2, 3, 4)
inputs = {"x": x, "weights": None, "w1": w1, "w2": w2, "offsets": torch.tensor([0, 2, 5])}
y = reference.experts(**inputs, activation="cubic")
assert torch.allclose(y[0], w2[0] @ (w1[0] @ x[0]) ** 3, rtol=1e-4)
take = lambda x: ops.experts(**{**inputs, "x": x}, activation="cubic").sum()  # by the reference
assert torch.func.grad(take)(x).shape == x.shape
spec = next(spec for spec in SPECS if spec.name == "experts")
assert any(c.inputs.get("activation") == "cubic" for c in spec.cases(torch.float32))
page = runpy.run_path("docs/hooks.py")["on_page_markdown"]("<!-- activations -->")
assert "| `cubic` | `h ** 3` |" in page, page
"""


def test_an_activation_is_four_files(tree):
    tree.insert("csrc/include/moekernels/registers.h", "X(gelu)\n", "X(cubic) ")
    kind = "} else if constexpr (kind == Activation::"
    formula = f"{kind}cubic) {{\n    return {{g * g * g, S(3) * g * g, V{{}}}};\n  "
    tree.insert("csrc/include/moekernels/activation.h", f"{kind}relu2) {{", formula)
    tree.insert(
        "moekernels/reference/__init__.py", '    "gelu": F.gelu,', '    "cubic": lambda h: h**3,\n'
    )
    tree.insert("moekernels/model/experts.py", '    "gelu": False,', '    "cubic": False,\n')
    assert tree.files <= 4
    tree.run(USE_ACTIVATION)
    if not COMPILER:
        return
    formulas = Formulas(tree.path, kernels=["experts", "gemm", "gemm_few"], plain=[])
    assert "cubic" in formulas.names()[0]
    h, da = randn(7, 5).requires_grad_(), randn(7, 5)
    a = h**3
    dh = torch.autograd.grad(a, h, da)
    formulas.hold(("activation", "cubic", 7, 5), (h, da), (a, *dh))
    for name in formulas.names()[0]:  # and those that were there before
        if name == "cubic":
            continue
        h = (3 * randn(7, 5 * (2 if name in reference.GATED else 1))).requires_grad_()
        a = reference.activate(h, name, alpha=1.5, limit=2.0)
        dh = torch.autograd.grad(a, h, da)
        formulas.hold(("activation", name, 7, 5), (h, da), (a, *dh))


USE_SCORE = """
import runpy

import torch

from moekernels import ops, reference
from moekernels.cli.parser import build_parser
from moekernels.run import files as cfg
from python_tests.support.contract import SPECS

given = build_parser().parse_args(["train", "--score", "sigmoid2"])
assert cfg.resolve("tiny", None, given.flags).model.score == "sigmoid2"
logits = torch.randn(5, 4)
out = reference.gate(logits, 2, score="sigmoid2")
assert torch.equal(out.weights, torch.sigmoid(logits).square().topk(2).values)
take = lambda x: ops.gate(x, 2, score="sigmoid2").weights.sum()  # by the reference
assert torch.func.grad(take)(logits).shape == logits.shape
spec = next(spec for spec in SPECS if spec.name == "gate")
assert any(c.inputs.get("score") == "sigmoid2" for c in spec.cases(torch.float32))
page = runpy.run_path("docs/hooks.py")["on_page_markdown"]("<!-- scores -->")
assert "| `sigmoid2` | `torch.sigmoid(x).square()` |" in page, page
"""


def test_a_score_is_four_files(tree):
    tree.insert("csrc/include/moekernels/registers.h", "X(sqrtsoftplus)\n", "X(sigmoid2) ")
    last = "} else {\n    return Math::sqrt_softplus"
    kind, s = "} else if constexpr (kind == GateScore::sigmoid2) {\n    ", "Math::sigmoid(x)"
    tree.insert(
        "csrc/include/moekernels/score.h",
        last + "(x);",
        f"{kind}const V s = {s};\n    return s * s;\n  ",
    )
    tree.insert(
        "csrc/include/moekernels/score.h",
        last + "_slope(x, value);",
        f"{kind}return S(2) * value * (S(1) - {s});\n  ",
    )
    meaning = '    "sigmoid2": lambda x: torch.sigmoid(x).square(),\n'
    tree.insert("moekernels/reference/__init__.py", '    "sqrtsoftplus": lambda', meaning)
    tree.insert("moekernels/model/router.py", '"sqrtsoftplus")', '"sigmoid2", ')
    assert tree.files <= 4
    tree.run(USE_SCORE)
    if not COMPILER:
        return
    formulas = Formulas(tree.path, kernels=["gate"], plain=["gate", "gate_backward"])
    assert "sigmoid2" in formulas.names()[1]
    logits, dweights = randn(9, 6).requires_grad_(), randn(9, 2)
    own = {"sigmoid2": lambda x: torch.sigmoid(x).square()}
    for name in formulas.names()[1]:  # those that were there before, too
        with pytest.MonkeyPatch.context() as patched:
            for each, meaning in own.items():
                patched.setitem(reference.SCORES, each, meaning)
            out = reference.gate(logits, 2, score=name, renormalize=True)
        dlogits = torch.autograd.grad(out.weights, logits, dweights, retain_graph=True)
        wanted = (out.weights, *dlogits, out.score_sum)
        formulas.hold(("score", name, 9, 6, 2), (logits, dweights), wanted)
