"""A linear probe: from an answer's states to the odds that it is wrong, learned from labelled answers.

Ridge logistic regression on the standardised states (:class:`~hallucination_guard.values.States`), its strength chosen
by cross-validation over questions. What is kept is the mean of members that were fitted on four fifths of the
questions, in several partitions, each brought to one scale. A probe reads form as well as truth and loses under shift,
so it is never used alone: its logit is one signal of a fused score. Fitting needs scikit-learn, applying nothing.
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
from hallucination_guard.errors import CalibrationError, MissingExtra
from hallucination_guard.values import States

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

__all__ = ["Probe", "fit_probe"]

_STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2)
_FOLDS, _PARTITIONS = 5, 4
_FAR = 30.0  # |logit|: no probe is more certain than that


class Probe(BaseModel):
    """Fitted weights. JSON in a file, never pickle.

    Args:
        layers: whose states it reads, see :class:`~hallucination_guard.values.States`.
        weights: one a feature, 2d.
        intercept: of the logit, whose scale is that of its members: standard deviation 1 where they were fitted.
        strength: C, 1 / the ridge's weight, as cross-validation chose it.
        answers: n, how many it was fitted on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1)
    weights: Numbers = Field(min_length=2)
    intercept: float
    strength: float = Field(gt=0)
    answers: int = Field(ge=2)

    @model_validator(mode="after")
    def _is_of_states(self) -> Self:
        if len(self.weights) % 2:
            raise ValueError("a probe has a weight for each number of mean and last state")
        return self

    @property
    def name(self) -> str:
        """Under which a score keeps what it said; a hash of what it computes is part of it."""
        return f"probe:{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]}"

    def odds(self, states: States | None) -> float:
        """The odds that an answer is wrong, before calibration; positive.

        Args:
            states: of the answer.

        Raises:
            CalibrationError: if there are none, or they are of other layers or another width.
        """
        if states is None:
            raise CalibrationError("the probe reads the answer's states, and it has none", hint="score it as fitted")
        if states.layers != self.layers or len(states.features) != len(self.weights):
            raise CalibrationError(
                f"the probe reads {len(self.weights)} numbers of the layers {self.layers!r}, and the answer has "
                f"{len(states.features)} of {states.layers!r}",
                hint="use the model and scorer that it was fitted with",
            )
        logit = self.intercept + math.fsum(map(mul, self.weights, states.features))
        return math.exp(min(max(logit, -_FAR), _FAR))


def fit_probe(states: Sequence[States], wrong: Sequence[bool], ids: Sequence[str]) -> tuple[Probe, Floats]:
    """Fit a probe on labelled answers.

    Args:
        states: of the answers, all of the same layers.
        wrong: whether each was wrong.
        ids: of the questions; answers to one question are never on both sides of a fold.

    Returns:
        The probe, and for each answer the mean logit of those members that never saw its question.

    Raises:
        CalibrationError: on states of different layers, or right or wrong answers only.
        MissingExtra: if scikit-learn is not installed.
    """
    import numpy as np

    x, y = _matrix(states), np.array(wrong, bool)
    if len(set(y.tolist())) < 2:
        raise CalibrationError("a probe needs right and wrong answers", hint="give more labelled answers")
    strength = _strength(x, y, ids)
    members, unseen = [], np.zeros((_PARTITIONS, len(y)))
    for seed in range(_PARTITIONS):
        parts = fold_of(ids, _FOLDS, seed=seed)
        for part in range(_FOLDS):
            inside, rest = parts == part, parts != part
            if len(set(y[rest].tolist())) < 2:
                continue
            member = _at_one_scale(x[rest], *_fitted(x[rest], y[rest], strength))
            members.append(member)
            unseen[seed, inside] = x[inside] @ member[0] + member[1]
    probe = Probe(
        layers=states[0].layers,
        weights=tuple(np.mean([weights for weights, _ in members], axis=0).tolist()),
        intercept=float(np.mean([intercept for _, intercept in members])),
        strength=strength,
        answers=len(y),
    )
    return probe, unseen.mean(axis=0)


def _matrix(states: Sequence[States]) -> Floats:
    import numpy as np

    if len(kinds := {(each.layers, len(each.features)) for each in states}) != 1:
        raise CalibrationError(f"the answers have states of {len(kinds)} kinds", hint="score all with one scorer")
    return np.array([each.features for each in states], float)


def _strength(x: Floats, y: Any, ids: Sequence[str]) -> float:
    """The C with the least log loss out of fold; the stronger ridge where they are equal."""
    import numpy as np

    parts = fold_of(ids, _FOLDS, seed=1)
    losses = []
    for strength in _STRENGTHS:
        loss = 0.0
        for part in range(_FOLDS):
            inside, rest = parts == part, parts != part
            if not inside.any() or len(set(y[rest].tolist())) < 2:
                continue
            weights, intercept = _fitted(x[rest], y[rest], strength)
            z = x[inside] @ weights + intercept
            loss += float(np.sum(np.logaddexp(0.0, z) - y[inside] * z))
        losses.append(loss)
    return _STRENGTHS[int(np.argmin(losses))]


def _fitted(x: Floats, y: Any, strength: float) -> tuple[Floats, float]:
    """Weights and intercept on the features as they are; the ridge is on standardised ones."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra(
            "fitting a probe needs scikit-learn", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
        ) from None
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-9] = 1.0
    fitted = LogisticRegression(C=strength, max_iter=1000).fit((x - centre) / scale, y)
    weights = fitted.coef_[0] / scale
    return weights, float(fitted.intercept_[0] - centre @ weights)


def _at_one_scale(x: Floats, weights: Floats, intercept: float) -> tuple[Floats, float]:
    """The same direction, with logits of mean 0 and standard deviation 1 where it was fitted."""
    logits = x @ weights + intercept
    scale = float(logits.std()) or 1.0
    return weights / scale, (intercept - float(logits.mean())) / scale
