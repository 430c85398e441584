"""Answers while they are drawn: what asks at the same time is decoded as one batch, each with a reader of its own.

A batch is a static one, so that what scoring needs is kept (:mod:`hallucination_guard.model.generating`): what comes
while it runs waits for the next. One thread decodes and ends when nothing waits. Where torch has all the cores, it
waits while a reader computes; a reader who left costs the token that was being drawn.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from transformers import StoppingCriteria

from hallucination_guard.model.calling import begun_at_end, format_of, prose_of, written_text
from hallucination_guard.model.decoding import end_of_answer
from hallucination_guard.model.generating import Asked, Decoding, generation_of, room_for
from hallucination_guard.model.inside import Inside
from hallucination_guard.model.replay import Trace
from hallucination_guard.values import FinishReason, Generation, GenerationSettings

__all__ = ["LiveAnswer", "Streams"]

_GATHER = 0.005  # seconds without a further request before a batch begins: a tenth of a token on a CPU
_MOST = 32  # rows of a batch
_LOOK = 0.25  # seconds after which one who waits looks whether its own reader is gone


class LiveAnswer:
    """One answer while it is drawn; see :class:`~hallucination_guard.values.Live`.

    Args:
        streams: of the model.
        asked: what it answers.
        settings: how it is drawn.
        gone: whether the reader is gone.
    """

    def __init__(self, streams: Streams, asked: Asked, settings: GenerationSettings, gone: Callable[[], bool]) -> None:
        assert settings.max_new_tokens is not None
        self.asked, self.settings = asked, settings
        self.room = room_for(streams.inside, asked, settings.max_new_tokens)
        self._streams, self._inside, self._gone = streams, streams.inside, gone
        self._left = False
        self._changed = threading.Condition()
        self._ready: Callable[[], bool] | None = None
        self._ids: list[int] = list(asked.begin)
        self._ended: FinishReason | None = None
        self._error: BaseException | None = None
        self._trace: Callable[[tuple[int, ...]], Trace | None] = lambda answer: None
        self._ends = [0]  # of what each token adds, as far as it was looked at
        self._began = time.perf_counter()

    # ------------------------------------------------------------------------------------------- for the reader

    @property
    def ended(self) -> FinishReason | None:
        """How it ended; None while it is drawn."""
        return self._ended

    @property
    def gone(self) -> bool:
        """Whether nobody reads it any more."""
        return self._left or self._gone()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until ``ready`` says so, or it has ended, or the reader is gone; see the protocol."""
        with self._changed:
            # Two threads with work of their own on all cores would make each other wait at every operation.
            self._ready = None if ready() else ready
            while self._ready is not None and self._ended is None and self._error is None and not self.gone:
                self._changed.wait(_LOOK)
            self._ready = None
        if self._error is not None:
            raise self._error

    def texts(self) -> tuple[str, ...]:
        """What each token so far adds to the text; a token with half a character adds nothing yet."""
        ended, ids = self._ended, tuple(self._ids)
        whole = self._text(ids)
        for stop in range(len(self._ends), len(ids) + 1):
            text = self._text(ids[:stop])
            if stop < len(ids) or ended is None:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            self._ends.append(max(self._ends[-1], min(len(text), len(whole))))
        ends = [*self._ends[: len(ids)], len(whole)] if ended is not None and ids else self._ends[: len(ids) + 1]
        return tuple(whole[start:stop] for start, stop in pairwise(ends))

    def prose(self) -> int:
        """How many characters of the text are surely of the answer, and in no call."""
        ended, text = self._ended, "".join(self.texts())
        if ended is not None:
            return len(text)
        if self.settings.response_schema is not None:
            return 0
        sure = len(text) - begun_at_end(text, self.settings.stop or ())
        return min(sure, prose_of(format_of(self._inside.tokenizer), text)) if self._may_call else sure

    def beginning(self, tokens: int) -> Generation:
        """Its first tokens as an answer."""
        ended, ids = self._ended, tuple(self._ids)
        answer = ids[:tokens]
        whole = ended is not None and len(answer) == len(ids)
        return generation_of(
            self._inside,
            self.asked,
            answer,
            ending=ended if whole and ended is not None else "open",
            settings=self.settings,
            most=self.room + len(self.asked.begin) if whole and ended == "length" else None,
            model=self._inside.identity,
            seconds=time.perf_counter() - self._began,
            trace=self._trace(answer),
        )

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, the reader computes."""
        with self._streams.computing():
            yield

    def leave(self) -> None:
        """The reader is gone."""
        self._left = True
        self._trace = lambda answer: None  # what was kept of the batch can go

    @property
    def _may_call(self) -> bool:
        return bool(self.settings.tools) and self.settings.tool_choice != "none"

    def _text(self, ids: Sequence[int]) -> str:
        return written_text(self._inside.tokenizer, ids, calls=self._may_call)

    # ---------------------------------------------------------------------------------- for the one who decodes

    def begins(self, trace: Callable[[tuple[int, ...]], Trace | None]) -> None:
        """Its batch begins."""
        self._trace = trace

    def drawn(self, token: int) -> bool:
        """Take in a token; whether the answer has ended."""
        with self._changed:
            if self._ended is None:
                begin = len(self.asked.begin)
                ids = [*self._ids[begin:], token]
                length, ending = end_of_answer(
                    self._inside.tokenizer, ids, self._inside.end_ids, self.settings.stop or ()
                )
                self._ids = [*self.asked.begin, *ids[:length]]
                if ending != "length" or len(ids) == self.room:
                    self._ended = ending
                self._tell()
        return self._ended is not None or self._error is not None or self.gone

    def _tell(self) -> None:
        """Wake the reader up if there is something to do."""
        try:
            told = self._ended is not None or (self._ready is not None and self._ready())
        except Exception as error:  # the reader's own: its thread raises it
            self._error, told = error, True
        if told:
            self._ready = None
            self._changed.notify_all()

    def fails(self, error: BaseException | None) -> None:
        """Its batch is over; whoever still waits learns why."""
        with self._changed:
            if self._ended is None:
                self._error = error
                if error is None and not self.gone:
                    self._ended = "length"
            self._changed.notify_all()


class Streams:
    """The answers of one model that are being drawn, or wait to be.

    Args:
        inside: the model.
    """

    def __init__(self, inside: Inside) -> None:
        self.inside = inside
        self._lock = threading.Condition()
        self._waiting: list[LiveAnswer] = []
        self._runs = False
        self._computing = 0
        self._turn = threading.Lock()

    def open(self, asked: Asked, settings: GenerationSettings, gone: Callable[[], bool]) -> LiveAnswer:
        """Begin to answer, as soon as it can be."""
        live = LiveAnswer(self, asked, settings, gone)
        with self._lock:
            self._waiting.append(live)
            self._lock.notify_all()
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, daemon=True, name="hallucination-guard-stream").start()
        return live

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, a reader computes: one at a time, and decoding waits where it would want the same cores."""
        with self._lock:
            self._computing += 1
        try:
            with self._turn:
                yield
        finally:
            with self._lock:
                self._computing -= 1
                self._lock.notify_all()

    def _run(self) -> None:
        while group := self._next():
            run = Decoding(self.inside, [each.asked for each in group], group[0].settings)
            for row, each in enumerate(group):
                each.begins(lambda answer, row=row, run=run: run.trace(row, answer))  # type: ignore[misc]
            failed: BaseException | None = None
            try:
                run(group[0].room, _Watch(group, self._let))
            except BaseException as error:  # each reader's thread raises it
                failed = error
            for each in group:
                each.fails(failed)
            del run, group, each, failed

    def _next(self) -> list[LiveAnswer]:
        """The batch to be decoded next; none, and the thread ends, where nothing waits."""
        with self._lock:
            seen = -1
            while seen != len(self._waiting) < _MOST:  # until nobody came for a while
                seen = len(self._waiting)
                self._lock.wait(_GATHER)
            for each in [each for each in self._waiting if each.gone]:
                self._waiting.remove(each)
                each.fails(None)
            if not self._waiting:
                self._runs = False
                return []
            first = self._waiting[0]
            alike = [each for each in self._waiting if _alike(each, first)][:_MOST]
            self._waiting = [each for each in self._waiting if each not in alike]
            return alike

    def _let(self) -> None:
        """Wait while a reader computes."""
        if self.inside.device.type == "cpu" and (os.cpu_count() or 1) <= torch.get_num_threads():
            with self._lock:
                while self._computing:
                    self._lock.wait()


class _Watch(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Hands every token to its reader, and ends the rows that have ended or are read no more."""

    def __init__(self, rows: Sequence[LiveAnswer], let: Callable[[], None]) -> None:
        self._rows, self._let = rows, let

    def __call__(self, input_ids: Tensor, scores: object, **_kwargs: object) -> Tensor:
        """Which rows (B) are done."""
        done = [live.drawn(token) for live, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True)]
        self._let()
        return torch.tensor(done, device=input_ids.device)


def _alike(one: LiveAnswer, other: LiveAnswer) -> bool:
    """Whether two can be decoded together."""
    same = replace(one.settings, question=None) == replace(other.settings, question=None)
    return same and one.room == other.room
