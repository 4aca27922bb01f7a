"""How much of an exchange over a set link is waited for, by playing its parts one after the other.

The link carries one message at a time, the core computes one part at a time, and rows of the first
part must be there before anything is computed: what `parallel.chunks` does, under a clock.
"""

from __future__ import annotations


def exposed(parts: int, flight: float, compute: float, afterwards: float = 0.0) -> float:
    """Seconds beyond computing, for rows that take `flight` there and as long back.

    compute: of all parts between the two. afterwards: work that needs none of the rows, and runs
    while the last come home.
    """
    each, work = flight / parts, compute / parts
    link = core = 0.0
    there = []
    for _ in range(parts):  # all are posted at once
        link += each
        there.append(link)
    for ready in there:
        core = max(core, ready) + work
        link = max(link, core) + each  # its results
    return max(link, core + afterwards) - compute - afterwards
