"""Any guard, any call, any fault at any step, in any order: what leaves was accepted, recorded before, and covered.

Invariants: a text means that the record of an accepting or escalating decision was kept before it left; of every draft
there is a record, or an exception was raised and nothing left; a certificate in a record means that its conditions
held.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hallucination_guard import Calibration, Guard
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.calibration.certificate import Certificate
from hallucination_guard.errors import GuardError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions, Decision, Generation, ModelIdentity, Outcome, Score
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    Budget,
    EscalateBelow,
    RetrieveBelow,
    RetryBelow,
    Unscored,
    Within,
)

RUNS = int(os.environ.get("STATEFUL", "300"))
FAULTS = ("none", "raise", "interrupt", "odd", "memory")
WHERE = ("generate", "score", "policy", "sink", "retriever", "target", "identity")


class Boom(Exception):
    """A fault that quotes what it should not."""


class Faulty:
    """Raises, or gives something odd, at one place when its time comes."""

    def __init__(self) -> None:
        self.where, self.kind, self.after = "", "none", 0

    def __call__(self, where: str, quoting: object = "") -> bool:
        """Whether something odd is to be given instead."""
        if where != self.where or self.kind == "none":
            return False
        self.after -= 1
        if self.after >= 0:
            return False
        match self.kind:
            case "raise":
                raise Boom(f"failed on {quoting}")
            case "interrupt":
                raise KeyboardInterrupt
            case "memory":
                raise MemoryError
        return True


class Model(ScriptedModel):
    def __init__(self, fault: Faulty) -> None:
        self.fault, self.drafts, self.ending = fault, 0, "stop"
        self.texts: list[str] = []
        super().__init__("unused")

    @property
    def identity(self) -> ModelIdentity:
        self.fault("identity")
        return self.plain

    @identity.setter
    def identity(self, value: ModelIdentity) -> None:
        self.plain = value

    def _next(self, messages: Any, settings: dict[str, Any]) -> str:
        odd = self.fault("generate")
        self.drafts += 1
        self._ending = self.ending
        self.texts.append("" if odd else f"draft-{self.drafts}")
        return self.texts[-1]


class Scorer(ScriptedScorer):
    def __init__(self, fault: Faulty) -> None:
        super().__init__(1.0)
        self.fault, self.value = fault, 1.0

    def _line(self, generation: Generation) -> Any:
        odd = self.fault("score", generation.text)
        return Score.unscorable("odd", scorer=self.identity) if odd else self.value


class Policy:
    """A policy of the library, that fails now and then."""

    redraws = True

    def __init__(self, policy: Any, fault: Faulty) -> None:
        self.policy, self.fault = policy, fault
        for name in ("needs_confidence", "needs_risk", "redraws", "uncertified", "unnamed"):
            setattr(self, name, getattr(policy, name))

    def __call__(self, verdict: Any, situation: Any) -> Decision:
        return None if self.fault("policy", verdict) else self.policy(verdict, situation)  # type: ignore[return-value]

    def describe(self) -> Any:
        return self.policy.describe()


class Sink:
    def __init__(self, fault: Faulty) -> None:
        self.fault, self.kept = fault, []  # type: ignore[var-annotated]

    def __call__(self, record: AuditRecord) -> str:
        odd = self.fault("sink", record.answer)
        if odd:
            return ""
        self.kept.append(record)
        return record.id


RAW: dict[str, Any] = {"score": "hybridgrad", "limit": 1.0}
SURE: dict[str, Any] = {"confidence": 0.4}
RISK: dict[str, Any] = {"max_risk": 0.3}


class Search:
    identity = "a passage"

    def __init__(self, fault: Faulty) -> None:
        self.fault = fault

    def __call__(self, query: str) -> Any:
        return [] if self.fault("retriever", query) else ["a passage"]


def policies(fault: Faulty, below: dict[str, Any]) -> dict[str, Any]:
    def target(messages: Any) -> Any:
        return None if fault("target", messages) else "from the target"

    abstain, retry = AbstainBelow(**below), RetryBelow(**below, times=2)
    retrieve, escalate = RetrieveBelow(**below, retriever=Search(fault)), EscalateBelow(**below, to=target)
    found: dict[str, Any] = {
        "abstain": abstain,
        "retry": retry | abstain,
        "last": RetryBelow(**below, times=3, keep="last") | abstain,
        "retrieve": retrieve | abstain,
        "escalate": escalate,
        "all": retrieve | retry | escalate,
        "within": Within(retry | escalate, Budget(attempts=2)),
        "both": abstain & escalate,
    }
    if "max_risk" not in below:
        found |= {
            "accept": Accept(),
            "unscored": Unscored(retry | abstain, on_unscorable="accept", on_error="escalate", to=target),
        }
    return found


def calibration(model: Model, policy: Any) -> Calibration:
    """P(correct) = 1 / (1 + score), and a certificate up to the score 1 for what the policy lets through."""
    from hallucination_guard.calibration.certificate import drafts_hash

    plain: dict[str, Any] = {
        "score": "hybridgrad", "intercept": 0.0, "slope": 1.0, "fingerprint": "scripted", "structure": "",
        "dtype": "float32", "template": "none", "scorer": "hybridgrad", "scorer_version": "scripted",
        "scorer_settings": {}, "examples": 20, "correct": 10, "data": "none",
        "conditions": Conditions.of(ScriptedModel("x").generate("Who?")), "reference": tuple(range(20)),
    }  # fmt: skip
    bare = Calibration(**plain)
    certificate = Certificate(
        alpha=0.3, delta=0.1, score="hybridgrad", threshold=1.0, n=100, answered=50, errors=2, bound=0.1, fitted=50,
        date="2026-01-01", data="none", covers=bare.covered, policy=drafts_hash(policy) if policy.redraws else None,
    )  # fmt: skip
    return Calibration(**{**plain, "certificates": (certificate,)})


class Guarded(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fault = Faulty()
        self.model, self.scorer, self.sink = Model(self.fault), Scorer(self.fault), Sink(self.fault)
        self.guard = Guard(self.model, policy=Accept(), scorer=self.scorer, audit=self.sink)
        self.left: list[Outcome] = []
        self.certified: tuple[Certificate, ...] = ()

    @initialize()
    def begin(self) -> None:
        self.put_together("abstain", RISK)

    @rule(name=st.sampled_from(sorted(policies(Faulty(), RAW))), below=st.sampled_from([RAW, SURE, RISK]))
    def put_together(self, name: str, below: dict[str, Any]) -> None:
        kind, self.fault.kind = self.fault.kind, "none"
        found = policies(self.fault, below)
        policy = Policy(found.get(name, found["abstain"]), self.fault)
        fitted = None if below is RAW else calibration(self.model, policy)
        self.guard = Guard(
            self.model, policy=policy, scorer=self.scorer, calibration=fitted, audit=self.sink, max_attempts=4
        )
        self.certified = () if fitted is None else fitted.certificates
        self.fault.kind = kind

    @rule(value=st.sampled_from([0.2, 1.0, 1.1, 5.0]), ending=st.sampled_from(["stop", "length", "stop_text"]))
    def answers_are(self, value: float, ending: str) -> None:
        self.scorer.value, self.model.ending = value, ending

    @rule(where=st.sampled_from(WHERE), kind=st.sampled_from(FAULTS), after=st.integers(0, 3))
    def a_fault_is_set(self, where: str, kind: str, after: int) -> None:
        self.fault.where, self.fault.kind, self.fault.after = where, kind, after

    @rule(temperature=st.sampled_from([None, 0.7]), prompts=st.integers(1, 3))
    def ask(self, temperature: float | None, prompts: int) -> None:
        settings = {} if temperature is None else {"temperature": temperature}
        asked = [f"Question {at}?" for at in range(prompts)]
        self._call(lambda: self.guard.batch(asked, **settings), covered=not settings)

    @rule(answer=st.sampled_from(["from elsewhere", "", "..."]), unscorable=st.sampled_from(["", "an image"]))
    def review(self, answer: str, unscorable: str) -> None:
        self._call(lambda: [self.guard.review("Question?", answer, unscorable=unscorable)], covered=False, given=answer)

    def _call(self, run: Any, *, covered: bool, given: str | None = None) -> None:
        drawn, kept = len(self.model.texts), len(self.sink.kept)
        outcomes: list[Outcome] = []
        failure: BaseException | None = None
        try:
            outcomes = run()
        except (GuardError, Boom, MemoryError, KeyboardInterrupt, ValueError, TypeError) as error:
            failure = error
        written = self.sink.kept[kept:]
        if failure is None:
            texts = {*self.model.texts[drawn:], *([given] if given is not None else [])}
            assert texts <= {record.answer for record in written}, "every draft has a record"
        else:
            assert not isinstance(failure, GuardError) or "draft-" not in str(failure), "an error quotes no draft"
        for record in written:
            if record.certificate is not None:
                assert covered and record.certificate in {each.id for each in self.certified}
                assert record.conditions is not None and record.conditions["endings"] == ("stop",)
                assert record.conditions["temperature"] == 0.0 and record.uncovered == ""
        for outcome in outcomes:
            own = [record for record in written if record.request_id == outcome.request_id]
            if outcome.text is not None:
                assert own[-1].decision in ("accept", "escalate")
                assert own[-1].id == outcome.audit_ids[-1]
                judged = next(each for each in own if each.attempt == own[-1].judged)
                assert outcome.text == (own[-1].answer if own[-1].decision == "escalate" else judged.answer)
            if outcome.text is not None and outcome.decision.action == "accept" and self.guard.policy.needs_risk:  # type: ignore[attr-defined]
                assert judged.certificate is not None
        self.left += outcomes
        self.fault.kind = "none"

    @invariant()
    def nothing_without_a_decision(self) -> None:
        for outcome in self.left:
            assert outcome.text is None or outcome.decision.action in ("accept", "escalate")
            assert outcome.audit_ids


Guarded.TestCase.settings = settings(
    max_examples=RUNS,
    stateful_step_count=20,
    deadline=None,
    database=None,
    derandomize="STATEFUL" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
TestGuarded = pytest.mark.timeout(300 + RUNS)(Guarded.TestCase)
