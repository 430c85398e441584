"""What scores mean in a guard: verdicts, which certificates hold, whether scores drifted, which draft is better."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hallucination_guard.calibration import Calibration, Certificate, DriftMonitor, SentenceCalibration
from hallucination_guard.values import LOWER_IS_LESS_CERTAIN, Conditions, Score, Verdict, Watch

__all__ = ["Judging", "suspended_by"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """From a score to a verdict.

    Args:
        calibration: None where there is none: verdicts then have no confidence.
        certificates: those that cover the policy.
        drift: watches the scores of first drafts; None where nothing is to be suspended.
        novelty: watches how new they are; None where nothing says it.
        watch: of the risk, by labels; None where there is none.
        primary: the score by which drafts are compared where nothing was calibrated.
        sentences: thresholds for the sentences of answers; None where there are none.
    """

    calibration: Calibration | None
    certificates: tuple[Certificate, ...]
    drift: DriftMonitor | None
    novelty: DriftMonitor | None = None
    watch: Watch | None = None
    primary: str
    sentences: SentenceCalibration | None = None

    def verdict(
        self,
        score: Score,
        *,
        conditions: Conditions,
        attempt: int,
        at_least: float = 0.0,
        notices: bool | None = None,
    ) -> Verdict:
        """What the score means.

        Args:
            score: of the answer.
            conditions: how it was drawn, and how it ended.
            attempt: which one it is.
            at_least: the value that the calibration reads is at least this: the greatest of a stream so far.
            notices: whether drift is noticed by it; by default by first drafts, as the calibration's reference is made
                of them.
        """
        if self.calibration is None:
            return self._with_backoffs(Verdict(score=score, finish_reason=conditions.endings[0]), conditions)
        notices = attempt == 1 if notices is None else notices
        if self.drift is not None and notices and score.status == "scored":
            self.drift.observe(self.calibration.value(score))
            if self.novelty is not None and self.calibration.novelty is not None:
                self.novelty.observe(self.calibration.novelty.of(score))
        # A certificate of single drafts says nothing about a second one, whatever the policy says of itself.
        holding = [each for each in self.certificates if each.policy is not None or attempt == 1]
        suspended = suspended_by(self.drift, self.novelty, self.watch)
        verdict = self.calibration.verdict(
            score, conditions=conditions, certificates=holding, suspended=suspended, at_least=at_least
        )
        return self._with_backoffs(verdict, conditions)

    def _with_backoffs(self, verdict: Verdict, conditions: Conditions) -> Verdict:
        if self.sentences is None or not verdict.score.sentences:
            return verdict
        completed = self.sentences.completed(verdict.score.sentences)
        verdict = replace(verdict, score=replace(verdict.score, sentences=completed))
        if lacking := self.sentences.conditions.lacks(conditions):
            return replace(verdict, sentences_uncovered=lacking)
        return replace(verdict, backoffs=self.sentences.backoffs)

    def value(self, score: Score, *, at_least: float = 0.0) -> float:
        """What the calibration reads of a score, or ``at_least``, whichever is more; 0 without a calibration."""
        if self.calibration is None or score.status != "scored":
            return at_least
        return max(at_least, self.calibration.value(score))

    def doubt(self, verdict: Verdict) -> tuple[int, float]:
        """How drafts are ordered, the most certain first; cut ones come later, those without a score last."""
        if verdict.score.status != "scored":
            return (2, 0.0)
        if self.calibration is not None:  # not by the confidence, of which an isotonic map gives many drafts the same
            return (int(verdict.confidence is None), self.calibration.value(verdict.score))
        value = verdict.score.scores[self.primary]
        return (0, -value if self.primary in LOWER_IS_LESS_CERTAIN else value)


def suspended_by(*watching: DriftMonitor | Watch | None) -> str:
    """Why certificates do not hold at the moment; empty while they do."""
    return "; ".join(why for each in watching if each is not None and (why := each.suspended))
