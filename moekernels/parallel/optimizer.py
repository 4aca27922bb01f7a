"""AdamW, or Muon (see there), over flat buffers: fp32 gradients and master weights, whatever dtype
the model computes in.

All parameters of one kind (gradients summed over the same ranks, held by the same ranks, decayed
or not) lie in one flat tensor, so that a reduction, a norm and an update are each one call. fp32
parameters are views of their masters; bf16 ones are copied from them after a step. bf16 moments are
rounded stochastically (see `rounding`).

Sharded (stage 1 of ZeRO, Rajbhandari et al. 2020), each of the ranks whose gradients are summed
owns an equal slice of every flat tensor: it gets the sum of that slice alone, keeps its masters and
moments, updates it, and all gather the slices. A share of them may lie in the host's memory (see
`offload`).

Weight decay acts on matrices, not on norms, biases (anything one-dimensional) and embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moekernels.parallel import average, muon
from moekernels.parallel.adamw import AdamWConfig
from moekernels.parallel.mesh import Group, Mesh
from moekernels.parallel.nodes import gather
from moekernels.parallel.offload import Held, Streamed, host_zeros
from moekernels.parallel.reduction import Reduction
from moekernels.parallel.rounding import Noise
from moekernels.parallel.shard import ShardInfo, boxes
from moekernels.parallel.tensor import all_gather, all_reduce
from moekernels.parallel.update import Bucket, update

CHUNK = 1 << 18  # elements whose bf16 moments are widened at a time: what fits a cache
ALIGN = 16  # elements: every parameter begins on a 64-byte line
FP32_MAX = torch.finfo(torch.float32).max


def decays(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and "embed" not in name


class Optimizer:
    """Owns the storage of parameters and gradients of this rank.

    Gradients accumulate over backward passes into `parameter.main_grad` (kernels that know it
    write there, autograd's are added) until `zero_grad`. A step is `reduce`, then `step`; sums of a
    chunk whose backward is over may begin before, by `sums.begin`.
    """

    def __init__(
        self,
        shards: Iterable[tuple[str, Tensor, ShardInfo]],
        mesh: Mesh,
        config: AdamWConfig,
        chunk_of: Mapping[str, int] | None = None,
    ) -> None:
        """`chunk_of`: the chunk of this rank that a parameter is of, by name; else they are of
        one."""
        self.mesh, self.config, self.steps_done = mesh, config, 0
        self.parameters = {name: (parameter, info) for name, parameter, info in shards}
        kinds: dict[tuple[str, str, bool, bool, torch.dtype, int, bool], list[str]] = {}
        asked = config.optimizer == "muon"
        for name, (parameter, info) in self.parameters.items():
            decay, matrix = decays(name, info.full_shape), asked and muon.takes(name, info)
            kind = (info.reduce_over, info.copies, decay, info.apart, parameter.dtype)
            key = (*kind, chunk_of[name] if chunk_of else 0, matrix)
            kinds.setdefault(key, []).append(name)
        matrices = {
            name: self.parameters[name][1] for key in kinds if key[-1] for name in kinds[key]
        }
        self._peers = muon.peers_of(matrices, mesh) if asked else {}
        # Where each expert tensor begins among all squares, and how many there are.
        self._places: tuple[dict[str, int], int] | None = None
        self._hooks: list[RemovableHandle] = []
        self._streamed = Streamed(mesh.device)
        self.buckets = [self._bucket(*kind, names) for kind, names in kinds.items()]
        self.sums = Reduction(self.buckets, mesh)

    def _bucket(
        self,
        reduce_over: str,
        copies: str,
        decay: bool,
        apart: bool,
        kept: torch.dtype,
        chunk: int,
        matrices: bool,
        names: list[str],
    ) -> Bucket:
        """Take over the storage of these parameters, which are `kept` in one dtype."""
        device = self.parameters[names[0]][0].device
        dtype = torch.promote_types(kept, torch.float32)
        moments = torch.float64 if dtype == torch.float64 else self.config.state_dtype
        spans: list[tuple[int, int]] = []
        size = 0
        for name in names:
            end = size + self.parameters[name][0].numel()
            spans.append((size, end))
            size = -(-end // ALIGN) * ALIGN
        group: Group = getattr(self.mesh, reduce_over)
        whole = apart and self.config.whole_experts
        sharded = self.config.shard_optimizer and group.size > 1 and not whole
        parts, part = (group.size, group.rank) if sharded else (1, 0)
        # Whole lines, the last one, too: its few elements would be updated with other bits.
        share = -(-size // (parts * ALIGN)) * ALIGN
        own = slice(part * share, (part + 1) * share)

        def flat(length: int, of: torch.dtype) -> Tensor:
            return torch.zeros(length, dtype=of, device=device)

        grads, weights = flat(parts * share, dtype), flat(parts * share, kept)
        for name, (begin, end) in zip(names, spans):
            parameter = self.parameters[name][0]
            weights[begin:end].copy_(parameter.detach().reshape(-1))
            parameter.data = weights[begin:end].view(parameter.shape)
            main_grad = grads[begin:end].view(parameter.shape)
            parameter.main_grad = main_grad  # type: ignore[attr-defined]  # torch has no such field
            if kept == dtype:
                parameter.grad = main_grad  # autograd adds in place
            else:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_into_main_grad))
        far = round(self.config.offload_optimizer * (share // ALIGN)) * ALIGN
        near, master = share - far, Held(weights[own], host_zeros(0, dtype, device))
        if kept != dtype:
            master = Held.zeros(near, far, dtype, device)
            for (begin, end), x in master.parts(0, share):
                x.copy_(weights[own][begin:end])
        bucket = Bucket(
            reduce_over,
            copies,
            decay,
            apart,
            chunk,
            names,
            spans,
            own,
            sharded,
            grads=grads,
            weights=weights,
            master=master,  # a view where that is its dtype
            exp_avg=Held.zeros(near, far, moments, device),
            exp_avg_sq=Held.zeros(*((0, 0) if matrices else (near, far)), moments, device),
            muon=matrices,
            ema=Held.zeros(near, far, dtype, device) if self.config.ema else None,
        )
        average.begin(bucket)
        self._draw(bucket)
        return bucket

    def _draw(self, bucket: Bucket) -> None:
        """Noise for moments that are rounded, by what the parameters are parts of."""
        if bucket.exp_avg.dtype == torch.bfloat16:
            placed = zip(bucket.names, bucket.spans)
            parts = [(name, begin, self.parameters[name][1]) for name, (begin, _) in placed]
            bucket.noise = Noise(self.config.seed, parts, CHUNK, ALIGN, self.mesh.device)

    def zero_grad(self) -> None:
        for bucket in self.buckets:
            bucket.grads.zero_()

    def reduce(self) -> None:
        """Sum the gradients over the ranks that computed parts of them; sharded, those of this
        rank's slices alone."""
        self.sums.finish()

    def spread_gradients(self) -> None:
        """Give every rank the sums that the others have of sharded gradients: for comparisons."""
        for bucket in self.buckets:
            if bucket.sharded:
                group = getattr(self.mesh, bucket.reduce_over)
                bucket.grads.copy_(all_gather(bucket.grads[bucket.own], group))

    def grad_norm(self) -> Tensor:
        """Norm of the whole model's gradient [] in fp64, the same on every rank, and the same bits
        wherever the experts lie: each parameter counts once. Finite if every gradient is: where
        their squares overflow they are scaled."""
        total = self._squares(lambda grads: torch.linalg.vector_norm(grads, dim=1).double())
        if math.isfinite(total.item()):
            return total.sqrt()
        largest = self._largest()
        if not math.isfinite(largest) or largest == 0:
            return total.sqrt()

        def scaled(grads: Tensor) -> Tensor:
            parts = [
                torch.linalg.vector_norm(part / largest, dim=1)
                for part in grads.split(max(1, CHUNK // max(1, len(grads))), dim=1)
            ]
            return torch.stack(parts).double().norm(dim=0)

        return self._squares(scaled).sqrt() * largest

    def _squares(self, norms_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over all ranks [] of the squares of `norms_of` the gradients, [n, m] -> [n].

        Experts go into places that hang on their names alone, and are summed in that order.
        """
        if self._places is None:
            self._places = self._agree_on_places()
        places, size = self._places
        each = torch.zeros(1 + size, dtype=torch.float64, device=self.mesh.device)
        for bucket in self.buckets:
            if getattr(self.mesh, bucket.writers).rank != 0:
                continue
            if not bucket.apart:
                each[0] += norms_of(bucket.grads[bucket.own][None])[0].square()
                continue
            for name, (begin, _) in zip(bucket.names, bucket.spans):
                parameter, info = self.parameters[name]
                at_experts = 1 + places[name] + self._experts_places(info)
                rows = main_grad_of(parameter).flatten(1)
                owned = self._owned(bucket, begin, rows.numel())
                for (row, column), (height, width) in boxes(tuple(rows.shape), *owned):
                    part = rows[row : row + height, column : column + width]
                    each[at_experts[row : row + height]] += norms_of(part).square()
        return all_reduce(each, self.mesh.world).sum()

    def _agree_on_places(self) -> tuple[dict[str, int], int]:
        """Where the squares of each expert tensor of the model begin, and how many there are. Ranks
        ask together."""
        own = {
            name: info.full_shape[0] * self._parts(info)
            for name, (_, info) in self.parameters.items()
            if info.apart
        }
        everyone = gather(own, self.mesh.world.size)
        sizes = {name: size for names in everyone for name, size in names.items()}
        places, end = {}, 0
        for name in sorted(sizes):
            places[name] = end
            end += sizes[name]
        return places, end

    def _parts(self, info: ShardInfo) -> int:
        """Into how many shards each expert is cut."""
        return self.mesh.layout.etp if info.copies == "edp" else 1

    def _experts_places(self, info: ShardInfo) -> Tensor:
        """Of the experts [e] that this rank holds, within their tensor's squares."""
        parts = self._parts(info)
        experts = torch.tensor(info.held(), device=self.mesh.device)
        return experts * parts + (self.mesh.etp_index if parts > 1 else 0)

    def _largest(self) -> float:
        """The largest absolute gradient over all ranks; NaN where one is."""
        world = self.mesh.world
        each = torch.zeros(world.size, dtype=torch.float64, device=self.mesh.device)
        bounds = [torch.stack(torch.aminmax(b.grads[b.own])).abs().max() for b in self.buckets]
        if bounds:
            each[world.rank] = torch.stack([bound.double() for bound in bounds]).max()
        return all_reduce(each, world).max().item()

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr_at(self.steps_done + 1)

    @property
    def largest_norm(self) -> float:
        """Of a gradient, clipped if at all, whose squares the second moments hold."""
        return min((torch.finfo(b.master.dtype).max ** 0.5 for b in self.buckets), default=math.inf)

    def step(self, norm: Tensor | None = None) -> tuple[Tensor, float]:
        """One update from reduced gradients; the gradient's norm before clipping, and the learning
        rate. `norm`: what `grad_norm` has said of them, finite."""
        c, lr = self.config, self.lr
        norm = self.grad_norm() if norm is None else norm
        self.steps_done += 1
        divisor = None
        if c.clip:
            divisor = ((norm + 1e-6) / c.clip).clamp(min=1.0)
            if divisor.item() > FP32_MAX:  # more than one division can do
                divisor = divisor.sqrt()
                for bucket in self.buckets:
                    bucket.grads[bucket.own] /= divisor
            divisor = divisor.float()
        infos = {name: info for name, (_, info) in self.parameters.items()}
        for bucket in self.buckets:
            when = (c, self.steps_done, lr, divisor)
            if bucket.muon:
                muon.update(bucket, infos, self._peers, self.mesh, *when)
            else:
                update(bucket, *when, self._streamed)
        self.gather_weights()
        return norm, lr

    def state(self) -> Iterator[tuple[str, Tensor, ShardInfo]]:
        """What a checkpoint keeps, as views: `master.<name>`, `exp_avg.<name>`,
        `exp_avg_sq.<name>` and, where there is an average, `ema.<name>`; of a sharded tensor the
        boxes that lie in this rank's slice, and of one that lies partly in the host's memory those
        here and there, each by itself."""
        self._streamed.lanes.settle()
        for bucket in self.buckets:
            for name, (begin, _) in zip(bucket.names, bucket.spans):
                parameter, info = self.parameters[name]
                low, high = self._owned(bucket, begin, parameter.numel())
                first = begin - bucket.own.start
                for kind in bucket.kinds:
                    for (a, b), flat in getattr(bucket, kind).parts(first + low, first + high):
                        done = 0
                        for at, size in boxes(tuple(parameter.shape), a - first, b - first):
                            view = flat[done : done + math.prod(size)].view(size)
                            done += view.numel()
                            box = info.within(at, size, bucket.writers)
                            yield f"{kind}.{name}", view, box

    def expert_state(self) -> Iterator[tuple[str, list[list[Tensor]]]]:
        """Of experts that whole ones lie here, by key as in `state`: the flat parts of each one, in
        the order they lie in."""
        self._streamed.lanes.settle()
        for bucket in self.buckets:
            for name, (begin, end) in zip(bucket.names, bucket.spans) if bucket.apart else ():
                experts = len(self.parameters[name][0])
                each = (end - begin) // experts
                starts = range(begin - bucket.own.start, end - bucket.own.start, each)
                for kind in bucket.kinds:
                    held = getattr(bucket, kind)
                    yield (
                        f"{kind}.{name}",
                        [[x for _, x in held.parts(a, a + each)] for a in starts],
                    )

    @staticmethod
    def _owned(bucket: Bucket, begin: int, numel: int) -> tuple[int, int]:
        """Which elements of the parameter that begins there lie in this rank's slice."""
        low, high = (min(max(x - begin, 0), numel) for x in (bucket.own.start, bucket.own.stop))
        return low, high

    def loaded(self, steps_done: int, *, averaged: bool = True) -> None:
        """Tell that the tensors of `state` came from a checkpoint made after that many steps; not
        `averaged`: but for the average, which begins with these weights."""
        self.steps_done = steps_done
        self._take_over()
        for bucket in () if averaged else self.buckets:
            average.begin(bucket)

    def moved(self, shards: Iterable[tuple[str, Tensor, ShardInfo]]) -> None:
        """Tell that the tensors of `state` were filled with those of other experts: `shards` as
        they are now."""
        for name, parameter, info in shards:
            self.parameters[name] = (parameter, info)
        for bucket in self.buckets:
            if bucket.apart:
                self._draw(bucket)
        self._take_over()

    def _take_over(self) -> None:
        """Weights from their masters, wherever those lie."""
        for bucket in self.buckets:
            for (begin, end), master in bucket.master.parts(0, bucket.own.stop - bucket.own.start):
                if bucket.lifted:
                    bucket.weights[bucket.own][begin:end].copy_(master)
        self.gather_weights()

    def gather_weights(self) -> None:
        """Sharded weights from the ranks that update them."""
        for bucket in self.buckets:
            if bucket.sharded:
                group = getattr(self.mesh, bucket.reduce_over)
                bucket.weights.copy_(all_gather(bucket.weights[bucket.own], group))

    def bytes(self) -> int:
        """Memory of parameters, gradients and state on this rank's device."""
        total = self._streamed.bytes
        for bucket in self.buckets:
            kept = [bucket.grads, bucket.weights, bucket.exp_avg.near, bucket.exp_avg_sq.near]
            kept += [bucket.master.near] if bucket.lifted else []
            kept += [bucket.ema.near] if bucket.ema else []
            total += sum(x.nbytes for x in kept)
        return total

    def host_bytes(self) -> int:
        """Memory of this rank's state in the host's memory."""
        return sum(getattr(b, kind).far.nbytes for b in self.buckets for kind in b.kinds)


def main_grad_of(parameter: Tensor) -> Tensor:
    """Where the gradient of a parameter of an `Optimizer` accumulates."""
    return parameter.main_grad  # type: ignore[attr-defined]  # set by the optimiser


def _into_main_grad(parameter: Tensor) -> None:
    if parameter.grad is not None:  # None where a kernel has written to main_grad itself
        main_grad_of(parameter).add_(parameter.grad)
        parameter.grad = None
