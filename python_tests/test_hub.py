"""A folder for the kernels hub, made by its command and loaded by `kernels` itself."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moekernels.ops._library import LIBRARY

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the library that is built here: one whose ops have a name of their own takes a while."""
    out = tmp_path_factory.mktemp("hub") / "hub"
    command = [sys.executable, ROOT / "tools" / "hub.py", "--out", out, "--library", LIBRARY]
    subprocess.run(command, check=True)
    return out


def test_it_imports_itself_torch_and_the_standard_library(folder):
    allowed = {*sys.stdlib_module_names, "torch"}
    files = sorted((folder / "torch-ext" / "moekernels").rglob("*.py"))
    assert {"fp8.py", "layers.py", "gate.py"} <= {p.name for p in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            # transformers calls what is in this folder, and has been imported then.
            extra = {"transformers"} if path.parent.name == "integrations" else set()
            assert {n.split(".")[0] for n in names} <= allowed | extra, path


def test_build_toml_names_every_source(folder):
    said = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))
    kernels = said["kernel"].values()
    for name in (*said["torch"]["src"], *(n for kernel in kernels for n in kernel["src"])):
        assert (folder / name).is_file(), name
    sources = {p.relative_to(folder).as_posix() for p in folder.glob("csrc/*/*.c*")}
    named = {*said["torch"]["src"], *(n for kernel in kernels for n in kernel["src"])}
    assert sources <= named


LOADED = """
import sys
from pathlib import Path
import kernels, torch
from torch import nn
folder = Path(sys.argv[1])
moe = kernels.get_local_kernel(folder)
assert "moekernels" not in sys.modules

# ops
logits = torch.randn(9, 6, requires_grad=True)
gate = moe.gate(logits, 2)
torch.testing.assert_close(gate.weights, logits.softmax(-1).topk(2).values)
routing = moe.route(gate.ids, 6)
rows = moe.permute(logits, routing.token_of, routing.row_of)
moe.combine(rows, routing.row_of, routing.token_of).sum().backward()
assert torch.equal(logits.grad, torch.full((9, 6), 2.0))

# the experts function, and a layer
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen
config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8)
config.num_experts, config.num_experts_per_tok = 4, 2
config._experts_implementation = "eager"
block = qwen.Qwen3MoeSparseMoeBlock(config)
for p in block.parameters():
    nn.init.normal_(p, std=0.3)
x = torch.randn(2, 5, 16)
wanted = block(x)
ALL_EXPERTS_FUNCTIONS.register("of_the_hub", moe.experts_forward)
config._experts_implementation = "of_the_hub"
torch.testing.assert_close(block(x), wanted)

config._experts_implementation = "eager"
layer = kernels.LocalLayerRepository(folder, layer_name="SparseMoeBlock")
kernels.replace_kernel_forward_from_hub(qwen.Qwen3MoeSparseMoeBlock, "Block")
with kernels.use_kernel_mapping({"Block": {"cpu": layer}}):
    kernels.kernelize(block, mode=kernels.Mode.TRAINING, device="cpu")
calls = []
block.experts.register_forward_hook(lambda *_: calls.append(1))
y = block(x)
torch.testing.assert_close(y, wanted)
assert not calls  # the layer calls the kernel, not the module
y.sum().backward()
assert all(p.grad is not None for p in block.parameters())
"""


def test_kernels_loads_it(folder, tmp_path):
    pytest.importorskip("kernels", reason="needs kernels (requirements/peers.txt)")
    pytest.importorskip("transformers")
    subprocess.run([sys.executable, "-c", LOADED, folder], check=True, cwd=tmp_path)
