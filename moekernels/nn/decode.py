"""A whole model on one rank that says what comes next. Legend: B sequences, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moekernels.model.rotary import frequencies
from moekernels.nn.cache import Cache
from moekernels.nn.rotary import Packing
from moekernels.nn.transformer import StageModel


class Decoding:
    """Sequences that grow: each is fed once, its keys and values are kept."""

    def __init__(self, model: StageModel) -> None:
        embedding, norm = model.embedding, model.norm
        if embedding is None or norm is None or model.mesh.world.size > 1:
            raise ValueError("decoding: needs a model that is whole, on one rank")
        self.model, self.cache = model, Cache()
        self.embedding, self.norm = embedding, norm
        self.lengths: list[int] = []  # fed so far
        self._radians = frequencies(model.config, model.config.head_dim)

    @torch.no_grad()
    def feed(self, new: Sequence[Tensor]) -> Tensor:
        """At least one new token [n] of each sequence, all at once -> logits [B, V] behind the last
        of each, in fp32 at least."""
        model, config = self.model, self.model.config
        self.lengths = self.lengths or [0] * len(new)
        bounds = [0]
        for tokens in new:
            bounds.append(bounds[-1] + len(tokens))
        device = self.norm.weight.device
        positions = [torch.arange(n, n + len(t)) for n, t in zip(self.lengths, new, strict=True)]
        self.lengths = [n + len(t) for n, t in zip(self.lengths, new)]
        self.cache.cu_seqlens = bounds
        packing = Packing.make(
            torch.cat(positions).to(device),
            bounds,
            self._radians,
            model.dtype,
            magnitude=config.rope_magnitude,
            pairs=config.rope_pairs,
            cache=self.cache,
        )
        x = F.embedding(torch.cat(list(new)).to(device), self.embedding.weight)
        for block in model.layers.values():
            x, *_ = block(x, packing, None)
        last = torch.tensor([end - 1 for end in bounds[1:]], device=device)
        logits = F.linear(self.norm(x[last]), model.output_table.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def keep(self, numbers: list[int]) -> None:
        """Only these sequences, by their places, go on."""
        self.cache.keep(numbers)
        self.lengths = [self.lengths[number] for number in numbers]


def choose(
    logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """logits [B, V] -> a token of each sequence [B], by its own generator; temperature 0: the most
    likely. `top_p`: among the likeliest that together have this part of the probability."""
    if temperature == 0:
        return logits.argmax(-1)
    below = logits.double() - logits.amax(-1, keepdim=True)  # so that no temperature overflows
    p = torch.softmax(below / temperature, -1).cpu()
    if top_p < 1:
        ordered, order = p.sort(stable=True, dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the first that reaches it counts
        p = torch.zeros_like(p).scatter_(-1, order, ordered)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators)]
    return torch.cat(drawn).to(logits.device)


def generate(
    model: StageModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    end: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """What follows each prompt, up to `tokens` of them and without the `end` that ends it: a
    prompt's text hangs on the seed and its place, not on the others."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    decoding, live = Decoding(model), list(range(len(prompts)))
    found: list[list[int]] = [[] for _ in prompts]
    new = [torch.tensor(list(prompt), dtype=torch.int64) for prompt in prompts]
    for _ in range(tokens):
        logits = decoding.feed(new)
        drawn = choose(logits, temperature, top_p, [generators[i] for i in live]).tolist()
        places = [place for place, token in enumerate(drawn) if token != end]
        if not places:
            break
        if len(places) < len(live):
            decoding.keep(places)
        live, new = [live[p] for p in places], [torch.tensor([drawn[p]]) for p in places]
        for number, token in zip(live, new):
            found[number].append(int(token))
    return found
