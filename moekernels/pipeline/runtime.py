"""Execution of a schedule on one rank of a pipeline, over torch.distributed.

Every rank is handed the same microbatches, so all know the shape of every message: lengths may
differ from microbatch to microbatch and no shape is ever sent. A receive buffer exists from its
posting to its backward, never for all microbatches at once.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .build import build
from .check import SENDS_IN_FLIGHT
from .interleave import Piece, interleave
from .mailbox import Ends, PipelineMemory, Receive
from .schedule import Action, Kind, Message, Pair, Schedule, batches
from .stage import Chunk, Joined, PutOff, Stage
from .trace import Clock, Event

ORDERED_BACKENDS = ("nccl",)  # those that run the communications of a group one after the other


class PipelineGroup(Protocol):
    """The ranks of one pipeline: `ranks[stage]` is the global rank, `rank` our own stage. `memory`
    is what they share where they can, None otherwise."""

    @property
    def process_group(self) -> dist.ProcessGroup | None: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def ranks(self) -> Sequence[int]: ...

    @property
    def memory(self) -> PipelineMemory | None: ...


class TakeTurns(Protocol):
    """Run a forward and a backward in the order of their pieces, each within what `observe` gives
    of whether it is the forward's."""

    def __call__(
        self,
        order: Sequence[Piece],
        forward: Callable[[], Tensor | None],
        backward: Callable[[], Tensor | None],
        observe: Callable[[bool], AbstractContextManager[object]],
    ) -> tuple[Tensor | None, Tensor | None]: ...


class StepResult(NamedTuple):
    """`losses`: one detached scalar a microbatch on the last stage, empty elsewhere. `events`: what
    ran when, here.
    """

    losses: list[Tensor]
    events: list[Event]


class PipelineRuntime:
    """Runs steps of `schedule` over `chunks`, the virtual stages of this rank.

    A chunk is called as `chunk(batch, x)`, x being [rows, H] or None on the first virtual stage. It
    returns [rows, H]; the last one a scalar, the microbatch's share of the step's loss: whoever
    made the batch has scaled it (by one over the tokens of the step), so shares are added and
    backward starts from 1.

    `shapes(batch)` gives (rows, H) of the messages between chunks, of type `dtype`. `put_off` says
    how the chunks put gradients of weights off from I to W, `joined` and `at_once` how those of
    several B are computed together (see `Stage`), `turns` how a forward and a backward
    run piece by piece, of chunks that have `pieces`; other pairs run one after the other.
    """

    def __init__(
        self,
        schedule: Schedule,
        chunks: Sequence[Chunk],
        group: PipelineGroup,
        shapes: Callable[[Any], tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device | str,
        put_off: PutOff | None = None,
        turns: TakeTurns | None = None,
        joined: Sequence[Joined] = (),
        at_once: int = 1,
    ):
        if (schedule.stages, schedule.virtual_stages) != (group.size, len(chunks)):
            raise ValueError(
                f"the schedule has {schedule.stages} stages of {schedule.virtual_stages} chunks, "
                f"the group has {group.size} ranks, this one {len(chunks)} chunks"
            )
        self.schedule = schedule
        self.group = group
        self.shapes = shapes
        self.dtype = dtype
        self.device = torch.device(device)
        self._stage = Stage(chunks, put_off, joined, at_once)
        self._turns = turns
        self._channels = self._open_channels()
        self._ends = Ends(group.rank)

    def step(
        self,
        microbatches: Sequence[Any],
        *,
        origin: float | None = None,
        record: bool = True,
        finished: Callable[[int], None] | None = None,
    ) -> StepResult:
        """Forward and backward of all microbatches; gradients are accumulated in the parameters.
        `finished` is told of each chunk when its last backward is over.

        Event times are seconds since `origin`, a `time.perf_counter()` that the ranks of a machine
        share (default: the start of this step). On a GPU `record` costs a synchronisation at the
        end of the step.
        """
        schedule = self._schedule_for(self.schedule.name, len(microbatches))
        return self._run(schedule, microbatches, origin, record, finished)

    @torch.no_grad()
    def evaluate(
        self, microbatches: Sequence[Any], *, origin: float | None = None, record: bool = False
    ) -> StepResult:
        """The losses alone; no gradient, nothing kept."""
        schedule = self._schedule_for("forward", len(microbatches))
        return self._run(schedule, microbatches, origin, record)

    def _schedule_for(self, name: str, microbatches: int) -> Schedule:
        mine = self.schedule
        if (name, microbatches) == (mine.name, mine.microbatches):
            return mine
        return _cached_build(name, mine.stages, microbatches, mine.virtual_stages)

    def _run(
        self,
        schedule: Schedule,
        microbatches: Sequence[Any],
        origin: float | None,
        record: bool,
        finished: Callable[[int], None] | None = None,
    ) -> StepResult:
        clock = Clock(self.device, origin, record)
        step = _Step(self, schedule, microbatches, clock)
        try:
            rank = self.group.rank
            paired = schedule.paired[rank] if schedule.paired else ()
            backwards = (a for a in schedule.computations(rank) if a.kind is not Kind.F)
            last = {action.chunk: action for action in backwards}
            over: list[int] = []  # chunks to tell of, behind what their last backward sends

            def tell() -> None:
                while over and finished is not None:
                    finished(over.pop())

            for entry in batches(schedule.actions[rank], paired):
                if isinstance(entry, list):
                    step.communicate(entry)
                    continue
                tell()
                if isinstance(entry, Pair):
                    step.compute_pair(entry)
                else:
                    step.compute(entry)
                done = entry.backward if isinstance(entry, Pair) else entry
                if last.get(done.chunk) == done:
                    self._stage.join(done.chunk)
                    over.append(done.chunk)
            tell()
            step.finish()
        except Exception:
            self._stage.clear()
            raise
        losses = [step.losses[i] for i in sorted(step.losses)]
        return StepResult(losses, clock.events(self.group.rank))

    def _open_channels(self) -> dict[bool, dist.ProcessGroup | None]:
        """A process group for each direction (True: forward).

        Where communications run one after the other, a gradient's receive posted ahead would hold
        up the activations behind it in a shared group. The first use of a group blocks until all
        its ranks are there, so it is done here, where they are.
        """
        forward = self.group.process_group
        backend = None if self.group.size == 1 else dist.get_backend(forward)
        if backend not in ORDERED_BACKENDS:
            return {True: forward, False: forward}
        backward = dist.new_group(
            list(self.group.ranks),
            backend=backend,
            use_local_synchronization=True,
            pg_options=getattr(self.group, "options", None),
        )
        for channel in (forward, backward):
            dist.all_reduce(torch.zeros(1, device=self.device), group=channel)
        return {True: forward, False: backward}


class _Step:
    """One pass through a schedule."""

    def __init__(
        self,
        runtime: PipelineRuntime,
        schedule: Schedule,
        microbatches: Sequence[Any],
        clock: Clock,
    ):
        self.runtime = runtime
        self.schedule = schedule
        self.microbatches = microbatches
        self.clock = clock
        self.rank = runtime.group.rank
        self.losses: dict[int, Tensor] = {}
        # What waits for its send, or for the next chunk of this rank.
        self._made: dict[Message, Tensor] = {}
        self._awaited: dict[Message, tuple[Tensor, dist.Work | Receive]] = {}
        self._sent: dict[bool, deque[tuple[Action, Tensor, dist.Work]]] = {
            True: deque(),
            False: deque(),
        }

    def compute(self, action: Action) -> None:
        given = self._take(action)
        with self._noted(action), self.clock.time(action):
            result = self._pass(action, given)
        self._keep(action, result)

    def compute_pair(self, pair: Pair) -> None:
        """What both need is here before either begins; both are over before anything is sent."""
        ours, other = (self.runtime._stage.pieces(action.chunk) for action in pair)
        if self.runtime._turns is None or ours is None or other is None:
            for action in pair:
                self.compute(action)
            return
        order = interleave(ours[0], other[1])
        given = {action: self._take(action) for action in pair}

        def run(action: Action) -> Tensor | None:
            with self._noted(action):
                return self._pass(action, given.pop(action))

        results = self.runtime._turns(
            order,
            functools.partial(run, pair.forward),
            functools.partial(run, pair.backward),
            lambda forward: self.clock.time(pair.forward if forward else pair.backward),
        )
        for action, result in zip(pair, results):
            self._keep(action, result)

    def _pass(self, action: Action, given: Tensor | None) -> Tensor | None:
        stage, (kind, chunk, microbatch) = self.runtime._stage, action
        if kind is Kind.B:
            return stage.backward(chunk, microbatch, given)
        if kind is Kind.I:
            return stage.backward_input(chunk, microbatch, given)
        if kind is Kind.W:
            return stage.backward_weight(chunk, microbatch)
        batch = self.microbatches[microbatch]
        if self.schedule.has_backward:
            return stage.forward(chunk, microbatch, batch, given)
        return stage.chunks[chunk](batch, given)

    def _keep(self, action: Action, result: Tensor | None) -> None:
        """What a computation has made, for its send, the next chunk or the losses."""
        output = self.schedule.makes(self.rank, action)
        if output:
            assert result is not None  # only the first stage's backward makes nothing
            with self._noted(action):
                self._check_planned(result, self.microbatches[action.microbatch])
            self._made[output] = result
        elif action.kind is Kind.F:
            assert result is not None
            self.losses[action.microbatch] = result.detach()

    @contextmanager
    def _noted(self, action: Action) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._note(error, action)
            raise

    def _note(self, error: Exception, action: Action) -> None:
        error.add_note(f"in {self._where(action)}")

    def communicate(self, batch: list[Action]) -> None:
        if self.runtime.group.memory is not None:
            self._through_memory(batch, self.runtime.group.memory)
            return
        operations, tensors = [], []
        for action in batch:
            message = self.schedule.message(self.rank, action)
            if action.kind.sends:
                while len(self._sent[message.forward]) >= SENDS_IN_FLIGHT:
                    self._wait_for_send(message.forward)
                tensor = self._made.pop(message).contiguous()
            else:
                tensor = self._room(message)
            tensors.append(tensor)
            operations.append(
                dist.P2POp(
                    dist.isend if action.kind.sends else dist.irecv,
                    tensor,
                    self.runtime.group.ranks[self.schedule.peer(self.rank, action)],
                    self.runtime._channels[message.forward],
                    self.schedule.tag(message),
                )
            )
        with self._noted(batch[0]):
            works = dist.batch_isend_irecv(operations)
        if len(works) < len(batch):  # NCCL: one handle for the batch
            works = works * len(batch)
        for action, tensor, work in zip(batch, tensors, works):
            message = self.schedule.message(self.rank, action)
            if action.kind.sends:
                self._sent[message.forward].append((action, tensor, work))
            else:
                self._awaited[message] = tensor, work

    def _through_memory(self, batch: list[Action], memory: PipelineMemory) -> None:
        """A send is over once its tensor is copied; a lane each way, as neither waits for the
        other."""
        for action in batch:
            message, sends, peer, lane, tag = self.runtime._ends.of(self.schedule, action)
            if sends:
                try:
                    memory.send(self._made.pop(message), peer, lane, tag)
                except Exception as error:
                    self._note(error, action)
                    raise
            else:
                room = self._room(message)
                self._awaited[message] = room, Receive(memory, room, peer, lane, tag)

    def _room(self, message: Message) -> Tensor:
        return torch.empty(
            self.runtime.shapes(self.microbatches[message.microbatch]),
            dtype=self.runtime.dtype,
            device=self.runtime.device,
        )

    def finish(self) -> None:
        for forward, queue in self._sent.items():
            while queue:
                self._wait_for_send(forward)

    def _take(self, action: Action) -> Tensor | None:
        """What a computation needs: received, made by another chunk of this rank, or nothing."""
        need = self.schedule.needs(self.rank, action)
        if need is None:
            return None
        if need in self._made:
            return self._made.pop(need)
        tensor, work = self._awaited.pop(need)
        receive = action._replace(kind=Kind.RECV_F if need.forward else Kind.RECV_B)
        with self.clock.time(receive):
            self._wait(receive, work)
        return tensor

    def _wait_for_send(self, forward: bool) -> None:
        """Until the oldest send is over; then its tensor may go."""
        action, _tensor, work = self._sent[forward].popleft()
        self._wait(action, work)

    def _wait(self, action: Action, work: dist.Work | Receive) -> None:
        try:
            work.wait()
        except Exception as error:
            self._note(error, action)
            raise

    def _check_planned(self, result: Tensor, batch: Any) -> None:
        planned = tuple(self.runtime.shapes(batch)), self.runtime.dtype
        if (tuple(result.shape), result.dtype) != planned:
            raise ValueError(
                f"the result is {list(result.shape)} {result.dtype}, "
                f"planned were {list(planned[0])} {planned[1]}"
            )

    def _where(self, action: Action) -> str:
        stage = self.schedule.virtual_stage(self.rank, action.chunk)
        where = (
            f"pipeline stage {self.rank} of {self.schedule.stages}: {action} "
            f"(virtual stage {stage} of {self.schedule.depth})"
        )
        if action.kind.computes:
            return where
        return f"{where}, with stage {self.schedule.peer(self.rank, action)} at the other end"


@functools.lru_cache(maxsize=16)
def _cached_build(name: str, stages: int, microbatches: int, virtual_stages: int) -> Schedule:
    return build(name, stages, microbatches, virtual_stages)
