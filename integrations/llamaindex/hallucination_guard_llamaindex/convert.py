"""Between LlamaIndex's messages and the guard's values."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Reply
from hallucination_guard.values import Message, ToolCall

__all__ = ["as_chat_response", "as_completion", "as_guard_messages", "calls_of"]

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def as_guard_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Roles and texts, and the calls of tools.

    Raises:
        InputError: on a block that is not text, such as an image.
    """
    return [
        Message(
            role=_ROLES.get(message.role, message.role.value),
            content="\n".join(block.text for block in _read(message.blocks) if isinstance(block, TextBlock)),
            tool_calls=calls_of(message),
            tool_call_id=message.additional_kwargs.get("tool_call_id") or "",
            name=message.additional_kwargs.get("name") or "",
        )
        for message in messages
    ]


def _read(blocks: Sequence[ContentBlock]) -> list[TextBlock | ToolCallBlock]:
    """The blocks that the model reads; thoughts are not handed on, and a mark for a cache says nothing."""
    for block in blocks:
        if not isinstance(block, TextBlock | ToolCallBlock | ThinkingBlock | CachePoint):
            raise InputError(
                f"a message holds a block of type {block.block_type!r}", hint="only text can be read by this model"
            )
    return [block for block in blocks if isinstance(block, TextBlock | ToolCallBlock)]


def calls_of(message: ChatMessage) -> tuple[ToolCall, ...]:
    """The calls in a message."""
    written = [
        {"name": block.tool_name, "arguments": block.tool_kwargs, "id": block.tool_call_id}
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]
    # Where older versions of LlamaIndex, and what they stored, keep the calls.
    return tuple(ToolCall.of(each) for each in written or message.additional_kwargs.get("tool_calls") or ())


def as_chat_response(reply: Reply, *, streamed: bool = False) -> ChatResponse:
    """What LlamaIndex gets; the verdict lies in ``additional_kwargs`` and in ``raw``, which is what agents hand on.

    It does not lie in the message: what is there goes into the prompt of the next model that reads the history.
    """
    calls = [
        ToolCallBlock(tool_name=each.name, tool_kwargs=dict(each.arguments), tool_call_id=each.id)
        for each in reply.tool_calls
    ]
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, blocks=[TextBlock(text=reply.text), *calls]),
        delta=reply.text if streamed else None,
        raw=_raw(reply),
        additional_kwargs=reply.metadata,
    )


def as_completion(reply: Reply, *, streamed: bool = False) -> CompletionResponse:
    """The same for a completion, which has no calls."""
    return CompletionResponse(
        text=reply.text,
        delta=reply.text if streamed else None,
        raw=_raw(reply),
        additional_kwargs=reply.metadata,
    )


def _raw(reply: Reply) -> dict[str, object]:
    return {**reply.metadata, "usage": {"input_tokens": reply.tokens_in, "output_tokens": reply.tokens_out}}
