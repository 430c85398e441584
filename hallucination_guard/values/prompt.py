"""What is asked: the turns of a conversation, and what the model reads of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from hallucination_guard.errors import InputError
from hallucination_guard.values.plain import JSON
from hallucination_guard.values.tools import Tool, ToolCall

__all__ = ["Message", "Messages", "Prompt", "as_messages", "checked_text", "is_batch", "question_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Args:
        role: ``system``, ``user``, ``assistant``, ``tool``: whatever the model's chat template knows.
        content: the text of the turn; of a turn that calls tools it may be empty.
        tool_calls: what an ``assistant`` turn calls.
        tool_call_id: of a ``tool`` turn, the call whose result this is.
        name: of a ``tool`` turn, the tool's.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def to_json_dict(self) -> dict[str, JSON]:
        """As the chat APIs write it; without what was not said."""
        plain: dict[str, JSON] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            plain["tool_calls"] = [each.to_json_dict() for each in self.tool_calls]
        if self.tool_call_id:
            plain["tool_call_id"] = self.tool_call_id
        if self.name:
            plain["name"] = self.name
        return plain


Messages: TypeAlias = str | Sequence[Message | Mapping[str, object]]
"""What callers may hand in as a prompt: one user message, or the turns so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model reads.

    Args:
        messages: the turns; without a chat template one ``user`` message with the raw text.
        text: the turns as the template writes them.
        token_ids: x, length P, generation header included.
        header: how many of the last ids are the generation header (0 without one).
        templated: whether a chat template wrote it.
        literal: characters (start, stop) of ``text`` that spell control tokens and were read as text.
        tools: what the model was told it may call.
        response_schema: what the answer was said to fit.
    """

    messages: tuple[Message, ...]
    text: str
    token_ids: tuple[int, ...]
    header: int
    templated: bool
    literal: tuple[tuple[int, int], ...] = ()
    tools: tuple[Tool, ...] = ()
    response_schema: Mapping[str, JSON] | None = None


def is_batch(messages: Messages | Sequence[Messages]) -> TypeGuard[Sequence[Messages]]:
    """Whether this is a list of prompts rather than one prompt."""
    return not isinstance(messages, str) and bool(messages) and not isinstance(messages[0], Message | Mapping)


def as_messages(messages: Messages) -> tuple[Message, ...]:
    """The turns as values.

    Raises:
        InputError: on an empty prompt, or a turn without a role or a text.
    """
    if isinstance(messages, str):
        messages = [Message(role="user", content=messages)]
    if not isinstance(messages, Sequence) or not messages:
        raise InputError(f"the prompt is {messages!r}", hint="give a question, or a list of role/content messages")
    turns = tuple(_as_message(message, at) for at, message in enumerate(messages))
    if not turns[-1].content.strip() and turns[-1].role != "tool":  # a tool may well have nothing to say
        raise InputError(f"the last message, of role {turns[-1].role!r}, is empty", hint="give it a text")
    return turns


def _as_message(message: object, at: int) -> Message:
    def of(name: str) -> object:
        return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)

    role, content, calls = of("role"), of("content"), of("tool_calls") or ()
    if not isinstance(role, str) or not role:
        raise InputError(f"message {at} has role {role!r}", hint="a role is a word such as 'user'")
    if content is None and calls:  # as the chat APIs write a turn that only calls
        content = ""
    if not isinstance(content, str):
        raise InputError(f"message {at}, of role {role!r}, has content {content!r}", hint="a content is a text")
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise InputError(f"message {at} has the tool calls {calls!r}", hint="give a list of calls")
    names = {}
    for name in ("tool_call_id", "name"):
        value = of(name) or ""
        if not isinstance(value, str):
            raise InputError(f"message {at} has the {name} {value!r}", hint="give a text")
        names[name] = checked_text(value, f"the {name} of message {at}")
    return Message(
        role=role,
        content=checked_text(content, f"message {at}"),
        tool_calls=tuple(ToolCall.of(each) for each in calls),
        **names,
    )


def checked_text(text: str, what: str) -> str:
    """``text``, if it can be written down.

    Raises:
        InputError: if it holds half a surrogate pair, which no tokenizer and no log can take.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds {text[error.start]!r}, half a character", hint="decode it as UTF-16 or drop it"
        ) from None
    return text


def question_of(messages: Sequence[Message]) -> str:
    """The text of the last user turn: what a retriever is asked.

    Raises:
        InputError: if no turn is the user's.
    """
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    raise InputError("no message has the role 'user'", hint="the last user message is what the answer is to")
