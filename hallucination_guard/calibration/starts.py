"""Several starts for one error budget: where a certificate's walk may begin, and what a start that succeeds hands on.

The grid is cut at fixed starts. Each start has its share of δ and tests its piece of the grid, towards more permissive
thresholds, until one hypothesis is not refuted; a piece that was passed to its end adds its budget to that of the next
(the fallback procedure of Wiens 2003, one of the graphs of Bretz et al. 2009). Wherever the risks lie, a threshold
whose risk exceeds α is passed with probability ≤ δ: docs/methods.md has the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints: TypeAlias = NDArray[np.int64]

__all__ = ["SPREAD_FROM", "Start", "furthest", "spread_over"]

SPREAD_FROM = 600
"""Questions in the test part from which on several starts are used. With fewer, a share of δ refutes too little."""

_AT = (0.05, 0.15)  # shares of the fit part's questions that the starts answer
_SHARES = (0.3, 0.7)  # of δ
_AT_ONCE = 64  # most walks end early


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A place on the grid where a walk begins.

    Args:
        at: index of the threshold.
        share: of δ, above 0; those of all starts together are at most 1.
    """

    at: int
    share: float

    def __post_init__(self) -> None:
        if self.at < 0 or not 0.0 < self.share <= 1.0:
            raise ValueError(f"a start at {self.at!r} with the share {self.share!r} of delta cannot be")


def spread_over(answered: Ints, *, questions: int) -> tuple[Start, ...]:
    """Two fixed starts: where 5 and 15 % of the questions are answered, with .3 and .7 of δ. Labels have no say.

    Args:
        answered: how many questions of the fit part each threshold of the grid answers, rising.
        questions: of the fit part.
    """
    import numpy as np

    if not len(answered):
        return ()
    shares: dict[int, float] = {}
    for place, share in zip(_AT, _SHARES, strict=True):
        at = min(int(np.searchsorted(answered, place * questions)), len(answered) - 1)
        shares[at] = shares.get(at, 0.0) + share
    return tuple(Start(at=at, share=min(share, 1.0)) for at, share in sorted(shares.items()))


def furthest(answered: Ints, wrong: Ints, *, starts: Sequence[Start], alpha: float, delta: float) -> int | None:
    """The most permissive threshold that is passed; None if none is.

    Args:
        answered: how many questions of the test part each threshold of the grid answers.
        wrong: how many of those wrongly.
        starts: from the strictest to the most permissive.
        alpha: α.
        delta: δ.
    """
    if not len(answered):
        return None
    ends = [*(each.at for each in starts[1:]), len(answered)]
    handed_on, found = 0.0, None
    for start, end in zip(starts, ends, strict=True):
        share = min(handed_on + start.share, 1.0)
        piece = slice(start.at, end)
        steps = _passed(answered[piece], wrong[piece], alpha=alpha, level=share * delta)
        if steps:
            found = start.at + steps - 1
        handed_on = share if steps == end - start.at else 0.0
    return found


def _passed(answered: Ints, wrong: Ints, *, alpha: float, level: float) -> int:
    """How many hypotheses in a row are refuted from the first on."""
    import numpy as np
    from scipy.special import bdtr  # binom.cdf without its checks, which cost more than the sums

    for first in range(0, len(answered), _AT_ONCE):
        k, e = answered[first : first + _AT_ONCE], wrong[first : first + _AT_ONCE]
        passed = (k > 0) & (bdtr(e, k, alpha) <= level)
        if not passed.all():
            return first + int(np.argmin(passed))
    return len(answered)
