"""Verdicts out of records: with the confidence that was recorded, or with what another calibration says."""

from __future__ import annotations

from dataclasses import replace

from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.audit.sentences import of_sentences
from hallucination_guard.calibration import Calibration, Certificate
from hallucination_guard.errors import AuditError, CalibrationMismatch
from hallucination_guard.values import (
    JSON,
    LOWER_IS_LESS_CERTAIN,
    Conditions,
    ModelIdentity,
    Policy,
    Score,
    ScorerIdentity,
    Verdict,
)

__all__ = ["Verdicts"]


class Verdicts:
    """Makes verdicts of records: with their own confidence, or with what another calibration says.

    Args:
        calibration: whose confidence to use; None for the recorded confidence.
        policy: of a calibration with certificates, those that cover this policy are used.
    """

    def __init__(self, calibration: Calibration | None = None, policy: Policy | None = None) -> None:
        self.calibration = calibration
        self._policy = policy
        covered = () if calibration is None or policy is None else calibration.covering(policy)
        self._certificates: tuple[Certificate, ...] = tuple(covered)
        self._identities: list[tuple[JSON, JSON, ScorerIdentity]] = []

    def __call__(self, record: AuditRecord, *, at_least: float = 0.0) -> Verdict:
        """The verdict that the record was decided on, or would have been.

        Args:
            record: of an attempt, or of a beginning of a streamed one.
            at_least: of a stream, the greatest value that the calibration read of a shorter beginning.

        Raises:
            CalibrationMismatch: the calibration was fitted on another model or scorer than the record's.
            CalibrationError: it has no certificate that keeps the risk that the policy asks for.
            AuditError: the record's score cannot be.
        """
        scorer = self._scorer(record)
        try:
            drawn = None if record.conditions is None else Conditions.from_json_dict(record.conditions)
            sentences, held = of_sentences(record.sentences)
            score = Score(
                status=record.status, scorer=scorer, reason=record.detail, scores=record.scores, sentences=sentences
            )
            if self.calibration is None:
                return Verdict(
                    score=score,
                    confidence=record.confidence,
                    finish_reason=None if drawn is None else drawn.endings[0],
                    uncovered=record.uncovered,
                    **held,
                )
        except (ValueError, TypeError, KeyError) as error:
            raise AuditError(f"the record {record.id} holds no verdict: {error}", hint="verify the log") from None
        if self.calibration.gate != (record.gate or "answer"):
            raise CalibrationMismatch(
                f"record {record.id} is of the gate {record.gate or 'answer'!r}, and the calibration of "
                f"{self.calibration.gate!r}",
                hint="replay it with one that was fitted for this gate",
            )
        # As the guard does: what was certified of single drafts says nothing about a second one. Whether scores had
        # drifted by then, only a decision by this rule says.
        holding = [each for each in self._certificates if each.policy is not None or record.attempt == 1]
        suspended = record.reason if record.rule == "suspended" else ""
        verdict = self.calibration.verdict(
            score, conditions=drawn, certificates=holding, suspended=suspended, at_least=at_least
        )
        return replace(verdict, **held)

    def value(self, verdict: Verdict) -> float:
        """What the calibration reads of it; 0 without a calibration or a score."""
        if self.calibration is None or verdict.score.status != "scored":
            return 0.0
        return self.calibration.value(verdict.score)

    def doubt(self, verdict: Verdict) -> tuple[int, float] | None:
        """How the guard orders drafts, the most certain first; None if the log does not say what it ordered by."""
        score = verdict.score
        if score.status != "scored":
            return (2, 0.0)
        if self.calibration is not None:
            return (int(verdict.confidence is None), self.calibration.value(score))
        if verdict.confidence is not None:
            return (0, -verdict.confidence)
        name = score.scorer.name  # a scorer is named after the score that it is about
        if name not in score.scores:
            if len(score.scores) > 1:
                return None
            [name] = score.scores
        value = score.scores[name]
        return (int(bool(verdict.uncovered)), -value if name in LOWER_IS_LESS_CERTAIN else value)

    def _scorer(self, record: AuditRecord) -> ScorerIdentity:
        """A log has few models and scorers and many records: each pair is built and checked once."""
        for model, scorer, known in self._identities:
            if model == record.model and scorer == record.scorer:
                return known
        try:
            plain = record.to_json_dict()
            identity = ScorerIdentity(**plain["scorer"])
            if self.calibration is not None:
                self.calibration.check(ModelIdentity(**plain["model"]), identity, self._policy)
        except CalibrationMismatch as error:
            raise CalibrationMismatch(f"record {record.id}: {error.message}", hint=error.hint) from None
        except TypeError:
            raise AuditError(
                f"the record {record.id} does not name its model and scorer in full", hint="verify the log"
            ) from None
        self._identities.append((record.model, record.scorer, identity))
        return identity
