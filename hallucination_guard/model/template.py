"""From messages to token ids, by the model's chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from hallucination_guard.errors import InputError
from hallucination_guard.model.literal import Spans, encoded, literal_spans, spelt_control
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import Message, Messages, Prompt, as_messages

__all__ = ["render", "rendered", "template_hash"]


def render(tokenizer: Tokenizer, messages: Messages) -> Prompt:
    """Write the turns as the model expects them, ready for its answer.

    Raises:
        InputError: if the turns are empty or the template refuses them.
    """
    turns = as_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        return _render_raw(tokenizer, turns)
    literal: Spans = ()
    if any(spelt_control(tokenizer, turn.role) or spelt_control(tokenizer, turn.content) for turn in turns):
        text, shorter = _text(tokenizer, turns), _text(tokenizer, turns, header=False)
        literal = literal_spans(tokenizer, turns, lambda marked: _text(tokenizer, marked), text)
        ids, without = encoded(tokenizer, text, literal)[0], encoded(tokenizer, shorter, literal)[0]
    else:
        plain = [{"role": turn.role, "content": turn.content} for turn in turns]
        ids = _template(tokenizer, plain, header=True)
        without = _template(tokenizer, plain, header=False)
        text = rendered(tokenizer, turns)
    # A template whose header changes what comes before it has no header that could be told apart.
    header = len(ids) - len(without) if ids[: len(without)] == without else 0
    if not ids:
        raise InputError("the chat template made nothing of the messages", hint="look at tokenizer.chat_template")
    return Prompt(messages=turns, text=text, token_ids=ids, header=header, templated=True, literal=literal)


def rendered(tokenizer: Tokenizer, turns: Sequence[Message]) -> str:
    """The turns as the template writes them, generation header included."""
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    return str(tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False))


def _text(tokenizer: Tokenizer, turns: Sequence[Message], *, header: bool = True) -> str:
    """As :func:`rendered`, for turns that the template may refuse."""
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(plain, add_generation_prompt=header, tokenize=False))
    except Exception as error:  # a template is somebody's program; whatever it raises, there is no prompt
        raise _refused(plain, error) from error


def _template(tokenizer: Tokenizer, plain: list[dict[str, str]], *, header: bool) -> tuple[int, ...]:
    try:
        found = tokenizer.apply_chat_template(plain, add_generation_prompt=header, tokenize=True, return_dict=True)
    except Exception as error:  # a template is somebody's program; whatever it raises, there is no prompt
        raise _refused(plain, error) from error
    return tuple(found["input_ids"])


def _refused(plain: Sequence[Mapping[str, str]], error: Exception) -> InputError:
    roles = [message["role"] for message in plain]
    return InputError(
        f"the model's chat template refuses the roles {roles!r}: {type(error).__name__}: {error}",
        hint="most templates want user and assistant in turn, some know no system role",
    )


def _render_raw(tokenizer: Tokenizer, turns: tuple[Message, ...]) -> Prompt:
    if len(turns) != 1:
        raise InputError(
            f"{len(turns)} messages for a model without a chat template",
            hint="write them as one text, or load a tokenizer that has a chat template",
        )
    ids = tuple(tokenizer(turns[0].content)["input_ids"])
    return Prompt(messages=turns, text=turns[0].content, token_ids=ids, header=0, templated=False)


def template_hash(tokenizer: Tokenizer) -> str:
    """A short hash of the chat template, or ``none``."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "none"
    return hashlib.sha256(repr(template).encode()).hexdigest()[:16]
