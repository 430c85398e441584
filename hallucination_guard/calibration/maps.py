"""The two maps from a score to P(correct), fitted on labelled answers; both fall where the score rises.

Platt's, 1 / (1 + e^(a + b·log score)), b > 0, by regularised logistic regression on the log of the score: scores are
positive and spread over decades. The isotonic one, a falling table with straight lines between its points, for which a
few hundred answers are wanted. Fitting needs scikit-learn, applying nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from hallucination_guard.errors import CalibrationError, MissingExtra

__all__ = ["Kind", "Table", "fit_map", "isotonic", "platt"]

Kind: TypeAlias = Literal["platt", "isotonic"]
Table: TypeAlias = tuple[tuple[float, float], ...]
"""Of an isotonic map: (score, confidence), scores rising, confidences falling."""

_TINY = 1e-12


def platt(value: float, *, intercept: float, slope: float) -> float:
    """The confidence of a score by Platt's map."""
    z = intercept + slope * math.log(max(value, _TINY))
    return 1.0 / (1.0 + math.exp(min(z, 700.0)))


def isotonic(value: float, table: Table) -> float:
    """The confidence of a score by an isotonic map; flat beyond both ends."""
    at = bisect_right(table, value, key=lambda point: point[0])
    if at == 0 or at == len(table):
        return table[0 if at == 0 else -1][1]
    (low, sure), (high, unsure) = table[at - 1 : at + 1]
    return sure + (unsure - sure) * (value - low) / (high - low)


def fit_map(values: Sequence[float], labels: Sequence[bool], *, kind: Kind, name: str) -> dict[str, Any]:
    """The fields of a :class:`~hallucination_guard.calibration.Calibration` that say the map.

    Args:
        values: scores, not negative.
        labels: whether each answer was right.
        kind: which map.
        name: of the score.

    Raises:
        CalibrationError: if the score does not rise with being wrong here, or is negative.
        MissingExtra: if scikit-learn is not installed.
    """
    return _platt(values, labels, name=name) if kind == "platt" else _isotonic(values, labels, name=name)


def _platt(values: Sequence[float], labels: Sequence[bool], *, name: str) -> dict[str, Any]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise _no_sklearn() from None
    _refuse_negative(values, name)
    logs = [[math.log(max(value, _TINY))] for value in values]
    fitted = LogisticRegression(C=1e3).fit(logs, [not right for right in labels])  # P(wrong) rises with the score
    slope, intercept = float(fitted.coef_[0][0]), float(fitted.intercept_[0])
    if not slope > 0:
        raise CalibrationError(
            f"on these {len(values)} answers {name!r} does not rise with being wrong (slope {slope:.3g})",
            hint="give more labelled answers, or use another score",
        )
    return {"intercept": intercept, "slope": slope}


def _isotonic(values: Sequence[float], labels: Sequence[bool], *, name: str) -> dict[str, Any]:
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError:
        raise _no_sklearn() from None
    _refuse_negative(values, name)
    # One invented answer against the trend at either end: a run of right answers is many, but never certainty.
    scores = [min(values), *values, max(values)]
    right = [0.0, *map(float, labels), 1.0]
    fitted = IsotonicRegression(increasing=False, y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(scores, right)
    points = zip(map(float, fitted.X_thresholds_), map(float, fitted.y_thresholds_), strict=True)
    table = tuple((score, min(max(confidence, 0.0), 1.0)) for score, confidence in points)
    if not table[0][1] > table[-1][1]:
        raise CalibrationError(
            f"on these {len(values)} answers {name!r} does not rise with being wrong: the table is flat",
            hint="give more labelled answers, or use another score",
        )
    return {"table": table}


def _refuse_negative(values: Sequence[float], name: str) -> None:
    if (lowest := min(values)) < 0.0:
        raise CalibrationError(
            f"{name!r} is {lowest!r}, and it cannot be negative", hint="give a score that rises from 0 with doubt"
        )


def _no_sklearn() -> MissingExtra:
    return MissingExtra(
        "fitting a calibration needs scikit-learn", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
    )
