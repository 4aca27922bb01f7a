"""Pre-training that goes on from a Hugging Face folder, on two ranks, and back into such a folder;
needs transformers 5.10 or newer.

    python examples/continue_pretraining.py

A tiny random Qwen3-MoE stands for the folder here. The three commands are what a shell would run.
"""

import json
import math
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moekernels.cli import main as moekernels
from moekernels.data.tokenizer import Tokenizer

TEXT = "Each token goes to a few of many experts; each expert sees few of many tokens.\n"
SMALL = (
    "--sequences 8 --context 48 --microbatches 2 --accumulation 1 --eval-sequences 4 --device cpu"
)


def make_folder(folder: Path) -> None:
    """What `from_pretrained` would read: weights, configuration, tokenizer."""
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    Tokenizer.train([TEXT], 300).save(folder / "tokenizer.json")


def main(steps: int = 20) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        make_folder(here / "model")
        text = "\n".join([json.dumps({"text": TEXT * 4})] * 200)
        (here / "text.jsonl").write_text(text)

        imported, run, exported = (str(here / n) for n in ("imported", "run", "exported"))
        assert moekernels(["import", str(here / "model"), "--out", imported]) == 0
        train = ["train", "--init-from", imported, "--out", run, "--data", str(here / "text.jsonl")]
        layout = ["--tp", "2", "--ep", "2", "--lr", "1e-2", "--warmup", "2", "--steps", str(steps)]
        assert moekernels([*train, *layout, *SMALL.split()]) == 0
        assert moekernels(["export", run, "--out", exported]) == 0

        lines = (here / "run" / "metrics.jsonl").read_text().splitlines()
        losses = [x["loss"] for x in map(json.loads, lines) if "loss" in x]
        assert all(math.isfinite(loss) for loss in losses)
        AutoModelForCausalLM.from_pretrained(exported)  # it is a folder like the one at first
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
