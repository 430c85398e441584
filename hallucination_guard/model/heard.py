"""An answer that something else is writing, read while it comes; see :class:`~hallucination_guard.values.Heard`.

Text is tokenised as a whole each time that a sentence of it may have ended, so that it has the tokens that its model
wrote: apart, a sentence that begins with a space would have others. A beginning that was handed out keeps its tokens.
Where those of the longer text do not begin with them, what follows is tokenised apart, and where that says another
text, the answer ends with an error: what is scored is what is delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from hallucination_guard.errors import InputError, ModelError
from hallucination_guard.values import Ending, FinishReason, Generation, Piece
from hallucination_guard.values.protocols import Compute, Found
from hallucination_guard.values.text import sentence_starts

__all__ = ["HeardAnswer", "Reading"]

_OVER: Any = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the answer to one prompt is read.

    Args:
        ids: from a text to its token ids; raises ``InputError`` where it has none.
        text: from token ids to what they say.
        check: raises ``InputError`` on ids that are none of the model's.
        read: the answer with these ids, as if nothing followed.
        unread: an answer of which only the text is known, and how it ended.
        prose: how many characters of an unfinished answer are surely in no call.
        end_ids: ids that end an answer and are no part of it.
        most: tokens that it may have; None for no limit.
        compute: what a reader wants computed goes through it.
    """

    ids: Callable[[str], tuple[int, ...]]
    text: Callable[[Sequence[int]], str]
    check: Callable[[Sequence[int]], None]
    read: Callable[[tuple[int, ...]], Generation]
    unread: Callable[[str, FinishReason], Generation]
    prose: Callable[[str], int]
    end_ids: frozenset[int] = frozenset()
    most: int | None = None
    compute: Compute = lambda work: work()


class HeardAnswer:
    """One answer while something else writes it. How it ends is not known, so it ends as ``read``.

    Args:
        pieces: of it, as they come; closed when the reader leaves, if it can be.
        reading: how it is read.
        gone: asked at every piece whether the reader is gone.
        unscorable: why it is not to be read; empty where it is.
    """

    def __init__(
        self, pieces: Iterable[Piece], reading: Reading, *, gone: Callable[[], bool], unscorable: str = ""
    ) -> None:
        self._pieces: Iterator[Piece] = iter(pieces)
        self._source, self._reading, self._gone = pieces, reading, gone
        self._unscorable = unscorable
        self._kind: Literal["text", "ids"] | None = None
        self._text = ""  # as the pieces say; of ids nothing
        self._ids: tuple[int, ...] = ()
        self._tokenised = 0  # characters of the text of which the ids are
        self._kept = 0  # ids that were handed out, and stay
        self._from = 0  # characters that they say
        self._ends = [0]  # of what each id that stays adds
        self._asked = 0  # sentences that had begun when the reader was asked last
        self._ended: FinishReason | None = None

    @property
    def ended(self) -> FinishReason | None:
        """How it ended; None while it is written."""
        return self._ended

    @property
    def unscorable(self) -> str:
        """Why it cannot be read; empty while it can."""
        return self._unscorable

    def wait(self, ready: Callable[[], bool]) -> None:
        """Take in pieces until a sentence has ended and ``ready`` says so, or there are no more; see the protocol."""
        while self._ended is None and not self._gone():
            if self._may_be_ready() and ready():
                return
            self._take()

    def texts(self) -> tuple[str, ...]:
        """What each token so far adds to the text; a token with half a character adds nothing yet."""
        self._tokenise()
        if self._unscorable:
            return (self._said(),)
        ids, ended = self._ids, self._ended
        whole = self._reading.text(ids)
        ends = self._ends[: (self._kept if self._kind == "text" else len(ids)) + 1]
        for stop in range(len(ends), len(ids) + 1):
            text = whole if stop == len(ids) else self._reading.text(ids[:stop])
            if stop < len(ids) or ended is None:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            ends.append(max(ends[-1], min(len(text), len(whole))))
        self._ends = list(ends)
        if ended is not None and ids:
            ends[-1] = len(whole)
        return tuple(whole[start:stop] for start, stop in pairwise(ends))

    def prose(self) -> int:
        """How many characters of the text are surely of the answer, and in no call."""
        text = "".join(self.texts())
        if self._unscorable:
            return 0  # it is decided on as a whole
        return len(text) if self._ended is not None else self._reading.prose(text)

    def beginning(self, tokens: int | None = None) -> Generation:
        """Its first tokens as an answer; they stay as they are."""
        self._tokenise()
        ending = self._ended
        if self._unscorable:
            return self._reading.unread(self._said(), ending or "open")
        answer = self._ids[:tokens]
        self._kept, self._from, self._asked = len(answer), len(self._reading.text(answer)), 0
        read = self._reading.read(answer)
        if ending is not None and len(answer) == len(self._ids):
            return replace(read, finish_reason=ending)
        return replace(read, finish_reason="open", written_calls=())

    def compute(self, work: Callable[[], Found], *, patient: bool = False) -> Found:
        """What ``work`` gives."""
        return self._reading.compute(work)

    def leave(self) -> None:
        """The reader is gone: whoever writes is told, if it can be."""
        if callable(close := getattr(self._source, "close", None)):
            close()

    def _said(self) -> str:
        return self._reading.text(self._ids) if self._kind == "ids" else self._text

    def _take(self) -> None:
        """Take in the next piece.

        Raises:
            InputError: if it is none, or of another kind than those before.
        """
        piece = next(self._pieces, _OVER)
        if piece is _OVER:
            self._ended = "read"
            return
        if isinstance(piece, Ending):
            self._ended = piece.reason
            return
        kind: Literal["text", "ids"] = "text" if isinstance(piece, str) else "ids"
        if kind == "ids" and (isinstance(piece, bytes | bytearray) or not isinstance(piece, Sequence)):
            raise InputError(f"a piece of the answer is {piece!r}", hint="give texts, or lists of token ids")
        if self._kind not in (None, kind):
            raise InputError(f"the answer goes on as {kind} and began as {self._kind}", hint="give one kind")
        self._kind = kind
        if isinstance(piece, str):
            self._text += piece
            return
        ids = tuple(piece)
        if ids:
            self._reading.check(ids)
        stop = next((at for at, each in enumerate(ids) if each in self._reading.end_ids), None)
        if stop is not None:
            ids = ids[:stop]
            self._ended = "read"
        self._ids += ids
        self._check_length()

    def _may_be_ready(self) -> bool:
        """Whether a sentence may have ended that the reader has not been asked about."""
        if self._unscorable:
            return False
        if self._kind == "ids":
            return True
        begun = len(sentence_starts(self._text[self._from :]))
        asked, self._asked = self._asked, max(self._asked, begun)
        return begun > max(1, asked)

    def _tokenise(self) -> None:
        """See that the ids are those of the text.

        Raises:
            ModelError: if it cannot be told in tokens that begin with those that were handed out.
        """
        if self._kind != "text" or self._tokenised == len(self._text) or self._unscorable:
            return
        self._tokenised = len(self._text)  # a text that fails does so once
        kept = self._ids[: self._kept]
        try:
            ids = self._reading.ids(self._text)
            if ids[: len(kept)] != kept:
                said = self._reading.text(kept)
                ids = (*kept, *self._reading.ids(self._text[len(said) :]))
                if not self._text.startswith(said) or self._reading.text(ids) != self._text:
                    raise ModelError(
                        "the tokens of an answer do not begin with those of its beginning that was read",
                        hint="give the answer as token ids",
                    )
        except InputError as error:
            self._unscorable = error.message
            return
        self._ids = ids
        self._check_length()

    def _check_length(self) -> None:
        most = self._reading.most
        if most is not None and len(self._ids) > most and not self._unscorable:
            self._unscorable = f"the answer has more than the {most} tokens that the context leaves for it"
