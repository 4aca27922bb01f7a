"""Ends of messages: as the schedule says, asked once in a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import moekernels
from moekernels.pipeline.build import build
from moekernels.pipeline.mailbox import Ends
from python_tests.support.counting import calls_within

OURS = str(Path(moekernels.__file__).parent)


def test_ends_are_those_of_the_schedule_and_asked_for_once() -> None:
    schedules = [
        build("interleaved", 3, 3, 2),
        build("interleaved", 3, 6, 2),
    ]  # the same actions, other tags
    for rank in range(3):
        ends = Ends(rank)
        for schedule in (*schedules, schedules[0]):
            messages = [a for a in schedule.actions[rank] if not a.kind.computes]
            assert messages
            for action in messages:
                message = schedule.message(rank, action)
                lane = 0 if message.forward else 1
                peer, tag = schedule.peer(rank, action), schedule.tag(message)
                assert ends.of(schedule, action) == (message, action.kind.sends, peer, lane, tag)
            assert calls_within(OURS, partial(ends.of, schedule, messages[0])) == 1
