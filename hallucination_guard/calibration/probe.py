"""A linear probe: from an answer's states to the odds that it is wrong, learned from labelled answers.

Ridge logistic regression on the standardised states (:class:`~hallucination_guard.values.States`). Its strength is
chosen by cross-validation over questions, by log loss; out of fold, inside of every fold anew. A probe reads form as
well as truth and loses under shift, so it is never used alone: its logit is one signal of a fused score. Fitting needs
scikit-learn, applying nothing.
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

__all__ = ["Probe", "fit_probe", "out_of_fold"]

_STRENGTHS = (1e-4, 1e-3, 1e-2)
_FOLDS = 5
_FAR = 30.0  # |logit|: no probe is more certain than that


class Probe(BaseModel):
    """Fitted weights. JSON in a file, never pickle.

    Args:
        layers: whose states it reads, see :class:`~hallucination_guard.values.States`.
        weights: one a feature, 2d.
        intercept: of the logit.
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


def fit_probe(states: Sequence[States], wrong: Sequence[bool], ids: Sequence[str]) -> Probe:
    """Fit a probe on labelled answers.

    Args:
        states: of the answers, all of the same layers.
        wrong: whether each was wrong.
        ids: of the questions; answers to one question are never on both sides of a fold.

    Raises:
        CalibrationError: on states of different layers, or right or wrong answers only.
        MissingExtra: if scikit-learn is not installed.
    """
    import numpy as np

    x, y = _matrix(states), np.array(wrong, bool)
    strength = _strength(x, y, ids)
    weights, intercept = _fitted(x, y, strength)
    return Probe(
        layers=states[0].layers,
        weights=tuple(weights.tolist()),
        intercept=intercept,
        strength=strength,
        answers=len(y),
    )


def out_of_fold(
    states: Sequence[States], wrong: Sequence[bool], ids: Sequence[str], *, folds: int = _FOLDS, seed: int = 0
) -> Floats:
    """Logits of labelled answers, each from a probe that never saw its question.

    Args:
        states: as for :func:`fit_probe`.
        wrong: as for :func:`fit_probe`.
        ids: as for :func:`fit_probe`.
        folds: how many parts.
        seed: of the parts.
    """
    import numpy as np

    x, y = _matrix(states), np.array(wrong, bool)
    parts, found = fold_of(ids, folds, seed=seed), np.zeros(len(y))
    for part in range(folds):
        inside, rest = np.flatnonzero(parts == part), np.flatnonzero(parts != part)
        if len(inside):
            strength = _strength(x[rest], y[rest], [ids[at] for at in rest.tolist()])
            weights, intercept = _fitted(x[rest], y[rest], strength)
            found[inside] = x[inside] @ weights + intercept
    return found


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
    if len(set(y.tolist())) < 2:
        raise CalibrationError("a probe needs right and wrong answers", hint="give more labelled answers")
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-9] = 1.0
    fitted = LogisticRegression(C=strength, max_iter=1000).fit((x - centre) / scale, y)
    weights = fitted.coef_[0] / scale
    return weights, float(fitted.intercept_[0] - centre @ weights)
