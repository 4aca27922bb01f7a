"""The experts of a model in slots, a few of each layer's at a time: what a cache of experts does,
whoever's model it is. Legend: T tokens, K top-k, E experts, H hidden, S slots per layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moekernels import files, ops
from moekernels.errors import UsageError
from moekernels.integrations import _slots
from moekernels.integrations._slots import Counts, Event, Fetch, Round, Slots
from moekernels.parallel.host import available
from moekernels.reference import Routing

LAYER = "_moekernels_layer"  # the attribute of an experts module that numbers it, from 0
TRACE = 1 << 16  # events that are kept for the bound and the break-even


class Rows(NamedTuple):
    """Results of experts [R, H] and how to add them up; weights [T, K] if not yet applied."""

    rows: Tensor
    routing: Routing
    weights: Tensor | None

    def combined(self) -> Tensor:
        """[T, H]."""
        routing = self.routing
        return ops.combine(self.rows, routing.row_of, routing.token_of, self.weights)


# Of the experts module, x [T, H], slots of the choices and their weights [T, K], what slots hold.
RowsOf = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Tensor]], Rows]


@dataclass
class Layer:
    """Of one experts module: all experts' parameters [E, ...] by name, where they stay; the slots'
    [S, ...]; the router's weight [E, H] that looks ahead to it; what computes with the slots."""

    whole: dict[str, Tensor]
    kept: dict[str, Tensor]
    slots: Slots
    gate: Tensor | None
    rows_of: RowsOf
    top_k: int = 1
    coming: Future | None = None

    @property
    def experts(self) -> int:
        """E."""
        return len(self.whole["w1"])

    @property
    def expert_bytes(self) -> int:
        return sum(x[0].numel() * x.element_size() for x in self.whole.values())


def _copy(layer: Layer, fetches: list[Fetch]) -> tuple[float, int]:
    """Bring experts into their slots; seconds and bytes."""
    began = time.perf_counter()
    for expert, slot in fetches:
        for name, whole in layer.whole.items():
            layer.kept[name][slot].copy_(whole[expert])
    return time.perf_counter() - began, len(fetches) * layer.expert_bytes


def _together(parts: list[Rows], ids: Tensor) -> Tensor:
    """ids [T, K] of all rounds' choices -> [T, H], each token's rows added in the order of K, as
    those of one round are."""
    count = ids.numel()
    rows = parts[0].rows.new_zeros(count, parts[0].rows.shape[1])
    for part in parts:
        row_of = part.routing.row_of.flatten()
        rows[row_of >= 0] = part.rows[row_of[row_of >= 0].long()]
    places = torch.arange(count, dtype=torch.int32, device=ids.device)
    row_of = torch.where(ids >= 0, places.view(ids.shape), -1)
    return ops.combine(rows, row_of, places // ids.shape[1], parts[0].weights)


class ExpertCache:
    """All layers' slots. `trace`: what the layers saw, as far as it is kept."""

    def __init__(self, layers: list[Layer], policy: str, prefetch: bool) -> None:
        self.layers, self.policy = layers, policy
        self.prefetch = prefetch and any(layer.gate is not None for layer in layers[1:])
        self.trace: list[Event] = []
        self.late = 0  # fetches ahead that were still under way when they were needed
        self.stalled = self.computing = self.fetching = 0.0  # seconds
        self.fetched = 0  # bytes
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="experts")

    @property
    def counts(self) -> Counts:
        """Of all layers together."""
        return Counts.of(layer.slots for layer in self.layers)

    def forward(self, module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As `experts_forward`, with the experts that are needed in slots."""
        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            raise UsageError("cache: for inference alone; run the model under torch.no_grad()")
        number = getattr(module, LAYER)
        layer = self.layers[number]
        layer.top_k = ids.shape[1]
        chosen = torch.where((ids >= 0) & (ids < layer.experts), ids, -1)
        needed = [expert for expert in chosen.unique().tolist() if expert >= 0]
        self._arrive(layer)
        *early, last = layer.slots.use(needed) or [Round({}, [])]
        self._note(Event(number, tuple(needed)))
        parts = [self._part(layer, module, x, chosen, weights, one) for one in early]
        self._stall(layer, last.fetches)
        self._look_ahead(number, x)
        parts.append(self._part(layer, module, x, chosen, weights, Round(last.places, [])))
        began = time.perf_counter()
        out = parts[0].combined() if not early else _together(parts, chosen)
        self.computing += time.perf_counter() - began
        return out.to(x.dtype)

    def _part(
        self, layer: Layer, module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, one: Round
    ) -> Rows:
        """Rows of the experts of one round."""
        self._stall(layer, one.fetches)
        began = time.perf_counter()
        place = torch.full((layer.experts + 1,), -1, dtype=torch.int32)  # the last: of id -1
        for expert, slot in one.places.items():
            place[expert] = slot
        part = layer.rows_of(module, x, place.to(ids.device)[ids], weights, layer.kept)
        self.computing += time.perf_counter() - began
        return part

    def _note(self, event: Event) -> None:
        if len(self.trace) < TRACE:
            self.trace.append(event)

    def _stall(self, layer: Layer, fetches: list[Fetch]) -> None:
        """Fetch, and wait for it."""
        seconds, size = _copy(layer, fetches)
        self.stalled += seconds
        self.fetching += seconds
        self.fetched += size

    def _look_ahead(self, number: int, x: Tensor) -> None:
        """Have the next layer's experts come that its router would choose for this layer's x."""
        if not self.prefetch or number + 1 == len(self.layers):
            return
        layer = self.layers[number + 1]
        if layer.gate is None:
            return
        self._arrive(layer)
        scores = x.float() @ layer.gate.float().T
        chosen = scores.topk(min(layer.top_k, layer.experts)).indices
        votes = chosen.flatten().bincount(minlength=layer.experts)
        order = votes.argsort(descending=True, stable=True).tolist()
        likely = [expert for expert in order if votes[expert] > 0]
        fetches = layer.slots.ahead(likely)
        self._note(Event(number + 1, tuple(likely), ahead=True))
        if fetches:
            layer.coming = self._worker.submit(_copy, layer, fetches)

    def _arrive(self, layer: Layer) -> None:
        """Until what was fetched ahead is here."""
        if layer.coming is None:
            return
        began = time.perf_counter()
        self.late += not layer.coming.done()
        seconds, size = layer.coming.result()
        layer.coming = None
        self.stalled += time.perf_counter() - began
        self.fetching += seconds
        self.fetched += size

    def break_even(self) -> int | None:
        """The fewest slots per layer with which fetching would have taken no longer than computing
        did, by a replay of the trace at the rate that was measured; None where no number has."""
        if not self.fetched:
            return 1
        one = self.layers[0].expert_bytes * self.fetching / self.fetched
        low, high = 1, self.layers[0].experts
        while low < high:
            middle = (low + high) // 2
            counts = _slots.replay(self.trace, middle, self.policy)
            fetches = counts.misses + counts.ahead
            low, high = (low, middle) if fetches * one <= self.computing else (middle + 1, high)
        counts = _slots.replay(self.trace, low, self.policy)
        return low if (counts.misses + counts.ahead) * one <= self.computing else None

    def report(self) -> str:
        """Hits, fetches ahead, bytes, waiting, the bound and the break-even, a line each."""
        counts, size = self.counts, self.layers[0].slots.size
        asked = max(1, counts.hits + counts.misses)
        demand = [event for event in self.trace if not event.ahead]
        seen = max(1, sum(len(event.experts) for event in demand))
        others = ", ".join(
            f"{name} {100 * _slots.replay(demand, size, name).hits / seen:.1f} %"
            for name in _slots.POLICIES
        )
        best = 100 * _slots.belady(demand, size) / seen
        even = self.break_even()
        resident = sum(layer.expert_bytes * layer.slots.size for layer in self.layers) / 1e6
        whole = sum(x.nbytes for layer in self.layers for x in layer.whole.values()) / 1e6
        rows = [
            f"slots      {size} per layer by {self.policy}, {resident:,.1f} of {whole:,.1f} MB",
            f"hits       {100 * counts.hits / asked:.1f} % of {asked} experts asked for",
            f"ahead      {counts.ahead} fetched, {self.late} passes met them late, "
            f"{counts.useless} useless" + ("" if self.prefetch else " (off)"),
            f"fetched    {self.fetched / 1e6:,.1f} MB in {self.fetching:.3f} s",
            f"stalled    {self.stalled:.3f} s, beside {self.computing:.3f} s of computing",
            f"without fetching ahead: {others}; no policy exceeds {best:.1f} % (Belady)",
            "break even "
            + (f"{even} slots" if even else "at no number of slots")
            + ": fetching takes no longer than computing",
        ]
        return "\n".join(rows)


def mapped(whole: dict[str, Tensor], folder: Path | None, number: int) -> dict[str, Tensor]:
    """The same tensors, of files in a folder: written there, or on the meta device found there."""
    mapped = {}
    for key, tensor in whole.items():
        if folder is None:
            raise UsageError("cache: experts are on the meta device; give the folder they are in")
        path, size = folder / f"layer-{number:04d}-{key}.bin", tensor.nbytes
        try:
            if tensor.is_meta:
                if (here := path.stat().st_size) != size:
                    raise UsageError(f"cache: {path}: has {here} bytes of {size}")
            elif path.exists():
                raise UsageError(f"cache: {path} is there already; give another folder")
            else:
                folder.mkdir(parents=True, exist_ok=True)
                _write(path, tensor)
        except OSError as error:
            if tensor.is_meta:
                raise UsageError(f"cache: {path}: cannot be read: {error.strerror}") from None
            said = files.no_room(path, error, size, remedy="give another folder")
            raise UsageError(f"cache: {said}") from None
        flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        mapped[key] = flat.view(tensor.shape)  # nobody writes to it
    return mapped


def _write(path: Path, tensor: Tensor) -> None:
    """The tensor's bytes; no part of them where not all can be written."""
    data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
    with open(path, "xb") as file:
        try:
            file.write(data)
            file.flush()
        except BaseException:
            path.unlink()
            raise


def check_memory(whole: dict[str, Tensor], slots: int, layers: int) -> None:
    """UsageError where all layers' slots are more than the memory that is free."""
    needed = layers * slots * sum(x[0].numel() * x.element_size() for x in whole.values())
    free = int(available())
    if needed > free:
        raise UsageError(
            f"cache: {slots} slots in each of {layers} layers need {needed:,} bytes, {free:,} are "
            f"free; {slots * free // needed} would fit"
        )
