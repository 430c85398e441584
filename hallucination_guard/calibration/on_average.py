"""α on average: a threshold whose error rate is at most α in the mean over calibration sets. It is no certificate.

The largest λ with (wrong + 1) / (answered + 1) ≤ α among the labelled answers. Where the error rate among the answered
does not fall as λ rises,

    E[ P(wrong | answered at λ) ] ≤ α    over the draw of the labelled answers,

a calibration set that lets nothing through counting as 0. About every second set gives a threshold whose own error
rate is above α. No ``max_risk`` accepts it. docs/methods.md has the proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hallucination_guard.errors import ConfigurationError

__all__ = ["OnAverage", "keep_on_average"]


class OnAverage(BaseModel):
    """A threshold with the error rate ``alpha`` on average over calibration sets; of this one nothing is promised.

    Args:
        alpha: α.
        score: name of the score, or ``fused``.
        threshold: λ; answers with a score up to here are let through. None where no threshold keeps the rule: then
            nothing is let through.
        n: labelled questions.
        answered: how many of them λ lets through.
        errors: how many of those are wrong.
        covers: hash of model, scorer, weights of the score and conditions of the answers.
        data: hash of the labelled answers.
        date: ISO, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    alpha: float = Field(gt=0, lt=1)
    score: str
    threshold: float | None
    n: int = Field(ge=1)
    answered: int = Field(ge=0)
    errors: int = Field(ge=0)
    covers: str = ""
    data: str = ""
    date: str

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if not self.errors <= self.answered <= self.n or (self.threshold is None) != (self.answered == 0):
            raise ValueError(
                f"{self.errors} wrong of {self.answered} answered of {self.n} at {self.threshold!r} cannot be"
            )
        if self.answered and not _kept(self.errors, self.answered, self.alpha):
            raise ValueError(f"{self.errors} wrong of {self.answered} do not keep alpha {self.alpha:g} on average")
        return self

    @property
    def coverage(self) -> float:
        """The share of the labelled questions that λ answers."""
        return self.answered / self.n

    def in_words(self) -> str:
        """One sentence."""
        if self.threshold is None:
            return f"alpha {self.alpha:g} on average: no threshold of {self.score!r} keeps it on {self.n} answers"
        return (
            f"alpha {self.alpha:g} on average: {self.score!r} up to {self.threshold:.4g} lets {self.answered} of "
            f"{self.n} through ({self.coverage:.0%}), {self.errors} of them wrong"
        )


def keep_on_average(
    scores: Sequence[float],
    correct: Sequence[bool],
    *,
    alphas: Iterable[float],
    questions: int,
    score: str,
    covers: str = "",
    data: str = "",
    date: str | None = None,
) -> tuple[OnAverage, ...]:
    """Thresholds for several α, smallest first.

    Args:
        scores: of single drafts that were not used to fit the score.
        correct: whether each was right.
        alphas: error rates among the answered, each in (0, 1).
        questions: how many questions there are, those without a score among them.
        score: name of the score.
        covers: hash of what the thresholds are bound to.
        data: hash of the labelled answers.
        date: ISO; today by default.

    Raises:
        ConfigurationError: on an α out of range.
    """
    chosen = sorted(set(alphas))
    for alpha in chosen:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 < alpha < 1.0:
            raise ConfigurationError(
                f"alpha on average is {alpha!r}", hint="give a share above 0 and below 1, for example 0.1"
            )
    steps = _steps(scores, correct)
    found = []
    for alpha in chosen:
        kept = [each for each in steps if _kept(each[2], each[1], alpha)]
        threshold, answered, errors = kept[-1] if kept else (None, 0, 0)
        found.append(
            OnAverage(
                alpha=alpha,
                score=score,
                threshold=threshold,
                n=questions,
                answered=answered,
                errors=errors,
                covers=covers,
                data=data,
                date=date or datetime.now(UTC).date().isoformat(),
            )
        )
    return tuple(found)


def _steps(scores: Sequence[float], correct: Sequence[bool]) -> list[tuple[float, int, int]]:
    """Every threshold between different scores: (λ, answered, wrong), rising."""
    pairs = sorted(zip(map(float, scores), map(bool, correct), strict=True))
    found, errors = [], 0
    for at, (value, right) in enumerate(pairs, start=1):
        errors += not right
        if (pairs[at][0] if at < len(pairs) else math.inf) > value:
            found.append((value, at, errors))
    return found


def _kept(errors: int, answered: int, alpha: float) -> bool:
    return errors + 1 <= alpha * (answered + 1) + 1e-9  # alpha 0.1 of ten is one, however it rounds
