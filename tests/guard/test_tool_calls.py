"""A call is an answer: it leaves by decision of the policy, and the record has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hallucination_guard import AuditLog, Guard
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions
from hallucination_guard_policies import AbstainBelow, Accept, EscalateBelow, RetryBelow

TOOLS = [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}]
CALL = 'Let me see. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
RESULT = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "add", "args": {"a": 471100171}}]},
    {"role": "tool", "content": "", "tool_call_id": "c"},
]


def test_a_call_that_is_let_through() -> None:
    sink = MemorySink()
    outcome = Guard(ScriptedModel(CALL), policy=Accept(), scorer=ScriptedScorer(1.0), audit=sink)("1 + 1?", tools=TOOLS)
    assert outcome.text == "Let me see."
    assert [(each.name, dict(each.arguments)) for each in outcome.tool_calls] == [("add", {"a": 1})]
    assert sink.records[0].answer == CALL
    assert "[calls add]" in str(outcome)


def test_a_call_that_is_not_let_through_is_nowhere() -> None:
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    outcome = Guard(ScriptedModel(CALL), policy=policy, scorer=ScriptedScorer(1.0))("1 + 1?", tools=TOOLS)
    assert outcome.text is None
    assert outcome.tool_calls == ()
    assert "add" not in str(outcome)


def test_a_retry_calls_again_with_the_same_tools() -> None:
    other = CALL.replace("1}", "2}")
    model = ScriptedModel([CALL, other])
    policy = RetryBelow(score="hybridgrad", limit=0.5)
    outcome = Guard(model, policy=policy, scorer=ScriptedScorer({CALL: 1.0, other: 0.1}))("1 + 1?", tools=TOOLS)
    assert dict(outcome.tool_calls[0].arguments) == {"a": 2}
    assert all([each.name for each in settings["tools"]] == ["add"] for _, settings in model.calls)


def test_without_tools_the_same_text_is_text() -> None:
    outcome = Guard(ScriptedModel(CALL), policy=Accept(), scorer=ScriptedScorer(1.0))("1 + 1?")
    assert outcome.text == CALL
    assert outcome.tool_calls == ()


def test_an_answer_from_elsewhere_is_read_with_the_tools() -> None:
    guard = Guard(ScriptedModel("x"), policy=Accept(), scorer=ScriptedScorer(1.0))
    assert [each.name for each in guard.review("1 + 1?", CALL, tools=TOOLS).tool_calls] == ["add"]


def test_the_target_of_an_escalation_sees_the_calls() -> None:
    seen = []

    def colleague(messages: list[dict[str, object]]) -> str:
        seen.extend(messages)
        return "2"

    policy = EscalateBelow(to=colleague, score="hybridgrad", limit=0.5)
    Guard(ScriptedModel("3"), policy=policy, scorer=ScriptedScorer(1.0))(RESULT, tools=TOOLS)
    assert seen[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 471100171}'}  # type: ignore[index]
    assert seen[2]["tool_call_id"] == "c"


@pytest.mark.parametrize("content", ["redacted", "hmac"])
def test_a_log_that_keeps_no_text_keeps_no_arguments(tmp_path: Path, content: str) -> None:
    settings = {"key": b"0" * 32} if content == "hmac" else {}
    with AuditLog(tmp_path / "audit.jsonl", content=content, **settings) as log:  # type: ignore[arg-type]
        Guard(ScriptedModel(CALL), policy=Accept(), scorer=ScriptedScorer(1.0), audit=log)(RESULT, tools=TOOLS)
    assert "471100171" not in (tmp_path / "audit.jsonl").read_text()
    assert (tmp_path / "audit.jsonl").read_text().count("\n") == 1


def test_tools_are_conditions_of_a_calibration() -> None:
    model, asked = ScriptedModel("x"), [{"role": "user", "content": "1 + 1?"}]
    frames = {
        Conditions.of(model.generate(asked)).frame,
        Conditions.of(model.generate(asked, tools=TOOLS)).frame,
        Conditions.of(model.generate(asked, tools=TOOLS, tool_choice="required")).frame,
        Conditions.of(model.generate(asked, response_schema={"type": "object"})).frame,
    }
    assert len(frames) == 4
