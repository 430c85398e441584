"""Which examples go through a pass together: those of like length, so that padding and passes together cost least."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PASS", "parts_of"]

PASS = 48
"""What a pass costs besides its tokens, in tokens: where memory is read as fast as it is on a desktop, about that."""


def parts_of(lengths: Sequence[int]) -> list[list[int]]:
    """The positions in parts: the cheapest way to part them, a part costing a pass and its rows times its longest."""
    order = sorted(range(len(lengths)), key=lambda at: lengths[at])
    # The cheapest way to part the first n, and where its last part begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best.append(min((best[begin][0] + PASS + (stop - begin) * longest, begin) for begin in range(stop)))
    parts = []
    stop = len(order)
    while stop:
        begin = best[stop][1]
        parts.append(order[begin:stop])
        stop = begin
    return parts
