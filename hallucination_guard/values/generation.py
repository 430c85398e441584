"""A prompt and the answer to it, exactly as the model saw them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, TypeAlias

from hallucination_guard.values.identity import ModelIdentity
from hallucination_guard.values.prompt import Message, Prompt
from hallucination_guard.values.settings import GenerationSettings
from hallucination_guard.values.tools import ToolCall, WrittenCall

__all__ = ["Anchor", "FinishReason", "Generation", "Kept", "Rule"]

Rule: TypeAlias = Literal["profile", "header", "last_user_token", "question"]
"""What chose t*."""

FinishReason: TypeAlias = Literal["stop", "stop_text", "length", "read", "open"]
"""How an answer ended: by the model's own end token, at a stop text of the caller's, at the most tokens that it may
have; ``read`` where something else wrote it, and nobody said; ``open`` of the beginning of an answer that goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The semantics-preserving token t*.

    Args:
        index: position counted from the end of the prompt; −1 is its last token.
        token: its text, as the tokenizer writes it.
        rule: what chose it: ``profile``, ``header``, ``last_user_token`` or ``question``.
    """

    index: int
    token: str
    rule: Rule


class Kept(Protocol):
    """What a model keeps of generating so that scoring need not read again; it is handed over once."""

    def take(self) -> object:
        """Hand it over and forget it; None if it is gone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A prompt and the answer to it, exactly as the model saw them.

    Args:
        messages: the turns; for a model without a chat template one ``user`` message with the raw text.
        prompt_token_ids: x, length P, with the generation header.
        response_token_ids: ŷ, length T, without the end-of-turn token that stopped it.
        text: the answer as it is written, with the calls of tools in it.
        finish_reason: how it ended, see :data:`FinishReason`.
        settings: how it was drawn; of an answer that something else wrote, at most the ``question``.
        model: which model it belongs to.
        anchor: t*; None on a model without a chat template whose caller did not name the question.
        written_calls: the tools that it calls, and where in ``text``; empty where none were offered. What begins like a
            call and cannot be parsed is text.
        thinking: how many of its first tokens are a reasoning model's thinking, the marks included.
        spoken: the character of ``text`` at which the answer behind the thinking begins.
        seconds: wall time of generating (0 for ``read``).
    """

    messages: tuple[Message, ...]
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    settings: GenerationSettings
    model: ModelIdentity
    anchor: Anchor | None
    written_calls: tuple[WrittenCall, ...] = ()
    thinking: int = 0
    spoken: int = 0
    seconds: float = 0.0
    _trace: Kept | None = field(default=None, repr=False, compare=False)

    @classmethod
    def unread(
        cls,
        prompt: Prompt,
        text: str,
        *,
        settings: GenerationSettings,
        model: ModelIdentity,
        finish_reason: FinishReason = "read",
    ) -> Self:
        """An answer that something else wrote and the model did not read: it has a text and no tokens."""
        return cls(
            messages=prompt.messages,
            prompt_token_ids=prompt.token_ids,
            response_token_ids=(),
            text=text,
            finish_reason=finish_reason,
            settings=settings,
            model=model,
            anchor=None,
        )

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tools that the answer calls, in order."""
        return tuple(each.call for each in self.written_calls)

    @property
    def content(self) -> str:
        """What the answer says, without thinking and calls. This is what is let through."""
        if not self.written_calls:
            return self.text[self.spoken :].lstrip() if self.thinking else self.text
        ends = [self.spoken, *(edge for each in self.written_calls for edge in (each.start, each.stop)), len(self.text)]
        return "".join(self.text[start:stop] for start, stop in zip(ends[::2], ends[1::2], strict=True)).strip()

    def release(self) -> None:
        """Forget what was kept for scoring; a later score reads the text again."""
        if self._trace is not None:
            self._trace.take()
