"""Run any policy over an existing log, without a model: what it would have decided, and what that would have cost.

A record holds what a decision was taken from, so the decision can be taken again, by another policy, another threshold
or another calibration. What the log cannot say is not guessed: where a policy wants a draft that was never drawn, the
outcome is unknown and counted apart.

Replayed is the policy, not the world. What is taken from the log as it was: the drafts and their scores, a redraw for a
redraw and a retrieval for a retrieval (whatever their settings), a retrieval or an escalation that failed, the guard's
own limit of attempts, and the seconds of generating and scoring (waiting is not in the log, so a time budget is
replayed as a lower bound).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from hallucination_guard.audit.chain import canonical
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.audit.request import Final, Request, requests
from hallucination_guard.audit.tally import Tally
from hallucination_guard.audit.verdicts import Verdicts
from hallucination_guard.calibration import Calibration
from hallucination_guard.errors import PolicyError
from hallucination_guard.values import Decision, FrozenDict, Policy, Redraw, Situation, Verdict

__all__ = ["Flip", "Replayed", "replay", "replay_each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A request that would end otherwise.

    Args:
        request_id: of the call.
        id: of the record that ended it.
        was: how it ended.
        now: how it would end.
        was_attempt: the draft that the end was about.
        now_attempt: the draft that it would be about.
    """

    request_id: str
    id: str
    was: Final
    now: Final
    was_attempt: int
    now_attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A policy's decisions over a log, beside the log's own.

    Args:
        policy: hash of its description, as records name it.
        now: what it makes of the requests.
        then: what was made of them.
        flips: requests that are known to end otherwise: by another verb, or by accepting another draft.
        unknown_because: how many outcomes are unknown for which reason.
    """

    policy: str
    now: Tally
    then: Tally
    flips: tuple[Flip, ...]
    unknown_because: Mapping[str, int] = field(default_factory=dict)


def replay(
    records: Iterable[AuditRecord],
    policy: Policy,
    *,
    calibration: Calibration | None = None,
    labels: Mapping[str, bool] | None = None,
) -> Replayed:
    """Run a policy over the records of a log.

    Args:
        records: in the order of the log, for example :func:`~hallucination_guard.audit.records` of its path.
        policy: decides; what its decisions would call is never called.
        calibration: whose confidence to use instead of the recorded one.
        labels: of one judge: whether the answer of a record was right, by the record's id.

    Raises:
        CalibrationMismatch: the calibration was fitted on another model or scorer than a record's.
        PolicyError: the policy decides what is no decision.
        AuditError: a record cannot be read.
    """
    return replay_each(records, [policy], calibration=calibration, labels=labels)[0]


def replay_each(
    records: Iterable[AuditRecord],
    policies: Sequence[Policy],
    *,
    calibration: Calibration | None = None,
    labels: Mapping[str, bool] | None = None,
) -> list[Replayed]:
    """:func:`replay` for each of several policies, reading the records once."""
    shared, known = Verdicts(calibration), labels or {}
    runs = [_Run(policy, shared) for policy in policies]
    for request in requests(records):
        read = [_read(shared, request, record) for record in request.attempts]
        for run in runs:
            run.add(request, read, known)
    return [run.replayed() for run in runs]


@dataclass(frozen=True, slots=True)
class _End:
    """How a call would end, about which attempt's draft; or why that is unknown."""

    action: Final | None
    judged: int = 0
    why: str = ""


class _Run:
    """One policy on its way through a log."""

    def __init__(self, policy: Policy, shared: Verdicts) -> None:
        self._policy = policy
        self._hash = hashlib.sha256(canonical(policy.describe()).encode("ascii")).hexdigest()
        self._as_recorded = shared.calibration is None
        self._needs_confidence = bool(getattr(policy, "needs_confidence", False))
        self._needs_risk = getattr(policy, "needs_risk", None) is not None
        self._edits = bool(getattr(policy, "edits", False))
        # Which certificates hold depends on the policy; all else of a verdict does not, and is shared.
        self._verdicts = Verdicts(shared.calibration, policy) if self._needs_risk else shared
        self._now: Counter[str] = Counter()
        self._then: Counter[str] = Counter()
        self._flips: list[Flip] = []
        self._unknown: Counter[str] = Counter()

    def add(self, request: Request, read: Sequence[Sequence[Verdict]], labels: Mapping[str, bool]) -> None:
        moves: Counter[str] = Counter()
        if self._needs_risk:
            read = [_read(self._verdicts, request, record) for record in request.attempts]
        end = self._end_of(request.attempts, read, moves)
        was, last = request.decided, request.last
        _count(self._now, request, end.action, end.judged, moves, labels)
        made = Counter(record.decision for record in request.attempts[:-1])
        _count(self._then, request, was, last.judged, made, labels)
        if end.action is None:
            self._unknown[end.why] += 1
        elif was is not None and (was != end.action or (was == "accept" and last.judged != end.judged)):
            flip = Flip(
                request_id=request.id,
                id=last.id,
                was=was,
                now=end.action,
                was_attempt=last.judged,
                now_attempt=end.judged,
            )
            self._flips.append(flip)

    def _end_of(self, attempts: Sequence[AuditRecord], read: Sequence[Sequence[Verdict]], moves: Counter[str]) -> _End:
        """The guard's loop, with the log in place of the model."""
        verdicts = [each[-1] for each in read]
        judged = 0
        redraw: Redraw | None = None
        rules: list[str] = []
        seconds = 0.0
        if not attempts:
            return _End(None, why="the log does not have the first attempt")
        for at, (record, verdict) in enumerate(zip(attempts, verdicts, strict=True)):
            if record.rule == "interrupted" and record.status != "scored":
                return _End(None, why="the call was interrupted before the draft was scored")
            if self._needs_confidence and record.status == "scored" and verdict.confidence is None:
                return _End(None, why="the policy speaks of confidence and the record has none")
            if self._edits and record.status == "scored" and record.sentences is None:
                return _End(None, why="the policy acts on sentences and the record has none")
            if self._needs_risk and self._as_recorded:
                return _End(None, why="the policy speaks of max_risk and no calibration was given")
            seconds += sum(record.seconds.values())
            # After a retrieval it is another prompt, judged afresh; a stream goes on after what it let go.
            if redraw is None or redraw.keep == "last" or record.gate == "stream":
                judged = at
            else:
                old, new = (self._verdicts.doubt(verdicts[each]) for each in (judged, at))
                if old is None or new is None:
                    return _End(None, why="the log does not say by which score the best draft was chosen")
                # Drafts that an isotonic map gives one confidence were told apart by a score: the log says how.
                if new < old or (new == old and self._as_recorded and record.judged == at + 1):
                    judged = at
            situation = Situation(attempt=record.attempt, rules=tuple(rules), seconds=seconds)
            asked = read[at] if record.gate == "stream" else [verdicts[judged]]
            decision, beginnings = self._first_objection(asked, situation)
            if record.gate == "stream" and decision.action == "accept" and record.decision != "accept":
                return _End(None, why="the stream ended before the answer that would be let through")
            if beginnings < len(asked) and decision.action in ("retry", "retrieve"):
                return _End(None, why=f"the log has no attempt after the {decision.action} that is wanted")
            rules.append(decision.rule)
            match decision.action:
                case "accept" | "abstain":
                    return _End(decision.action, judged + 1)
                case "escalate":
                    return _End("abstain" if record.rule == "escalate_failed" else "escalate", judged + 1)
                case "retry" | "retrieve":
                    if self._ended_then(record, decision):
                        return _End("abstain", judged + 1)
                    if record.decision != decision.action or at + 1 == len(attempts):
                        return _End(None, why=f"the log has no attempt after the {decision.action} that is wanted")
                    moves[decision.action] += 1
                    redraw = decision.move if isinstance(decision.move, Redraw) else None
                case _:
                    assert_never(decision.action)
        raise AssertionError("every decision ends the call or has a next attempt")

    def _first_objection(self, asked: Sequence[Verdict], situation: Situation) -> tuple[Decision, int]:
        """The policy's decision on the first of them that it does not let through, or on the last; and which it is."""
        for number, verdict in enumerate(asked, start=1):
            decision = self._policy(verdict, situation)
            if not isinstance(decision, Decision):
                raise PolicyError(f"the policy decided {decision!r}", hint="a policy gives a Decision, also to accept")
            if decision.action != "accept" or number == len(asked):
                return decision, number
        raise AssertionError("an attempt has a record")

    def _ended_then(self, record: AuditRecord, decision: Decision) -> bool:
        """Whether the attempt that the policy wants could not be had when the log was written."""
        if record.rule in ("max_attempts", f"{decision.action}_failed"):
            return True
        # The same policy on the same verdict wanted it too, and only its time budget, of which the log knows a lower
        # bound, was in the way.
        same = self._as_recorded and record.policy.get("hash") == self._hash
        return same and record.rule == "budget"

    def replayed(self) -> Replayed:
        return Replayed(
            policy=self._hash,
            now=Tally(**self._now),
            then=Tally(**self._then),
            flips=tuple(self._flips),
            unknown_because=FrozenDict(self._unknown),
        )


def _read(verdicts: Verdicts, request: Request, record: AuditRecord) -> list[Verdict]:
    """The verdicts on an attempt: one, or of a stream one for each beginning."""
    found: list[Verdict] = []
    doubt = 0.0
    for each in request.beginnings(record) if record.gate == "stream" else (record,):
        found.append(verdicts(each, at_least=doubt))
        doubt = max(doubt, verdicts.value(found[-1]))
    return found


_COUNTED = {"accept": "accepted", "abstain": "abstained", "escalate": "escalated", None: "unknown"}


def _count(
    counts: Counter[str],
    request: Request,
    action: Final | None,
    judged: int,
    moves: Mapping[Any, int],
    labels: Mapping[str, bool],
) -> None:
    counts["requests"] += 1
    counts[_COUNTED[action]] += 1
    if action is None:
        return
    redraws, retrievals = moves.get("retry", 0), moves.get("retrieve", 0)
    counts["redraws"] += redraws
    counts["retrievals"] += retrievals
    counts["attempts"] += 1 + redraws + retrievals
    if action == "accept" and judged <= len(request.attempts):
        label = labels.get(request.attempts[judged - 1].id)
        if label is not None:
            counts["right" if label else "wrong"] += 1
