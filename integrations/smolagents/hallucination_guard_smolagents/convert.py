"""Between smolagents' messages and the guard's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smolagents.models import ChatMessage, ChatMessageToolCall, ChatMessageToolCallFunction, MessageRole
from smolagents.monitoring import TokenUsage

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Reply
from hallucination_guard.values import JSON, Message, ToolCall

__all__ = ["FINAL_ANSWER", "as_chat_message", "as_guard_messages", "schema_of"]

FINAL_ANSWER = "final_answer"
"""The tool whose call ends an agent's run."""

_ROLES = {MessageRole.TOOL_CALL: "assistant", MessageRole.TOOL_RESPONSE: "user"}


def as_guard_messages(messages: Sequence[ChatMessage | dict[str, Any]]) -> list[Message]:
    """Roles and texts. Steps of an agent are texts, and turns of one role in a row are one turn, as in smolagents.

    Raises:
        InputError: on content that is not text, such as an image.
    """
    turns: list[Message] = []
    for each in messages:
        message = ChatMessage.from_dict(dict(each)) if isinstance(each, dict) else each
        role = _ROLES.get(message.role, message.role.value)
        text = _text(message.content)
        calls = tuple(ToolCall.of(_plain(call)) for call in message.tool_calls or ())
        if turns and turns[-1].role == role and not calls and not turns[-1].tool_calls:
            turns[-1] = Message(role=role, content=f"{turns[-1].content}\n{text}")
        else:
            turns.append(Message(role=role, content=text, tool_calls=calls))
    return turns


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text":
            raise InputError(
                f"a message holds a part of type {part.get('type')!r}", hint="only text can be read by this model"
            )
    return "\n".join(str(part.get("text", "")) for part in content)


def _plain(call: ChatMessageToolCall) -> dict[str, Any]:
    return {"id": call.id, "function": {"name": call.function.name, "arguments": call.function.arguments}}


def schema_of(response_format: dict[str, Any] | None) -> dict[str, JSON] | None:
    """The JSON Schema in what the chat APIs call a response format.

    Raises:
        InputError: if it asks for anything else.
    """
    if response_format is None:
        return None
    named = response_format.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise InputError(
            f"response_format is of type {response_format.get('type')!r}", hint="give a json_schema with a schema"
        )
    return schema


def as_chat_message(reply: Reply, *, offered: Sequence[str]) -> ChatMessage:
    """What the agent gets; the verdict in ``raw``.

    An agent that calls tools takes a text for an error and asks again, so what is said instead of an accepted answer
    is said as its final answer, where that tool is ``offered``.
    """
    calls = [_call(each.name, dict(each.arguments), each.id) for each in reply.tool_calls]
    if FINAL_ANSWER in offered and reply.verdict["decision"] != "accept":
        calls = [_call(FINAL_ANSWER, {"answer": reply.text}, f"call_{reply.verdict['request_id']}")]
    return ChatMessage(
        role=MessageRole.ASSISTANT,
        content=reply.text,
        tool_calls=calls or None,
        raw=reply.metadata,
        token_usage=TokenUsage(input_tokens=reply.tokens_in, output_tokens=reply.tokens_out),
    )


def _call(name: str, arguments: dict[str, Any], id: str) -> ChatMessageToolCall:
    return ChatMessageToolCall(
        function=ChatMessageToolCallFunction(name=name, arguments=arguments), id=id, type="function"
    )
