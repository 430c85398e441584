"""Confidences made of a score, and whether they mean what they say: Brier score, ECE and the reliability curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hallucination_guard.errors import InputError, MissingExtra
from hallucination_guard.evaluation.metrics import Floats, checked

__all__ = ["Bin", "brier", "calibration_error", "confidences", "reliability"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Answers of like confidence.

    Args:
        count: how many.
        confidence: their mean.
        accuracy: the share of right ones.
    """

    count: int
    confidence: float
    accuracy: float


def confidences(
    values: Sequence[float] | Floats, wrong: Sequence[bool] | NDArray[np.bool_], *, folds: int = 5, seed: int = 0
) -> Floats:
    """P(correct) of each answer by Platt's map, fitted on the other folds: of the logarithm where all are positive.

    Raises:
        InputError: if right or wrong answers are fewer than folds.
        MissingExtra: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise MissingExtra(
            "confidences need scikit-learn", hint="pip install 'hallucination-guard-semgrad[evaluate]'"
        ) from None
    numbers, labels = checked(values, wrong)
    errors = int(labels.sum())
    if min(errors, len(labels) - errors) < folds:
        raise InputError(
            f"{errors} wrong and {len(labels) - errors} right answers cannot be put into {folds} folds",
            hint="give more answers, or fewer folds",
        )
    inputs = np.log(numbers) if (numbers > 0).all() else numbers
    split = StratifiedKFold(n_splits=folds, shuffle=True, random_state=seed)
    platt = make_pipeline(StandardScaler(), LogisticRegression(C=1e3))
    found = cross_val_predict(platt, inputs[:, None], ~labels, cv=split, method="predict_proba")
    return np.asarray(found[:, 1], dtype=np.float64)


def brier(confidence: Floats, wrong: Sequence[bool] | NDArray[np.bool_]) -> float:
    """Mean of (confidence − correct)²; lower is better.

    Raises:
        InputError: if a confidence is not in [0, 1].
    """
    shares, labels = _probabilities(confidence, wrong)
    return float(((shares - ~labels) ** 2).mean())


def reliability(confidence: Floats, wrong: Sequence[bool] | NDArray[np.bool_], *, bins: int = 10) -> list[Bin]:
    """Confidence against accuracy in bins of equal width; empty ones are left out.

    Raises:
        InputError: if a confidence is not in [0, 1].
    """
    shares, labels = _probabilities(confidence, wrong)
    at = np.minimum((shares * bins).astype(np.int64), bins - 1)
    found = []
    for each in range(bins):
        inside = at == each
        if inside.any():
            accuracy = float((~labels[inside]).mean())
            found.append(Bin(count=int(inside.sum()), confidence=float(shares[inside].mean()), accuracy=accuracy))
    return found


def calibration_error(confidence: Floats, wrong: Sequence[bool] | NDArray[np.bool_], *, bins: int = 10) -> float:
    """ECE: mean over answers of |confidence − accuracy| of their bin; bins of equal width.

    Raises:
        InputError: if a confidence is not in [0, 1].
    """
    found = reliability(confidence, wrong, bins=bins)
    return sum(each.count * abs(each.confidence - each.accuracy) for each in found) / sum(each.count for each in found)


def _probabilities(confidence: Floats, wrong: Sequence[bool] | NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    shares, labels = checked(confidence, wrong)
    if ((shares < 0) | (shares > 1)).any():
        raise InputError("a confidence is outside [0, 1]", hint="give probabilities of being right")
    return shares, labels
