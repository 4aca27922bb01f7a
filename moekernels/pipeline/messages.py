"""Where a schedule's sends and receives stand between its computations."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

from .check import SENDS_IN_FLIGHT
from .schedule import RELATIVE_COST, Action, Kind, Message, Schedule

# What a rank computes at a time, with no message between: one action, or two that are a pair.
Entry = tuple[Action, ...]


class Production(NamedTuple):
    """A schedule's computations, if F takes 1, B takes 2 (I and W one each) and messages travel in
    no time. made: for each message when; the second number orders those of one moment: what a rank
    receives before what it sends. ends[rank]: of its entries, in order."""

    made: dict[Message, tuple[int, int]]
    ends: list[list[int]]


def production_order(schedule: Schedule, orders: list[list[Entry]]) -> Production:
    made: dict[Message, tuple[int, int]] = {}
    ends: list[list[int]] = [[] for _ in orders]
    clock = [0] * schedule.stages
    position = [0] * schedule.stages
    turn = list(enumerate(orders))
    moved = True
    while moved:
        moved = False
        for rank, order in turn + turn[::-1]:  # forwards travel up, backwards down: both in one go
            while position[rank] < len(order):
                entry = order[position[rank]]
                needs = [need for action in entry if (need := schedule.needs(rank, action))]
                if any(need not in made for need in needs):
                    break
                clock[rank] = max([clock[rank], *(made[need][0] for need in needs)])
                clock[rank] += sum(RELATIVE_COST[action.kind] for action in entry)
                ends[rank].append(clock[rank])
                for action in entry:
                    message = schedule.makes(rank, action)
                    if message:
                        made[message] = clock[rank], message.border * (1 if message.forward else -1)
                position[rank] += 1
                moved = True
    return Production(made, ends)


def with_communication(
    schedule: Schedule, rank: int, order: list[Entry], production: Production
) -> tuple[Action, ...]:
    """Sends go right behind the computation, receives one computation ahead of need.

    A receive must not block its channel, though, which runs its batches one after the other. So
    every channel follows the order in which the messages are made: a receive moves behind the sends
    of earlier messages, on which its own may depend, and in front of those of later ones. At the
    same place they are one batch, which is as good. And whoever sends must not wait for a receive
    that is posted late: each is there when the message is made before which a sender waits for it.
    """
    made, ends = production.made, production.ends[rank]
    if schedule.stages == 1:  # what a chunk needs is there already
        return tuple(action for entry in order for action in entry)
    # [i]: what stands in front of entry i
    sends: list[list[Action]] = [[] for _ in range(len(order) + 1)]
    receives: list[list[Action]] = [[] for _ in range(len(order) + 1)]
    places: dict[bool, list[int]] = {True: [], False: []}
    times: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for i, action in _numbered(order):
        output = schedule.makes(rank, action)
        if output:
            forward = action.kind.forward
            kind = Kind.SEND_F if forward else Kind.SEND_B
            sends[i + 1].append(action._replace(kind=kind))
            places[forward].append(i + 1)
            times[forward].append(made[output])
    wanted: dict[bool, list[tuple[tuple[int, int], int, Action]]] = {False: [], True: []}
    for i, action in _numbered(order):
        need = schedule.needs(rank, action)
        if need:
            kind = Kind.RECV_F if action.kind.forward else Kind.RECV_B
            wanted[action.kind.forward].append((made[need], i, action._replace(kind=kind)))
    for forward, coming in wanted.items():
        first = len(order)  # of the receives of later messages: none overtakes another
        coming.sort(reverse=True)
        for number, (time, i, receive) in enumerate(coming):
            later = bisect.bisect_right(times[forward], time)
            place = max(0, i - 1)
            if later < len(places[forward]):
                place = min(place, places[forward][later])
            if later > 0:
                place = max(place, places[forward][later - 1])
            if number >= SENDS_IN_FLIGHT:
                due = coming[number - SENDS_IN_FLIGHT][0][0]
                place = min(place, bisect.bisect_right(ends, due))
            first = min(first, place)
            receives[first].insert(0, receive)
    actions: list[Action] = []
    for i in range(len(order) + 1):
        actions += sends[i] + receives[i]
        actions += order[i] if i < len(order) else ()
    return tuple(actions)


def _numbered(order: list[Entry]) -> Iterator[tuple[int, Action]]:
    return ((i, action) for i, entry in enumerate(order) for action in entry)
