"""From messages to token ids, by the model's chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from hallucination_guard.errors import InputError
from hallucination_guard.model.calling import taught, told_schema
from hallucination_guard.model.literal import Spans, encoded, literal_spans, spelt_control
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import JSON, Message, Messages, Prompt, Tool, as_messages

__all__ = ["knows_tools", "render", "rendered", "template_hash"]


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Sequence[Tool] = (),
    response_schema: Mapping[str, JSON] | None = None,
) -> Prompt:
    """Write the turns as the model expects them, ready for its answer.

    Tools go through the chat template; one that knows none is taught them in the system turn. On a model without a
    chat template they are the caller's to write: here they only say what a call may be.

    Args:
        tokenizer: of the model.
        messages: the turns.
        tools: that the answer may call.
        response_schema: JSON Schema of the answer; it goes into the system turn.

    Raises:
        InputError: if the turns are empty or the template refuses them.
    """
    turns = as_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        return _render_raw(tokenizer, turns, tuple(tools))
    conversation = _Conversation.of(tokenizer, turns, tools, response_schema)
    _check_calls(tokenizer, conversation)
    literal: Spans = ()
    if any(spelt_control(tokenizer, turn.role) or spelt_control(tokenizer, turn.content) for turn in turns):
        text, shorter = conversation.text(), conversation.text(header=False)
        literal = literal_spans(
            tokenizer, conversation.turns, lambda marked: replace(conversation, turns=tuple(marked)).text(), text
        )
        ids, without = encoded(tokenizer, text, literal)[0], encoded(tokenizer, shorter, literal)[0]
    else:
        ids, without, text = conversation.ids(header=True), conversation.ids(header=False), conversation.text()
    # A template whose header changes what comes before it has no header that could be told apart.
    header = len(ids) - len(without) if ids[: len(without)] == without else 0
    if not ids:
        raise InputError("the chat template made nothing of the messages", hint="look at tokenizer.chat_template")
    return Prompt(
        messages=turns,
        text=text,
        token_ids=ids,
        header=header,
        templated=True,
        literal=literal,
        tools=tuple(tools),
        response_schema=response_schema,
    )


def rendered(tokenizer: Tokenizer, prompt: Prompt, turns: Sequence[Message]) -> str:
    """Other turns in the place of a prompt's own, as the template writes them, generation header included."""
    return _Conversation.of(tokenizer, turns, prompt.tools, prompt.response_schema).text()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conversation:
    """What a template is given.

    Args:
        tokenizer: whose template it is.
        turns: with all that the template has no place for in their texts.
        tools: those for which it has one.
    """

    tokenizer: Tokenizer
    turns: tuple[Message, ...]
    tools: tuple[Tool, ...]

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        turns: Sequence[Message],
        tools: Sequence[Tool],
        response_schema: Mapping[str, JSON] | None,
    ) -> Self:
        turns = tuple(turns)
        if response_schema is not None:
            turns = told_schema(turns, response_schema)
        called = any(turn.tool_calls or turn.role == "tool" for turn in turns)
        if (tools or called) and not knows_tools(tokenizer):
            return cls(tokenizer=tokenizer, turns=taught(turns, tools), tools=())
        return cls(tokenizer=tokenizer, turns=turns, tools=tuple(tools))

    def text(self, *, header: bool = True) -> str:
        return str(self._applied(header=header, tokenize=False))

    def ids(self, *, header: bool) -> tuple[int, ...]:
        return tuple(self._applied(header=header, tokenize=True, return_dict=True)["input_ids"])

    def _applied(self, *, header: bool, **settings: bool) -> Any:
        offered = {"tools": [each.to_json_dict() for each in self.tools]} if self.tools else {}
        try:
            return self.tokenizer.apply_chat_template(
                [_for_template(turn) for turn in self.turns], add_generation_prompt=header, **offered, **settings
            )
        except Exception as error:  # a template is somebody's program; whatever it raises, there is no prompt
            raise InputError(
                f"the model's chat template refuses the roles {[turn.role for turn in self.turns]!r}: "
                f"{type(error).__name__}: {error}",
                hint="most templates want user and assistant in turn, some know no system role",
            ) from error


def _for_template(turn: Message) -> dict[str, Any]:
    plain: dict[str, Any] = turn.to_json_dict()
    if turn.tool_calls:
        plain["tool_calls"] = [each.to_json_dict(as_text=False) for each in turn.tool_calls]
    return plain


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the template writes down the tools that it is given."""
    probe = Tool(name="zq7xk_probe")
    asked = _Conversation(tokenizer=tokenizer, turns=(Message(role="user", content="?"),), tools=(probe,))
    try:
        return probe.name in asked.text()
    except InputError:
        return False


def _check_calls(tokenizer: Tokenizer, conversation: _Conversation) -> None:
    """See that no tool and no call spells a control token: the template writes them among its own words.

    Raises:
        InputError: if one does.
    """
    calls = [each for turn in conversation.turns for each in turn.tool_calls]
    for what, plain in (
        *((f"the tool {each.name!r}", each.to_json_dict()) for each in conversation.tools),
        *((f"a call of {each.name!r}", each.to_json_dict()) for each in calls),
        *(("the name of a tool's result", [turn.name, turn.tool_call_id]) for turn in conversation.turns),
    ):
        if control := spelt_control(tokenizer, json.dumps(plain, ensure_ascii=False)):
            raise InputError(f"{what} spells the control token {control!r}", hint="take the token out of it")


def _render_raw(tokenizer: Tokenizer, turns: tuple[Message, ...], tools: tuple[Tool, ...]) -> Prompt:
    if len(turns) != 1:
        raise InputError(
            f"{len(turns)} messages for a model without a chat template",
            hint="write them as one text, or load a tokenizer that has a chat template",
        )
    ids = tuple(tokenizer(turns[0].content)["input_ids"])
    return Prompt(messages=turns, text=turns[0].content, token_ids=ids, header=0, templated=False, tools=tools)


def template_hash(tokenizer: Tokenizer) -> str:
    """A short hash of the chat template, or ``none``."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "none"
    return hashlib.sha256(repr(template).encode()).hexdigest()[:16]
