"""What certificates are to be expected with how many labels, by certifying answers drawn from a fitted population.

A forecast has looked at the labels, so it promises nothing: it tells how much to label, not what to let through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hallucination_guard.calibration.certificate import Infeasible, course, design
from hallucination_guard.calibration.needed import Needed
from hallucination_guard.calibration.starts import furthest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hallucination_guard.calibration.population import Population, Sample

    Floats: TypeAlias = NDArray[np.float64]

__all__ = ["NO_CERTIFICATE", "Advice", "Likely", "advice_of", "with_needed"]

NO_CERTIFICATE = "advice is a forecast that has looked at the labels, not a certificate: it promises nothing"
FEASIBLE = 0.8
"""An α counts as feasible with n labels if so many of the calibration sets drawn give a certificate."""
UP_TO = 12_800

_FIRST = 50
_DRAWS = 100  # of the coverage with the labels that there are
_STEP_DRAWS = 30  # of each number of labels
_REFITS = 41
_MOST = 0.9


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Likely(_Part):
    """A share, and between what it will lie four times in five."""

    expected: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low <= self.expected <= self.high:
            raise ValueError(f"{self.expected!r} does not lie between {self.low!r} and {self.high!r}")
        return self

    def in_words(self) -> str:
        """A few words."""
        return f"{self.expected:.0%} ({self.low:.0%} to {self.high:.0%})"


class Advice(_Part):
    """What to expect of certificates for one α. A forecast, not a certificate.

    Args:
        alpha: α.
        delta: δ.
        score: name of the score, or ``fused``.
        labels: labelled questions that there are.
        wrong: the share of wrong ones among the scored answers.
        auroc: P(a wrong answer scores higher than a right one).
        possible: the share of questions that could be answered at α if everything were known, the oracle's.
        coverage: the share that a certificate on ``labels`` new questions answers; an infeasible one answers none.
        feasible: the share of such calibration sets that give a certificate at all.
        to_be_feasible: labels with which four sets in five give a certificate.
        to_half: labels with which half of what is possible is answered, in the mean.
        to_most: the same of nine tenths.
    """

    alpha: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    score: str
    labels: int = Field(ge=1)
    wrong: float = Field(ge=0, le=1)
    auroc: float = Field(ge=0, le=1)
    possible: Likely
    coverage: Likely
    feasible: float = Field(ge=0, le=1)
    to_be_feasible: Needed
    to_half: Needed
    to_most: Needed

    def in_words(self) -> str:
        """What to expect, what is possible, and what the next step takes."""
        if self.possible.expected == 0.0:
            return f"alpha {self.alpha:g}: no threshold of {self.score!r} is expected to keep it, however many labels"
        said = (
            f"alpha {self.alpha:g}: with {self.labels:,} labels expect {self.coverage.in_words()} to be answered, "
            f"and a certificate in {self.feasible:.0%} of the cases; no number of labels gets past "
            f"{self.possible.in_words()}"
        )
        steps = [("four in five to be feasible", self.to_be_feasible)] if self.feasible < FEASIBLE else []
        steps += [("half of what is possible", self.to_half), ("nine tenths of it", self.to_most)]
        return said + "".join(f"; {what}: {needed.in_words()}" for what, needed in steps)


def advice_of(
    sample: Sample, *, alphas: Sequence[float], delta: float, fused: bool, seed: int = 0
) -> tuple[Advice, ...]:
    """Forecasts for several α, smallest first.

    Args:
        sample: the labelled answers.
        alphas: error rates among the answered, each in (0, 1).
        delta: δ of the certificates.
        fused: whether certificates fit the score on their fit part.
        seed: of the draws.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    chosen, population, labels = sorted(set(alphas)), sample.population, sample.labels
    refits = [population.refitted(rng) for _ in range(_DRAWS)]
    today = np.concatenate([_coverages(each, labels, chosen, delta, fused, 1, rng) for each in refits])
    likely = _low_and_high(refits, chosen)
    curves = [_curve(each, chosen, delta, fused, rng) for each in (population, *likely)]
    found = []
    for at, alpha in enumerate(chosen):
        possible = [each.possible(alpha) for each in (population, *refits[:_REFITS])]

        def needed(what: str, share: float, at: int = at, alpha: float = alpha) -> Needed:
            return _needed([_reached(curve, at, alpha, what, share) for curve in curves])

        found.append(
            Advice(
                alpha=alpha,
                delta=delta,
                score=sample.score,
                labels=labels,
                wrong=sample.wrong,
                auroc=sample.auroc,
                possible=_likely(possible[0], possible[1:]),
                coverage=_likely(float(today[:, at].mean()), today[:, at]),
                feasible=float((today[:, at] > 0).mean()),
                to_be_feasible=needed("feasible", FEASIBLE),
                to_half=needed("coverage", 0.5),
                to_most=needed("coverage", _MOST),
            )
        )
    return tuple(found)


def with_needed(infeasible: Infeasible, population: Population, *, fused: bool, seed: int = 0) -> Infeasible:
    """The same, with the number of labels that is expected to make it feasible."""
    import numpy as np

    rng = np.random.default_rng(seed)
    likely = _low_and_high([population.refitted(rng) for _ in range(_REFITS)], [infeasible.alpha])
    reached = []
    for each in (population, *likely):
        curve = _curve(each, [infeasible.alpha], infeasible.delta, fused, rng, feasible_only=True)
        reached.append(_reached(curve, 0, infeasible.alpha, "feasible", FEASIBLE))
    return infeasible.model_copy(update={"needed": _needed(reached)})


class _Curve:
    """Mean coverage and share of feasible calibration sets by number of labels, in one population."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.labels: list[int] = []
        self.coverage: list[Floats] = []
        self.feasible: list[Floats] = []


def _curve(
    population: Population,
    alphas: Sequence[float],
    delta: float,
    fused: bool,
    rng: np.random.Generator,
    *,
    feasible_only: bool = False,
) -> _Curve:
    """Twice as many labels each time, until there is nothing left to reach."""
    import numpy as np

    found = _Curve(population)
    possible = np.array([population.possible(alpha) for alpha in alphas])
    # With fewer right answers in a row than this not even a score without a fault certifies the largest α.
    least = math.log(delta) / math.log1p(-max(alphas))
    labels = _FIRST
    while labels <= UP_TO:
        if labels >= least:
            drawn = _coverages(population, labels, alphas, delta, fused, _STEP_DRAWS, rng)
            found.labels.append(labels)
            found.coverage.append(drawn.mean(axis=0))
            found.feasible.append((drawn > 0).mean(axis=0))
            done = found.feasible[-1] >= FEASIBLE
            if not feasible_only:
                done &= found.coverage[-1] >= _MOST * possible
            if np.all(done | (possible == 0.0)):
                break
        labels *= 2
    return found


def _coverages(
    population: Population,
    labels: int,
    alphas: Sequence[float],
    delta: float,
    fused: bool,
    draws: int,
    rng: np.random.Generator,
) -> Floats:
    """(draws, α): the share answered by the certificate on each of so many sets; 0 where there is none."""
    import numpy as np

    share, spread = design(labels, fused=fused)
    fitted = max(1, round(share * labels))
    found = np.zeros((draws, len(alphas)))
    for row in found:
        fit, test = population.draw(fitted, rng), population.draw(labels - fitted, rng)
        grid, starts = course(fit, questions=test.questions, delta=delta, spread=spread)
        answered, wrong = test.at(grid)
        for at, alpha in enumerate(alphas):
            last = furthest(answered, wrong, starts=starts, alpha=alpha, delta=delta)
            row[at] = 0.0 if last is None else answered[last] / test.questions
    return found


def _reached(curve: _Curve, at: int, alpha: float, what: str, share: float) -> int | None:
    """The number of labels at which a rising curve gets to its goal, in between by the logarithm, two digits."""
    import numpy as np

    rising = np.maximum.accumulate(
        [row[at] for row in (curve.feasible if what == "feasible" else curve.coverage)] or [0.0]
    )
    possible = curve.population.possible(alpha)
    goal = share if what == "feasible" else share * possible
    first = int(np.argmax(rising >= goal))
    if possible == 0.0 or not curve.labels or rising[first] < goal:
        return None
    if first == 0:
        return curve.labels[0]
    low, high = rising[first - 1], rising[first]
    between = math.log(curve.labels[first - 1]) + (goal - low) / (high - low) * math.log(2.0)
    return min(int(round(math.exp(between), 1 - math.floor(between / math.log(10.0)))), UP_TO)


def _low_and_high(refits: Sequence[Population], alphas: Sequence[float]) -> tuple[Population, Population]:
    """A refit that is better than nine in ten, and one that is worse."""
    ranked = sorted(refits, key=lambda each: (-sum(map(each.possible, alphas)), each.risk()))
    tenth = len(ranked) // 10
    return ranked[tenth], ranked[-1 - tenth]


def _needed(numbers: Sequence[int | None]) -> Needed:
    """Of the population as fitted, a better one, a worse one; draws are noisy, so they are put in order."""
    expected, fewest, most = (math.inf if each is None else each for each in numbers)
    ordered = (expected, min(fewest, expected), max(most, expected))
    named = [None if each > UP_TO else int(each) for each in ordered]
    return Needed(expected=named[0], fewest=named[1], most=named[2], up_to=UP_TO)


def _likely(expected: float, drawn: Sequence[float] | Floats) -> Likely:
    import numpy as np

    low, high = (float(each) for each in np.quantile(drawn, [0.1, 0.9]))
    return Likely(expected=expected, low=min(low, expected), high=max(high, expected))
