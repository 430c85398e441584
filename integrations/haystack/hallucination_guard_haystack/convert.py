"""Between Haystack's messages and the guard's values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from haystack.dataclasses import ChatMessage, ReasoningContent, TextContent, ToolCall, ToolCallResult

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Reply
from hallucination_guard.values import Message
from hallucination_guard.values import ToolCall as GuardToolCall

__all__ = ["as_chat_message", "as_guard_messages"]


def as_guard_messages(messages: str | Sequence[ChatMessage]) -> list[Message]:
    """Roles and texts, and the calls of tools.

    Raises:
        InputError: on content that is not text, such as an image.
    """
    if isinstance(messages, str):
        return [Message(role="user", content=messages)]
    return [turn for message in messages for turn in _turns(message)]


def _turns(message: ChatMessage) -> Iterator[Message]:
    """Of one message: itself, or a turn for each result of a tool in it."""
    parts = list(message._content)  # there is no public way to all of it
    for part in parts:
        if not isinstance(part, TextContent | ToolCall | ToolCallResult | ReasoningContent):
            raise InputError(f"a message holds a {type(part).__name__}", hint="only text can be read by this model")
    for result in message.tool_call_results:
        yield Message(
            role="tool",
            content=_result(result),
            tool_call_id=result.origin.id or "",
            name=result.origin.tool_name,
        )
    if not message.tool_call_results:
        calls = tuple(
            GuardToolCall(name=each.tool_name, arguments=each.arguments, id=each.id or "")
            for each in message.tool_calls
        )
        yield Message(role=message.role.value, content="\n".join(message.texts), tool_calls=calls)


def _result(result: ToolCallResult) -> str:
    if isinstance(result.result, str):
        return result.result
    texts = []
    for part in result.result:
        if not isinstance(part, TextContent):
            raise InputError(
                f"a tool's result holds a {type(part).__name__}", hint="only text can be read by this model"
            )
        texts.append(part.text)
    return "\n".join(texts)


def as_chat_message(reply: Reply, *, model_name: str) -> ChatMessage:
    """What the pipeline gets; the verdict in ``meta``."""
    meta: dict[str, Any] = {
        "model": model_name,
        "index": 0,
        "finish_reason": reply.ended,
        "usage": {
            "prompt_tokens": reply.tokens_in,
            "completion_tokens": reply.tokens_out,
            "total_tokens": reply.tokens_in + reply.tokens_out,
        },
        **reply.metadata,
    }
    calls = [
        ToolCall(tool_name=each.name, arguments=dict(each.arguments), id=each.id or None) for each in reply.tool_calls
    ]
    return ChatMessage.from_assistant(reply.text or None if calls else reply.text, meta=meta, tool_calls=calls or None)
