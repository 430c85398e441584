"""A population to draw labelled answers from, fitted to those that there are: what forecasts are simulated with.

Only the order of scores matters to a certificate, so single drafts are drawn by the normal quantile z of the score's
rank, and wrong with P = 1 / (1 + e^−(a + bz + cz²)), fitted with a ridge on c (and a weak one on b). Tried against a
binormal fit and the bootstrap, smoothed or not: docs/methods.md has the figures. Sequences of attempts have no one
rank; they are drawn with replacement as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

from hallucination_guard.calibration.certificate import Drafts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]
    Bools: TypeAlias = NDArray[np.bool_]

__all__ = ["Population", "Ranked", "Resampled", "Sample"]

_RIDGE = (0.0, 0.01, 1.0)  # on a, b, c
_STEPS = 50
_FINE = 5001


class Population(Protocol):
    """Draws questions, and knows what a threshold does to all of them."""

    def draw(self, n: int, rng: np.random.Generator) -> Drafts:
        """``n`` questions."""

    def refitted(self, rng: np.random.Generator) -> Self:
        """What it might have been: fitted to as many answers drawn from its own with replacement."""

    def possible(self, alpha: float) -> float:
        """The largest share of questions that any threshold answers with an error rate of at most α."""

    def risk(self) -> float:
        """The error rate among the answered, in the mean over all thresholds: the lower, the better the score."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """Single drafts.

    Args:
        z: normal quantiles of the ranks of the scores that were fitted to.
        wrong: the labels of those.
        scored: the share of the questions that have a score.
        weights: a, b and c.
    """

    z: Floats
    wrong: Bools
    scored: float
    weights: Floats

    @classmethod
    def of(cls, scores: Sequence[float] | Floats, wrong: Sequence[bool] | Bools, *, scored: float = 1.0) -> Self:
        """Fit it to labelled answers.

        Args:
            scores: (n), rising with doubt.
            wrong: (n), the labels.
            scored: the share of the questions that have a score.
        """
        import numpy as np
        from scipy.stats import norm, rankdata

        bad = np.asarray(wrong, bool)
        z = norm.ppf(rankdata(scores) / (len(bad) + 1))
        return cls(z, bad, scored, _fitted(z, bad))

    def draw(self, n: int, rng: np.random.Generator) -> Drafts:
        """``n`` questions; those without a score are among them."""
        import numpy as np

        z = rng.normal(size=int(rng.binomial(n, self.scored)))
        wrong = rng.random(len(z)) < self._chance(z)
        return Drafts(begins=z, ends=np.full(len(z), math.inf), wrong=wrong, questions=n)

    def refitted(self, rng: np.random.Generator) -> Self:
        """Fitted to a bootstrap sample."""
        drawn = rng.integers(len(self.z), size=len(self.z))
        return type(self).of(self.z[drawn], self.wrong[drawn], scored=self.scored)

    def possible(self, alpha: float) -> float:
        """By the fitted curve."""
        import numpy as np

        fine = np.flatnonzero(self._rates() <= alpha)
        return self.scored * float(fine[-1] + 1) / _FINE if len(fine) else 0.0

    def risk(self) -> float:
        """By the fitted curve."""
        return float(self._rates().mean())

    def _rates(self) -> Floats:
        import numpy as np

        chances = self._chance(_evenly())
        return np.asarray(np.cumsum(chances) / np.arange(1, _FINE + 1))

    def _chance(self, z: Floats) -> Floats:
        return _logistic(_powers(z) @ self.weights)


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """Sequences of attempts, as they are.

    Args:
        drafts: of all the questions, those of one question side by side.
        lengths: how many of the drafts each question has.
    """

    drafts: Drafts
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[tuple[float | None, bool]]]) -> Self:
        """Of (score, correct) pairs in the order of the attempts."""
        import numpy as np

        return cls(Drafts.of(sequences), np.array([len(Drafts.of([each]).begins) for each in sequences], np.int64))

    def draw(self, n: int, rng: np.random.Generator) -> Drafts:
        """``n`` questions, with replacement."""
        return self._taken(rng.integers(len(self.lengths), size=n))

    def refitted(self, rng: np.random.Generator) -> Self:
        """A bootstrap sample."""
        drawn = rng.integers(len(self.lengths), size=len(self.lengths))
        return type(self)(self._taken(drawn), self.lengths[drawn])

    def possible(self, alpha: float) -> float:
        """Of these questions; a little too much, because it is chosen among all thresholds."""
        answered, rates = self._rates()
        return float(answered[rates <= alpha].max(initial=0)) / len(self.lengths)

    def risk(self) -> float:
        """Of these questions."""
        return float(self._rates()[1].mean())

    def _rates(self) -> tuple[NDArray[np.int64], Floats]:
        import numpy as np

        answered, wrong = self.drafts.at(np.unique(self.drafts.begins))
        return answered, wrong / answered

    def _taken(self, questions: NDArray[np.int64]) -> Drafts:
        import numpy as np

        lengths = self.lengths[questions]
        before = np.cumsum(lengths) - lengths  # drafts of the questions taken earlier
        first = (np.cumsum(self.lengths) - self.lengths)[questions]
        rows = np.repeat(first - before, lengths) + np.arange(int(lengths.sum()))
        return Drafts(
            begins=self.drafts.begins[rows],
            ends=self.drafts.ends[rows],
            wrong=self.drafts.wrong[rows],
            questions=len(questions),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """Labelled answers as a forecast sees them.

    Args:
        population: fitted to them.
        score: the name of the score that was read.
        labels: how many questions there are.
        wrong: the share of wrong ones among the scored answers.
        auroc: P(a wrong answer scores higher than a right one).
    """

    population: Population
    score: str
    labels: int
    wrong: float
    auroc: float


def _evenly() -> Floats:
    import numpy as np
    from scipy.stats import norm

    return np.asarray(norm.ppf((np.arange(_FINE) + 0.5) / _FINE))


def _fitted(z: Floats, wrong: Bools) -> Floats:
    """Newton's method on the penalised log loss; one invented answer of each kind keeps the weights finite."""
    import numpy as np

    x = np.concatenate([_powers(z), [[1.0, 0.0, 0.0]] * 2])
    y = np.concatenate([wrong.astype(float), [0.0, 1.0]])
    weights, ridge = np.zeros(3), np.diag(_RIDGE)
    for _ in range(_STEPS):
        chance = _logistic(x @ weights)
        slope = x.T @ (y - chance) - ridge @ weights
        step = np.linalg.solve(x.T @ (x * (chance * (1.0 - chance))[:, None]) + ridge + 1e-9 * np.eye(3), slope)
        weights = weights + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-8:
            break
    return weights


def _powers(z: Floats) -> Floats:
    import numpy as np

    return np.stack([np.ones_like(z), z, z * z], axis=1)


def _logistic(x: Floats) -> Floats:
    import numpy as np

    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -500.0, 500.0))))
