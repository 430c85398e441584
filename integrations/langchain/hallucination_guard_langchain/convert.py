"""Between LangChain's messages and the guard's values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.exceptions import ModelError
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCall as LangChainToolCall
from langchain_core.runnables import RunnableConfig

from hallucination_guard.errors import InputError
from hallucination_guard.guard import KEY, NotAnswered, Replying, verdict_of
from hallucination_guard.values import Message, Outcome, ToolCall

__all__ = [
    "KEY",
    "LLM_TYPE",
    "LowConfidenceError",
    "as_ai_message",
    "as_guard_messages",
    "as_let_through",
    "thread_of",
    "unreadable",
    "verdict_of",
    "without_media",
]

LLM_TYPE = "hallucination-guard"
"""By which LangChain names the kind of the guarded chat model."""

# Blocks of earlier turns that say nothing to the reader: calls stand in tool_calls, thoughts are not handed on.
_UNSAID = frozenset({"tool_use", "tool_call", "invalid_tool_call", "reasoning", "thinking"})
# Of a draft's metadata.
_KEPT = ("model_name", "model_provider", "finish_reason")
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "function"}


class LowConfidenceError(NotAnswered, ModelError):
    """The policy let no answer through, and ``on_abstain="error"`` asked for an exception.

    Retry middleware turns an ordinary exception into an answer; as a LangChain ``ModelError`` that is not retryable it
    goes through to the caller, or to a fallback model.

    Args:
        outcome: of the guarded call; its ``text`` is None.
    """


def as_guard_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Roles and texts, and the calls of tools.

    Raises:
        InputError: on a message that is not text, such as an image.
    """
    return [
        Message(
            role=_role(message),
            content=_text(message),
            tool_calls=tuple(ToolCall.of(each) for each in getattr(message, "tool_calls", ())),
            tool_call_id=getattr(message, "tool_call_id", None) or "",
            name=(message.name or "") if _role(message) == "tool" else "",
        )
        for message in messages
    ]


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    kind = message.type.removesuffix("MessageChunk").lower()
    return _ROLES.get(kind, kind)


def unreadable(messages: Iterable[BaseMessage]) -> str:
    """Why a text model cannot read these messages as they are; empty if it can."""
    kinds = {
        str(block.get("type"))
        for message in messages
        if not isinstance(message.content, str)
        for block in message.content
        if not isinstance(block, str) and block.get("type") != "text" and block.get("type") not in _UNSAID
    }
    return f"the prompt holds {', '.join(sorted(kinds))}, which a text model cannot read" if kinds else ""


def without_media(messages: Iterable[BaseMessage]) -> list[BaseMessage]:
    """The same messages with a word in the place of each block that is no text, for the record."""
    return [
        message
        if isinstance(message.content, str)
        else message.model_copy(update={"content": [_in_a_word(block) for block in message.content]})
        for message in messages
    ]


def _in_a_word(block: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(block, str) or block.get("type") == "text" or block.get("type") in _UNSAID:
        return block
    return f"[{block.get('type')}]"


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    parts = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
        elif block.get("type") == "text":
            parts.append(str(block.get("text", "")))
        elif block.get("type") not in _UNSAID:
            raise InputError(
                f"a message holds a block of type {block.get('type')!r}", hint="only text can be read by this model"
            )
    return "".join(parts)


def thread_of(config: RunnableConfig) -> str | None:
    """The conversation that a call belongs to: LangGraph's ``thread_id``."""
    found = config.get("configurable", {}).get("thread_id", config.get("metadata", {}).get("thread_id"))
    return None if found is None else str(found)


def as_ai_message(outcome: Outcome, *, abstention: str, model_name: str) -> AIMessage:
    """What the chain gets: the text let through, or the abstention; the verdict in ``response_metadata``."""
    reply = Replying(abstention)(outcome)
    return AIMessage(
        content=reply.text,
        response_metadata={
            "model_name": model_name,
            "model_provider": "hallucination_guard",
            "finish_reason": reply.finish_reason,
            **reply.metadata,
        },
        tool_calls=[
            LangChainToolCall(name=each.name, args=dict(each.arguments), id=each.id, type="tool_call")
            for each in reply.tool_calls
        ],
        usage_metadata=UsageMetadata(
            input_tokens=reply.tokens_in,
            output_tokens=reply.tokens_out,
            total_tokens=reply.tokens_in + reply.tokens_out,
        ),
    )


def as_let_through(
    outcome: Outcome, draft: AIMessage, *, said: str = "", abstention: str, model_name: str
) -> AIMessage:
    """A draft of another model's that was let through: what was decided on, and nothing else that says anything.

    Blocks that are no text, reasoning beside the text and metadata with the draft's words were not scored. Kept are its
    id, its usage, how it was drawn, and its calls as it has them.

    Args:
        outcome: of the review.
        draft: what the model gave.
        said: what was reviewed of a draft with calls: a call of what is no tool of the agent's is text there.
        abstention: see :func:`as_ai_message`.
        model_name: likewise.
    """
    message = as_ai_message(outcome, abstention=abstention, model_name=model_name)
    message.usage_metadata = draft.usage_metadata or message.usage_metadata
    message.id, message.name = draft.id, draft.name
    # Not all metadata: a server may write the draft's words anywhere.
    message.response_metadata |= {key: each for key, each in draft.response_metadata.items() if key in _KEPT}
    if said and outcome.text == said:
        message.content, message.tool_calls = str(draft.text), draft.tool_calls
    elif [_what(each) for each in draft.tool_calls] == [_what(each) for each in message.tool_calls]:
        message.tool_calls = draft.tool_calls
    return message


def _what(call: LangChainToolCall) -> tuple[str, dict[str, Any]]:
    return call["name"], call["args"]
