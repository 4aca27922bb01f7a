"""The sections of a run's TOML file, one dataclass each: every key with its default, its help and
the values it takes. [model] is `model.decoder.DecoderSpec`."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field

from moekernels.model.decoder import DecoderSpec
from moekernels.model.dispatch import WAYS
from moekernels.model.spec import AUTO, LONGEST, MOST, STEPS, key
from moekernels.pipeline.build import SCHEDULES

LR_SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass
class BatchSection:
    """[batch]: what one optimiser step reads."""

    data: str = key(
        "stdlib",
        "a text file, a directory or a .jsonl file, also .gz or .zst, a .parquet or .arrow table, "
        "tokens as .npy or .bin; stdlib: Python's own library sources; several, each with a weight "
        "or none, as in a.jsonl:0.7 b/:0.3",
        several=True,
    )
    eval_data: str = key(
        "",
        "text for the held-out loss, as --data names it; empty: two per cent of --data, which is "
        "not trained on",
        several=True,
    )
    text_field: str = key("text", "key of a .jsonl row that holds its text")
    tokenizer: str = key(
        "",
        "a Hugging Face tokenizer.json, or its folder; empty: one learned from the text, or the "
        "one of the weights that a run begins with",
    )
    sequences: int = key(128, "sequences of a step, over all data-parallel ranks", low=1, high=MOST)
    lengths: str = key(
        "",
        "draw lengths uniformly from LOW:HIGH; empty: whole documents, cut to the context",
        flag="lengths",
    )
    context: int = key(10240, "longest sequence", low=2, high=LONGEST)
    microbatches: int = key(
        8,
        "microbatches of one accumulation step, per data-parallel rank; auto: of the whole flush, "
        "chosen from what the first steps take",
        low=1,
        auto=True,
        high=MOST,
    )
    accumulation: int = key(
        4, "accumulation steps, folded into one pipeline flush", low=1, high=MOST
    )
    policy: str = key(
        "packed", "how sequences become microbatches", choices=("packed", "buckets", "padded")
    )


@dataclass
class LayoutSection:
    """[layout]: world = tp*dp*pp = etp*ep*edp*pp."""

    tp: int = key(1, "tensor-parallel ranks", low=1, high=MOST)
    dp: int = key(1, "data-parallel ranks", low=1, high=MOST)
    pp: int = key(1, "pipeline stages", low=1, high=4096)
    ep: int = key(1, "expert-parallel ranks, folded on tp*dp", low=1, high=MOST)
    etp: int = key(1, "tensor-parallel ranks inside the experts", low=1, high=MOST)
    schedule: str = key("1f1b", "pipeline schedule", choices=SCHEDULES)
    virtual_stages: int = key(
        1, "chunks of layers a rank holds (schedules interleaved and zb)", low=1, high=4096
    )
    layers_per_stage: str = key("", "layers of each stage, as in 4,4,4,4; empty: equal")
    checkpoint_layers: str = key(
        "none", "layers whose activations are computed again: all, none, or 2-15, 3,5"
    )
    sequence_parallel: bool = key(True, "split the tokens over tp between the matrix products")
    dispatcher: str = key("auto", "how tokens reach experts", choices=("auto", *WAYS))


@dataclass
class TrainSection:
    """[train]: optimiser, length, precision, what is written."""

    steps: int = key(100, "optimiser steps in total", low=1, high=STEPS)
    lr: float = key(3e-3, "highest learning rate", above=0)
    min_lr_ratio: float = key(0.1, "last learning rate over the highest", low=0, high=1)
    warmup: int = key(10, "steps of linear warm-up", low=0, high=STEPS)
    lr_schedule: str = key(
        "cosine",
        "the learning rate behind the warm-up: half a cosine down, a line down, wsd (level, then "
        "a line down), or constant",
        choices=LR_SCHEDULES,
    )
    decay_steps: int = key(
        0, "last steps in which wsd goes down; 0: a fifth of all steps", low=0, high=STEPS
    )
    clip: float = key(1.0, "largest gradient norm; 0: none", low=0)
    skip_bad_steps: int = key(
        0,
        "steps in a row that may be left out, where the loss or the gradient's norm is not finite, "
        "before the run stops",
        low=0,
        high=STEPS,
    )
    weight_decay: float = key(
        0.1, "decay of matrices; norms, biases and embeddings have none", low=0
    )
    optimizer: str = key(
        "adamw",
        "adamw, or muon for the matrices of hidden layers, every expert's on its own, with adamw "
        "for all else",
        choices=("adamw", "muon"),
    )
    momentum: float = key(0.95, "momentum of muon", low=0, high=0.9999)
    beta1: float = key(0.9, "AdamW beta1", low=0, high=0.9999)
    beta2: float = key(0.95, "AdamW beta2", low=0, high=0.99999)
    eps: float = key(1e-8, "AdamW epsilon", low=1e-30, high=1)
    dtype: str = key(
        "fp32", "dtype of parameters and activations", choices=("fp32", "bf16", "fp64")
    )
    optimizer_state: str = key(
        "fp32",
        "dtype of the moments; bf16 ones are rounded by chance, right on average",
        choices=("fp32", "bf16"),
    )
    shard_optimizer: bool = key(
        True,
        "split masters and moments over the ranks that hold the same parameters (ZeRO stage 1), "
        "but for experts that --replan moves; gradients are reduce-scattered, parameters gathered",
    )
    offload_optimizer: float = key(
        0.0,
        "part of masters and moments that lies in the host's memory and is brought to the card in "
        "chunks, with the same result; auto: as little as lets the run fit its cards",
        low=0,
        high=1,
        auto=True,
    )
    ema: float = key(
        0.0,
        "decay of a moving average of the weights, kept beside the masters, as in 0.999; 0: none",
        low=0,
        high=0.9999999,
    )
    eval_weights: str = key(
        "model",
        "which weights the held-out loss is of: the model's, or their moving average (--ema)",
        choices=("model", "ema"),
    )
    seed: int = key(0, "seed of parameters and data order", low=0, high=2**31 - 1)
    device: str = key("auto", "where to run", choices=("auto", "cpu", "cuda"))
    weights_at_once: int = key(
        AUTO,
        "microbatches whose gradients of experts' weights are computed in one call, which adds up "
        "the same numbers in the same order; auto: 8 on a CPU where ranks share cores or exchange "
        "no rows, else 1",
        low=1,
        high=1024,
        auto=True,
    )
    exchange: str = key(
        "auto",
        "how rows travel: through memory that ranks of one machine share, or by collectives; auto: "
        "shared where it can be",
        choices=("auto", "shared", "collective"),
    )
    exchange_parts: int = key(
        1,
        "parts of a rank's experts: rows of one travel while another computes, in layers that are "
        "not computed again",
        low=1,
        high=64,
    )
    exchange_buffers: str = key(
        "exact",
        "memory of the rows that a rank takes in: exact, as many as come, which a GPU is asked for "
        "in every layer; bounded:C, C times the mean, known beforehand: a step whose rows do not "
        "fit is repeated with more",
    )
    link: str = key(
        "",
        "have the shared exchange arrive as over a link of that latency and rate, as in "
        "20us,1GB/s; empty: as memory brings it",
    )
    eval_every: int = key(0, "steps between held-out losses; 0: only at the end", low=0, high=STEPS)
    eval_sequences: int = key(64, "held-out sequences", low=1, high=MOST)
    save_every: int = key(
        -1,
        "steps between checkpoints; -1: only one, at the end; 0: none",
        low=-1,
        high=STEPS,
    )
    keep: int = key(2, "newest checkpoints kept", low=1, high=STEPS)
    profile: str = key(
        "",
        "steps that torch.profiler watches, FIRST:LAST, on all ranks, into one profile.json.gz; "
        "empty: none",
    )
    log: str = key(
        "none",
        "where the numbers of metrics.jsonl also go, by that library",
        choices=("none", "tensorboard", "wandb", "mlflow"),
    )
    replan: str = key(
        "never",
        "move experts between ranks where their loads are uneven: never, auto (every 10 steps, "
        "where it pays), a number of steps, or random:N (every N steps anywhere, for tests)",
    )
    replicas: int = key(
        0,
        "spare slots of a rank and layer for copies of hot experts of other ranks, where an expert "
        "alone has more rows than a rank on average; chosen when --replan looks, or every 10 steps",
        low=0,
        high=MOST,
    )


def _options(group: str, name: str) -> str:
    text = f"NCCL options of {group}, over `info`'s table, as in max_ctas=8,high_priority=no"
    return key("", text, flag=f"nccl-{name}")


@dataclass
class NcclSection:
    """[nccl]: what a GPU's collectives are told, a group each."""

    exchange: str = _options("the ranks that exchange rows", "exchange")
    pp: str = _options("pipelines", "pp")
    tp: str = _options("tensor-parallel groups", "tp")
    dp: str = _options("data-parallel groups", "dp")
    edp: str = _options("the copies of experts", "edp")
    ends: str = _options("the stages that hold a tied embedding", "ends")


@dataclass
class HardwareSection:
    """[hardware]: a machine that a plan is made for; a run ignores it."""

    gpus: int = key(1, "cards", low=1, high=MOST)
    gpus_per_node: int = key(8, "cards of a node", low=1, high=MOST)
    tflops: float = key(400.0, "dense bf16 TFLOP/s of a card", above=0, high=1e9)
    memory_gb: float = key(64.0, "memory of a card, 1e9 bytes", above=0, high=1e9)
    bandwidth_gbps: float = key(
        1800.0, "memory bandwidth of a card, 1e9 bytes/s", above=0, high=1e9
    )
    link_gbps: float = key(
        450.0, "bandwidth between cards of a node, a direction, 1e9 bytes/s", above=0, high=1e9
    )
    network_gbps: float = key(
        50.0, "bandwidth of a card between nodes, a direction, 1e9 bytes/s", above=0, high=1e9
    )
    host_gb: float = key(
        1024.0, "memory of a node for what its cards keep there, 1e9 bytes; 0: none", low=0
    )
    host_gbps: float = key(
        55.0, "bandwidth between a card and its host, both ways together, 1e9 bytes/s", above=0
    )
    reserve_gb: float = key(
        2.0, "memory of a card that context, collectives and allocator take", low=0, high=1e9
    )
    efficiency: float = key(
        0.6, "part of its FLOP/s that a card reaches in large products", above=0, high=1
    )
    imbalance: float = key(1.1, "rows of the busiest rank's experts over the mean", low=1)


@dataclass
class WorkloadSection:
    """[workload]: what a plan is told of the sequences and of the routing; a run finds out."""

    lengths: list[int] = field(
        default_factory=list, metadata={"help": "the lengths of a step's sequences"}
    )
    lengths_from: str = key("", "a file of them")
    zipf: float = key(
        0.0, "the expert in place n gets n^-zipf of the rows; 0: as [hardware] imbalance", low=0
    )
    loads: list[float] = field(
        default_factory=list, metadata={"help": "rows of each expert of a layer, to any scale"}
    )
    loads_from: str = key("", "a file of them, a list a layer, or the folder of a run")


@dataclass
class ObjectiveSection:
    """[objective]: what the recommended plan is best at."""

    best: str = key(
        "throughput",
        "shortest step, layer; most sequences/s per card; fewest cards; least memory per card",
        choices=("throughput", "latency", "cost", "gpus", "memory"),
    )
    at_least: float = key(0.0, "sequences/s that it must reach", low=0)


@dataclass
class ClaimsSection:
    """[claims]: what a specification says it reaches; a run ignores it. 0, empty: nothing said."""

    parameters: float = key(0.0, "parameters of the model", low=0)
    gpus: int = key(0, "cards", low=0)
    experts_per_gpu: int = key(0, "experts of a layer on a card", low=0)
    modules_per_gpu: int = key(0, "expert modules on a card", low=0)
    layer_ms: list[float] = field(
        default_factory=list, metadata={"help": "milliseconds of a layer, from, to"}
    )
    sequences_per_second: list[float] = field(
        default_factory=list, metadata={"help": "throughput, from, to"}
    )
    memory_gb: float = key(0.0, "memory in use on a card, 1e9 bytes", low=0)
    tp: int = key(0, "tensor-parallel ranks", low=0)
    pp: int = key(0, "pipeline stages", low=0)
    ep: int = key(0, "ranks that share a layer's experts", low=0)
    checkpoint_layers: str = key("", "layers whose activations are computed again")
    mfu: list[float] = field(
        default_factory=list, metadata={"help": "model FLOPs utilisation, from, to"}
    )


@dataclass
class RunConfig:
    """All sections of a run."""

    model: DecoderSpec = field(default_factory=DecoderSpec)
    batch: BatchSection = field(default_factory=BatchSection)
    layout: LayoutSection = field(default_factory=LayoutSection)
    train: TrainSection = field(default_factory=TrainSection)
    nccl: NcclSection = field(default_factory=NcclSection)
    hardware: HardwareSection = field(default_factory=HardwareSection)
    workload: WorkloadSection = field(default_factory=WorkloadSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    claims: ClaimsSection = field(default_factory=ClaimsSection)


SECTIONS: dict[str, type] = {
    f.name: typing.get_type_hints(RunConfig)[f.name] for f in dataclasses.fields(RunConfig)
}
FLAG_SECTIONS = ("model", "batch", "layout", "train", "nccl")
