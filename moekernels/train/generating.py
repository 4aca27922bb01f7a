"""`moekernels generate`: text by a run or a Hugging Face folder, on one rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moekernels import files
from moekernels.assembly import DTYPES
from moekernels.data.tokenizer import Tokenizer
from moekernels.errors import UsageError, one_line
from moekernels.model.layout import Layout
from moekernels.model.spec import MOST
from moekernels.nn.decode import generate as follow
from moekernels.nn.transformer import StageModel
from moekernels.parallel.launch import choose_device
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo, blank, shard
from moekernels.train import weights
from moekernels.train.expert_cache import cached
from moekernels.train.weights import MASTER, Weights


def generate(
    source: Path,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
    expert_cache: int = 0,
    expert_policy: str = "lru",
    kind: str = "model",
) -> int:
    """Print what follows each prompt; the exit code. `expert_cache`: slots of each layer, whose
    experts stay in the host's memory; 0: none. `kind`: of weights, see `weights.find`."""
    for name, value, low, high in (
        ("tokens", tokens, 1, 1 << 20),
        ("temperature", temperature, 0, 100),
        ("top-p", top_p, 1e-9, 1),
        ("seed", seed, 0, 2**31 - 1),
        ("expert-cache", expert_cache, 0, MOST),
    ):
        if not low <= value <= high:
            raise UsageError(f"--{name} must be from {low} to {high}, got {value}")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: use one of auto, cpu, cuda")
    if expert_policy != "lru" and not expert_cache:
        raise UsageError(
            f"--expert-policy {expert_policy} is of a cache; give --expert-cache as well"
        )
    prompts = [_as_utf8(prompt) for prompt in prompts]
    found = weights.find(source, kind=kind)
    if found.tokenizer is None:
        raise UsageError(f"{source}: has no tokenizer.json; put the model's there")
    tokenizer = Tokenizer.load(found.tokenizer)
    here = choose_device(device, 1)
    model = load(found, here, torch.device("cpu") if expert_cache else None)
    cache = None
    if expert_cache:
        cache = cached(model, expert_cache, expert_policy, torch.device(here))
    started = time.perf_counter()
    texts, count = continued(
        model, tokenizer, prompts, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    seconds = time.perf_counter() - started
    for prompt, text in zip(prompts, texts):
        print(f"{prompt}{text}\n")
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s")
    if cache is not None:
        print(cache.report())
    return 0


def _as_utf8(prompt: str) -> str:
    """A text as it was given, whatever the locale made of its bytes."""
    try:
        return files.portable(prompt)
    except ValueError:
        raise UsageError(f"--prompt {prompt!r} is not UTF-8; write it in UTF-8") from None


def load(found: Weights, device: str, experts_device: torch.device | None = None) -> StageModel:
    """The whole model on one device, its experts on another where that is named, in the dtype that
    it was trained or is kept in."""
    named = found.facts.get("run", {}).get("train", {}).get("dtype")
    dtype = DTYPES[named] if named else getattr(torch, found.tensors["embedding.weight"].dtype)
    layers = range(1, found.spec.num_layers + 1)
    mesh = Mesh(Layout(), device=device)
    with blank():
        model = StageModel(
            found.spec,
            mesh,
            layers,
            True,
            True,
            dtype=dtype,
            device=device,
            experts_device=experts_device,
        )
    state: list[tuple[str, Tensor, ShardInfo]] = [
        (MASTER + name, parameter, info) for name, parameter, info in model.named_shards()
    ]
    for name, bias in model.named_buffers():
        if name in found.tensors:
            state.append((name, bias, shard(bias.shape)))
    weights.load(found, state)
    return model


SAMPLE_BYTES = 1 << 30  # of a model that a run looks at once more at its end
SAMPLE_TOKENS, SAMPLE_PROMPT = 24, 8


def sample(run: Path, parameters: int, held_out: Sequence[int]) -> str | None:
    """What the run's newest checkpoint makes of the beginning of a held-out text, on one line; None
    where there is none or no tokenizer, or the model is too large to look at beside the ranks."""
    if 4 * parameters > SAMPLE_BYTES or not any((run / "checkpoints").glob("step-*")):
        return None
    found = weights.find(run)
    if found.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(found.tokenizer)
    prompt = tokenizer.decode(held_out[:SAMPLE_PROMPT])
    how = {"tokens": SAMPLE_TOKENS, "temperature": 0.8, "top_p": 0.95}
    texts, _ = continued(load(found, "cpu"), tokenizer, [prompt], **how)
    return f"{one_line(prompt.strip())!r} -> {one_line(texts[0].strip())!r}"


def continued(
    model: StageModel, tokenizer: Tokenizer, prompts: Sequence[str], **how
) -> tuple[list[str], int]:
    """(what follows each prompt, how many tokens that is). A text that has not begun follows the
    end of another, as where documents are joined."""
    end = tokenizer.end_of_text
    ids = [tokenizer.encode(prompt) or [end] for prompt in prompts]
    for prompt, one in zip(prompts, ids):
        if max(one) >= model.config.vocab_size:
            raise UsageError(f"{prompt!r}: token {max(one)} is beyond the model's vocabulary")
    drawn = follow(model, ids, end=end, **how)
    texts = []
    for before, new in zip(ids, drawn):  # decoded with what precedes it: a letter may be cut
        whole, known = tokenizer.decode(before + new), tokenizer.decode(before)
        texts.append(whole[len(known) :])
    return texts, sum(map(len, drawn))
