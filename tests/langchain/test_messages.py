"""LangChain's messages as the guard reads them: roles and texts, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from hallucination_guard.errors import InputError
from hallucination_guard.testing import MemorySink
from hallucination_guard.values import ToolCall
from hallucination_guard_langchain.convert import as_guard_messages

CALL: Any = {"name": "search", "args": {"q": "Ada"}, "id": "1"}
SPOKEN: dict[str, tuple[BaseMessage, tuple[str, str]]] = {
    "human": (HumanMessage("Hm?"), ("user", "Hm?")),
    "ai": (AIMessage("Yes."), ("assistant", "Yes.")),
    "chunk": (AIMessageChunk(content="Yes."), ("assistant", "Yes.")),
    "system": (SystemMessage("Be short."), ("system", "Be short.")),
    "tool": (ToolMessage("42", tool_call_id="1"), ("tool", "42")),
    "function": (FunctionMessage(name="f", content="42"), ("function", "42")),
    "own role": (ChatMessage(role="critic", content="No."), ("critic", "No.")),
    "name": (HumanMessage("Hm?", name="Ada"), ("user", "Hm?")),
    "parts": (
        HumanMessage([{"type": "text", "text": "Who "}, "was ", {"type": "text", "text": "Ada?"}]),
        ("user", "Who was Ada?"),
    ),
    "tool parts": (ToolMessage([{"type": "text", "text": "42"}], tool_call_id="1"), ("tool", "42")),
    "tool call": (AIMessage("", tool_calls=[CALL]), ("assistant", "")),
    "call block": (
        AIMessage([{"type": "text", "text": "Wait."}, {"type": "tool_use", **CALL}]),
        ("assistant", "Wait."),
    ),
    "thought": (
        AIMessage([{"type": "reasoning", "reasoning": "…"}, {"type": "text", "text": "Yes."}]),
        ("assistant", "Yes."),
    ),
}


@pytest.mark.parametrize("kind", SPOKEN)
def test_a_message_becomes_a_role_and_a_text(kind: str) -> None:
    message, (role, content) = SPOKEN[kind]
    [found] = as_guard_messages([message])
    assert (found.role, found.content) == (role, content)


@pytest.mark.parametrize("kind", ["tool call", "tool", "human"])
def test_calls_and_the_names_of_results_stay(kind: str) -> None:
    [found] = as_guard_messages([SPOKEN[kind][0]])
    calls = {"tool call": (ToolCall(name="search", arguments={"q": "Ada"}, id="1"),)}
    assert found.tool_calls == calls.get(kind, ())
    assert found.tool_call_id == ("1" if kind == "tool" else "")


@pytest.mark.parametrize("block", ["image_url", "image", "audio", "file", "video", None])
def test_what_is_not_text_is_refused(block: str | None) -> None:
    with pytest.raises(InputError, match=repr(block)):
        as_guard_messages([HumanMessage([{"type": "text", "text": "What is this?"}, {"type": block}])])


def test_an_image_is_refused_before_anything_is_generated(open_model: Any, sink: MemorySink) -> None:
    with pytest.raises(InputError):
        open_model.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}])])
    assert sink.records == []


def test_a_tools_round_is_read_in_order(open_model: Any, sink: MemorySink) -> None:
    open_model.invoke(
        [HumanMessage("Hm?"), AIMessage("", tool_calls=[CALL]), ToolMessage("42", tool_call_id="1")],
    )
    called = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q": "Ada"}'}}
    assert sink.records[0].to_json_dict()["prompt"] == [
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


def test_an_empty_question_is_refused(open_model: Any) -> None:
    with pytest.raises(InputError, match="empty"):
        open_model.invoke("")
