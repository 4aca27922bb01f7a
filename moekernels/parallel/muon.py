"""Muon (K. Jordan 2024, https://kellerjordan.github.io/posts/muon): a matrix moves along the
momentum of its gradients, orthogonalised, so that it moves as far in every direction.

Each matrix of a hidden layer by itself: each expert's, and where several lie in one tensor (gate
and up, query, key and value) each of those. Embedding, head, router, norms and biases stay
AdamW's. A step is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of AdamW's (Liu
et al. 2025, "Muon is scalable for LLM training"): learning rate and decay are the same for both.

It takes whole matrices. What is split over the tensor-parallel ranks is gathered, in bf16, one
tensor at a time, and each rank makes the whole step and takes its part. Where the optimiser is
sharded a rank has a slice of the momentum; its ranks gather what is to be orthogonalised, in bf16,
and each makes the steps of those matrices of which it owns some.

Legend: n matrices, A rows and B columns of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.average import approach
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.nodes import gather
from moekernels.parallel.rounding import round_
from moekernels.parallel.shard import ShardInfo
from moekernels.parallel.tensor import all_gather
from moekernels.parallel.update import Bucket

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # Jordan's: steepest at 0, so that five steps suffice
STEPS = 5
LEAST = 1e-7  # of a norm that is divided by
SIZE_OF_ADAMW = 0.2  # the root mean square of AdamW's steps, about
AT_A_TIME = 1 << 26  # elements


def takes(name: str, info: ShardInfo) -> bool:
    """Whether a parameter is a matrix of a hidden layer, or such matrices."""
    shape = info.full_shape
    if len(shape) != 3 and (len(shape) != 2 or info.apart):  # a vector of each expert is none
        return False
    elsewhere = "embed" in name or name.startswith("head") or ".router." in name
    return min(shape[-2:]) > 1 and not elsewhere


def orthogonalised(x: Tensor) -> Tensor:
    """x [n, A, B] -> [n, A, B] with singular values from 0.7 to 1.2 in place of its own, by
    Newton-Schulz; in bf16, fp64 for fp64."""
    a, b, c = COEFFICIENTS
    y = _narrow(x)
    tall = y.shape[1] > y.shape[2]
    y = y.mT if tall else y
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=LEAST)  # no singular value above 1
    for _ in range(STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def _narrow(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.bfloat16()


def scaled_step(x: Tensor, stacked: Sequence[int] = ()) -> Tensor:
    """x [n, A, B], in which matrices of `stacked` rows lie one below the other (none named: one) ->
    the step of each in fp32 at least, before the learning rate."""
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    each = max(1, AT_A_TIME // max(1, x[0].numel()))
    for part, step in zip(x.split(each), out.split(each)):
        sizes = list(stacked) or [x.shape[1]]
        for matrix, place in zip(part.split(sizes, dim=1), step.split(sizes, dim=1)):
            scale = SIZE_OF_ADAMW * max(matrix.shape[1:]) ** 0.5
            place.copy_(orthogonalised(matrix)).mul_(scale)
    return out


def peers_of(shards: Mapping[str, ShardInfo], mesh: Mesh) -> dict[str, list[ShardInfo]]:
    """How the parts of each tensor lie that is split over the tensor-parallel ranks, in their
    order. All ranks call it together."""
    if mesh.tp.size == 1:
        return {}
    split = {name: info for name, info in shards.items() if _split(info)}
    everyone = gather(split, mesh.world.size)
    return {name: [everyone[rank][name] for rank in mesh.tp.ranks] for name in split}


def _split(info: ShardInfo) -> bool:
    return info.local_shape[-2:] != info.full_shape[-2:]


def update(
    bucket: Bucket,
    shards: Mapping[str, ShardInfo],
    peers: Mapping[str, list[ShardInfo]],
    mesh: Mesh,
    config: AdamWConfig,
    step: int,
    lr: float,
    divisor: Tensor | None,
) -> None:
    """Masters, momentum, average and this rank's weights, by its gradients over `divisor`; those
    are spoilt. `shards`: of all parameters; `peers` as from `peers_of`."""
    own, master = bucket.own, bucket.master.near
    grads = bucket.grads[own]
    if divisor is not None:
        grads.div_(divisor)
    _mix(bucket, grads, config.momentum, step)
    given = bucket.grads
    if bucket.sharded:
        given = all_gather(_narrow(grads), getattr(mesh, bucket.reduce_over))
    for name, (begin, end) in zip(bucket.names, bucket.spans):
        low, high = max(begin, own.start), min(end, own.stop)
        if low >= high:
            continue  # nor do the tensor-parallel ranks own any of it
        info = shards[name]
        local = given[begin:end].view(info.local_shape)
        moves = _step_of(local, info, peers.get(name), mesh.tp, low - begin, high - begin)
        place = master[low - own.start : high - own.start]
        if bucket.decay:
            place.mul_(1 - lr * config.weight_decay)
        place.add_(moves, alpha=-lr)
    if bucket.lifted:
        bucket.weights[own].copy_(master)
    if bucket.ema is not None:
        approach(bucket.ema.near, master, config.ema)


def _mix(bucket: Bucket, grads: Tensor, momentum: float, step: int) -> None:
    """The momentum takes the gradients in, and they become what is to be orthogonalised: Nesterov's
    look ahead of it."""
    kept = bucket.exp_avg.near
    if bucket.noise is None:
        kept.lerp_(grads, 1 - momentum)
        grads.lerp_(kept, momentum)
        return
    for begin, end, bits in bucket.noise.chunks(step, bucket.own):
        part = slice(begin - bucket.own.start, end - bucket.own.start)
        wide = kept[part].float().lerp_(grads[part], 1 - momentum)
        grads[part].lerp_(wide, momentum)
        round_(wide, bits & 0xFFFF, kept[part])


def _step_of(
    local: Tensor,
    info: ShardInfo,
    peers: list[ShardInfo] | None,
    tp: Group,
    low: int,
    high: int,
) -> Tensor:
    """The step [high - low] of elements low ... high-1 of a local tensor [A, B] or [n, A, B]."""
    if peers is None:
        matrices = local.reshape(-1, *local.shape[-2:])
        each = matrices[0].numel()
        first, last = low // each, -(-high // each)
        moves = scaled_step(matrices[first:last], info.stacked)
        return moves.reshape(-1)[low - first * each : high - first * each]
    parts = all_gather(_narrow(local)[None].contiguous(), tp)
    whole = parts.new_empty(info.full_shape)
    for there, part in zip(peers, parts):
        there.put(part, whole)
    moves = scaled_step(whole.reshape(-1, *whole.shape[-2:]), info.stacked)
    return info.take(moves.view(info.full_shape)).reshape(-1)[low:high]
