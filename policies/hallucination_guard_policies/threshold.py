"""Whether a verdict is certain enough: by confidence, by one raw score, or by a certified risk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import JSON, LOWER_IS_LESS_CERTAIN, Score, Verdict
from hallucination_guard_policies._check import number

__all__ = ["Reading", "Threshold", "unscored"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a verdict stands to a threshold.

    Args:
        passed: certain enough.
        words: the comparison with its numbers, or why there was nothing to compare.
        blind: the rule by which to abstain where there was nothing to compare; empty where there was.
    """

    passed: bool
    words: str
    blind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Certain enough by calibrated confidence, by one raw score, or by a certificate.

    Args:
        confidence: passes from here up, in (0, 1].
        score: name of a raw score that is higher where the model is less certain.
        limit: the raw score passes up to here.
        max_risk: passes what a certificate of at most this risk lets through, in (0, 1): of all the answers that pass
            at most this share is wrong.

    Raises:
        PolicyError: on several kinds or none, or a number out of range.
    """

    confidence: float | None = None
    score: str | None = None
    limit: float | None = None
    max_risk: float | None = None

    def __post_init__(self) -> None:
        names = ("confidence", "score", "limit", "max_risk")
        given = tuple(name for name in names if getattr(self, name) is not None)
        if given not in (("confidence",), ("score", "limit"), ("max_risk",)):
            raise PolicyError(
                f"a threshold with {', '.join(f'{name}={getattr(self, name)!r}' for name in names)}",
                hint="give either confidence, or score together with limit, or max_risk",
            )
        if self.confidence is not None:
            number("confidence", self.confidence, above=0, most=1)
        elif self.max_risk is not None:
            number("max_risk", self.max_risk, above=0, most=1)
            if self.max_risk == 1:
                raise PolicyError("max_risk is 1", hint="give a share below 1; an answer cannot be more than wrong")
        else:
            number("limit", self.limit)
            if not isinstance(self.score, str) or not self.score:
                raise PolicyError(f"score is {self.score!r}", hint="give the name of a score, for example 'hybridgrad'")
            if self.score in LOWER_IS_LESS_CERTAIN:  # compared like the others it would let the least certain through
                raise PolicyError(
                    f"score is {self.score!r}, which falls where the model is less certain",
                    hint="give one that rises, for example 'hybridgrad' or 'mean_nll'",
                )

    @property
    def needs_confidence(self) -> bool:
        """Whether it can only read verdicts that were calibrated."""
        return self.confidence is not None

    @property
    def needs_risk(self) -> float | None:
        """The risk that a certificate has to keep for it; None if it does not speak of risk."""
        return self.max_risk

    def read(self, verdict: Verdict) -> Reading:
        """Compare; a verdict without the number asked for never passes."""
        score = verdict.score
        if blind := unscored(score):
            return blind
        if self.confidence is not None:
            if verdict.confidence is None and verdict.uncovered:
                words = f"confidence ≥ {self.confidence:g} was asked for, and {verdict.uncovered}"
                return Reading(passed=False, words=words)
            if verdict.confidence is None:
                words = (
                    f"confidence ≥ {self.confidence:g} was asked for, but nothing was calibrated: give the guard "
                    "a calibration, or give the policy score and limit instead of confidence"
                )
                return Reading(passed=False, words=words, blind="uncalibrated")
            passed = verdict.confidence >= self.confidence
            value, limit = _apart(verdict.confidence, self.confidence, "f")
            return Reading(passed=passed, words=f"confidence {value} {'≥' if passed else '<'} {limit}")
        if self.max_risk is not None:
            return self._certified(verdict, self.max_risk)
        assert self.score is not None and self.limit is not None  # __post_init__ saw to it
        if self.score not in score.scores:
            words = f"there is no score {self.score!r}, only {', '.join(sorted(score.scores))}"
            return Reading(passed=False, words=words, blind="unknown_score")
        passed = score.scores[self.score] <= self.limit
        value, limit = _apart(score.scores[self.score], self.limit, "g")
        return Reading(passed=passed, words=f"{self.score} {value} {'≤' if passed else '>'} {limit}")

    @staticmethod
    def _certified(verdict: Verdict, limit: float) -> Reading:
        if verdict.suspended:
            words = f"max_risk {limit:g} was asked for, but the certificate is suspended: {verdict.suspended}"
            return Reading(passed=False, words=words, blind="suspended")
        if verdict.uncovered:
            words = f"max_risk {limit:g} was asked for, and no certificate covers the answer: {verdict.uncovered}"
            return Reading(passed=False, words=words)
        if verdict.max_risk is None:
            words = f"max_risk {limit:g} was asked for, and no certified threshold lets the answer through"
            return Reading(passed=False, words=words)
        passed = verdict.max_risk <= limit
        risk, most = _apart(verdict.max_risk, limit, "f")
        words = f"certified risk {risk} {'≤' if passed else '>'} {most} (certificate {verdict.certificate})"
        return Reading(passed=passed, words=words)

    def covers(self, other: Threshold) -> bool:
        """Whether every verdict that fails ``other`` fails this one too."""
        if self.confidence is not None:
            return other.confidence is not None and other.confidence <= self.confidence
        if self.max_risk is not None:
            return other.max_risk is not None and other.max_risk >= self.max_risk
        return other.score == self.score and other.limit is not None and other.limit >= (self.limit or 0.0)

    def written(self) -> Mapping[str, JSON]:
        """The threshold as a policy document spells it."""
        if self.confidence is not None:
            return {"below": {"confidence": self.confidence}}
        if self.max_risk is not None:
            return {"below": {"max_risk": self.max_risk}}
        return {"above": {"score": self.score, "limit": self.limit}}


def unscored(score: Score) -> Reading | None:
    """Why an answer without a score cannot be read; None of one that has a score."""
    match score.status:
        case "scored":
            return None
        case "unscorable":
            return Reading(passed=False, words=f"the answer cannot be scored: {score.reason}", blind="on_unscorable")
        case "error":
            return Reading(passed=False, words=f"scoring failed: {score.reason}", blind="on_error")
        case _:
            assert_never(score.status)


def _apart(value: float, limit: float, kind: Literal["f", "g"]) -> tuple[str, str]:
    """Both numbers, with the fewest digits that show the limit as it is and the two as different as they are."""
    for digits in range(2 if kind == "f" else 3, 18):
        left, right = f"{value:.{digits}{kind}}", f"{limit:.{digits}{kind}}"
        if float(right) == limit and (left != right or value == limit):
            return left, right
    return repr(value), repr(limit)
