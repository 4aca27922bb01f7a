"""Tied embeddings with a table at both ends of a pipeline: the training of one stage."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moekernels.cli import main
from moekernels.train.metrics import read_metrics
from python_tests.support.small_runs import trained

TINY = (
    "--layers 2 --experts 4 --d-model 16 --heads 2 --vocab-size 258 --tp 1 --tie-embeddings "
    "--lr-schedule constant --keep 9 --eval-sequences 4"
).split()


@pytest.fixture
def train(text, cache, capfd, tmp_path):
    def run(*more, out="run"):
        trained(text, tmp_path / out, capfd, *TINY, *more)
        return read_metrics(tmp_path / out)

    return run


def test_a_table_at_both_ends_trains_resumes_and_is_saved_once(train, tmp_path, capfd):
    """From one stage to two and back, and out to a file that has no head."""
    expected = train("--steps", "6", out="one")
    train("--steps", "2", out="moves")
    train("--pp", "2", "--steps", "4", "--resume", out="moves")
    train("--pp", "2", "--dp", "2", "--schedule", "zb", "--steps", "5", "--resume", out="moves")
    folder = tmp_path / "folder"
    assert main(["export", str(tmp_path / "moves"), "--out", str(folder)]) == 0, capfd.readouterr()
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    exported = {}
    for file in folder.glob("*.safetensors"):
        exported |= load_file(file)
    assert exported["model.embed_tokens.weight"].shape == (258, 16)
    assert not any("lm_head" in name for name in exported)
    got = train("--pp", "1", "--steps", "6", "--resume", out="moves")
    for key in ("loss", "grad_norm"):
        lines = [[line[key] for line in lines] for lines in (got, expected)]
        assert lines[0] == pytest.approx(lines[1], rel=2e-4), key
    assert got[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=2e-4)
    manifest = tmp_path / "moves" / "checkpoints" / "step-0000005" / "manifest.json"
    saved = json.loads(manifest.read_text())["tensors"]["master.embedding.weight"]
    covered = sum(torch.Size(box["size"]).numel() for box in saved["boxes"])
    assert covered == torch.Size(saved["shape"]).numel() == 258 * 16
