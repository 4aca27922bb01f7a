"""Hugging Face folders in and out: the same bytes, the same logits, no half of either."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from python_tests.support.distributed import RankPool
from python_tests.support.layouts import TINY, variant

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GptOssConfig

from moekernels.cli import main
from moekernels.data.batch import MicroBatch
from moekernels.errors import UsageError
from moekernels.integrations.families import family_of, form_of, in_our_shape, their_names
from moekernels.model import tensors
from moekernels.model.layout import Layout
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import shard
from moekernels.train import checkpoint, exporting, folder, shards, weights
from python_tests.support.transformers_models import tiny_model, worst

FAMILIES = (
    "Qwen3Moe",
    "Qwen2Moe",
    "Dots1",
    "Olmoe",
    "Mixtral",
    "Glm4Moe",
    "DeepseekV3",
    "DeepseekV2",
    "GptOss",
)
# Releases without this field compute with 7.0, and a run with another limit is refused.
CLAMPED = {"activation_limit": 0.5} if hasattr(GptOssConfig(), "swiglu_limit") else {}
EVEN = {"Olmoe": {"num_experts": 8}, "Mixtral": {"num_local_experts": 6}}  # by two ranks
TOKENS = torch.tensor([[5, 9, 33, 7, 50, 4, 11]])


def tiny_of(family: str):
    return tiny_model(family, **EVEN.get(family, {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each family as transformers writes it, several files of weights each."""
    root, made = tmp_path_factory.mktemp("folders"), {}
    for family in FAMILIES:
        made[family] = root / family
        tiny_of(family).save_pretrained(made[family], max_shard_size="60KB")
        assert len(list(made[family].glob("*.safetensors"))) > 1
    return made


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def whole_model(spec, **options) -> StageModel:
    layers = range(1, spec.num_layers + 1)
    return StageModel(spec, Mesh(Layout()), layers, True, True, **options)


def state_of(model: StageModel):
    for name, parameter, info in model.named_shards():
        yield f"master.{name}", parameter, info
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            yield name, buffer, shard(buffer.shape, copies="stage")


@torch.no_grad()
def logits_of(model: StageModel) -> torch.Tensor:
    spec = replace(model.config, tie_embeddings=False)
    body = StageModel(spec, model.mesh, range(1, spec.num_layers + 1), True, False)
    body.load_state_dict({k: model.state_dict()[k] for k in body.state_dict()})
    batch = MicroBatch.pack([(TOKENS[0], TOKENS[0])], loss_scale=1.0)
    return F.linear(model.norm(body(batch)), (model.head or model.embedding).weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_gives_the_same_bytes(folders, family, tmp_path):
    assert main(["import", str(folders[family]), "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(folders[family])


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "DeepseekV2", "GptOss"])
def test_another_dtype_is_what_transformers_would_write(folders, family, tmp_path):
    out = tmp_path / "bf16"
    assert main(["export", str(folders[family]), "--out", str(out), "--dtype", "bf16"]) == 0
    assert folder.read(out).dtype == "bfloat16"  # and it is taken back
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    if family == "DeepseekV2" and not model._keep_in_fp32_modules_strict:
        pytest.skip("this transformers rounds DeepSeek-V2's router, which stays in fp32 here")
    model.save_pretrained(tmp_path / "theirs")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        variant(
            qkv_bias=True,
            out_bias=True,
            sinks=True,
            window=3,
            router_bias=True,
            expert_bias=True,
            activation="swiglu_oai",
        ),
        variant(qk_norm_wide=True, num_kv_heads=2, expert_bias=True, expert_d_in=24),
        variant(kv_rank=6, q_rank=5, rotary_dim=2, value_dim=6),
        variant(kv_rank=6, rotary_dim=2),
        variant(expert_d_in=24, qk_norm=True, tie_embeddings=True, bias_update_rate=0.1),
        variant(shared_d_ff=12, shared_gate=True, dense_layers=1, dense_d_ff=20),
        variant(gated=False, activation="relu2", shared_d_ff=8, num_kv_heads=2),
    ],
)
def test_the_list_of_tensors_is_that_of_the_modules(spec):
    model = whole_model(spec)
    named = {name: info.full_shape for name, _, info in model.named_shards()}
    assert tensors.parameters(spec) == named
    count = sum(parameter.numel() for parameter in model.parameters())
    assert spec.parameters_count() == count
    held = {n: tuple(x.shape) for n, x in model.named_buffers() if n.endswith("selection_bias")}
    assert tensors.biases(spec) == held


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"expert_d_in": 24, "qk_norm": True}, "qwen3_moe"),  # as the presets are made
        ({"tie_embeddings": True, "qk_norm": True, "renormalize": True}, "qwen3_moe"),
        ({"shared_d_ff": 10, "shared_gate": True}, "qwen2_moe"),
        ({"qk_norm_wide": True, "renormalize": True}, "olmoe"),
        ({"renormalize": True, "window": 5, "rope_scaling": "linear", "rope_factor": 2.0,
          "num_kv_heads": 2}, "mixtral"),
        ({"kv_rank": 6, "q_rank": 5, "rotary_dim": 2, "value_dim": 6, "rope_pairs": True,
          "shared_d_ff": 12, "rope_scaling": "yarn", "rope_context": 32, "rope_factor": 4.0,
          "rope_magnitude": 1.1}, "deepseek_v2"),
        ({"kv_rank": 6, "rotary_dim": 2, "shared_d_ff": 12, "bias_update_rate": 0.1,
          "score": "sigmoid", "group_score": "sum2", "num_groups": 2, "groups_kept": 1,
          "dense_layers": 1, "dense_d_ff": 20}, "deepseek_v3"),
        ({"qkv_bias": True, "out_bias": True, "sinks": True, "window": 5, "window_period": 2,
          "router_bias": True, "expert_bias": True, "activation": "swiglu_oai",
          "score": "softmax_topk", **CLAMPED, "rope_scaling": "llama3",
          "rope_context": 24, "rope_fast": 4.0, "rope_factor": 8.0}, "gpt_oss"),
        ({"qk_norm": True, "rotary_dim": 2, "score": "sigmoid", "bias_update_rate": 0.1,
          "shared_d_ff": 12, "dense_layers": 1, "dense_d_ff": 20, "group_score": "sum2"},
         "glm4_moe"),
        ({"qk_norm": True, "score": "sigmoid", "bias_update_rate": 0.1, "shared_d_ff": 24,
          "dense_layers": 1, "dense_d_ff": 20, "scale": 1.5, "group_score": "sum2"}, "dots1"),
    ],
)  # fmt: skip
def test_a_run_is_exported_in_the_family_that_has_its_model(changes, kind, tmp_path, monkeypatch):
    """And gives the same logits in plain transformers, from several files."""
    model = whole_model(variant(vocab_size=300, **changes))
    with torch.no_grad():
        for bias in (*model.selection_biases, *model.parameters()):
            bias.add_(0.2 * torch.randn_like(bias))
    run = tmp_path / "run"
    saver = checkpoint.Checkpoints(run / "checkpoints", model.mesh, keep=1, run="a")
    facts = {"run": {"model": vars(model.config), "batch": {"context": 77}}}
    saver.save(3, state_of(model), facts)
    saver.close()
    monkeypatch.setattr(exporting, "SHARD", 30_000)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    theirs, said = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values())
    assert theirs.config.model_type == kind and theirs.config.max_position_embeddings == 77
    with torch.no_grad():
        error, _ = worst({"": logits_of(model)}, {"": theirs(TOKENS).logits[0]})
    assert error <= 1e-5


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"gated": False, "activation": "relu2", "qk_norm": True}, "model.gated is False"),
        ({"qk_norm": True, "bias_update_rate": 0.1}, "selection bias is True"),
        ({"qk_norm": True, "scale": 2.0}, "model.scale is 2.0"),
    ],
)
def test_what_no_family_has_is_said_by_name(changes, named, tmp_path):
    found = weights.Weights(tmp_path, tmp_path, variant(**changes), {})
    with pytest.raises(UsageError, match=named):
        exporting._fitting(found, None)


def _taken(rank: int, path: Path, layout: Layout, names: list[str]) -> dict[str, tuple]:
    """What a rank holds of the weights, and how many elements it read of a file."""
    found, mesh, read = weights.find(path), Mesh(layout), []
    original = shards.Reader._slice

    def counted(self, box, spans):
        part = original(self, box, spans)
        read.append(part.numel())
        return part

    shards.Reader._slice = counted
    per = found.spec.num_layers // layout.pp
    layers = range(mesh.pp_index * per + 1, (mesh.pp_index + 1) * per + 1)
    ends = mesh.pp_index == 0, mesh.pp_index == layout.pp - 1
    model = StageModel(replace(found.spec), mesh, layers, *ends, seed=1)
    state = list(state_of(model))
    weights.load(found, state)
    shards.Reader._slice = original
    assert sum(read) == sum(x.numel() for _, x, _ in state), "read more than it holds"
    return {name: (x.detach().clone(), info) for name, x, info in state}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_reads_its_slices_and_no_more(folders, family):
    hf = tiny_of(family)
    theirs, kind = hf.state_dict(), family_of(hf.config)
    layout = Layout(tp=2, pp=2, ep=2)
    with RankPool(4) as pool:
        ranks = pool.run(_taken, folders[family], layout, [])
    seen = set()
    for held in ranks:
        for name, (local, info) in held.items():
            ours = name.removeprefix("master.")
            parts = [theirs[n] for n in their_names(ours, kind)]
            whole = in_our_shape(parts, info.full_shape, form_of(ours, kind))
            assert torch.equal(local, info.take(whole)), name
            seen.add(ours)
    spec = folder.read(folders[family]).spec
    assert seen == {*tensors.parameters(spec), *tensors.biases(spec)}


# --- broken folders


def _cut(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def _index(change):
    def break_(path: Path) -> None:
        at = path / folder.INDEX
        data = json.loads(at.read_text())
        change(data["weight_map"])
        at.write_text(json.dumps(data))

    return break_


def _lie(placed: dict) -> None:
    key = "model.norm.weight"
    placed[key] = next(file for file in placed.values() if file != placed[key])


def _rewrite(change):
    """The same folder with other tensors."""

    def break_(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = {k: v for p in sorted(path.glob("*.safetensors")) for k, v in load_file(p).items()}
        for old in (*path.glob("*.safetensors"), path / folder.INDEX):
            old.unlink()
        change(held)
        save_file(held, path / folder.SINGLE)

    return break_


def _config(**changes):
    def break_(path: Path) -> None:
        at = path / folder.CONFIG
        at.write_text(json.dumps({**json.loads(at.read_text()), **changes}))

    return break_


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
BROKEN = {
    "a missing shard": (lambda p: sorted(p.glob("*.safetensors"))[0].unlink(), "is missing"),
    "a truncated file": (_cut, r"is cut short: [\d,]+ bytes of [\d,]+"),
    "an index that lies": (_index(_lie), "model.norm.weight is in .* by the index, but in"),
    "an index with more": (_index(lambda m: m.update(x=m[NORM])), "x is not in .*, as it says"),
    "an index with less": (_index(lambda m: m.pop(NORM)), "model.norm.weight is nowhere"),
    "an index that leads out": (_index(lambda m: m.update(x="../a")), "does not name files"),
    "no index": (lambda p: (p / folder.INDEX).unlink(), "holds neither model.safetensors nor"),
    "two dtypes": (_rewrite(lambda h: h.update({Q: h[Q].bfloat16()})), "two dtypes: .* and .*"),
    "an unknown key": (_rewrite(lambda h: h.update(extra=h[NORM].clone())), "extra is no tensor"),
    "a missing key": (_rewrite(lambda h: h.pop(Q)), "q_proj.weight is missing"),
    "another shape": (_rewrite(lambda h: h.update({NORM: h[NORM][:-1]})), "norm.* has shape"),
    "integers": (_rewrite(lambda h: h.update({NORM: h[NORM].int()})), "is of dtype I32"),
    "no configuration": (lambda p: (p / folder.CONFIG).unlink(), "config.json: is missing"),
    "no JSON": (lambda p: (p / folder.CONFIG).write_text("{"), "config.json: cannot be read"),
    "no family": (_config(model_type="llama"), "model_type 'llama' is no family"),
    "a field not honoured": (_config(attention_bias=True), "attention_bias is True"),
    "no header": (lambda p: sorted(p.glob("*.saf*"))[0].write_bytes(b"x" * 40), "cut short, or"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_one_line_and_leaves_nothing(folders, what, tmp_path, capfd):
    break_, said = BROKEN[what]
    source = tmp_path / "source"
    source.mkdir()
    for name, data in contents(folders["Qwen3Moe"]).items():
        (source / name).write_bytes(data)
    break_(source)
    assert main(["import", str(source), "--out", str(tmp_path / "made" / "run")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_place_that_is_taken_is_left_alone(folders, tmp_path, capfd):
    (tmp_path / "mine").write_text("x")
    for command in ("import", "export"):
        assert main([command, str(folders["Qwen3Moe"]), "--out", str(tmp_path)]) == 2
        assert "is there already" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_links_as_a_place(folders, tmp_path, capfd):
    """One that leads nowhere is refused before a tensor is read; one to an empty folder is kept."""
    (tmp_path / "nowhere").symlink_to(tmp_path / "no" / "such")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    source = str(folders["Qwen3Moe"])
    for command in ("import", "export"):
        assert main([command, source, "--out", str(tmp_path / "nowhere")]) == 2
        assert "is there already" in capfd.readouterr().err
    assert main(["import", source, "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "config.toml").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "nowhere", "there"]


def test_a_copy_that_fails_leaves_nothing(folders, tmp_path, capfd, monkeypatch):
    def full(path, source):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(shards, "copy", full)
    assert main(["import", str(folders["Dots1"]), "--out", str(tmp_path / "a" / "run")]) == 1
    assert "No space left" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
