"""Answers while they are drawn: what asks at the same time is decoded as one batch, each with a reader of its own.

A batch is a static one, so that what scoring needs is kept (:mod:`hallucination_guard.model.generating`): what comes
while it runs waits for the next. Every thread that computes has threads of its own in torch, and where these are more
than the cores, all of them wait for each other at every operation (measured: 1.7 times as slow). So where torch has all
the cores, a reader who is alone draws and computes himself, and of several none does: one thread draws for all of them
and computes what they want computed. Where there is a core to spare, or a GPU, it draws while readers compute.
"""

from __future__ import annotations

import atexit
import contextvars
import copy
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch

from hallucination_guard.errors import ModelError
from hallucination_guard.model.calling import begun_at_end, format_of, prose_of, written_text
from hallucination_guard.model.decoding import end_of_answer
from hallucination_guard.model.generating import Asked, Decoding, generation_of, room_for
from hallucination_guard.model.inside import Inside
from hallucination_guard.model.replay import Trace
from hallucination_guard.values import FinishReason, Generation, GenerationSettings

__all__ = ["LiveAnswer", "Streams"]

_GATHER = 0.01  # seconds without a further request before a batch begins: a fifth of a token on a CPU
_READY = 0.05  # seconds that a reader whose answer has ended may take before a batch begins without its successor
_SHARE = 0.05  # of the time that a batch took: so long the next one waits for those who come after its readers, but
_FULL = 0.25  # seconds at most: a batch of long answers must not hold up the first word of one who comes alone
_Found = TypeVar("_Found")
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
        self.room = max(0, room_for(streams.inside, asked, settings.max_new_tokens - len(asked.begin)))
        self.ready: Callable[[], bool] | None = None
        self.error: BaseException | None = None
        self._streams, self._inside, self._gone = streams, streams.inside, gone
        self._left = False
        self._ids: tuple[int, ...] = asked.begin
        self._ended: FinishReason | None = None if self.room else "length"
        self._trace: Callable[[tuple[int, ...]], Trace | None] = lambda answer: None
        self._ends = [0]  # of what each token adds, as far as it was looked at
        self._began = time.perf_counter()

    # ------------------------------------------------------------------------------------------- for the reader

    @property
    def ended(self) -> FinishReason | None:
        """How it ended; None while it is drawn."""
        return self._ended

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until ``ready`` says so, or it has ended, or the reader is gone; see the protocol."""
        self._streams.wait(self, ready)
        if self.error is not None:
            raise self.error

    def texts(self) -> tuple[str, ...]:
        """What each token so far adds to the text; a token with half a character adds nothing yet."""
        ended, ids = self._ended, self._ids
        whole = self._text(ids)
        for stop in range(len(self._ends), len(ids) + 1):
            text = whole if stop == len(ids) else self._text(ids[:stop])
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

    def beginning(self, tokens: int | None = None) -> Generation:
        """Its first tokens as an answer."""
        ended, ids = self._ended, self._ids
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

    def compute(self, work: Callable[[], _Found], *, patient: bool = False) -> _Found:
        """What ``work`` gives; see the protocol."""
        return self._streams.compute(work, until=2 * time.perf_counter() - self._began if patient else 0.0)

    def leave(self) -> None:
        """The reader is gone."""
        self._left = True
        self._trace = lambda answer: None  # what was kept of the batch can go
        self._streams.left(self)

    @property
    def _may_call(self) -> bool:
        return bool(self.settings.tools) and self.settings.tool_choice != "none"

    def _text(self, ids: Sequence[int]) -> str:
        return written_text(self._inside.tokenizer, ids, calls=self._may_call)

    # -------------------------------------------------------------------------------------- for the one who draws

    @property
    def over(self) -> bool:
        """Whether nothing more is to be drawn."""
        return self._ended is not None or self.error is not None or self._left or self._gone()

    @property
    def waits(self) -> bool:
        """Whether its reader waits for more."""
        return self.ready is not None and not self.over

    def begins(self, trace: Callable[[tuple[int, ...]], Trace | None]) -> None:
        """Its batch begins."""
        self._trace = trace

    def look(self, drawn: Sequence[int]) -> None:
        """Take in what its row of the batch has so far, and see whether the reader has something to do.

        Whatever goes wrong here is this reader's: its thread raises it.
        """
        try:
            # How far it is, its ids say: an interruption between two lines must not take a token in twice.
            while (taken := len(self._ids) - len(self.asked.begin)) < len(drawn) and not self.over:
                self._take(drawn[taken])
            if self.ready is not None and self.ready():
                self.ready = None
        except Exception as error:
            self.error = error

    def _take(self, token: int) -> None:
        begin, ends, stop = len(self.asked.begin), self._inside.end_ids, self.settings.stop or ()
        ids = (*self._ids, token)
        # A stop text may have begun in what was released, of which nothing can be taken back.
        length, ending = end_of_answer(self._inside.tokenizer, ids, ends, stop)
        self._ids = ids[: max(length, begin)]
        if ending != "length" or len(ids) - begin == self.room:
            self._ended = ending


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch:
    """Rows that are decoded together. What was drawn is kept whole: an interruption takes no token from a row."""

    rows: tuple[LiveAnswer, ...]
    steps: Iterator[list[int]]
    drawn: list[list[int]]
    began: float

    def look(self) -> None:
        """Let each row take in what it has not yet."""
        for at, each in enumerate(self.rows):
            each.look([step[at] for step in self.drawn])

    def fail(self, error: BaseException | None) -> None:
        """Tell each row that nothing more is drawn."""
        for each in self.rows:
            if not each.over:
                each.error = _of_its_own(error)


class _Job(Generic[_Found]):
    """What a reader wants computed, in the context of the reader, and until when that can wait for others'."""

    def __init__(self, work: Callable[[], _Found], until: float) -> None:
        self.until = until
        self._work, self._context = work, contextvars.copy_context()
        self._found: Future[_Found] = Future()

    def __call__(self) -> None:
        """Compute it. What goes wrong is the reader's."""
        try:
            self._found.set_result(self._context.run(self._work))
        except Exception as error:
            self._found.set_exception(error)
        except BaseException as error:  # an interruption is of the thread that it meets
            self._found.set_exception(_of_its_own(error))
            raise

    @property
    def done(self) -> bool:
        """Whether it was computed."""
        return self._found.done()

    def result(self) -> _Found:
        """What it gave."""
        return self._found.result()


class Streams:
    """The answers of one model that are being drawn, or wait to be.

    Args:
        inside: the model.
        most: rows of a batch.
    """

    def __init__(self, inside: Inside, *, most: int = 32) -> None:
        self.inside, self._most = inside, most
        self._lock = threading.Condition()  # of all that follows
        self._waiting: list[LiveAnswer] = []
        self._read: set[LiveAnswer] = set()  # those whose readers are there
        self._jobs: list[_Job[Any]] = []
        self._batch: _Batch | None = None
        self._drawn_by: threading.Thread | None = None
        self._computing = 0
        self._awaited, self._patience, self._idle = 0, 0.0, 0.0  # rows of the next batch, how long to wait, since when
        self._stopped = self._registered = False
        self._turn = threading.Lock()

    def open(self, asked: Asked, settings: GenerationSettings, gone: Callable[[], bool]) -> LiveAnswer:
        """Begin to answer, as soon as it can be."""
        live = LiveAnswer(self, asked, settings, gone)
        if live.ended is not None:  # there is no room for a token
            return live
        with self._lock:
            self._waiting.append(live)
            self._read.add(live)
            self._lock.notify_all()
            try:
                if self._apart:
                    self._begin_to_draw()
            except BaseException:
                self._waiting.remove(live)
                self._read.discard(live)
                raise
        return live

    def wait(self, live: LiveAnswer, ready: Callable[[], bool]) -> None:
        """Until ``live`` is over or ``ready``; one who waits alone draws."""
        with self._lock:
            live.ready = None if ready() else ready
            while live.waits:
                if self._apart:
                    self._begin_to_draw()
                if self._drawn_by is not None:
                    self._lock.wait(_LOOK)
                    continue
                self._drawn_by = threading.current_thread()
                self._lock.release()
                try:
                    while live.waits and self._step():
                        pass
                finally:
                    self._lock.acquire()
                    if self._draws:
                        self._drawn_by = None
                    self._lock.notify_all()  # who else waits goes on drawing
            live.ready = None

    def compute(self, work: Callable[[], _Found], *, until: float = 0.0) -> _Found:
        """What ``work`` gives: one computes at a time, and nothing is drawn where both would want the same cores.

        Args:
            work: is called once.
            until: when others wait to be drawn, it waits for what else there is to compute until the batch has ended,
                or until then by ``time.perf_counter``.
        """
        with self._lock:
            job: _Job[_Found] | None = None
            if self._several and not self._spare and not self._draws:
                job = _Job(work, until)
                self._jobs.append(job)
                self._lock.notify_all()
                while not job.done:
                    if self._stopped:
                        self._jobs, job = [each for each in self._jobs if each is not job], None
                        break
                    self._begin_to_draw()
                    self._lock.wait(_LOOK)
        if job is not None:
            return job.result()
        with self._computes():
            return work()

    @contextmanager
    def _computes(self) -> Iterator[None]:
        with self._lock:
            self._computing += 1
        try:
            with self._turn:
                yield
        finally:
            with self._lock:
                self._computing -= 1
                self._lock.notify_all()

    def left(self, live: LiveAnswer) -> None:
        """A reader is gone: a batch that nobody reads is forgotten."""
        with self._lock:
            self._read.discard(live)
            if self._drawn_by is None and self._batch is not None and all(each.over for each in self._batch.rows):
                self._batch = None
            self._waiting = [each for each in self._waiting if not each.over]
            self._lock.notify_all()

    @property
    def _draws(self) -> bool:
        """Whether this thread is the one that draws. It may have given that up, and another have taken it."""
        return self._drawn_by is threading.current_thread()

    @property
    def _several(self) -> bool:
        return len(self._read) > 1

    @property
    def _apart(self) -> bool:
        """Whether a thread draws that is no reader's."""
        return self._spare or self._several

    def _begin_to_draw(self) -> None:
        """Have a thread that draws; called with the lock."""
        if self._drawn_by is not None or self._stopped:
            return
        thread = threading.Thread(target=self._draw_all, daemon=True, name="hallucination-guard-stream")
        thread.start()  # where that fails, nobody draws
        self._drawn_by = thread
        if not self._registered:
            atexit.register(self._stop, weakref.ref(self))
            self._registered = True

    @property
    def _spare(self) -> bool:
        """Whether drawing and scoring do not want the same cores."""
        return self.inside.device.type != "cpu" or (os.cpu_count() or 1) > torch.get_num_threads()

    def _draw_all(self) -> None:
        """What the thread does that draws while readers compute; it ends when nothing waits."""
        failed: BaseException | None = None
        try:
            while not self._stopped and self._step():
                pass
        except BaseException as error:  # whoever reads raises it; nobody may wait for a thread that is gone
            failed = error
        finally:
            with self._lock:
                if self._draws:
                    if self._batch is not None:
                        self._batch.fail(failed)
                    self._batch, self._drawn_by = None, None
                self._lock.notify_all()

    @staticmethod
    def _stop(own: weakref.ref[Streams]) -> None:
        """The interpreter ends: torch must not be in the middle of a step then."""
        streams = own()
        if streams is None:
            return
        streams._stopped = True
        if (thread := streams._drawn_by) is not None and thread is not threading.current_thread():
            thread.join()

    def _step(self) -> bool:
        """Draw a token of each row; False where there is nothing to draw, and then nobody draws any more."""
        if self._due:
            self._do_jobs()
            return True
        batch = self._batch or self._next()
        if batch is None:
            return self._draws and bool(self._jobs)  # they came while it looked
        with self._lock:
            while self._computing and not self._spare:
                self._lock.wait()
        try:
            tokens = next(batch.steps, None)
            if tokens is not None:
                batch.drawn.append(tokens)
        except BaseException as error:
            with self._lock:
                batch.fail(error)
                self._batch = None
                self._lock.notify_all()
            if not isinstance(error, Exception):  # an interruption is of the thread that it meets
                raise
            return True
        with self._lock:
            waited = [each for each in batch.rows if each.waits]
            batch.look()
            if tokens is None:
                batch.fail(None)
            if tokens is None or all(each.over for each in batch.rows):
                self._batch, self._idle = None, time.perf_counter()
                # Who is still there asks again, or another in his place; whoever came after one who has left is there.
                still = sum(each in self._read for each in batch.rows)
                self._awaited = min(self._most, len(self._waiting) + still)
                self._patience = min(_FULL, _SHARE * (self._idle - batch.began))
            if not all(each.waits for each in waited):  # else every token would wake every reader for nothing
                self._lock.notify_all()
        return True

    @property
    def _due(self) -> bool:
        """Whether to compute before another token is drawn. What ends a little later could be scored together with it.

        Eight answers at once take half of what they take singly; who waits to be drawn gets that time.
        """
        with self._lock:
            now = time.perf_counter()
            if not self._jobs or any(each.until <= now for each in self._jobs):
                return bool(self._jobs)
            if self._batch is not None:
                return not self._waiting
            # What ended as the batch did comes in a moment.
            self._lock.wait_for(lambda: len(self._jobs) >= sum(each.ended is not None for each in self._read), _READY)
            return True

    def _do_jobs(self) -> None:
        """Compute what readers want computed."""
        with self._computes():
            while True:
                with self._lock:
                    if not self._jobs:
                        return
                    job = self._jobs[0]
                job()
                with self._lock:  # only now: an interruption must not lose it
                    self._jobs = [each for each in self._jobs if each is not job]
                    self._idle = time.perf_counter()
                    self._lock.notify_all()

    def _next(self) -> _Batch | None:
        """The batch to be decoded next."""
        with self._lock:
            # Whose answer has ended computes first: who asks after that belongs into the next batch.
            self._lock.wait_for(lambda: self._jobs or all(each.ended is None for each in self._read), _READY)
            if self._jobs:
                return None
            # A full batch takes little longer than one of the few who are there already. Nor is a thread ended for a
            # moment without any: torch would begin anew in the next one.
            until = self._idle + self._patience
            while len(self._waiting) < self._awaited and not self._jobs and not self._stopped:
                if not self._lock.wait(max(0.0, until - time.perf_counter())):
                    break
            seen = -1
            while seen != len(self._waiting) < self._most:  # until nobody came for a while
                seen = len(self._waiting)
                self._lock.wait(_GATHER)
            if self._jobs:
                return None
            self._waiting = [each for each in self._waiting if not each.over]
            if not self._waiting:
                self._drawn_by = None
                self._lock.notify_all()
                return None
            first = self._waiting[0]
            rows = tuple(each for each in self._waiting if _alike(each, first))[: self._most]
            self._waiting = [each for each in self._waiting if each not in rows]
            try:
                run = Decoding(self.inside, [each.asked for each in rows], first.settings)
            except BaseException as error:
                for each in rows:
                    each.error = _of_its_own(error)
                raise
            for row, each in enumerate(rows):
                each.begins(lambda answer, row=row, run=run: run.trace(row, answer))  # type: ignore[misc]
            self._batch = _Batch(rows=rows, steps=run.steps(first.room), drawn=[], began=time.perf_counter())
            return self._batch


def _of_its_own(error: BaseException | None) -> Exception:
    """An error for one reader: the traceback of a shared one would show each what the others read."""
    if isinstance(error, Exception):
        try:
            own = copy.copy(error)
        except Exception:  # some cannot be copied: then its kind is said
            return ModelError(f"decoding failed: {type(error).__name__}")
        own.__cause__ = own.__context__ = None
        return own.with_traceback(None)
    what = "the batch ended before the answer" if error is None else f"{type(error).__name__} in the batch"
    return ModelError(f"decoding was interrupted: {what}", hint="ask again")


def _alike(one: LiveAnswer, other: LiveAnswer) -> bool:
    """Whether two can be decoded together."""
    same = replace(one.settings, question=None) == replace(other.settings, question=None)
    return same and one.room == other.room
