"""Writing attempts down: one record each, before anything leaves; what raises here keeps the answer in."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from typing import Literal

from hallucination_guard.audit.record import AuditRecord, Sink, record_id
from hallucination_guard.errors import AuditError, GuardError
from hallucination_guard.guard.progress import Progress
from hallucination_guard.values import (
    JSON,
    Call,
    Decision,
    Generation,
    Message,
    ModelIdentity,
    Policy,
    Score,
    ScorerIdentity,
    Verdict,
)

__all__ = ["Recorder", "Review", "policy_identity"]


_log = logging.getLogger("hallucination_guard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What became of an answer outside of the guard, for the record: a human's part in a call.

    Args:
        request_id: of the call.
        attempt: the draft that it is about.
        rule: why it waited: the policy's rule that handed it on, or ``require_approval_below``.
        said: ``held``, ``approved``, ``edited`` or ``rejected``.
        by: who said so.
        reason: in words; no text of prompt or answer.
        answer: what leaves; None where nothing does.
        call: as for a guarded call.
    """

    request_id: str
    attempt: int
    rule: str
    said: Literal["held", "approved", "edited", "rejected"]
    by: str
    reason: str
    answer: str | None = None
    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Makes records of attempts and hands them to the sink.

    Args:
        sink: where they go; None keeps none.
        policy: named in every record; see :func:`policy_identity`.
        debug: let a sink's own errors through.
    """

    sink: Sink | None
    policy: Mapping[str, JSON]
    debug: bool = False

    def draft(self, progress: Progress, decision: Decision) -> None:
        """Write down what was decided on the newest draft."""
        self._keep(progress, decision)

    def part(self, progress: Progress, decision: Decision, *, start: int, stop: int, text: str) -> None:
        """Write down that a stream lets a part of the newest draft go: the tokens from ``start`` to ``stop``."""
        if self.sink is not None:
            record = self._record(progress, decision, "", "")
            # What is only shown is no part that was let through, and begins where the first one does.
            kind = "shown" if decision.rule == "provisional" else "part"
            own = record_id(progress.request_id, progress.attempt, f"{kind} {start}-{stop}")
            part = replace(record, id=own, part={"start": start, "stop": stop}, answer=text)
            progress.audit_ids.append(self._write(part))

    def escalated(self, progress: Progress, decision: Decision, *, answered_by: str, answer: str) -> None:
        """Write down the answer of an escalation's target, which nobody scored."""
        self._keep(progress, decision, answered_by=answered_by, answer=answer)

    def reviewed(
        self, messages: Sequence[Message], review: Review, *, model: ModelIdentity, scorer: ScorerIdentity
    ) -> str:
        """Write down that an answer waits for a human, or what the human said; the record's id, or nothing."""
        record = AuditRecord(
            id=record_id(review.request_id, review.attempt, review.said),
            request_id=review.request_id,
            thread_id=review.call.thread_id,
            principal=review.call.principal,
            tags=review.call.tags,
            attempt=review.attempt,
            model=asdict(model),
            scorer={"name": scorer.name, "version": scorer.version, "settings": dict(scorer.settings)},
            status="unscorable",
            detail=f"{review.said} by {review.by}, not scored",
            policy=self.policy,
            decision="escalate",
            rule=review.rule,
            reason=review.reason,
            prompt=[message.to_json_dict() for message in messages],
            answer=review.answer,
            versions=_versions(),
        )
        return self._write(record)

    def interrupted(self, all_progress: Sequence[Progress], error: BaseException) -> None:
        """Write down what was generated and not yet recorded, before the error goes on its way."""
        for progress in all_progress:
            if progress.newest is None or progress.recorded == progress.attempt:
                continue
            decision = Decision(
                action="abstain",
                rule="interrupted",
                reason=f"{type(error).__name__} before the decision was carried out",
            )
            try:
                self._keep(progress, decision)
            except Exception as second:  # the interruption goes on its way all the same, and says so
                # A reader who closes the stream never sees the note.
                error.add_note(f"and the interrupted attempt could not be recorded: {type(second).__name__}")
                _log.warning("guard.record_lost: an interrupted attempt, by %s", type(second).__name__)

    def _keep(self, progress: Progress, decision: Decision, *, answered_by: str = "", answer: str = "") -> None:
        if self.sink is None:
            progress.recorded = progress.attempt
            return
        kept = self._write(self._record(progress, decision, answered_by, answer))
        progress.recorded = progress.attempt
        progress.audit_ids.append(kept)

    def _write(self, record: AuditRecord) -> str:
        if self.sink is None:
            return ""
        foreign = ""
        try:
            kept = self.sink(record)
        except GuardError:
            raise
        except Exception as error:
            if self.debug:
                raise
            foreign = type(error).__name__
        if foreign:  # its message may quote the record, as those of database drivers do: only its kind is named
            raise AuditError(
                f"the audit sink raised {foreign}", hint="Guard(debug=True) shows the error, which may quote the record"
            )
        if not isinstance(kept, str) or not kept:
            raise AuditError(
                f"the audit sink gave {type(kept).__name__} and not the id of the record it kept",
                hint="a sink is synchronous, returns the record's id, and raises if it could not keep it",
            )
        return kept

    def _record(self, progress: Progress, decision: Decision, answered_by: str, answer: str) -> AuditRecord:
        draft = progress.newest
        assert draft is not None
        generation, score = draft.generation, draft.verdict.score
        escalated = bool(answered_by)
        return AuditRecord(
            id=record_id(progress.request_id, progress.attempt, "answered" if escalated else "draft"),
            request_id=progress.request_id,
            thread_id=progress.call.thread_id,
            principal=progress.call.principal,
            tags=progress.call.tags,
            attempt=progress.attempt,
            model=asdict(generation.model),
            scorer={
                "name": score.scorer.name,
                "version": score.scorer.version,
                "settings": dict(score.scorer.settings),
            },
            status="unscorable" if escalated else score.status,
            detail=f"answered by {answered_by}, not scored" if escalated else score.reason,
            scores={} if escalated else dict(score.scores),
            anchor=None if escalated or score.anchor is None else asdict(score.anchor),
            prefix=None if escalated else score.prefix,
            conditions=None if escalated else progress.conditions(generation).to_json_dict(),
            uncovered="" if escalated else draft.verdict.uncovered,
            confidence=None if escalated else draft.verdict.confidence,
            certificate=None if escalated else draft.verdict.certificate,
            policy=self.policy,
            decision=decision.action,
            rule=decision.rule,
            reason=decision.reason,
            judged=(progress.judged or draft).attempt,
            tokens=_tokens(generation, score),
            seconds={"generate": generation.seconds, "score": score.seconds},
            retrieved=progress.retrieved,
            sentences=None if escalated else _sentences(draft.verdict),
            edit=None if escalated or decision.edit is None else decision.edit.to_json_dict(),
            gate="stream" if progress.streamed and not escalated else None,
            generator=None if escalated or progress.by is None else progress.by.to_json_dict(),
            prompt=[message.to_json_dict() for message in generation.messages],
            answer=answer if escalated else generation.text,
            versions=_versions(),
        )


def _tokens(generation: Generation, score: Score) -> dict[str, int]:
    """``in`` and ``out``, and how many of these were ``scored`` where thinking was left out."""
    counts = {"in": len(generation.prompt_token_ids), "out": len(generation.response_token_ids)}
    scored = len(score.token_logprobs)
    return counts if scored in (0, counts["out"]) else {**counts, "scored": scored}


def _sentences(verdict: Verdict) -> dict[str, JSON] | None:
    """What was measured of the sentences and which thresholds hold for them, without their text."""
    if not verdict.score.sentences:
        return None
    return {
        "scored": [each.to_json_dict() for each in verdict.score.sentences],
        "backoffs": [each.to_json_dict() for each in verdict.backoffs],
        "uncovered": verdict.sentences_uncovered,
    }


def policy_identity(policy: Policy) -> dict[str, JSON]:
    """How a record names a policy.

    Taken before anything is generated, so that a policy that cannot say what it is leaves no draft without a record.
    """
    plain = policy.describe()
    written = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {
        "id": plain.get("id") or type(policy).__name__,
        "version": plain.get("version") or 0,
        "hash": hashlib.sha256(written.encode()).hexdigest(),
    }


@cache
def _versions() -> dict[str, str]:
    names = ("hallucination-guard-semgrad", "torch", "transformers", "langchain-core")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
