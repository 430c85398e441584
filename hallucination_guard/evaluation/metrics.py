"""How well a score tells wrong answers from right ones, and how sure that is: AUROC, AUCPR, AURC, PRR, accuracy@q.

Scores are turned beforehand so that higher = less certain; *wrong* is the positive class. Ties have no order: metrics
take them together or at their expected value. With right or wrong answers only, ``auroc``, ``aucpr`` and ``prr`` are
undefined: None, never a number. docs/methods.md has the formulas.

One arithmetic serves a data set and all of its resamples: a resample is a vector of counts, so each score is sorted
once. All scores see the same resamples, which makes their differences paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hallucination_guard.errors import ConfigurationError, InputError

__all__ = [
    "COVERAGES",
    "METRICS",
    "Compared",
    "Estimate",
    "auroc",
    "bootstrap",
    "measure",
    "risk_coverage",
    "roc",
    "spearman",
]

Floats: TypeAlias = NDArray[np.float64]

COVERAGES = (0.25, 0.5, 0.75, 0.9)
METRICS = ("auroc", "aucpr", "aurc", "prr", *(f"accuracy@{each:g}" for each in COVERAGES))
_UNDEFINED_SHARE = 0.05  # of resamples; with more the quantiles would be those of a selection
_CHUNK = 2_000_000  # numbers in an array of resamples


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its bootstrap interval.

    Args:
        value: of all rows; None where it is undefined.
        low: lower end of the interval; None without one.
        high: upper end.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Every score by every metric, and against one of them.

    Args:
        scores: by score, by metric.
        differences: score minus reference, by score, by metric; paired.
        reference: the score that all are compared with.
        resamples: how many were drawn.
        one_class: how many of them held right or wrong answers only and could not be used for ``auroc``, ``aucpr``
            and ``prr``.
        level: of the intervals.
    """

    scores: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Mapping[str, Estimate]]
    reference: str
    resamples: int
    one_class: int
    level: float


def measure(values: Sequence[float] | Floats, wrong: Sequence[bool] | NDArray[np.bool_]) -> dict[str, float | None]:
    """All metrics of one score.

    Args:
        values: the score of each answer, higher = less certain.
        wrong: whether each answer was wrong.

    Raises:
        InputError: if there is nothing, the lengths differ, or a value is not finite.
    """
    numbers, labels = checked(values, wrong)
    found = _Ranked(numbers, labels).metrics(np.ones((1, len(numbers)), dtype=np.int64))
    return {name: _number(each[0]) for name, each in found.items()}


def bootstrap(
    scores: Mapping[str, Sequence[float] | Floats],
    wrong: Sequence[bool] | NDArray[np.bool_],
    *,
    reference: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Compared:
    """Percentile intervals of every score and of its difference to a reference, on the same resamples.

    Args:
        scores: by name, each of all answers, higher = less certain.
        wrong: whether each answer was wrong.
        reference: one of the names; by default the one with the highest AUROC on these very answers, which flatters
            it: its interval does not know that it was chosen.
        resamples: at least 1,000 for an interval worth printing.
        seed: of the resamples.
        level: of the intervals.

    Raises:
        InputError: if there is nothing to compare, lengths differ, or a value is not finite.
        ConfigurationError: on an unknown reference, fewer than two resamples or an impossible level.
    """
    if not scores:
        raise InputError("there is no score to compare", hint="give at least one")
    if reference is not None and reference not in scores:
        raise ConfigurationError(f"the reference {reference!r} is none of {sorted(scores)!r}", hint="name one of them")
    if resamples < 2 or not 0.0 < level < 1.0:
        raise ConfigurationError(
            f"{resamples!r} resamples and a level of {level!r} give no interval", hint="2000 and 0.95, for example"
        )
    ranked = {name: _Ranked(*checked(values, wrong)) for name, values in scores.items()}
    n = len(next(iter(ranked.values())).wrong)
    whole = {name: each.metrics(np.ones((1, n), dtype=np.int64)) for name, each in ranked.items()}
    points = {name: {metric: _number(each[0]) for metric, each in found.items()} for name, found in whole.items()}
    if reference is None:
        reference = max(points, key=lambda name: points[name]["auroc"] or 0.0)
    drawn: dict[str, dict[str, list[Floats]]] = {name: {metric: [] for metric in METRICS} for name in scores}
    random = np.random.default_rng(seed)
    one_class = 0
    labels = next(iter(ranked.values())).wrong
    step = max(1, _CHUNK // n)
    for begin in range(0, resamples, step):
        counts = random.multinomial(n, np.full(n, 1.0 / n), size=min(step, resamples - begin))
        errors = counts @ labels
        one_class += int(((errors == 0) | (errors == n)).sum())
        for name, each in ranked.items():
            for metric, values in each.metrics(counts).items():
                drawn[name][metric].append(values)
    joined = {name: {metric: np.concatenate(parts) for metric, parts in each.items()} for name, each in drawn.items()}
    return Compared(
        scores={
            name: {metric: _estimate(points[name][metric], joined[name][metric], level) for metric in METRICS}
            for name in scores
        },
        differences={
            name: {
                metric: _estimate(
                    _less(points[name][metric], points[reference][metric]),
                    joined[name][metric] - joined[reference][metric],
                    level,
                )
                for metric in METRICS
            }
            for name in scores
        },
        reference=reference,
        resamples=resamples,
        one_class=one_class,
        level=level,
    )


class _Ranked:
    """One score, sorted once, its ties in groups; then the metrics of any number of resamples."""

    def __init__(self, values: Floats, wrong: NDArray[np.bool_]) -> None:
        self.wrong = wrong.astype(np.int64)
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        self._starts = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])

    def groups(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Answers and wrong answers in each group of ties (resamples × groups), from the most certain up."""
        sorted_counts = counts[:, self._order]
        every = np.add.reduceat(sorted_counts, self._starts, axis=1)
        errors = np.add.reduceat(sorted_counts * self.wrong[self._order], self._starts, axis=1)
        return every, errors

    def metrics(self, counts: NDArray[np.int64]) -> dict[str, Floats]:
        """By name, one number a resample; NaN where undefined."""
        every, errors = self.groups(counts)
        n, total = int(counts[0].sum()), errors.sum(axis=1)
        right = every - errors
        both = np.where((total > 0) & (total < n), 1.0, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            below = np.cumsum(right, axis=1) - right
            auroc = (errors * (below + right / 2)).sum(axis=1) / (total * (n - total)) * both
            found, taken = _from_above(errors), _from_above(every)
            precision = np.where(taken > 0, found / np.maximum(taken, 1), 0.0)
            aucpr = (errors * precision).sum(axis=1) / total * both
        curve = _expected_errors(every, errors, n)
        k = np.arange(1, n + 1)
        aurc = (curve / k).mean(axis=1)
        chance = total / n
        with np.errstate(divide="ignore", invalid="ignore"):
            prr = (chance - aurc) / (chance - _oracle(n)[total]) * both
        at = {f"accuracy@{each:g}": _kept(each, n) for each in COVERAGES}
        return {
            "auroc": auroc,
            "aucpr": aucpr,
            "aurc": aurc,
            "prr": prr,
            **{name: 1.0 - curve[:, kept - 1] / kept for name, kept in at.items()},
        }


def _from_above(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]


def _expected_errors(every: NDArray[np.int64], errors: NDArray[np.int64], n: int) -> Floats:
    """E_k for k = 1 … n (resamples × n), expected over the orders within ties."""
    rate = errors / np.maximum(every, 1)
    return np.cumsum(np.repeat(rate.ravel(), every.ravel()).reshape(len(every), n), axis=1)


def _oracle(n: int) -> Floats:
    """A_oracle for each number of wrong answers 0 … n: these come last."""
    k = np.arange(1, n + 1)
    # With E wrong answers, max(0, k − (n − E)) of the first k are wrong: sums of (1 − (n − E) / k) over the k above.
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / k)])
    wrong = np.arange(n + 1)
    right = n - wrong
    return np.asarray((wrong - right * (harmonic[n] - harmonic[right])) / n, dtype=np.float64)


def _kept(coverage: float, n: int) -> int:
    # 0.9 · 10 is 9.000000000000002 in some products, and that is nine.
    return max(1, math.ceil(coverage * n - 1e-9))


def checked(
    values: Sequence[float] | Floats, wrong: Sequence[bool] | NDArray[np.bool_]
) -> tuple[Floats, NDArray[np.bool_]]:
    """One finite number and one label for each answer, as arrays.

    Raises:
        InputError: if there is nothing, the lengths differ, a value is not finite or a label is no label.
    """
    numbers = np.asarray(values, dtype=np.float64)
    labels = np.asarray(wrong)
    if numbers.ndim != 1 or numbers.shape != labels.shape or not numbers.size:
        raise InputError(
            f"scores of shape {numbers.shape!r} do not go with labels of shape {labels.shape!r}",
            hint="give one finite number and one label for each answer, and at least one",
        )
    if labels.dtype != np.bool_:
        raise InputError(
            f"the labels are of type {str(labels.dtype)!r}", hint="give True for wrong and False for right"
        )
    if not np.isfinite(numbers).all():
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise InputError(f"score {at} is {numbers[at]!r}, not a finite number", hint="leave out what was not scored")
    return numbers, labels


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _estimate(value: float | None, drawn: Floats, level: float) -> Estimate:
    defined = drawn[~np.isnan(drawn)]
    if value is None or len(defined) < (1.0 - _UNDEFINED_SHARE) * len(drawn):
        return Estimate(value=value)
    low, high = np.quantile(defined, [(1.0 - level) / 2, (1.0 + level) / 2])
    return Estimate(value=value, low=float(low), high=float(high))


def risk_coverage(values: Sequence[float] | Floats, wrong: Sequence[bool] | NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Coverage k / n and expected risk E_k / k for k = 1 … n.

    Raises:
        InputError: as :func:`measure`.
    """
    numbers, labels = checked(values, wrong)
    n = len(numbers)
    every, errors = _Ranked(numbers, labels).groups(np.ones((1, n), dtype=np.int64))
    k = np.arange(1, n + 1)
    return k / n, _expected_errors(every, errors, n)[0] / k


def roc(values: Sequence[float] | Floats, wrong: Sequence[bool] | NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Share of right answers flagged and share of wrong answers flagged, from the highest score down.

    Raises:
        InputError: as :func:`measure`, and with right or wrong answers only.
    """
    numbers, labels = checked(values, wrong)
    if labels.all() or not labels.any():
        raise InputError("all answers have one label, so there is no such curve", hint="give right and wrong ones")
    every, errors = _Ranked(numbers, labels).groups(np.ones((1, len(numbers)), dtype=np.int64))
    found, taken = _from_above(errors)[0][::-1], _from_above(every)[0][::-1]
    right = len(numbers) - int(labels.sum())
    return np.concatenate([[0.0], (taken - found) / right]), np.concatenate([[0.0], found / labels.sum()])


def auroc(values: Sequence[float] | Floats, positive: Sequence[bool] | NDArray[np.bool_]) -> float:
    """The chance that a positive has the higher score; ties count half.

    Raises:
        InputError: as :func:`measure`, and if one of the two kinds is missing.
    """
    found = measure(values, positive)["auroc"]
    if found is None:
        raise InputError(f"{sum(positive)} of {len(positive)} are positive", hint="both kinds are needed")
    return found


def spearman(one: Sequence[float] | Floats, other: Sequence[float] | Floats) -> float | None:
    """Rank correlation; equal values share the mean of their ranks. None where one side is the same everywhere."""
    first, second = _ranks(one), _ranks(other)
    spread = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float(first @ second) / spread if spread else None


def _ranks(values: Sequence[float] | Floats) -> Floats:
    """Centred at 0."""
    _, group, sizes = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    middle: Floats = (ends - (sizes - 1) / 2)[group]
    return middle - (len(middle) + 1) / 2
