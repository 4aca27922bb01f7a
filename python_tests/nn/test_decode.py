"""Token by token, with what was kept: the logits and the texts that transformers has."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from moekernels.cli import main
from moekernels.data.tokenizer import Tokenizer
from moekernels.integrations.families import decoder_spec, family_of, load_
from moekernels.model.layout import Layout
from moekernels.nn.decode import Decoding, choose, generate
from moekernels.nn.transformer import StageModel
from moekernels.parallel.mesh import Mesh
from moekernels.train import generating, weights
from python_tests.support.transformers_models import tiny_model, worst

FAMILIES = {
    "Qwen3Moe": {"tie_word_embeddings": True},
    "Qwen2Moe": {},
    "Olmoe": {},
    "Mixtral": {"sliding_window": 4},
    "Glm4Moe": {},
    "DeepseekV3": {"v_head_dim": 6},
    "GptOss": {"sliding_window": 4},
}


def ours(hf) -> StageModel:
    spec = decoder_spec(hf.config)
    model = StageModel(spec, Mesh(Layout()), range(1, spec.num_layers + 1), True, True)
    load_(model, hf.state_dict(), family_of(hf.config))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_growing_sequences_are_those_of_whole_ones(family):
    """Three sequences of other lengths at once, fed in pieces; one of them leaves."""
    hf = tiny_model(family, **FAMILIES[family])
    decoding = Decoding(ours(hf))
    texts = [torch.randint(3, 96, (n,)) for n in (12, 9, 14)]
    at, live = [5, 1, 7], [0, 1, 2]
    new = [texts[i][: at[i]] for i in live]
    for step in range(5):
        got = decoding.feed(new)
        with torch.no_grad():
            wanted = torch.stack([hf(texts[i][None, : at[i]]).logits[0, -1] for i in live])
        assert worst({"": got}, {"": wanted})[0] <= 1e-5
        if step == 2:
            decoding.keep([0, 2])
            live = [0, 2]
        new = [texts[i][at[i] : at[i] + 1 + step % 2] for i in live]
        for i in live:
            at[i] += 1 + step % 2


def test_the_likeliest_text_is_transformers_own():
    hf = tiny_model("Qwen3Moe")
    prompts = [[5, 9, 33], [7], [50, 4, 11, 60, 3]]
    for end in (None, 17):
        got = generate(ours(hf), prompts, tokens=12, end=end, temperature=0)
        for prompt, text in zip(prompts, got):
            hf.generation_config.eos_token_id = end
            out = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
            wanted = out[0, len(prompt) :].tolist()
            assert text == [t for t in wanted if t != end]


def test_choices_follow_temperature_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    for temperature, top_p, wanted in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.79, [0.625, 0.375, 0.0, 0.0]),  # two reach it, the third is not needed
        (1.0, 0.81, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
        (1.0, 1e-6, [1.0, 0.0, 0.0, 0.0]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (1e-320, 1.0, [1.0, 0.0, 0.0, 0.0]),  # logits over it are infinite
        (0.0, 1.0, [1.0, 0.0, 0.0, 0.0]),
    ):
        drawn = choose(logits.expand(4000, 4), temperature, top_p, generators)
        share = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(share, torch.tensor(wanted), atol=0.03, rtol=0)
        assert not share[torch.tensor(wanted) == 0].any()


def test_a_text_hangs_on_the_seed_and_its_place_alone():
    model, prompts = ours(tiny_model("Mixtral")), [[5, 9, 33], [7]]
    first = generate(model, prompts, tokens=8, seed=3)
    assert first == generate(model, prompts, tokens=8, seed=3)
    assert first != generate(model, prompts, tokens=8, seed=5)
    assert first[0] == generate(model, prompts[:1], tokens=8, seed=3)[0]


@pytest.fixture
def folder(tmp_path):
    tiny_model("Qwen3Moe", vocab_size=300).save_pretrained(tmp_path)
    Tokenizer.train(["some text, some more text"], 290).save(tmp_path / "tokenizer.json")
    return tmp_path


def test_the_command(folder, capsys):
    flags = ["--temperature", "0", "--tokens", "6", "--device", "cpu"]
    command = ["generate", str(folder), *flags, "--prompt", "some", "--prompt", "text,"]
    assert main(command) == 0
    out = capsys.readouterr().out
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = generating.load(weights.find(folder), "cpu")
    for prompt in ("some", "text,"):
        ids = tokenizer.encode(prompt)
        (new,) = generate(model, [ids], tokens=6, end=0, temperature=0)
        assert f"{tokenizer.decode(ids + new)}\n\n" in out
    assert "tokens/s" in out
    assert main(["generate", str(folder), *flags]) == 0  # from nothing
    capsys.readouterr()
    for policy in ("lru", "lfu", "least-stale"):
        cache = ["--expert-cache", "2", "--expert-policy", policy]
        assert main([*command, *cache]) == 0
        cached = capsys.readouterr().out
        texts = out[: out.rindex("\n\n")]
        assert cached.startswith(texts) and f"slots      2 per layer by {policy}" in cached


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tokens", "0"], "--tokens must be from 1"),
        (["--temperature", "-1"], "--temperature must be from 0"),
        (["--top-p", "0"], "--top-p must be from"),
        (["--device", "tpu"], "--device tpu"),
        (["--expert-cache", "-1"], "--expert-cache must be from 0"),
        (["--expert-cache", "99"], "99 slots; a layer has"),
        (["--expert-cache", "2", "--expert-policy", "mru"], "policy 'mru'; it is one of"),
        (["--expert-policy", "lfu"], "give --expert-cache as well"),
    ],
)
def test_mistakes(folder, flags, said, capsys):
    assert main(["generate", str(folder), *flags]) == 2
    assert said in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(["generate", str(folder)]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
