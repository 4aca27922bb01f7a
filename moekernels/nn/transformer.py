"""The decoder, one pipeline chunk at a time:

    embed -> [attention, gate -> route -> exchange -> experts -> exchange -> combine] x layers
          -> loss

Legend: T tokens of a microbatch, H hidden, E experts, K top-k, L layers of the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekernels.model.decoder import DecoderSpec
from moekernels.model.rotary import frequencies
from moekernels.nn.attention import Attention
from moekernels.nn.auxiliary import Auxiliary, inject, join, own_segments
from moekernels.nn.batch import Batch
from moekernels.nn.dispatcher import make_dispatcher
from moekernels.nn.embedding import VocabularyWeight, embed
from moekernels.nn.ffn import FeedForward
from moekernels.nn.home import Home
from moekernels.nn.latent import LatentAttention
from moekernels.nn.loss import cross_entropy
from moekernels.nn.moe import MoE
from moekernels.nn.norm import RMSNorm
from moekernels.nn.rotary import Packing
from moekernels.nn.router import RouteHook
from moekernels.parallel.expert import Kept
from moekernels.parallel.mesh import Mesh
from moekernels.parallel.shard import ShardInfo
from moekernels.parallel.tensor import copy_to, own_part

# (microbatch, layer, logits and ids of own tokens) -> ids to use instead, or None; see
# `RouteHook`.
BatchRouteHook = Callable[[Batch, int, Tensor, Tensor], Tensor | None]

# The module of each kind in `model.attention`.
ATTENTIONS: dict[str, type] = {"grouped": Attention, "latent": LatentAttention}


class Block(nn.Module):
    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        layer: int,
        dispatcher: str,
        home: Home,
        exchange_parts: int,
    ) -> None:
        super().__init__()
        name = f"layers.{layer}"
        split = home.sequence_parallel
        norm = partial(RMSNorm, config.d_model, config.norm_eps, home, partial=split)
        self.has_experts = layer > config.dense_layers
        self.attention_norm = norm()
        attention = ATTENTIONS[config.attention]
        self.attention = attention(config, mesh, layer, home, name=f"{name}.attention")
        if not self.has_experts:
            self.ffn_norm = norm()
            self.ffn = FeedForward(config, mesh, config.dense_d_ff, home, name=f"{name}.ffn")
            return
        self.moe_norm = norm()
        ways = make_dispatcher(dispatcher, mesh, config, layer, exchange_parts, home.spare)
        self.moe = MoE(config, mesh, layer, ways, home, name=f"{name}.moe")

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        valid: Tensor | None,
        hook: RouteHook | None = None,
        segments: Tensor | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, ...]:
        """x [T/tp, H] -> the same shape, and, if it has experts, the sums of `MoE`."""
        if isinstance(self.attention, Attention):
            y = self.attention.behind(self.attention_norm, x, packing)
        else:
            y = self.attention(self.attention_norm(x), packing)
        if not self.has_experts:
            normed, x = self.ffn_norm.behind(x, y)
            return (x + self.ffn(normed),)
        return self.moe(self.moe_norm, x, y, valid, hook, segments, kept)


class StageModel(nn.Module):
    """The layers of one pipeline chunk, with the embedding if it is the first and the head and loss
    if the last.

    `loads` [L, E] counts how often own tokens chose each expert since `take_statistics`.
    `route_hook` sees and may replace every choice of experts (see `BatchRouteHook`); own tokens of
    a microbatch are `parallel.tensor.own_part(whole, mesh.tp)`. `tied_to`: for a last chunk, the
    tied embedding of the first one where this rank has that, too.
    """

    def __init__(
        self,
        config: DecoderSpec,
        mesh: Mesh,
        layers: range,
        first: bool,
        last: bool,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        experts_device: torch.device | None = None,
        sequence_parallel: bool = True,
        dispatcher: str = "auto",
        exchange_parts: int = 1,
        replicas: int = 0,
        checkpoint_layers: Collection[int] = (),
        seed: int = 0,
        tied_to: VocabularyWeight | None = None,
    ) -> None:
        super().__init__()
        mesh.layout.validate(vocab_size=config.vocab_size)
        device = torch.device(device)
        self.config, self.mesh, self.dtype = config, mesh, dtype
        self.first, self.last = first, last
        self.sequence_parallel = sequence_parallel and mesh.tp.size > 1
        self.checkpoint_layers = frozenset(checkpoint_layers)
        self.route_hook: BatchRouteHook | None = None
        home = Home(dtype, device, seed, self.sequence_parallel, experts_device, replicas)
        table = partial(VocabularyWeight, config.vocab_size, config.d_model, mesh, home)
        # A tied table lies at both ends of the pipeline, or once on a rank that has both.
        tied_end = config.tie_embeddings and last
        self._tied_to = (tied_to,) if tied_end else (None,)  # no parameter of this chunk
        self.embedding: VocabularyWeight | None = None
        if first or (tied_end and tied_to is None):
            std = config.embedding_std or config.init_std
            parted = config.tie_embeddings and first != last and mesh.layout.pp > 1
            group = "ends" if parted else "dp"
            self.embedding = table(name="embedding", std=std, group=group)
        self.layers = nn.ModuleDict(
            {
                str(layer): Block(config, mesh, layer, dispatcher, home, exchange_parts)
                for layer in layers
            }
        )
        self.norm: RMSNorm | None = None
        self.head: VocabularyWeight | None = None
        if last:
            over = self.sequence_parallel
            self.norm = RMSNorm(config.d_model, config.norm_eps, home, partial=over)
            if not config.tie_embeddings:
                self.head = table(name="head", std=config.init_std)
        routed = sum(layer > config.dense_layers for layer in layers)
        self.auxiliary = Auxiliary(config, mesh, routed, device)

    def forward(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        """x [T/tp, H] from the chunk before (None for the first) -> x for the chunk after, or the
        last chunk's loss.

        The loss is this microbatch's share of the step's mean loss, sum over tokens times
        `batch.loss_scale`: a scalar in fp32 at least, the same on every tp rank. Shares add up over
        microbatches and dp ranks. The auxiliary losses of the layers have no part in its value,
        and in its gradient as if they were added, scaled as it is; where chunks before this one
        hold some, only `batch.loss_scale` may scale it. Without sequence parallel activations are
        whole, [T, H], on every tp rank.
        """
        mesh, config = self.mesh, self.config
        if self.first:
            assert self.embedding is not None
            x = embed(self.embedding, batch.tokens, mesh, sequence_parallel=self.sequence_parallel)
        assert x is not None  # a later chunk is given what the one before it made
        valid = None if batch.valid is None else own_part(batch.valid, mesh.tp)
        packing = Packing.make(
            batch.positions,
            batch.cu_seqlens,
            frequencies(config, config.head_dim),
            self.dtype,
            magnitude=config.rope_magnitude,
            pairs=config.rope_pairs,
        )
        hook = None if self.route_hook is None else partial(self.route_hook, batch)
        segments = None
        if config.balance_scope == "sequence":
            segments = own_segments(batch.cu_seqlens, mesh.tp, mesh.device)
        sums = []
        for layer, block in self.layers.items():
            if int(layer) in self.checkpoint_layers and torch.is_grad_enabled():
                x, *layer_sums = self._checkpointed(block, x, packing, valid, hook, segments)
            else:
                x, *layer_sums = block(x, packing, valid, hook, segments)
            if layer_sums:
                sums.append(layer_sums)
        auxiliary = None
        if sums and torch.is_grad_enabled():
            auxiliary = self.auxiliary(batch, *map(torch.cat, zip(*sums)))
        if self.norm is None:
            return inject(x, auxiliary)
        loss = self._loss(batch, self.norm(x))
        if auxiliary is None and self.auxiliary.weighs and loss.requires_grad:
            auxiliary = torch.zeros_like(loss)  # no layers here, but others have some
        return join(loss, auxiliary, alone=self.first)

    @staticmethod
    def _checkpointed(block: nn.Module, *inputs: object) -> tuple[Tensor, ...]:
        """Run a block; its input and what the exchange brought are kept, the rest is recomputed."""
        kept = Kept()
        return checkpoint(
            block,
            *inputs,
            kept,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (kept.recording(), kept.replay()),
        )

    @property
    def output_table(self) -> VocabularyWeight:
        """What the last chunk makes logits with: the head, or the embedding where they are tied."""
        table = self.head or self.embedding or self._tied_to[0]
        assert table is not None
        return table

    def _loss(self, batch: Batch, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            x = copy_to(x, self.mesh.tp)
        head = self.output_table
        total = cross_entropy(
            x,
            head.weight,
            batch.labels,
            head.first,
            self.mesh.tp,
            split=self.sequence_parallel,
            vocabulary=self.config.vocab_size,
        )
        return total * batch.loss_scale

    def take_statistics(self) -> tuple[Tensor, Tensor]:
        """(loads [L, E] int64, losses [2]) since the last call: this rank's counts, and the
        load-balancing and z-loss, token-weighted and summed over layers. Sum loads over the stage;
        losses, equal on all tp ranks, over dp and pp."""
        return self.auxiliary.take()

    def place(self, slot_of: Tensor) -> None:
        """Say where the experts of the layers with some lie, slot_of [L, E]: see `MoE.place`."""
        for moe, slots in zip(self.experts_layers, slot_of, strict=True):
            moe.place(slots)

    @property
    def exchanged_layers(self) -> list[int]:
        """Numbers of the layers whose rows are posted and waited for at once, in order."""
        blocks = ((int(number), block) for number, block in self.layers.items())
        return [n for n, b in blocks if isinstance(b, Block) and b.has_experts and b.moe.posts]

    @property
    def experts_layers(self) -> list[MoE]:
        """Of the layers that have experts, in order."""
        blocks = [block for block in self.layers.values() if isinstance(block, Block)]
        return [block.moe for block in blocks if block.has_experts]

    @property
    def selection_biases(self) -> list[Tensor]:
        """Each layer's selection bias [E]; empty where the router has none."""
        biases = [moe.router.selection_bias for moe in self.experts_layers]
        return [bias for bias in biases if bias is not None]

    def named_shards(self) -> Iterator[tuple[str, nn.Parameter, ShardInfo]]:
        """Every parameter's full name, this rank's part, and how the part lies in the whole."""
        for prefix, module in self.named_modules():
            for key, info in getattr(module, "shards", {}).items():
                yield f"{prefix}.{key}", getattr(module, key), info
