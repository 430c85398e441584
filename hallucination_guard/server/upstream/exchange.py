"""One prompt and its answer, as the server has them and as the model here does: whether these are the same.

Each of the reasons for which an answer is not scored stands here in words; none quotes prompt or answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Guard
from hallucination_guard.server.upstream.asking import asked_of
from hallucination_guard.server.upstream.delivered import Delivered
from hallucination_guard.server.upstream.part import Asked, Part, Upstream
from hallucination_guard.values import FinishReason, Generation, GenerationSettings, Messages

__all__ = ["NO_IDS", "Exchange", "Heard"]

NO_IDS = "the server does not say which tokens it drew"
_NO_PROMPT = "the server does not say which tokens it read"
_OTHER_PROMPT = "the server read another prompt than the model here: another template, tokenizer or system turn"
_OTHER_TEXT = "the server's text is not what its tokens say"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A whole answer as it is delivered, or why it cannot be scored."""

    ids: tuple[int, ...] = ()
    text: str = ""
    ended: FinishReason
    unscorable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One prompt as the model here reads it, and the request for its answer."""

    guard: Guard
    messages: Messages
    settings: GenerationSettings
    asked: Asked
    prompt_ids: tuple[int, ...]

    @classmethod
    def begin(cls, guard: Guard, messages: Messages, settings: GenerationSettings, upstream: Upstream) -> Self:
        """Read the prompt.

        Raises:
            InputError: if it cannot be used, or the server does not draw by a setting.
        """
        return cls(
            guard=guard,
            messages=messages,
            settings=settings,
            asked=asked_of(guard.model, messages, settings, upstream.can),
            prompt_ids=guard.model.prompt(messages, **settings.offered).token_ids,
        )

    def read(self, ids: Sequence[int]) -> Generation:
        """The answer as the model here reads it.

        Raises:
            InputError: if an id is outside the vocabulary, or there are more than the context holds.
        """
        return self.guard.model.read(self.messages, ids, question=self.settings.question, **self.settings.offered)

    def delivered(self) -> Delivered:
        """What is delivered of the answer, which begins."""
        ends: frozenset[int] = getattr(self.guard.model, "end_ids", frozenset())
        return Delivered(ends, self.settings.stop or (), lambda ids: self.read(ids).text if ids else "")

    def heard(self, part: Part) -> Heard:
        """What of the answer is delivered, and whether it can be scored."""
        said = part.ended
        assert said is not None  # it is whole
        if why := self.prompt_differs(part):
            return Heard(text=part.text, ended=said, unscorable=why)
        assert part.ids is not None
        delivered = self.delivered()
        try:
            delivered.feed(part.ids)
            _, ended = delivered.end(said)
            why = self.text_differs(delivered.ids, part.text, ended)
        except InputError as error:  # of ids: they are outside the vocabulary, or more than the context holds
            return Heard(text=part.text, ended=said, unscorable=error.message)
        return Heard(ids=delivered.ids, text=part.text, ended=ended, unscorable=why)

    def prompt_differs(self, part: Part) -> str:
        """Why the answer is not to the prompt that is read here; empty if it is."""
        if part.ids is None:
            return NO_IDS
        if part.prompt_ids is None:
            return _NO_PROMPT
        return "" if part.prompt_ids == self.prompt_ids else _OTHER_PROMPT

    def text_differs(self, ids: Sequence[int], text: str, ended: FinishReason) -> str:
        """Whether the server's text is not that of its tokens, but for thinking and calls, which servers take out."""
        read = self.read(ids)
        if read.thinking or self.settings.tools:
            return ""
        theirs, own = _letters(text), _letters(read.text)
        # It may have cut within the token in which a stop text begins.
        same = theirs.startswith(own) if ended == "stop_text" else theirs == own
        return "" if same else _OTHER_TEXT


def _letters(text: str) -> str:
    """A text without the space around it and what stands for half a character."""
    return text.replace("\N{REPLACEMENT CHARACTER}", "").strip()
