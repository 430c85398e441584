"""What of the tokens that a server drew is the answer. What is scored is what is delivered, so this decides both.

The answer ends before the first token that ends a turn, and before the token in which a stop text begins: as when the
model here draws it. Servers differ: vLLM leaves a stop text in the ids and cuts it from the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hallucination_guard.errors import UpstreamError
from hallucination_guard.model.calling import begun_at_end
from hallucination_guard.values import FinishReason

__all__ = ["Delivered"]


class Delivered:
    """One answer while it is drawn.

    Args:
        end_ids: the tokens that end a turn.
        stop: texts that end the answer.
        text_of: what tokens say.
    """

    def __init__(self, end_ids: frozenset[int], stop: Sequence[str], text_of: Callable[[Sequence[int]], str]) -> None:
        self._end_ids, self._stop, self._text_of = end_ids, tuple(stop), text_of
        self._drawn: tuple[int, ...] = ()
        self._given = 0
        self._found: FinishReason | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """What was given so far."""
        return self._drawn[: self._given]

    def feed(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The next tokens of the answer, as far as it is sure that they are.

        Raises:
            UpstreamError: if what was given turns out to be no part of it.
        """
        if self._found is not None:
            return ()
        at = next((at for at, each in enumerate(ids) if each in self._end_ids), None)
        self._drawn += tuple(ids if at is None else ids[:at])
        sure = len(self._drawn)
        if self._stop:
            sure = self._before_stop()
        if self._found is None and at is not None:
            self._found, sure = "stop", len(self._drawn)
        return self._give(sure)

    def end(self, said: FinishReason) -> tuple[tuple[int, ...], FinishReason]:
        """The last tokens, and how the answer ended.

        Args:
            said: how the server says that it ended.
        """
        rest = () if self._found is not None else self._give(len(self._drawn))
        return rest, self._found or said

    def _give(self, sure: int) -> tuple[int, ...]:
        if sure < self._given:
            raise UpstreamError("a stop text begins in tokens that were taken for the answer", hint="ask again")
        given, self._given = self._drawn[self._given : sure], sure
        return given

    def _before_stop(self) -> int:
        """How many of the tokens come before a stop text, or what may become one."""
        text = self._text_of(self._drawn)
        begins = [at for each in self._stop if (at := text.find(each)) >= 0]
        if begins:
            self._found = "stop_text"
        safe = min(begins) if begins else len(text) - begun_at_end(text, self._stop)
        length = len(self._drawn)
        while length and len(self._text_of(self._drawn[:length])) > safe:
            length -= 1
        return length
