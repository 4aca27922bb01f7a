"""The sections of a run's TOML file, one dataclass each: every key with its default, its help and
the values it takes."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field

AUTO = 0  # what the word `auto` stands for where a number is wanted
# Beyond any use: a number with a digit too many is refused before anything counts up to it.
MOST, WIDEST, LONGEST, STEPS = 1 << 16, 1 << 20, 1 << 24, 10**9


def _key(default, help, *, low=None, high=None, above=None, choices=None, flag=None, auto=False):
    """A field with its help and the values it takes: `low <= value <= high`, `value > above`, or
    one of `choices`; with `auto` also that word."""
    meta = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
        "flag": flag,
        "auto": auto,
    }
    return field(default=default, metadata=meta)


@dataclass
class ModelSection:
    """[model]: the decoder and its experts."""

    vocab_size: int = _key(
        1024,
        "entries of the vocabulary; the tokenizer is trained to this size",
        low=258,
        high=LONGEST,
    )
    d_model: int = _key(1024, "width of a token", low=2, high=WIDEST)
    num_layers: int = _key(16, "decoder layers", low=1, flag="layers", high=4096)
    num_heads: int = _key(16, "attention heads", low=1, flag="heads", high=MOST)
    num_kv_heads: int = _key(
        0,
        "key/value heads (grouped-query attention); 0: as many as heads",
        low=0,
        flag="kv-heads",
        high=MOST,
    )
    head_dim: int = _key(64, "width of a head, even", low=2, high=MOST)
    qk_norm: bool = _key(True, "RMSNorm on queries and keys, per head")
    rope_theta: float = _key(10000.0, "base of the rotary embedding", low=1, high=1e15)
    norm_eps: float = _key(1e-6, "epsilon of RMSNorm", low=1e-30, high=1)
    num_experts: int = _key(64, "experts of a layer", low=1, flag="experts", high=MOST)
    top_k: int = _key(2, "experts that a token visits", low=1, high=MOST)
    expert_d_in: int = _key(
        0,
        "width inside an expert before its FFN; 0: d_model. Where it differs, the expert lifts "
        "and lowers",
        low=0,
        high=WIDEST,
    )
    expert_d_ff: int = _key(2048, "hidden width of an expert's FFN", low=1, high=WIDEST)
    gated: bool = _key(True, "gated FFN (three matrices) or plain (two)")
    activation: str = _key(
        "swiglu",
        "activation of the experts",
        choices=("swiglu", "geglu", "reglu", "relu2", "silu", "gelu"),
    )
    score: str = _key(
        "softmax",
        "how router logits become scores",
        choices=("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"),
    )
    renormalize: bool = _key(True, "weights of a token's experts sum to one")
    scale: float = _key(1.0, "factor on the routing weights", above=0, high=1e6)
    num_groups: int = _key(
        1, "groups of experts (group-limited routing)", low=1, flag="expert-groups", high=MOST
    )
    groups_kept: int = _key(1, "groups that a token may choose from", low=1, high=MOST)
    group_score: str = _key(
        "max", "score of a group: of its best, or of its two best", choices=("max", "sum2")
    )
    balance_coef: float = _key(0.01, "coefficient of the load-balancing loss", low=0)
    balance_scope: str = _key(
        "microbatch",
        "tokens that the load-balancing loss compares: of a micro-batch, which depends on how the "
        "step is split, or of each sequence, which does not",
        choices=("microbatch", "sequence"),
    )
    z_coef: float = _key(0.001, "coefficient of the router's z-loss", low=0)
    bias_update_rate: float = _key(
        0.0, "step of the selection bias (aux-loss-free balancing); 0: none", low=0, high=1000
    )
    tie_embeddings: bool = _key(False, "one matrix for the embedding and the head")
    init_std: float = _key(0.02, "standard deviation of the initial weights", above=0, high=100)
    embedding_std: float = _key(
        0.0, "standard deviation of the initial embedding; 0: init_std", low=0, high=100
    )
    recompute_experts: bool = _key(
        False, "experts keep no pre-activation and compute it again in backward"
    )


@dataclass
class BatchSection:
    """[batch]: what one optimiser step reads."""

    data: str = _key(
        "stdlib", "a text file, a directory or a .jsonl file; stdlib: Python's own library sources"
    )
    sequences: int = _key(
        128, "sequences of a step, over all data-parallel ranks", low=1, high=MOST
    )
    lengths: str = _key(
        "",
        "draw lengths uniformly from LOW:HIGH; empty: whole documents, cut to the context",
        flag="lengths",
    )
    context: int = _key(10240, "longest sequence", low=2, high=LONGEST)
    microbatches: int = _key(
        8,
        "micro-batches of one accumulation step, per data-parallel rank; auto: of the whole flush, "
        "chosen from what the first steps take",
        low=1,
        auto=True,
        high=MOST,
    )
    accumulation: int = _key(
        4, "accumulation steps, folded into one pipeline flush", low=1, high=MOST
    )
    policy: str = _key(
        "packed", "how sequences become micro-batches", choices=("packed", "buckets", "padded")
    )


@dataclass
class LayoutSection:
    """[layout]: world = tp*dp*pp = etp*ep*edp*pp."""

    tp: int = _key(1, "tensor-parallel ranks", low=1, high=MOST)
    dp: int = _key(1, "data-parallel ranks", low=1, high=MOST)
    pp: int = _key(1, "pipeline stages", low=1, high=4096)
    ep: int = _key(1, "expert-parallel ranks, folded on tp*dp", low=1, high=MOST)
    etp: int = _key(1, "tensor-parallel ranks inside the experts", low=1, high=MOST)
    schedule: str = _key("1f1b", "pipeline schedule", choices=("gpipe", "1f1b", "interleaved"))
    virtual_stages: int = _key(
        1, "chunks of layers a rank holds (interleaved 1F1B)", low=1, high=4096
    )
    layers_per_stage: str = _key("", "layers of each stage, as in 4,4,4,4; empty: equal")
    checkpoint_layers: str = _key(
        "none", "layers whose activations are computed again: all, none, or 2-15, 3,5"
    )
    sequence_parallel: bool = _key(True, "split the tokens over tp between the matrix products")
    dispatcher: str = _key(
        "auto", "how tokens reach experts", choices=("auto", "all_to_all", "all_gather")
    )


@dataclass
class TrainSection:
    """[train]: optimiser, length, precision, what is written."""

    steps: int = _key(100, "optimiser steps in total", low=1, high=STEPS)
    lr: float = _key(3e-3, "highest learning rate", above=0)
    min_lr_ratio: float = _key(0.1, "last learning rate over the highest", low=0, high=1)
    warmup: int = _key(10, "steps of linear warm-up", low=0, high=STEPS)
    clip: float = _key(1.0, "largest gradient norm; 0: none", low=0)
    skip_bad_steps: int = _key(
        0,
        "steps in a row that may be left out, where the loss or the gradient's norm is not finite, "
        "before the run stops",
        low=0,
        high=STEPS,
    )
    weight_decay: float = _key(
        0.1, "decay of matrices; norms, biases and embeddings have none", low=0
    )
    beta1: float = _key(0.9, "AdamW beta1", low=0, high=0.9999)
    beta2: float = _key(0.95, "AdamW beta2", low=0, high=0.99999)
    eps: float = _key(1e-8, "AdamW epsilon", low=1e-30, high=1)
    dtype: str = _key(
        "fp32", "dtype of parameters and activations", choices=("fp32", "bf16", "fp64")
    )
    optimizer_state: str = _key(
        "fp32",
        "dtype of the moments; bf16 ones are rounded by chance, right on average",
        choices=("fp32", "bf16"),
    )
    seed: int = _key(0, "seed of parameters and data order", low=0, high=2**31 - 1)
    device: str = _key("auto", "where to run", choices=("auto", "cpu", "cuda"))
    eval_every: int = _key(
        0, "steps between held-out losses; 0: only at the end", low=0, high=STEPS
    )
    eval_sequences: int = _key(64, "held-out sequences", low=1, high=MOST)
    save_every: int = _key(
        -1,
        "steps between checkpoints; -1: only one, at the end; 0: none",
        low=-1,
        high=STEPS,
    )
    keep: int = _key(2, "newest checkpoints kept", low=1, high=STEPS)


@dataclass
class HardwareSection:
    """[hardware]: a machine that a plan is made for; a run ignores it."""

    gpus: int = _key(1, "cards", low=1, high=MOST)
    gpus_per_node: int = _key(8, "cards of a node", low=1, high=MOST)
    tflops: float = _key(400.0, "dense bf16 TFLOP/s of a card", above=0)
    memory_gb: float = _key(64.0, "memory of a card, 1e9 bytes", above=0)
    bandwidth_gbps: float = _key(1800.0, "memory bandwidth of a card, 1e9 bytes/s", above=0)
    link_gbps: float = _key(
        450.0, "bandwidth between cards of a node, a direction, 1e9 bytes/s", above=0
    )
    network_gbps: float = _key(
        50.0, "bandwidth of a card between nodes, a direction, 1e9 bytes/s", above=0
    )
    reserve_gb: float = _key(
        2.0, "memory of a card that context, collectives and allocator take", low=0
    )
    efficiency: float = _key(
        0.6, "part of its FLOP/s that a card reaches in large products", above=0, high=1
    )
    imbalance: float = _key(1.1, "rows of the busiest rank's experts over the mean", low=1)


@dataclass
class WorkloadSection:
    """[workload]: what a plan is told of the sequences and of the routing; a run finds out."""

    lengths: list[int] = field(
        default_factory=list, metadata={"help": "the lengths of a step's sequences"}
    )
    lengths_from: str = _key("", "a file of them")
    zipf: float = _key(
        0.0, "the expert in place n gets n^-zipf of the rows; 0: as [hardware] imbalance", low=0
    )
    loads: list[float] = field(
        default_factory=list, metadata={"help": "rows of each expert of a layer, to any scale"}
    )
    loads_from: str = _key("", "a file of them, a list a layer, or the folder of a run")


@dataclass
class ObjectiveSection:
    """[objective]: what the recommended plan is best at."""

    best: str = _key(
        "throughput",
        "shortest step; shortest layer; most sequences/s a card; fewest cards; least memory a card",
        choices=("throughput", "latency", "cost", "gpus", "memory"),
    )
    at_least: float = _key(0.0, "sequences/s that it must reach", low=0)


@dataclass
class ClaimsSection:
    """[claims]: what a specification says it reaches; a run ignores it. 0 or empty: nothing
    said."""

    parameters: float = _key(0.0, "parameters of the model", low=0)
    gpus: int = _key(0, "cards", low=0)
    experts_per_gpu: int = _key(0, "experts of a layer on a card", low=0)
    modules_per_gpu: int = _key(0, "expert modules on a card", low=0)
    layer_ms: list[float] = field(
        default_factory=list, metadata={"help": "milliseconds of a layer, from, to"}
    )
    sequences_per_second: list[float] = field(
        default_factory=list, metadata={"help": "throughput, from, to"}
    )
    memory_gb: float = _key(0.0, "memory in use on a card, 1e9 bytes", low=0)
    tp: int = _key(0, "tensor-parallel ranks", low=0)
    pp: int = _key(0, "pipeline stages", low=0)
    ep: int = _key(0, "ranks that share a layer's experts", low=0)
    checkpoint_layers: str = _key("", "layers whose activations are computed again")
    mfu: list[float] = field(
        default_factory=list, metadata={"help": "model FLOPs utilisation, from, to"}
    )


@dataclass
class RunConfig:
    """All sections of a run."""

    model: ModelSection = field(default_factory=ModelSection)
    batch: BatchSection = field(default_factory=BatchSection)
    layout: LayoutSection = field(default_factory=LayoutSection)
    train: TrainSection = field(default_factory=TrainSection)
    hardware: HardwareSection = field(default_factory=HardwareSection)
    workload: WorkloadSection = field(default_factory=WorkloadSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    claims: ClaimsSection = field(default_factory=ClaimsSection)


SECTIONS: dict[str, type] = {
    f.name: typing.get_type_hints(RunConfig)[f.name] for f in dataclasses.fields(RunConfig)
}
FLAG_SECTIONS = ("model", "batch", "layout", "train")
