"""How good confidences are on questions that their map was not fitted on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Bin", "FitReport", "report_of"]

_BINS = 10


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bin(_Part):
    """Of answers that were given a similar confidence: how many, their mean confidence, the share that was right."""

    answers: int
    confidence: float
    correct: float


class FitReport(_Part):
    """How good the confidences are on questions that the map was not fitted on, by cross-validation.

    Args:
        answers: how many.
        folds: parts; each question was left out once.
        brier: mean of (confidence − label)².
        ece: expected calibration error: mean of |mean confidence − share right| over the bins, weighted.
        bins: ten of equally many answers, from the lowest confidence to the highest.
    """

    answers: int
    folds: int
    brier: float
    ece: float
    bins: tuple[Bin, ...]


def report_of(confidences: NDArray[np.float64], correct: NDArray[np.float64], *, folds: int) -> FitReport:
    """Brier score, expected calibration error and reliability bins of confidences."""
    import numpy as np

    order = np.argsort(confidences, kind="stable")
    bins = tuple(
        Bin(answers=len(at), confidence=float(confidences[at].mean()), correct=float(correct[at].mean()))
        for at in np.array_split(order, min(_BINS, len(order)))
    )
    return FitReport(
        answers=len(order),
        folds=folds,
        brier=float(np.mean((confidences - correct) ** 2)),
        ece=sum(each.answers * abs(each.confidence - each.correct) for each in bins) / len(order),
        bins=bins,
    )
