"""What scores mean in a guard: verdicts, which certificates hold, whether scores drifted, which draft is better."""

from __future__ import annotations

from dataclasses import dataclass

from hallucination_guard.calibration import Calibration, Certificate, DriftMonitor
from hallucination_guard.values import LOWER_IS_LESS_CERTAIN, Score, Verdict

__all__ = ["Judging"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """From a score to a verdict.

    Args:
        calibration: None where there is none: verdicts then have no confidence.
        certificates: those that cover the policy.
        drift: watches first drafts; None where nothing is to be suspended.
        primary: the score by which drafts are compared where nothing was calibrated.
    """

    calibration: Calibration | None
    certificates: tuple[Certificate, ...]
    drift: DriftMonitor | None
    primary: str

    def verdict(self, score: Score, *, attempt: int) -> Verdict:
        """What the score means. Drift is noticed by first drafts, as the calibration's reference is made of them."""
        if self.calibration is None:
            return Verdict(score=score)
        if self.drift is not None and attempt == 1 and score.status == "scored":
            self.drift.observe(self.calibration.value(score))
        # A certificate of single drafts says nothing about a second one, whatever the policy says of itself.
        holding = [each for each in self.certificates if each.policy is not None or attempt == 1]
        suspended = "" if self.drift is None else self.drift.suspended
        return self.calibration.verdict(score, certificates=holding, suspended=suspended)

    def doubt(self, verdict: Verdict) -> tuple[bool, float]:
        """How drafts are ordered, the most certain first; one without a score comes last."""
        if verdict.score.status != "scored":
            return (True, 0.0)
        if self.calibration is not None:  # not by the confidence, of which an isotonic map gives many drafts the same
            return (False, self.calibration.value(verdict.score))
        value = verdict.score.scores[self.primary]
        return (False, -value if self.primary in LOWER_IS_LESS_CERTAIN else value)
