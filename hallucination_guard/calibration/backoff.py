"""Back-off: how doubtful a sentence may be so that few responses keep more wrong sentences than they may.

The exchangeable unit is the response. With k wrong sentences allowed, let r_i be the (k+1)-th smallest score among the
wrong sentences of response i (∞ if it has no more than k): keeping what scores **below** r_i is right, from r_i on it
is not. Of n responses with order statistics r_(1) ≤ … ≤ r_(n), what scores below r_(j) is kept:

- ``average`` (conformal factuality, arXiv 2402.10978): j = ⌊α (n + 1)⌋ gives P(more than k wrong are kept) ≤ j/(n + 1)
  ≤ α over calibration and use together;
- ``certified``: the largest j with P(Bin(n, α) ≤ j − 1) ≤ δ gives P( P(more than k wrong are kept) > α ) ≤ δ over the
  draw of the n. As the loss falls with the threshold, it is where Learn-then-Test by fixed sequence with exact binomial
  p-values stops on the finest grid there is: no part of the data is needed to choose one (docs/sentences.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hallucination_guard.calibration.certificate import upper_bound
from hallucination_guard.errors import ConfigurationError

__all__ = ["Retention", "Scored", "average_rank", "certified_rank", "limits", "retention", "threshold_at"]

Scored = Sequence[tuple[float, bool | None]]
"""A response: of each sentence its score and whether it is right; None where nobody could say, which counts as kept or
cut and never as wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What a threshold leaves of responses; an empty response has nothing wrong, so the guarantee alone says little.

    Args:
        sentences: share of the sentences that are kept.
        right: share of the right sentences that are kept.
        empty: share of the responses of which nothing is kept.
    """

    sentences: float
    right: float
    empty: float


def limits(responses: Sequence[Scored], *, at_most: int) -> list[float]:
    """R of each response: what scores below it may be kept; ∞ where everything may.

    Args:
        responses: labelled.
        at_most: k, wrong sentences that may be kept.
    """
    found = []
    for response in responses:
        wrong = sorted(score for score, correct in response if correct is False)
        found.append(wrong[at_most] if len(wrong) > at_most else math.inf)
    return found


def average_rank(n: int, *, alpha: float) -> int:
    """J for the guarantee on average; 0 if there is none.

    As ⌈(n + 1)(1 − α)⌉ counts it from the other end. α is taken as the decimal that is written.
    """
    return math.floor(Fraction(str(alpha)) * (n + 1))


def certified_rank(n: int, *, alpha: float, delta: float) -> int:
    """J for the guarantee with probability 1 − δ; 0 if there is none."""
    low, high = 0, n  # the bound rises with the number of errors
    while low < high:
        middle = (low + high + 1) // 2
        if upper_bound(middle - 1, n, delta=delta) <= alpha:
            low = middle
        else:
            high = middle - 1
    return low


def threshold_at(limits: Sequence[float], rank: int) -> float:
    """The largest score that is kept: the number before the ``rank``-th smallest limit.

    Raises:
        ConfigurationError: if there is no such rank.
    """
    if not 1 <= rank <= len(limits):
        raise ConfigurationError(f"rank {rank} of {len(limits)} responses", hint="0 stands for INFEASIBLE")
    return math.nextafter(sorted(limits)[rank - 1], -math.inf)  # ∞ becomes the largest number: all is kept


def retention(responses: Sequence[Scored], threshold: float) -> Retention:
    """What is kept of responses up to a threshold."""
    kept = [[score <= threshold for score, _ in each] for each in responses]
    every = [own for row in kept for own in row]
    right = [own for own, (_, ok) in zip(every, (pair for each in responses for pair in each), strict=True) if ok]
    return Retention(
        sentences=sum(every) / max(1, len(every)),
        right=sum(right) / max(1, len(right)),
        empty=sum(not any(row) for row in kept) / max(1, len(kept)),
    )
