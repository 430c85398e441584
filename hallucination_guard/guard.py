"""Guard: generate, score, decide, act, and write down every attempt before anything leaves.

The loop is synchronous and works on a batch; one call is a batch of one, and the async methods run it in a thread.
It fails closed by construction: text leaves only in an Outcome, an Outcome is made only from a Decision, and a Decision
comes only from the policy, after its record was written.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from typing import Any, assert_never
from uuid import uuid4

from tenacity import Retrying, retry_if_result

from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.calibration import Calibration
from hallucination_guard.calls import ask, look_up
from hallucination_guard.certificate import Certificate
from hallucination_guard.drift import DriftMonitor
from hallucination_guard.errors import (
    AuditError,
    CallError,
    ConfigurationError,
    GuardError,
    InputError,
    PolicyError,
    ScoringError,
)
from hallucination_guard.template import as_messages, question_of
from hallucination_guard.types import (
    JSON,
    LOWER_IS_LESS_CERTAIN,
    Decision,
    Escalate,
    Generation,
    Message,
    Messages,
    Outcome,
    Passage,
    Policy,
    Redraw,
    Retrieve,
    Score,
    Scorer,
    Sink,
    Situation,
    Verdict,
)

__all__ = ["Guard", "with_passages"]

# What the application makes of these is its own: they go to the standard logger, under one key of ``extra``.
_log = logging.getLogger("hallucination_guard")
_SETTINGS = frozenset({"max_new_tokens", "temperature", "top_p", "seed", "stop", "question"})
_NUDGES = 2  # a redraw that repeats an earlier draft is drawn this often again, each time warmer
_FAR = 7919  # further than any number of redraws, so that no seed is used twice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    attempt: int
    generation: Generation
    verdict: Verdict


@dataclass(slots=True, kw_only=True)
class _Call:
    """One prompt on its way to an outcome."""

    messages: tuple[Message, ...]
    asked: tuple[Message, ...]
    settings: dict[str, Any]
    thread_id: str | None
    request_id: str = field(default_factory=lambda: uuid4().hex)
    began: float = field(default_factory=time.perf_counter)
    given: Generation | None = None
    drawn: set[tuple[int, ...]] = field(default_factory=set)
    attempt: int = 0
    rules: list[str] = field(default_factory=list)
    redraw: Redraw | None = None
    redraws: int = 0
    retrieved: tuple[str, ...] = ()
    newest: _Draft | None = None
    judged: _Draft | None = None
    recorded: int = 0
    audit_ids: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "score": 0.0})
    tokens: dict[str, int] = field(default_factory=lambda: {"in": 0, "out": 0})
    outcome: Outcome | None = None


class Guard:
    """A model whose answers leave only by decision of a policy.

    Args:
        model: a :class:`~hallucination_guard.model.WhiteBoxModel`.
        policy: decides what happens with each answer.
        scorer: measures; HybridGrad by default.
        calibration: turns scores into confidences; needed by a policy that speaks of confidence.
        audit: where the record of every attempt goes; without one nothing is kept.
        drift: notices when scores no longer look like the calibration's, and suspends certificates from then on; by
            default one is made for a calibration whose certificates cover the policy.
        generation: defaults for every call: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``,
            ``question`` (see ``WhiteBoxModel.generate``).
        max_attempts: after so many answers a policy's wish for another is an abstention, whatever its own budget says.
        batch_size: prompts that are generated and scored together by :meth:`batch`.

    Raises:
        ConfigurationError: if these can not work together; ``CalibrationMismatch`` for a stranger's calibration.
    """

    def __init__(
        self,
        model: Any,
        *,
        policy: Policy,
        scorer: Scorer | None = None,
        calibration: Calibration | None = None,
        audit: Sink | None = None,
        drift: DriftMonitor | None = None,
        generation: Mapping[str, Any] | None = None,
        max_attempts: int = 16,
        batch_size: int = 8,
    ) -> None:
        if scorer is None:
            from hallucination_guard.scoring import HybridGrad

            scorer = HybridGrad()
        if not isinstance(policy, Policy) or not callable(policy):
            raise ConfigurationError(
                f"the policy is {policy!r}", hint="it is called with a verdict and has describe(); see AbstainBelow"
            )
        if audit is not None and not callable(audit):
            raise ConfigurationError(f"the audit sink is {audit!r}", hint="for example AuditLog('audit.jsonl')")
        if calibration is None and getattr(policy, "needs_confidence", False):
            raise ConfigurationError(
                "the policy speaks of confidence and the guard has no calibration",
                hint="give calibration=Calibration.load(...), or a policy with score=... and limit=...",
            )
        for name, value in (("max_attempts", max_attempts), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} is {value!r}", hint="a whole number, at least 1")
        self.model = model
        self.policy = policy
        self.scorer = scorer
        self.calibration = calibration
        self.audit = audit
        self.drift = drift
        self._watched: Calibration | None = None
        self._certificates: tuple[Certificate, ...] = ()
        self.generation = _checked(generation or {})
        self.max_attempts = max_attempts
        self.batch_size = batch_size
        self._check_calibration()

    def __call__(self, messages: Messages, *, thread_id: str | None = None, **generation: Any) -> Outcome:
        """Answer one prompt, or not.

        Args:
            messages: a string, or role/content messages.
            thread_id: of the conversation, for the log.
            **generation: overrides the guard's ``generation`` for this call.

        Raises:
            InputError: if the prompt can not be used.
            AuditError: if the log can not be written; then nothing is let through.
        """
        return self._run([messages], thread_id, generation)[0]

    def batch(self, prompts: Sequence[Messages], *, thread_id: str | None = None, **generation: Any) -> list[Outcome]:
        """Answer several prompts, generated and scored together; each gets what it would get alone."""
        if isinstance(prompts, str):
            raise InputError(f"the batch is the text {prompts[:40]!r}", hint="give a list of prompts")
        return self._run(prompts, thread_id, generation)

    def review(
        self, messages: Messages, answer: str | Sequence[int], *, thread_id: str | None = None, **generation: Any
    ) -> Outcome:
        """Decide on an answer that something else wrote; further attempts, if the policy wants any, are the model's.

        Args:
            messages: what it is an answer to.
            answer: its text, or its token ids in this model's vocabulary.
            thread_id: of the conversation, for the log.
            **generation: settings of further attempts.
        """
        return self._run([messages], thread_id, generation, answers=[answer])[0]

    async def acall(self, messages: Messages, *, thread_id: str | None = None, **generation: Any) -> Outcome:
        """:meth:`__call__` in a thread. A cancelled task drops the outcome; the attempt is still recorded."""
        return await asyncio.to_thread(self, messages, thread_id=thread_id, **generation)

    async def abatch(
        self, prompts: Sequence[Messages], *, thread_id: str | None = None, **generation: Any
    ) -> list[Outcome]:
        """:meth:`batch` in a thread."""
        return await asyncio.to_thread(self.batch, prompts, thread_id=thread_id, **generation)

    # ----------------------------------------------------------------------------------------------- the loop

    def _run(
        self,
        prompts: Sequence[Messages],
        thread_id: str | None,
        generation: Mapping[str, Any],
        *,
        answers: Sequence[str | Sequence[int]] = (),
    ) -> list[Outcome]:
        settings = {**self.generation, **_checked(generation)}
        self._check_calibration()  # the weights, or the calibration, may have been changed since the last call
        calls = []
        for prompt in prompts:
            messages = as_messages(prompt)
            self.model.prompt(messages)  # a prompt that can not be used is refused before anything is generated
            calls.append(_Call(messages=messages, asked=messages, settings=settings, thread_id=thread_id))
        for call, answer in zip(calls, answers, strict=False):
            call.given = self.model.read(call.messages, answer=answer, question=settings.get("question"))
        another = Retrying(retry=retry_if_result(bool))  # it ends because every decision but two uses up an attempt
        try:
            another(self._round, calls)
        except BaseException as error:
            self._record_interrupted(calls, error)
            raise
        return [call.outcome for call in calls if call.outcome is not None]

    def _check_calibration(self) -> None:
        needs_risk = getattr(self.policy, "needs_risk", None) is not None
        if needs_risk and (uncovered := getattr(self.policy, "uncertified", "")):
            raise PolicyError(uncovered, hint="let every rule of the policy say the same max_risk")
        if self.calibration is None:
            if needs_risk:
                raise ConfigurationError(
                    "the policy speaks of max_risk and the guard has no calibration",
                    hint="give one with certificates: hallucination-guard calibrate --alpha ...",
                )
            self._certificates = ()
            return
        self.calibration.check(self.model.identity, self.scorer.identity, self.policy)
        self._certificates = self.calibration.covering(self.policy)
        if self._watched not in (None, self.calibration):
            self.drift = None  # it compares with another calibration's scores: a new one is watched afresh
        if self._certificates and self.drift is None:
            self.drift = DriftMonitor(self.calibration.reference)
        self._watched = self.calibration

    def _round(self, calls: Sequence[_Call]) -> list[_Call]:
        """One attempt for every call without an outcome; those that want another."""
        for group in _alike([call for call in calls if call.outcome is None]):
            for begin in range(0, len(group), self.batch_size):
                self._attempt(group[begin : begin + self.batch_size])
        return [call for call in calls if call.outcome is None]

    def _attempt(self, group: list[_Call]) -> None:
        generations = [call.given for call in group if call.given is not None] or self._draw_new(group)
        unfinished = Score.failed("interrupted while scoring", scorer=self.scorer.identity)
        for call, generation in zip(group, generations, strict=True):
            call.given = None
            call.drawn.add(generation.response_token_ids)
            call.attempt += 1
            call.newest = _Draft(attempt=call.attempt, generation=generation, verdict=Verdict(score=unfinished))
        scores = self._score(generations)
        for generation in generations:
            generation.release()
        for call, generation, score in zip(group, generations, scores, strict=True):
            self._judge(call, generation, score)

    def _draw_new(self, group: list[_Call]) -> list[Generation]:
        """Answers; of a redraw, ones that this call has not drawn yet, as far as the model has others to give."""
        settings = _draw(group[0])
        made: list[Generation] = self.model.generate([call.messages for call in group], **settings)
        for nudge in range(1, _NUDGES + 1):
            pairs = zip(group, made, strict=True)
            stale = [at for at, (call, each) in enumerate(pairs) if each.response_token_ids in call.drawn]
            if group[0].redraw is None or not stale:
                break
            warmer = {
                **settings,
                "seed": settings["seed"] + _FAR * nudge,
                "temperature": settings["temperature"] * (1 + nudge / 2),
            }
            others = self.model.generate([group[at].messages for at in stale], **warmer)
            for at, other in zip(stale, others, strict=True):
                made[at] = replace(other, seconds=made[at].seconds + other.seconds)
        return made

    def _score(self, generations: Sequence[Generation]) -> list[Score]:
        """Scores, or the words why there are none: any failure becomes a score that the policy must decide on."""
        identity = self.scorer.identity
        try:
            scores = self.scorer.batch(self.model, generations)
        except Exception as error:
            if len(generations) > 1:  # one that fails must not take the others with it
                return [self._score([each])[0] for each in generations]
            _log_failure("scoring", error)
            return [Score.failed(_in_words(error), scorer=identity)]
        if not isinstance(scores, list) or len(scores) != len(generations):
            return [Score.failed("the scorer did not give one score an answer", scorer=identity) for _ in generations]
        return [
            score
            if isinstance(score, Score) and score.scorer == identity
            else Score.failed("what the scorer gave is not a score of its own", scorer=identity)
            for score in scores
        ]

    def _judge(self, call: _Call, generation: Generation, score: Score) -> None:
        call.seconds["generate"] += generation.seconds
        call.seconds["score"] += score.seconds
        call.tokens["in"] += len(generation.prompt_token_ids)
        call.tokens["out"] += len(generation.response_token_ids)
        verdict = self._verdict(call, score)
        call.newest = _Draft(attempt=call.attempt, generation=generation, verdict=verdict)
        if call.judged is None or call.redraw is None or call.redraw.keep == "last":
            call.judged = call.newest
        else:
            call.judged = min(call.judged, call.newest, key=self._doubt)
        decision = self._decide(call, call.judged.verdict)
        call.rules.append(decision.rule)
        self._carry_out(call, call.judged, decision)

    def _verdict(self, call: _Call, score: Score) -> Verdict:
        """What the score means. Drift is noticed by first drafts, as the calibration's reference is made of them."""
        if self.calibration is None:
            return Verdict(score=score)
        if self.drift is not None and call.attempt == 1 and score.status == "scored":
            self.drift.observe(self.calibration.value(score))
        # A certificate of single drafts says nothing about a second one, whatever the policy says of itself.
        holding = [each for each in self._certificates if each.policy is not None or call.attempt == 1]
        suspended = "" if self.drift is None else self.drift.suspended
        return self.calibration.verdict(score, certificates=holding, suspended=suspended)

    def _doubt(self, draft: _Draft) -> tuple[bool, float]:
        verdict = draft.verdict
        if verdict.score.status != "scored":
            return (True, 0.0)
        if self.calibration is not None:  # not by the confidence, of which an isotonic map gives many drafts the same
            return (False, self.calibration.value(verdict.score))
        value = verdict.score.scores[self.scorer.primary]
        return (False, -value if self.scorer.primary in LOWER_IS_LESS_CERTAIN else value)

    def _decide(self, call: _Call, verdict: Verdict) -> Decision:
        situation = Situation(attempt=call.attempt, rules=tuple(call.rules), seconds=time.perf_counter() - call.began)
        decision = self.policy(verdict, situation)
        if not isinstance(decision, Decision):
            raise PolicyError(f"the policy decided {decision!r}", hint="a policy gives a Decision, also to accept")
        if decision.action in ("retry", "retrieve") and call.attempt >= self.max_attempts:
            return Decision(
                action="abstain",
                rule="max_attempts",
                reason=f"{call.attempt} attempts were made and the policy wants another: {decision.reason}",
            )
        return decision

    def _carry_out(self, call: _Call, draft: _Draft, decision: Decision) -> None:
        """Act, record, and end the call or set up its next attempt."""
        match decision.action:
            case "accept" | "abstain":
                self._record(call, decision)
                self._end(call, draft, decision, draft.generation.text if decision.action == "accept" else None)
            case "retry":
                assert isinstance(decision.move, Redraw)
                self._record(call, decision)
                call.redraw = decision.move
                call.redraws += 1
            case "retrieve":
                assert isinstance(decision.move, Retrieve)
                self._retrieve(call, draft, decision, decision.move)
            case "escalate":
                assert isinstance(decision.move, Escalate)
                self._escalate(call, draft, decision, decision.move)
            case _:
                assert_never(decision.action)

    def _retrieve(self, call: _Call, draft: _Draft, decision: Decision, move: Retrieve) -> None:
        try:
            passages = look_up(move, question_of(call.asked))
            messages = with_passages(call.asked, passages, move.template)
            self.model.prompt(messages)  # with the passages it may exceed the context
        except (CallError, InputError) as error:
            self._give_up(call, draft, decision, error)
            return
        self._record(call, decision)
        call.messages = messages
        call.retrieved = tuple(passage.id for passage in passages)
        call.redraw, call.redraws, call.judged = None, 0, None  # another prompt: its drafts are judged afresh

    def _escalate(self, call: _Call, draft: _Draft, decision: Decision, move: Escalate) -> None:
        if move.to is None:
            self._record(call, decision)
            self._end(call, draft, decision, None)
            return
        try:
            answer = ask(move, call.asked)
        except CallError as error:
            self._give_up(call, draft, decision, error)
            return
        self._record(call, decision)
        name = getattr(move.to, "__qualname__", type(move.to).__qualname__)
        self._record(call, decision, answered_by=name, answer=answer)
        self._end(call, draft, decision, answer)

    def _give_up(self, call: _Call, draft: _Draft, decision: Decision, error: GuardError) -> None:
        _log_failure(decision.action, error)
        closed = Decision(
            action="abstain",
            rule=f"{decision.action}_failed",
            reason=f"{error}; it was tried because {decision.reason}",
        )
        self._record(call, closed)
        self._end(call, draft, closed, None)

    def _end(self, call: _Call, draft: _Draft, decision: Decision, text: str | None) -> None:
        total = time.perf_counter() - call.began
        call.outcome = Outcome(
            text=text,
            decision=decision,
            verdict=draft.verdict,
            attempts=call.attempt,
            generation=draft.generation,
            audit_ids=tuple(call.audit_ids),
            seconds={**call.seconds, "total": total},
            tokens=dict(call.tokens),
            retrieved=call.retrieved,
            request_id=call.request_id,
        )
        _log.info(
            "guard.decision",
            extra={
                "hallucination_guard": {
                    "request_id": call.request_id,
                    "decision": decision.action,
                    "rule": decision.rule,
                    "confidence": draft.verdict.confidence,
                    "attempts": call.attempt,
                    "seconds": round(total, 4),
                }
            },
        )

    # ---------------------------------------------------------------------------------------------- recording

    def _record(self, call: _Call, decision: Decision, *, answered_by: str = "", answer: str = "") -> None:
        """Write one record; what raises here keeps the answer in.

        Args:
            call: whose newest attempt it is.
            decision: what was decided.
            answered_by: the escalation target, when the record is about its answer and not about a draft.
            answer: that answer.
        """
        if self.audit is None:
            call.recorded = call.attempt
            return
        draft = call.newest
        assert draft is not None
        generation, score = draft.generation, draft.verdict.score
        escalated = bool(answered_by)
        record = AuditRecord(
            request_id=call.request_id,
            thread_id=call.thread_id,
            attempt=call.attempt,
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
            confidence=None if escalated else draft.verdict.confidence,
            certificate=None if escalated else draft.verdict.certificate,
            policy=self._policy_identity(),
            decision=decision.action,
            rule=decision.rule,
            reason=decision.reason,
            judged=(call.judged or draft).attempt,
            tokens={"in": len(generation.prompt_token_ids), "out": len(generation.response_token_ids)},
            seconds={"generate": generation.seconds, "score": score.seconds},
            retrieved=call.retrieved,
            prompt=[{"role": message.role, "content": message.content} for message in generation.messages],
            answer=answer if escalated else generation.text,
            versions=_versions(),
        )
        kept = self.audit(record)
        if not isinstance(kept, str) or not kept:
            raise AuditError(
                f"the audit sink gave {type(kept).__name__} and not the id of the record it kept",
                hint="a sink is synchronous, returns the record's id, and raises if it could not keep it",
            )
        call.recorded = call.attempt
        call.audit_ids.append(kept)

    def _record_interrupted(self, calls: Sequence[_Call], error: BaseException) -> None:
        """What was generated but not yet written down is written down before the error goes on its way."""
        for call in calls:
            if call.newest is None or call.recorded == call.attempt:
                continue
            decision = Decision(
                action="abstain",
                rule="interrupted",
                reason=f"{type(error).__name__} before the decision was carried out",
            )
            try:
                self._record(call, decision)
            except Exception as second:  # the interruption goes on its way all the same, and says so
                error.add_note(f"and the interrupted attempt could not be recorded: {type(second).__name__}: {second}")

    def _policy_identity(self) -> dict[str, JSON]:
        plain = self.policy.describe()
        written = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return {
            "id": plain.get("id") or type(self.policy).__name__,
            "version": plain.get("version") or 0,
            "hash": hashlib.sha256(written.encode()).hexdigest(),
        }


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise ConfigurationError(
            f"unknown generation settings {unknown!r}", hint=f"known are {', '.join(sorted(_SETTINGS))}"
        )
    return dict(settings)


def _draw(call: _Call) -> dict[str, Any]:
    """The settings of the next attempt: a redraw samples, each time with another seed."""
    if call.redraw is None:
        return call.settings
    move = call.redraw
    drawn = {"temperature": move.temperature, "top_p": move.top_p, "seed": move.seed + call.redraws - 1}
    return {**call.settings, **drawn}


def _alike(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Calls whose next attempts can be generated together."""
    groups: dict[str, list[_Call]] = {}
    for call in calls:
        groups.setdefault(repr(sorted(_draw(call).items())), []).append(call)
    return list(groups.values())


def with_passages(messages: tuple[Message, ...], passages: Sequence[Passage], template: str) -> tuple[Message, ...]:
    """The turns with the passages written into the last user turn."""
    last = max(at for at, message in enumerate(messages) if message.role == "user")
    numbered = "\n".join(f"[{at}] {passage.text}" for at, passage in enumerate(passages, start=1))
    content = template.format(passages=numbered, question=messages[last].content)
    return (*messages[:last], Message(role="user", content=content), *messages[last + 1 :])


def _in_words(error: Exception) -> str:
    """The kind of error; its message may quote the prompt, which the log need not be allowed to hold."""
    return f"{error.message}" if isinstance(error, ScoringError) else f"{type(error).__name__} while scoring"


def _log_failure(what: str, error: Exception) -> None:
    """The whole error for those who look: the record only names its kind."""
    _log.debug("guard.failure in %s", what, exc_info=error)


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
