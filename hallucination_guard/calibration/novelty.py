"""Novelty: how far an answer's states are from all that was labelled. Beyond a limit nothing fitted is believed.

The distance is Mahalanobis', with a covariance that keeps its largest directions and shrinks the rest to one variance
(probabilistic PCA, Tipping and Bishop 1999), divided by d: about 1 for what is like the labelled answers. The limit is
a quantile of distances that were measured out of fold, since an answer is nearer to a centre it helped to fit. Fitting
needs numpy, applying nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from operator import mul
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.numbers import Numbers
from hallucination_guard.errors import CalibrationError
from hallucination_guard.values import Score, States

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

__all__ = ["Novelty", "fit_novelty"]

_DIRECTIONS = 16
_FOLDS = 5
_REFERENCE = 256
_LEAST = 100  # answers: a quantile of fewer is their maximum


class Novelty(BaseModel):
    """A fitted centre and covariance, and the distance beyond which an answer is unlike anything labelled.

    Args:
        layers: whose mean state it reads, see :class:`~hallucination_guard.values.States`.
        centre: of the labelled answers, d numbers.
        directions: k unit vectors of d numbers, one after the other.
        variances: along them.
        rest: variance along all others.
        limit: the largest distance that is not new.
        rate: the share of answers like the labelled ones that lies beyond the limit.
        answers: n, how many it was fitted on.
        reference: distances of labelled answers, out of fold, sorted and thinned, to notice drift by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1)
    centre: Numbers = Field(min_length=1)
    directions: Numbers
    variances: Numbers
    rest: float = Field(gt=0)
    limit: float = Field(gt=0)
    rate: float = Field(gt=0, lt=1)
    answers: int = Field(ge=2)
    reference: Numbers = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.directions) != len(self.variances) * len(self.centre):
            raise ValueError("there is a direction of the centre's length for each variance")
        if not all(each > 0 for each in self.variances):
            raise ValueError("a variance is not positive")
        return self

    @property
    def name(self) -> str:
        """Under which a score keeps the distance; a hash of what it computes is part of it."""
        return f"novelty:{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]}"

    def of(self, score: Score) -> float:
        """The distance of a scored answer: as its score keeps it, or of its states."""
        return score.scores[self.name] if self.name in score.scores else self.distance(score.states)

    def distance(self, states: States | None) -> float:
        """How far an answer is from the labelled ones; about 1 for one that is like them.

        Raises:
            CalibrationError: if there are no states, or they are of other layers or another width.
        """
        if states is None:
            raise CalibrationError("novelty is of the answer's states, and it has none", hint="score it as fitted")
        d = len(self.centre)
        if states.layers != self.layers or len(states.mean) != d:
            raise CalibrationError(
                f"novelty reads {d} numbers of the layers {self.layers!r}, and the answer has {len(states.mean)} of "
                f"{states.layers!r}",
                hint="use the model and scorer that it was fitted with",
            )
        off = [own - centre for own, centre in zip(states.mean, self.centre, strict=True)]
        left, found = math.fsum(map(mul, off, off)), 0.0
        for at, variance in enumerate(self.variances):
            along = math.fsum(map(mul, off, self.directions[at * d : (at + 1) * d])) ** 2
            left -= along
            found += along / variance
        return (found + max(left, 0.0) / self.rest) / d


def fit_novelty(states: Sequence[States], ids: Sequence[str], *, rate: float = 0.01) -> Novelty | None:
    """Fit on labelled answers, right and wrong alike; None on fewer than 100, which have no such quantile.

    Args:
        states: of the answers, all of the same layers.
        ids: of the questions.
        rate: the share of answers like these that may lie beyond the limit.

    Raises:
        CalibrationError: on states of different layers.
    """
    import numpy as np

    if len(states) < _LEAST:
        return None
    if len({(each.layers, len(each.mean)) for each in states}) != 1:
        raise CalibrationError("the answers have states of different layers", hint="score all with one scorer")
    x = np.array([each.mean for each in states], float)
    parts, distances = fold_of(ids, _FOLDS, seed=3), np.zeros(len(x))
    for part in range(_FOLDS):
        inside = parts == part
        if inside.any():
            distances[inside] = _distances(x[inside], *_fitted(x[~inside]))
    at = min(math.ceil((len(x) + 1) * (1.0 - rate)), len(x)) - 1
    centre, directions, variances, rest = _fitted(x)
    return Novelty(
        layers=states[0].layers,
        centre=tuple(centre.tolist()),
        directions=tuple(directions.ravel().tolist()),
        variances=tuple(variances.tolist()),
        rest=rest,
        limit=float(np.sort(distances)[at]),
        rate=rate,
        answers=len(x),
        reference=tuple(np.sort(distances)[:: math.ceil(len(x) / _REFERENCE)].tolist()),
    )


def _fitted(x: Floats) -> tuple[Floats, Floats, Floats, float]:
    import numpy as np

    centre = x.mean(axis=0)
    _, sizes, directions = np.linalg.svd(x - centre, full_matrices=False)
    variances = sizes**2 / max(len(x) - 1, 1)
    kept = min(_DIRECTIONS, len(variances) - 1)
    rest = max(float(variances[kept:].sum()) / max(x.shape[1] - kept, 1), 1e-12)
    return centre, directions[:kept], np.maximum(variances[:kept], rest), rest


def _distances(x: Floats, centre: Any, directions: Any, variances: Any, rest: float) -> Floats:
    off = x - centre
    along = (off @ directions.T) ** 2
    found: Floats = ((along / variances).sum(axis=1) + ((off**2).sum(axis=1) - along.sum(axis=1)) / rest) / x.shape[1]
    return found
