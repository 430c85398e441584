"""Calls of many tasks: what is asked at the same time is decoded as one batch, and what ends together scored together.

Each call keeps a thread, a loop and a policy of its own; they meet only where the model computes. Decoding is that of
the streams (:mod:`hallucination_guard.model.live`), whose batches are static ones, so that what scoring needs is kept.
A call that nobody waits for any more takes no further token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hallucination_guard.errors import BusyError
from hallucination_guard.guard.in_a_thread import ReaderGone
from hallucination_guard.guard.progress import Progress
from hallucination_guard.values import (
    Drawing,
    FollowingModel,
    Generation,
    Live,
    Score,
    Scorer,
    StreamingModel,
    Verdict,
)
from hallucination_guard.values.protocols import Compute, Found

__all__ = ["Joined", "Together", "UnderWay"]

Scoring = Callable[[Sequence[Generation]], list[Score]]


class UnderWay:
    """What is under way: calls, of which only so many may be, and streams, which take none of their places.

    A stream takes the time that what feeds it takes: calls would be refused meanwhile.

    Args:
        most: calls; beyond it a call is refused at once.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken, self._streams, self._lock = most, 0, 0, threading.Condition()

    def take(self) -> None:
        """Take a place, to be given :meth:`back`.

        Raises:
            BusyError: if none is left.
        """
        with self._lock:
            if self._taken >= self._most:
                raise BusyError(f"{self._taken} calls are under way", hint="ask again later, or give max_calls=…")
            self._taken += 1

    def back(self) -> None:
        """Give a place back."""
        with self._lock:
            self._taken -= 1
            self._lock.notify_all()

    def begin(self) -> None:
        """Count a stream, until its :meth:`end`."""
        with self._lock:
            self._streams += 1

    def end(self) -> None:
        """A stream has ended."""
        with self._lock:
            self._streams -= 1
            self._lock.notify_all()

    def __len__(self) -> int:
        """How many are under way."""
        with self._lock:
            return self._taken + self._streams

    def empty(self, seconds: float | None) -> bool:
        """Wait until none is under way, for so many seconds at most; whether none is."""
        with self._lock:
            return self._lock.wait_for(lambda: not len(self), seconds)


class Together:
    """Scores what waits to be scored as one batch: whoever's turn it is does it for those who wait.

    Args:
        most: answers at a time.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._waiting: list[_Waiting] = []

    def __call__(self, generation: Generation, compute: Compute, score: Scoring, of: tuple[object, ...]) -> Score:
        """The score of one answer.

        Args:
            generation: the answer.
            compute: says whose turn it is to compute.
            score: scores a batch.
            of: what it scores with: only those are scored together that wait for the very same model and scorer.
        """
        own = _Waiting(generation=generation, of=of)
        with self._lock:
            self._waiting.append(own)

        def together() -> Score:
            if own.score is None:
                with self._lock:
                    alike = [each for each in self._waiting if each is not own and each.alike(own)]
                    batch = [own, *alike[: self._most - 1]]
                    self._waiting = [each for each in self._waiting if all(each is not taken for taken in batch)]
                for each, found in zip(batch, score([each.generation for each in batch]), strict=True):
                    each.score = found
            assert own.score is not None
            return own.score

        try:
            return compute(together)
        finally:
            with self._lock:
                self._waiting = [each for each in self._waiting if each is not own]


@dataclass(slots=True, eq=False)
class _Waiting:
    generation: Generation
    of: tuple[object, ...]
    score: Score | None = None

    def alike(self, other: _Waiting) -> bool:
        """Whether both are scored by the same, and not by what is merely equal."""
        return all(one is another for one, another in zip(self.of, other.of, strict=True))


class Joined:
    """How one call draws and scores beside others.

    Args:
        model: whose streams are decoded together.
        scorer: that the call is scored by.
        gone: whether nobody waits for the call any more.
        together: of all calls under the same scorer.
    """

    def __init__(self, model: StreamingModel, scorer: Scorer, gone: Callable[[], bool], together: Together) -> None:
        self._model, self._scorer, self._gone, self._together = model, scorer, gone, together
        self._live: Live | None = None

    def draw(self, progress: Progress, drawing: Drawing, *, unfinished: Verdict) -> Generation:
        """The next answer of a prompt.

        Args:
            progress: of the prompt.
            drawing: how it is drawn.
            unfinished: the verdict on an answer that was not drawn to its end.

        Raises:
            ReaderGone: if nobody waits for it any more: then ``progress`` has what was drawn until then.
        """
        self._leave()
        live = self._model.stream(progress.messages, gone=self._gone, question=progress.settings.question, **drawing)
        self._live = live
        try:
            live.wait(lambda: False)
            ended = live.ended
            generation = live.beginning()
        except BaseException:
            self._leave()
            raise
        if ended is None:
            self._leave()
            if progress.recorded == progress.attempt:  # else a draft of this attempt is there, and is recorded
                progress.begin(generation, unfinished)
            raise ReaderGone("nobody waits for the answer any more")
        return generation

    def score(self, generations: Sequence[Generation], score: Scoring) -> list[Score]:
        """The scores of what was drawn last, or of what something else drew."""
        try:
            of = (self._model, self._scorer)
            return [self._together(each, self._compute, score, of) for each in generations]
        finally:
            self._leave()

    def _compute(self, work: Callable[[], Found]) -> Found:
        if self._live is not None:
            return self._live.compute(work, patient=True)
        return self._model.compute(work) if isinstance(self._model, FollowingModel) else work()

    def _leave(self) -> None:
        if self._live is not None:
            self._live.leave()
            self._live = None
