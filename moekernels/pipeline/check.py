"""Proof that a schedule is legal, without running it: complete, in order, free of deadlock, within
its memory.

Two models of communication are run to the end, and the schedule must finish under both, whatever
the durations:

* hosts (gloo): an action is reached when all before it are over. A computation blocks until its
  message was sent; a send blocks only while `SENDS_IN_FLIGHT` older ones of its direction have
  found no receiver yet.
* streams (NCCL): a rank has one queue a direction, in which whole batches run one after the other;
  a batch starts when the computations in front of it are over and ends when each of its messages
  has met its other end. A computation waits for its message and for the sends that are due.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from functools import lru_cache
from itertools import product

from .interleave import OPEN_EXCHANGES, interleave, open_exchanges, passes
from .schedule import Action, Kind, Message, Schedule, batches

# Per direction: the runtime waits for a send when this many newer ones have been posted.
SENDS_IN_FLIGHT = 2


BEHIND = {Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I}  # what a computation stands behind


class ScheduleError(ValueError):
    """A schedule breaks a rule; the message says which, where."""


def check(schedule: Schedule) -> None:
    """Raise `ScheduleError` unless the schedule is legal."""
    if len(schedule.actions) != schedule.stages:
        raise ScheduleError(f"{schedule.stages} stages, but actions for {len(schedule.actions)}")
    for rank in range(schedule.stages):
        _check_computations(schedule, rank)
        _check_communications(schedule, rank)
        _check_memory(schedule, rank)
        _check_pairs(schedule, rank)
    if schedule.stages > 1:
        _check_message_order(schedule)
        _check_hosts(schedule)
        _check_streams(schedule)


def peak_in_flight(schedule: Schedule) -> list[int]:
    """Per rank: the most (chunk, microbatch) pairs from F's begin to the end of B, or I."""
    down = {Kind.B: 1, Kind.I: 1}
    return [_peak(actions, {Kind.F: 1}, down) for actions in schedule.actions]


def peak_owed(schedule: Schedule) -> list[int]:
    """Per rank: the most (chunk, microbatch) pairs whose I has begun and whose W has not ended."""
    return [_peak(actions, {Kind.I: 1}, {Kind.W: 1}) for actions in schedule.actions]


def peak_both(schedule: Schedule) -> list[int]:
    """Per rank: the most (chunk, microbatch) pairs whose F has begun and whose B, or W, has not
    ended."""
    down = {Kind.B: 1, Kind.W: 1}
    return [_peak(actions, {Kind.F: 1}, down) for actions in schedule.actions]


def peak_held(schedule: Schedule) -> list[set[tuple[int, int]]]:
    """Per rank: what it holds when a backward begins or a forward ends, the most of it: pairs as of
    `held_limits`."""
    held: list[set[tuple[int, int]]] = []
    for actions in schedule.actions:
        kept = owed = 0
        found = set()
        for action in actions:
            kept += action.kind is Kind.F
            if action.kind is Kind.F or action.kind.frees:
                found.add((kept, owed))
            kept -= action.kind.frees
            owed += (action.kind is Kind.I) - (action.kind is Kind.W)
        held.append(
            {(n, o) for n, o in found if not any(a >= n and b >= o for a, b in found - {(n, o)})}
        )
    return held


def _peak(actions: Iterable[Action], up: dict[Kind, int], down: dict[Kind, int]) -> int:
    now = peak = 0
    for action in actions:
        now += up.get(action.kind, 0)
        peak = max(peak, now)
        now -= down.get(action.kind, 0)
    return peak


def _check_computations(schedule: Schedule, rank: int) -> None:
    """Each once: F and, behind it, B or else I and W; gradients in the order of microbatches."""
    counts = Counter(schedule.computations(rank))
    split = {action[1:] for action in counts if action.kind in (Kind.I, Kind.W)}
    wanted = set()
    for where in product(range(schedule.virtual_stages), range(schedule.microbatches)):
        backward = (Kind.I, Kind.W) if where in split else (Kind.B,)
        kinds = (Kind.F, *backward) if schedule.has_backward else (Kind.F,)
        wanted |= {Action(kind, *where) for kind in kinds}
    for action in sorted(wanted | counts.keys()):
        times = int(action in wanted)
        if counts[action] != times:
            raise ScheduleError(
                f"stage {rank}: {action} stands {counts[action]} times, not {times}"
            )
    done: set[Action] = set()
    latest: dict[tuple[Kind, int], Action] = {}
    for action in schedule.computations(rank):
        first = BEHIND.get(action.kind)
        if first and action._replace(kind=first) not in done:
            raise ScheduleError(f"stage {rank}: {action} stands before its {first}")
        done.add(action)
        # B adds to all gradients, I and W to some each: sums have the same bits in any schedule
        for part in (Kind.I, Kind.W):
            if action.kind not in (Kind.B, part):
                continue
            before = latest.get((part, action.chunk), action)
            if before.microbatch > action.microbatch:
                raise ScheduleError(f"stage {rank}: {action} stands behind {before}")
            latest[part, action.chunk] = action


def _check_communications(schedule: Schedule, rank: int) -> None:
    """Each message once, sent behind its computation, received before the one that needs it."""
    actions = schedule.actions[rank]
    if schedule.stages == 1:
        made: set[Message | None] = {None}
        for action in actions:
            if not action.kind.computes:
                raise ScheduleError(f"stage {rank}: {action}, but there is no other stage")
            if schedule.needs(rank, action) not in made:
                raise ScheduleError(f"stage {rank}: {action} stands before what it needs")
            made.add(schedule.makes(rank, action))
        return
    wanted: dict[Action, int] = {}
    for i, action in enumerate(actions):
        if action.kind.computes:
            forward = action.kind.forward
            if schedule.needs(rank, action):
                wanted[action._replace(kind=Kind.RECV_F if forward else Kind.RECV_B)] = i
            if schedule.makes(rank, action):
                wanted[action._replace(kind=Kind.SEND_F if forward else Kind.SEND_B)] = i
    counts = Counter(action for action in actions if not action.kind.computes)
    for action in sorted(wanted.keys() | counts.keys()):
        times = int(action in wanted)
        if counts[action] != times:
            raise ScheduleError(
                f"stage {rank}: {action} stands {counts[action]} times, not {times}"
            )
    for i, action in enumerate(actions):
        if action.kind.computes:
            continue
        if action.kind.sends and i < wanted[action]:
            raise ScheduleError(f"stage {rank}: {action} stands before its computation")
        if not action.kind.sends and i > wanted[action]:
            raise ScheduleError(
                f"stage {rank}: {action} stands behind the computation that needs it"
            )


def _check_memory(schedule: Schedule, rank: int) -> None:
    actions = schedule.actions[rank]
    peak, limit = peak_in_flight(schedule)[rank], schedule.in_flight_limit[rank]
    if peak > limit:
        raise ScheduleError(f"stage {rank}: {peak} microbatches in flight, the limit is {limit}")
    owed, limit = peak_owed(schedule)[rank], schedule.owed_limit[rank]
    if owed > limit:
        raise ScheduleError(f"stage {rank}: {owed} microbatches owe their W, the limit is {limit}")
    both, limit = peak_both(schedule)[rank], schedule.both_limit[rank]
    if both > limit:
        raise ScheduleError(
            f"stage {rank}: {both} microbatches between F and their last gradient, "
            f"the limit is {limit}"
        )
    consumers = {
        action: 1 for action in schedule.computations(rank) if schedule.needs(rank, action)
    }
    now = 0
    for action in actions:
        now += action.kind in (Kind.RECV_F, Kind.RECV_B)
        if now > schedule.receive_limit:
            raise ScheduleError(
                f"stage {rank}: {now} receives posted at {action}, at most {schedule.receive_limit}"
            )
        now -= schedule.stages > 1 and consumers.get(action, 0)


def _check_pairs(schedule: Schedule, rank: int) -> None:
    """The two of a pair stand side by side and need nothing of each other; the pieces of both keep
    their order, and few exchanges are open at once."""
    pairs = list(schedule.pairs(rank))
    if schedule.paired and len(pairs) < len(schedule.paired[rank]):
        raise ScheduleError(f"stage {rank}: a pair's forward stands last or not at all")
    for forward, backward in pairs:
        if forward.kind is not Kind.F or backward.kind is not Kind.B:
            raise ScheduleError(f"stage {rank}: {forward} and {backward} are no pair")
        if forward.microbatch == backward.microbatch:
            raise ScheduleError(f"stage {rank}: {backward} of a pair needs its {forward.kind}")
    if pairs and _most_open() > OPEN_EXCHANGES:
        raise ScheduleError(
            f"stage {rank}: {_most_open()} exchanges are open at once, at most {OPEN_EXCHANGES}"
        )


@lru_cache(maxsize=1)
def _most_open() -> int:
    """Exchanges of a pair, of few layers; more do not meet more."""
    return max(open_exchanges(interleave(*passes(range(layers)))) for layers in range(1, 4))


def _check_message_order(schedule: Schedule) -> None:
    """Between two ranks, messages of one direction are received in the order of their sends."""
    sent: dict[tuple[int, int, bool], list[Message]] = defaultdict(list)
    received: dict[tuple[int, int, bool], list[Message]] = defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind.computes:
                continue
            peer, message = schedule.peer(rank, action), schedule.message(rank, action)
            if action.kind.sends:
                sent[rank, peer, message.forward].append(message)
            else:
                received[peer, rank, message.forward].append(message)
    for source, target, forward in sent.keys() | received.keys():
        ours, theirs = sent[source, target, forward], received[source, target, forward]
        for a, b in zip(ours, theirs, strict=True):
            if a != b:
                raise ScheduleError(
                    f"stage {source} sends {a} to stage {target}, which receives {b} first"
                )


def _check_hosts(schedule: Schedule) -> None:
    position = [0] * schedule.stages
    sent: set[Message] = set()
    posted: set[Message] = set()
    outgoing: dict[tuple[int, bool], list[Message]] = defaultdict(list)

    def advance(rank: int) -> bool:
        action = schedule.actions[rank][position[rank]]
        if action.kind.computes:
            need = schedule.needs(rank, action)
            if need and need not in sent:
                return False
        elif action.kind.sends:
            message = schedule.message(rank, action)
            queue = outgoing[rank, message.forward]
            if len(queue) >= SENDS_IN_FLIGHT and queue[-SENDS_IN_FLIGHT] not in posted:
                return False
            queue.append(message)
            sent.add(message)
        else:
            posted.add(schedule.message(rank, action))
        position[rank] += 1
        return True

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.stages):
            while position[rank] < len(schedule.actions[rank]) and advance(rank):
                moved = True
    stuck = [
        f"stage {rank} at {actions[position[rank]]}"
        for rank, actions in enumerate(schedule.actions)
        if position[rank] < len(actions)
    ]
    _raise_if_stuck("hosts", stuck)


def _check_streams(schedule: Schedule) -> None:
    # per rank: each computation, and the messages without which it does not start
    gates: list[list[tuple[Action, set[Message]]]] = []
    # per (rank, direction): each batch as the number of computations in front, and its messages
    queues: dict[tuple[int, bool], deque[tuple[int, set[Message]]]] = defaultdict(deque)
    for rank, actions in enumerate(schedule.actions):
        rank_gates: list[tuple[Action, set[Message]]] = []
        sends: dict[bool, deque[Message]] = {True: deque(), False: deque()}
        over: set[Message] = set()  # old sends that the host has had the stream wait for
        for entry in batches(actions):
            if not isinstance(entry, list):
                assert isinstance(entry, Action)  # pairs were not asked for
                need = schedule.needs(rank, entry)
                rank_gates.append((entry, over | {need} if need else over))
                over = set()
                continue
            forward = entry[0].kind.forward
            for action in entry:
                if action.kind.sends:
                    if len(sends[forward]) >= SENDS_IN_FLIGHT:
                        over = over | {sends[forward].popleft()}
                    sends[forward].append(schedule.message(rank, action))
            messages = {schedule.message(rank, action) for action in entry}
            queues[rank, forward].append((len(rank_gates), messages))
        gates.append(rank_gates)

    computed = [0] * schedule.stages
    arrived: set[Message] = set()
    moved = True
    while moved:
        moved = False
        ends: Counter[Message] = Counter()
        for (rank, _), queue in queues.items():
            while queue and queue[0][1] <= arrived:
                queue.popleft()
            if queue and queue[0][0] <= computed[rank]:
                ends.update(queue[0][1] - arrived)
        met = {message for message, count in ends.items() if count == 2}
        arrived |= met
        moved = bool(met)
        for rank, rank_gates in enumerate(gates):
            while computed[rank] < len(rank_gates) and rank_gates[computed[rank]][1] <= arrived:
                computed[rank] += 1
                moved = True
    stuck = [
        f"stage {rank} at {rank_gates[computed[rank]][0]}"
        for rank, rank_gates in enumerate(gates)
        if computed[rank] < len(rank_gates)
    ]
    _raise_if_stuck("streams", stuck)


def _raise_if_stuck(model: str, stuck: list[str]) -> None:
    if stuck:
        raise ScheduleError(f"deadlock ({model}): " + "; ".join(stuck))
