"""How well numbers put wrong answers above right ones, and which of two does so better: AUROC, paired by questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

__all__ = ["Gain", "auroc", "gain"]

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """AUROC of one number minus that of another, with the interval of a bootstrap over questions."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def auroc(values: Sequence[float] | Floats, wrong: Sequence[bool] | NDArray[Any]) -> float:
    """P(a wrong answer has the higher number), ties half; both kinds must be there."""
    import numpy as np

    return float(_aurocs(np.asarray(values, float), np.asarray(wrong, bool), np.ones((1, len(values))))[0])


def gain(
    one: Sequence[float] | Floats,
    other: Sequence[float] | Floats,
    wrong: Sequence[bool] | NDArray[Any],
    ids: Sequence[str],
    *,
    level: float = 0.8,
    seed: int = 0,
) -> Gain:
    """How much better ``one`` ranks than ``other`` on the same answers.

    Args:
        one: rises with doubt.
        other: likewise.
        wrong: whether each answer was wrong.
        ids: of the questions, which are what is resampled.
        level: of the interval; its lower end is passed by chance with (1 − level) / 2.
        seed: of the resamples.
    """
    import numpy as np

    labels, names = np.asarray(wrong, bool), sorted(set(ids))
    place = {name: at for at, name in enumerate(names)}
    rows = np.array([place[each] for each in ids])
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES)
    counts = drawn[:, rows].astype(float)
    counts = counts[(counts[:, labels].sum(axis=1) > 0) & (counts[:, ~labels].sum(axis=1) > 0)]
    first, second = (np.asarray(each, float) for each in (one, other))
    found = _aurocs(first, labels, counts) - _aurocs(second, labels, counts)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Gain(value=auroc(first, labels) - auroc(second, labels), low=float(low), high=float(high))


def _aurocs(values: Floats, wrong: NDArray[Any], counts: Floats) -> Floats:
    """One for each row of counts (resamples × answers)."""
    import numpy as np

    order = np.argsort(values, kind="stable")
    begins = np.flatnonzero(np.append(True, np.diff(values[order]) > 0))  # of each stretch of equal values
    of_wrong = np.add.reduceat((counts * wrong)[:, order], begins, axis=1)
    of_right = np.add.reduceat((counts * ~wrong)[:, order], begins, axis=1)
    below = np.cumsum(of_right, axis=1) - of_right / 2
    found: Floats = (of_wrong * below).sum(axis=1) / (of_wrong.sum(axis=1) * of_right.sum(axis=1))
    return found
