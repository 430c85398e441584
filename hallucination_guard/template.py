"""From what a caller says to token ids: messages, chat template, prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from hallucination_guard.errors import InputError
from hallucination_guard.types import Message, Messages

__all__ = ["Prompt", "as_messages", "checked_text", "is_batch", "question_of", "render", "rendered", "template_hash"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model reads.

    Args:
        messages: the turns; without a chat template one ``user`` message with the raw text.
        text: the turns as the template writes them.
        token_ids: x, length P, generation header included.
        header: how many of the last ids are the generation header (0 without one).
        templated: whether a chat template wrote it.
    """

    messages: tuple[Message, ...]
    text: str
    token_ids: tuple[int, ...]
    header: int
    templated: bool


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
    if not turns[-1].content.strip():
        raise InputError(f"the last message, of role {turns[-1].role!r}, is empty", hint="give it a text")
    return turns


def _as_message(message: Any, at: int) -> Message:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
    else:
        role, content = getattr(message, "role", None), getattr(message, "content", None)
    if not isinstance(role, str) or not role:
        raise InputError(f"message {at} has role {role!r}", hint="a role is a word such as 'user'")
    if not isinstance(content, str):
        raise InputError(f"message {at}, of role {role!r}, has content {content!r}", hint="a content is a text")
    return Message(role=role, content=checked_text(content, f"message {at}"))


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


def render(tokenizer: Any, messages: Messages) -> Prompt:
    """Write the turns as the model expects them, ready for its answer.

    Raises:
        InputError: if the turns are empty or the template refuses them.
    """
    turns = as_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        return _render_raw(tokenizer, turns)
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = _template(tokenizer, plain, header=True)
    without = _template(tokenizer, plain, header=False)
    # A template whose header changes what comes before it has no header that could be told apart.
    header = len(ids) - len(without) if ids[: len(without)] == without else 0
    text = rendered(tokenizer, turns)
    if not ids:
        raise InputError("the chat template made nothing of the messages", hint="look at tokenizer.chat_template")
    return Prompt(messages=turns, text=text, token_ids=ids, header=header, templated=True)


def rendered(tokenizer: Any, turns: Sequence[Message]) -> str:
    """The turns as the template writes them, generation header included."""
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    return str(tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False))


def _template(tokenizer: Any, plain: list[dict[str, str]], *, header: bool) -> tuple[int, ...]:
    try:
        encoded = tokenizer.apply_chat_template(plain, add_generation_prompt=header, tokenize=True, return_dict=True)
    except Exception as error:  # a template is somebody's program; whatever it raises, there is no prompt
        roles = [message["role"] for message in plain]
        raise InputError(
            f"the model's chat template refuses the roles {roles!r}: {type(error).__name__}: {error}",
            hint="most templates want user and assistant in turn, some know no system role",
        ) from error
    return tuple(encoded["input_ids"])


def _render_raw(tokenizer: Any, turns: tuple[Message, ...]) -> Prompt:
    if len(turns) != 1:
        raise InputError(
            f"{len(turns)} messages for a model without a chat template",
            hint="write them as one text, or load a tokenizer that has a chat template",
        )
    ids = tuple(tokenizer(turns[0].content)["input_ids"])
    return Prompt(messages=turns, text=turns[0].content, token_ids=ids, header=0, templated=False)


def template_hash(tokenizer: Any) -> str:
    """A short hash of the chat template, or ``none``."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "none"
    return hashlib.sha256(repr(template).encode()).hexdigest()[:16]
