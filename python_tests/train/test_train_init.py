"""A run that begins with given weights, started as a user starts it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from moekernels.cli import main
from moekernels.errors import UsageError
from moekernels.train import start, weights
from python_tests.support.small_runs import run_command

pytest.importorskip("transformers")

from python_tests.support.transformers_models import tiny_model

SMALL = (
    "--sequences 8 --context 48 --microbatches 4 --accumulation 1 --device cpu --eval-sequences 8"
).split()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face folder with a tokenizer whose texts end in a token of its own."""
    from moekernels.data.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("source")
    tiny_model("Qwen3Moe", vocab_size=320).save_pretrained(path)
    Tokenizer.train(["some text, some more text"], 300).save(path / "tokenizer.json")
    data = json.loads((path / "tokenizer.json").read_text())
    text = json.dumps(data).replace("<|endoftext|>", "</s>")
    (path / "tokenizer.json").write_text(text)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return path


def run(text, *command):
    process = run_command(text, *map(str, command))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout


def test_a_folder_is_trained_on_a_layout_and_exported(text, source, tmp_path):
    """A step that moves nothing leaves every weight as it was, through both directions, and what
    lies beside them too, though the folder is gone; another stage of training begins with the same
    weights."""
    here, out = tmp_path / "here", tmp_path / "out"
    shutil.copytree(source, here)
    command = ("train", "--init-from", here, "--out", out, "--steps", "1", *SMALL)
    layout = ("--tp", "2", "--pp", "2", "--ep", "2", "--lr", "1e-30", "--warmup", "0")
    run(text, *command, "--data", text / "text.txt", *layout)
    shutil.rmtree(here)
    assert main(["export", str(out), "--out", str(tmp_path / "back")]) == 0
    theirs, ours = (load_file(x / "model.safetensors") for x in (source, tmp_path / "back"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert weights.find(out).spec == weights.find(source).spec
    assert weights.find(out).tensors.keys() == weights.find(source).tensors.keys()


def test_another_model_is_refused(text, source, tmp_path):
    flags = {
        ("model", "head_dim"): 16,
        ("layout", "pp"): 1,
        ("batch", "data"): str(text / "text.txt"),
    }
    with pytest.raises(UsageError, match="its model.head_dim is 8, this run asks for 16"):
        start.train(None, None, flags, out=tmp_path / "a", init_from=source)
    with pytest.raises(UsageError, match="no such folder"):
        start.train(None, None, {}, out=tmp_path / "a", init_from=tmp_path / "b")
    with pytest.raises(UsageError, match="holds neither a model .* nor a whole checkpoint"):
        start.train(None, None, {}, out=tmp_path / "a", init_from=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_of_weights_alone_is_not_resumed(text, source, tmp_path):
    from moekernels.train.importing import import_

    import_(source, tmp_path / "run")
    with pytest.raises(UsageError, match="holds weights alone; --init-from .*begins with them"):
        start.train(None, None, {}, out=tmp_path / "run", resume_how="must")
