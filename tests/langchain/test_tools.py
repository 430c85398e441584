"""Tools and schemas through LangChain's own doors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from pydantic import BaseModel

from hallucination_guard import Guard
from hallucination_guard.errors import InputError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_langchain import GuardedChatModel, LowConfidenceError
from hallucination_guard_langchain.structured import whole_object
from hallucination_guard_policies import AbstainBelow

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def _chat(answer: str, score: float = 0.1) -> tuple[GuardedChatModel, ScriptedModel]:
    model = ScriptedModel(answer)
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    return GuardedChatModel(guard=Guard(model, policy=policy, scorer=ScriptedScorer(score))), model


def test_a_call_is_a_message_with_tool_calls() -> None:
    chat, model = _chat(CALL)
    message = chat.bind_tools([add]).invoke("1 + 2?")
    assert [(each["name"], each["args"]) for each in message.tool_calls] == [("add", {"a": 1, "b": 2})]
    assert message.text == ""
    assert model.calls[0][1]["tools"][0].description == "Add two numbers."


def test_a_streamed_call_is_one_chunk_after_the_decision() -> None:
    chat, _ = _chat(CALL)
    chunks = list(chat.bind_tools([add]).stream("1 + 2?"))
    whole = chunks[0]
    for each in chunks[1:]:
        whole = whole + each  # type: ignore[assignment]
    assert whole.tool_calls[0]["args"] == {"a": 1, "b": 2}


def test_a_doubtful_call_is_an_abstention() -> None:
    chat, _ = _chat(CALL, score=1.0)
    message = chat.bind_tools([add]).invoke("1 + 2?")
    assert message.tool_calls == []
    assert "not sure enough" in message.text


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "auto"), ("auto", "auto"), ("none", "none"), ("any", "required"), ("required", "required"),
        (True, "required"), (False, "auto"), ("add", "add"), ({"type": "function", "function": {"name": "add"}}, "add"),
    ],
)  # fmt: skip
def test_every_way_of_saying_tool_choice(given: Any, meant: str) -> None:
    chat, model = _chat(CALL)
    chat.bind_tools([add], tool_choice=given).invoke("1 + 2?")
    assert model.calls[0][1]["tool_choice"] == meant


def test_a_choice_of_no_tool_is_refused() -> None:
    with pytest.raises(InputError, match="tool_choice"):
        _chat(CALL)[0].bind_tools([add], tool_choice="other")


def test_calls_and_results_of_earlier_turns_are_read() -> None:
    chat, model = _chat("3")
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c"}
    turns = [HumanMessage("1 + 2?"), AIMessage("", tool_calls=[call]), ToolMessage("3", tool_call_id="c", name="add")]
    chat.invoke(turns)
    asked = model.calls[0][0]
    assert (asked[1].tool_calls[0].name, asked[2].tool_call_id, asked[2].name) == ("add", "c", "add")


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_an_answer_is_an_object(method: Any) -> None:
    chat, model = _chat(json.dumps({"name": "Ada", "age": 36}))
    assert chat.with_structured_output(Person, method=method).invoke("Who?") == Person(name="Ada", age=36)
    assert set(model.calls[0][1]["response_schema"]["properties"]) == {"name", "age"}


def test_a_calls_arguments_are_an_object() -> None:
    chat, model = _chat('<tool_call>{"name": "Person", "arguments": {"name": "Ada", "age": 36}}</tool_call>')
    found = chat.with_structured_output(Person, method="function_calling").invoke("Who?")
    assert found == Person(name="Ada", age=36)
    assert model.calls[0][1]["tool_choice"] == "required"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_no_object_stands_for_an_abstention(method: Any) -> None:
    chat, _ = _chat(json.dumps({"name": "Ada", "age": 36}), score=1.0)
    with pytest.raises(LowConfidenceError):
        chat.with_structured_output(Person, method=method).invoke("Who?")
    raw: Any = chat.with_structured_output(Person, method="json_schema", include_raw=True).invoke("Who?")
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)
    assert "Ada" not in str(raw)


@pytest.mark.parametrize("text", ['{"name": "Ada", "age"', '{"name": "Ada"}', "Ada"])
def test_an_object_that_was_cut_is_none(text: str) -> None:
    with pytest.raises(OutputParserException) as found:
        whole_object(Person)(AIMessage(text))
    assert "Ada" not in str(found.value)
