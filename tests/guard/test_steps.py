"""A guarded call a step at a time is the call in one go, also through JSON and with another guard object each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.errors import AuditError, ConfigurationError, InputError
from hallucination_guard.guard import Kept, Steps
from hallucination_guard.guard.kept import keep, restore
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Call, Outcome
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetrieveBelow, RetryBelow

LIMIT = {"score": "hybridgrad", "limit": 0.5}
CALL = Call(thread_id="t", principal="ana", tags={"tenant": "acme"})


def _whole(make: Callable[[], Guard], question: str = "Which animal?") -> Outcome:
    """The outcome of a call, each step of it by another guard that is given JSON text alone."""

    def through(kept: Kept) -> Any:
        return json.loads(json.dumps(kept, allow_nan=False))

    kept = Steps(make()).begin(question, request_id="r", call=CALL)
    while True:
        kept = Steps(make()).draw(through(kept))
        kept, verdict = Steps(make()).score(through(kept))
        kept, outcome = Steps(make()).decide(through(kept))
        assert verdict.score.scorer == outcome.verdict.score.scorer
        if outcome.decision.action not in ("retry", "retrieve"):
            return outcome


def _comparable(record: Any) -> tuple[Any, ...]:
    return (
        record.attempt,
        record.decision,
        record.rule,
        record.answer,
        record.scores,
        record.judged,
        record.conditions,
        record.retrieved,
        record.prompt,
        record.tokens,
    )


@pytest.mark.parametrize(
    "policy",
    [
        AbstainBelow(**LIMIT),
        RetryBelow(**LIMIT, times=2),
        RetrieveBelow(retriever=lambda query: ["Zebras are striped."], **LIMIT) | AbstainBelow(**LIMIT),
        EscalateBelow(to=None, **LIMIT),
        EscalateBelow(to=lambda messages: "Zebras.", **LIMIT),
    ],
    ids=["abstain", "retry", "retrieve", "hand over", "escalate"],
)
@pytest.mark.parametrize("scores", [(0.1, 0.1, 0.1), (1.0, 0.9, 0.1), (0.7, 0.8, 0.9)], ids=["sure", "late", "never"])
def test_a_call_in_steps_is_the_call_in_one_go(policy: Any, scores: tuple[float, ...]) -> None:
    texts = ["zebra", "quagga", "okapi"]
    found = []
    for way in ("steps", "one go"):
        sink, model = MemorySink(), ScriptedModel(texts)
        script = dict(zip(texts, scores, strict=True))

        def make(model: Any = model, sink: Any = sink, script: Any = script) -> Guard:
            return Guard(model, policy=policy, scorer=ScriptedScorer(script), audit=sink)

        outcome = _whole(make) if way == "steps" else make()("Which animal?", call=CALL)
        found.append((outcome.text, outcome.decision, outcome.attempts, outcome.tokens, outcome.retrieved))
        found.append([_comparable(each) for each in sink.records])
        assert {(each.thread_id, each.principal) for each in sink.records} == {("t", "ana")}
        assert len({each.request_id for each in sink.records}) == 1
        assert outcome.audit_ids == tuple(each.id for each in sink.records)
    assert found[:2] == found[2:]


def test_a_real_model_is_scored_the_same(tiny: WhiteBoxModel) -> None:
    settings: Any = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1}
    policy = RetryBelow(score="hybridgrad", limit=-1.0, times=2)

    def make() -> Guard:
        return Guard(tiny, policy=policy, generation=settings)

    steps, one = _whole(make), make()("Which animal?")
    assert steps.generation.response_token_ids == one.generation.response_token_ids
    assert steps.attempts == one.attempts == 3
    for name, value in one.verdict.score.scores.items():
        assert steps.verdict.score.scores[name] == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_tools_and_calls_come_back_as_they_were() -> None:
    tool = {"name": "pay", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}
    text = '<tool_call>\n{"name": "pay", "arguments": {"to": "Ana"}}\n</tool_call>'
    guard = Guard(
        ScriptedModel(text), policy=AbstainBelow(**LIMIT), scorer=ScriptedScorer(0.1), generation={"tools": [tool]}
    )
    outcome = _whole(lambda: guard)
    assert [each.arguments for each in outcome.tool_calls] == [{"to": "Ana"}]
    assert outcome.generation == guard("Which animal?").generation


def test_what_is_kept_comes_back_whole(tiny: WhiteBoxModel) -> None:
    steps = Steps(Guard(tiny, policy=RetryBelow(score="hybridgrad", limit=-1.0), generation={"max_new_tokens": 4}))
    kept, _ = steps.decide(steps.score(steps.draw(steps.begin("a", request_id="r", call=CALL)))[0])
    again = keep(restore(kept))
    assert {**again, "began": 0} == {**kept, "began": 0}


@pytest.mark.fault("graph step", "the log cannot be written", "`AuditError`; the draft stays held and is decided later")
def test_a_log_that_fails_leaves_the_draft_to_be_decided_again() -> None:
    sink, model = MemorySink(), ScriptedModel(["zebra"])  # a second answer would raise
    full = [True]

    def failing(record: Any) -> str:
        if full.pop() if full else False:
            raise OSError("the disk is full")
        return sink(record)

    steps = Steps(Guard(model, policy=AbstainBelow(**LIMIT), scorer=ScriptedScorer([0.1]), audit=failing))
    kept, _ = steps.score(steps.draw(steps.begin("a", request_id="r", call=CALL)))
    with pytest.raises(AuditError):
        steps.decide(kept)
    assert steps.decide(kept)[1].text == "zebra"
    assert [each.decision for each in sink.records] == ["accept"]


@pytest.mark.fault("graph step", "an interruption while drawing again", "recorded as interrupted; nothing leaves")
def test_an_interrupted_draw_is_recorded() -> None:
    sink = MemorySink()

    class Interrupted(ScriptedModel):
        def generate(self, messages: Any, **settings: Any) -> Any:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().generate(messages, **settings)

    policy = RetryBelow(**LIMIT, times=2)
    steps = Steps(Guard(Interrupted("zebra"), policy=policy, scorer=ScriptedScorer(1.0), audit=sink))
    kept, _ = steps.decide(steps.score(steps.draw(steps.begin("a", request_id="r", call=CALL)))[0])
    with pytest.raises(KeyboardInterrupt):  # the redraw repeats the draft, and is interrupted while it is drawn warmer
        steps.draw(kept)
    assert [each.rule for each in sink.records] == ["retry_below", "interrupted"]


def test_another_model_does_not_go_on_with_a_draft() -> None:
    def steps(fingerprint: str) -> Steps:
        model = ScriptedModel("zebra", fingerprint=fingerprint)
        return Steps(Guard(model, policy=AbstainBelow(**LIMIT), scorer=ScriptedScorer(0.1)))

    kept = steps("one").draw(steps("one").begin("a", request_id="r", call=CALL))
    with pytest.raises(ConfigurationError, match="another one"):
        steps("two").score(kept)


@pytest.mark.parametrize(
    "damage", [{}, {"attempt": "1"}, {"newest": {}}, {"asked": "a"}, {"extra": 1}, {"rules": None}]
)
def test_what_was_damaged_is_refused(damage: dict[str, Any]) -> None:
    guard = Guard(ScriptedModel("zebra"), policy=AbstainBelow(**LIMIT), scorer=ScriptedScorer(0.1))
    kept = Steps(guard).begin("a", request_id="r", call=CALL)
    with pytest.raises(InputError):
        restore({**kept, **damage} if damage else {})
