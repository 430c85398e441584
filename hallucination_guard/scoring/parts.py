"""Which examples go through a pass together: those of like length, so that padding and passes together cost least."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ON_A_CPU", "PASS", "parts_of"]

PASS = 48
"""What a pass costs besides its tokens, in tokens: where memory is read as fast as it is on a desktop, about that."""

ON_A_CPU = 320
"""The tokens of a pass on a CPU. Replay and backward of 8 × 69 tokens take 570 ms in passes of 140, 500 in passes of
280 and 440 in one; what is held for the backward grows with them."""


def parts_of(lengths: Sequence[int], *, most: int | None = None) -> list[list[int]]:
    """The positions in parts: the cheapest way to part them, a part costing a pass and its rows times its longest.

    Args:
        lengths: tokens of each.
        most: rows times the longest of a part at most; a longer one is alone. None for any.
    """
    order = sorted(range(len(lengths)), key=lambda at: lengths[at])
    # The cheapest way to part the first n, and where its last part begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best.append(
            min(
                (best[begin][0] + PASS + (stop - begin) * longest, begin)
                for begin in range(stop)
                if most is None or (stop - begin) * longest <= most or begin == stop - 1
            )
        )
    parts = []
    stop = len(order)
    while stop:
        begin = best[stop][1]
        parts.append(order[begin:stop])
        stop = begin
    return parts
