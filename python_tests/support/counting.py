"""How much work something is, counted in calls: what a busy or slow machine does not change."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


class TooManyCalls(Exception):
    pass


@contextlib.contextmanager
def at_most_calls(limit: int) -> Iterator[None]:
    """Raises TooManyCalls where this thread calls more functions, of Python or of C; a generator
    that goes on counts as one."""
    left = limit

    def count(frame, event, argument):
        nonlocal left
        if event in ("call", "c_call"):
            left -= 1
            if left < 0:
                sys.setprofile(before)
                raise TooManyCalls(f"more than {limit:,}, in {frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def calls_within(folder: str, run: Callable[[], Any]) -> int:
    """How many functions of Python files below `folder` this thread calls while `run` runs."""
    found = 0

    def count(frame, event, argument):
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(folder)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found
