"""Between pydantic-ai's messages and the guard's values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic_ai.messages import (
    CachePoint,
    InstructionPart,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextContent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.usage import RequestUsage

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Reply
from hallucination_guard.values import Message, ToolCall

__all__ = ["as_guard_messages", "as_model_response"]


def as_guard_messages(messages: Sequence[ModelMessage], instructions: Sequence[InstructionPart]) -> list[Message]:
    """Roles and texts, and the calls of tools; the system prompts and the instructions are one turn, the first.

    Raises:
        InputError: on a part that is not text, such as an image.
    """
    turns = [
        turn
        for message in messages
        for turn in (_asked(message) if isinstance(message, ModelRequest) else _answered(message))
    ]
    begin = next((at for at, turn in enumerate(turns) if turn.role != "system"), len(turns))
    standing = [*(turn.content for turn in turns[:begin]), *(part.content for part in instructions)]
    system = [Message(role="system", content="\n\n".join(standing))] if standing else []
    return [*system, *turns[begin:]]


def _asked(request: ModelRequest) -> Iterator[Message]:
    for part in request.parts:
        match part:
            case SystemPromptPart():
                yield Message(role="system", content=part.content)
            case UserPromptPart():
                yield Message(role="user", content=_text(part))
            case ToolReturnPart():
                if part.files:
                    raise InputError(f"the tool {part.tool_name!r} gave a file", hint="only text can be read")
                yield Message(
                    role="tool",
                    content=part.model_response_str(),
                    tool_call_id=part.tool_call_id,
                    name=part.tool_name,
                )
            case _:  # what an agent translates before it asks a model, or does not send to models of text
                raise InputError(f"a request holds a part {part.part_kind!r}", hint="let an agent prepare it")


def _text(part: UserPromptPart) -> str:
    if isinstance(part.content, str):
        return part.content
    texts = []
    for each in part.content:
        if isinstance(each, CachePoint):  # a mark that says nothing
            continue
        if not isinstance(each, str | TextContent):
            raise InputError(f"a prompt holds a {type(each).__name__}", hint="only text can be read by this model")
        texts.append(each if isinstance(each, str) else each.content)
    return "\n".join(texts)


def _answered(response: ModelResponse) -> Iterator[Message]:
    for part in response.parts:
        # Thoughts are not handed on.
        if not isinstance(part, TextPart | ToolCallPart | ThinkingPart):
            raise InputError(f"an answer holds a part {part.part_kind!r}", hint="only text can be read by this model")
    yield Message(
        role="assistant",
        content="\n\n".join(part.content for part in response.parts if isinstance(part, TextPart)),
        tool_calls=tuple(
            ToolCall(name=part.tool_name, arguments=part.args_as_dict(), id=part.tool_call_id)
            for part in response.parts
            if isinstance(part, ToolCallPart)
        ),
    )


def as_model_response(reply: Reply, *, model_name: str, provider_name: str) -> ModelResponse:
    """What the agent gets; the verdict in ``metadata``, which no model is sent."""
    calls = [
        ToolCallPart(tool_name=each.name, args=dict(each.arguments), tool_call_id=each.id)
        if each.id
        else ToolCallPart(tool_name=each.name, args=dict(each.arguments))
        for each in reply.tool_calls
    ]
    texts = [TextPart(content=reply.text)] if reply.text or not calls else []
    return ModelResponse(
        parts=[*texts, *calls],
        usage=RequestUsage(input_tokens=reply.tokens_in, output_tokens=reply.tokens_out),
        model_name=model_name,
        provider_name=provider_name,
        finish_reason="tool_call" if reply.ended == "tool_calls" else reply.ended,
        metadata=reply.metadata,
    )
