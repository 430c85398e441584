"""What a score means: a calibrated confidence, and the risk that a certificate keeps."""

from __future__ import annotations

from dataclasses import dataclass

from hallucination_guard.values.generation import FinishReason
from hallucination_guard.values.score import Score
from hallucination_guard.values.sentence import Backoff

__all__ = ["Verdict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A score and what it means.

    Args:
        score: what was measured.
        confidence: calibrated P(correct) in [0, 1]; None when nothing was calibrated.
        max_risk: the smallest certified α whose threshold lets this answer through: of all the answers let through
            there at most this share is wrong; None when no certificate does.
        certificate: id of the certificate that says so.
        suspended: why certificates do not hold at the moment; empty while they do.
        finish_reason: how the answer ended; None where that is not recorded.
        uncovered: what of the answer the calibration does not cover, in words: then no certificate lets it through,
            and it has no confidence if it was cut where no labelled answer was. Empty if nothing.
        backoffs: thresholds for the sentences of this answer that hold for it; empty where there are none.
        sentences_uncovered: why no threshold of the calibration of sentences holds for it; empty if there is none, or
            they do.
    """

    score: Score
    confidence: float | None = None
    max_risk: float | None = None
    certificate: str | None = None
    suspended: str = ""
    finish_reason: FinishReason | None = None
    uncovered: str = ""
    backoffs: tuple[Backoff, ...] = ()
    sentences_uncovered: str = ""

    def __post_init__(self) -> None:
        if self.backoffs and (self.score.status != "scored" or self.sentences_uncovered):
            raise ValueError("thresholds of sentences hold for what is scored and covered")
        if (self.max_risk is None) != (self.certificate is None):
            raise ValueError(f"a verdict has max_risk {self.max_risk!r} by the certificate {self.certificate!r}")
        if self.max_risk is not None:
            if not 0.0 < self.max_risk < 1.0:  # also false for NaN
                raise ValueError(f"max_risk is {self.max_risk!r}, not a number between 0 and 1")
            if self.score.status != "scored" or self.suspended or self.uncovered:
                raise ValueError("no certificate lets through what has no score or is not covered, or is suspended")
        if self.confidence is not None:
            if not 0.0 <= self.confidence <= 1.0:  # also false for NaN
                raise ValueError(f"a confidence is {self.confidence!r}, not a number in [0, 1]")
            if self.score.status != "scored":
                raise ValueError(f"an answer that is {self.score.status!r} cannot have a confidence")
