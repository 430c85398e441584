"""Guard: the doors of a guarded call. Each looks at the parts, and lets the loop run, or the stream gate.

The loop is synchronous and works on a batch; one call is a batch of one, and the async methods run it in a thread. A
guard whose calibration is of streams lets its calls through the stream gate as well.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Unpack

from hallucination_guard.errors import ConfigurationError, InputError, without_frames
from hallucination_guard.guard.in_a_thread import from_the_loop, in_a_thread, result_of
from hallucination_guard.guard.joined import Joined
from hallucination_guard.guard.parts import Parts
from hallucination_guard.guard.progress import Progress
from hallucination_guard.guard.recording import Recorder, Review, policy_identity
from hallucination_guard.guard.stream import Streaming
from hallucination_guard.values import (
    Call,
    Event,
    FinishReason,
    FollowingModel,
    Generation,
    GenerationOptions,
    GenerationSettings,
    Generator,
    Heard,
    Messages,
    Outcome,
    Piece,
    StreamingModel,
    as_messages,
)

__all__ = ["Guard"]


class Guard(Parts):
    """A model whose answers leave only by decision of a policy.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`, or what else generates and reads.
        policy: decides what happens with each answer.
        scorer: measures; HybridGrad by default, and the sentences beside it where the policy acts on them.
        calibration: turns scores into confidences; needed by a policy that speaks of confidence.
        sentences: thresholds for the sentences of answers; needed by a policy that speaks of their ``alpha``.
        audit: where the record of every attempt goes; without one nothing is kept.
        drift: notices when scores no longer look like the calibration's, and suspends certificates from then on; by
            default one is made for a calibration whose certificates cover the policy.
        watch: suspends certificates when labels show that the risk is not kept, see
            :class:`~hallucination_guard.audit.RiskWatch`; it has to test a risk that is at most the policy's.
        generation: defaults for every call: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``,
            ``question`` (see ``WhiteBoxModel.generate``).
        max_attempts: after so many answers a policy's wish for another is an abstention, whatever its own budget says.
        batch_size: prompts that are generated and scored together by :meth:`batch`, and answers that are scored
            together of :meth:`acall`.
        max_calls: calls of :meth:`acall` that may be under way at a time; beyond it ``BusyError``.
        debug: let errors out with their traceback and with what others raised. Both may hold a draft that was not let
            through, so without it an error that leaves has neither.

    Raises:
        ConfigurationError: if these cannot work together; ``CalibrationMismatch`` for the calibration of
            another model, template, dtype or scorer.
    """

    def __call__(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Answer one prompt, or not.

        Args:
            messages: a string, or role/content messages.
            call: facts for the record of every attempt: conversation, principal, tags.
            thread_id: of the conversation; short for ``call=Call(thread_id=…)``.
            **generation: overrides the guard's ``generation`` for this call.

        Raises:
            InputError: if the prompt cannot be used.
            AuditError: if the log cannot be written; then nothing is let through.
        """
        return self._run([messages], call, thread_id, generation)[0]

    def batch(
        self,
        prompts: Sequence[Messages],
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> list[Outcome]:
        """Answer several prompts, generated and scored together; each gets what it would get alone."""
        if isinstance(prompts, str):
            raise InputError(f"the batch is the text {prompts[:40]!r}", hint="give a list of prompts")
        return self._run(prompts, call, thread_id, generation)

    def review(
        self,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        unscorable: str = "",
        by: Generator | None = None,
        ended: FinishReason = "read",
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Decide on an answer that something else wrote; further attempts, if the policy wants any, are the model's.

        Args:
            messages: what it is an answer to.
            answer: its text, or its token ids in this model's vocabulary.
            unscorable: why it cannot be scored, where the caller knows that (the prompt had an image): it is not read,
                and the policy's ``on_unscorable`` decides. No text of prompt or answer: it goes into the log.
            by: the server that drew it, where that is known: the record names it, and of a calibration's certificates
                only those of its answers hold. Then ``generation`` also says how it was drawn.
            ended: how the answer ended, where that is known.
            call: as for :meth:`__call__`.
            thread_id: as for :meth:`__call__`.
            **generation: settings of further attempts.
        """
        given = _Given(answer=answer, unscorable=unscorable, by=by, ended=ended)
        return self._run([messages], call, thread_id, generation, answers=[given])[0]

    async def areview(
        self,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        unscorable: str = "",
        by: Generator | None = None,
        ended: FinishReason = "read",
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """:meth:`review`, in a thread of its own, as :meth:`acall`: what comes at the same time is scored together.

        Raises:
            BusyError: if ``max_calls`` are under way.
        """
        given = _Given(answer=answer, unscorable=unscorable, by=by, ended=ended)
        return await self._apart(messages, call, thread_id, generation, answers=[given])

    def record_review(self, messages: Messages, review: Review) -> str:
        """Write down a human's part in a call: that its answer waits, or what became of it.

        Args:
            messages: what was asked.
            review: what is known.

        Returns:
            The id of the record; empty without an audit log.

        Raises:
            AuditError: if the log cannot be written; then nothing is let through.
        """
        recorder = Recorder(sink=self.audit, policy=policy_identity(self.policy), debug=self.debug)
        return recorder.reviewed(as_messages(messages), review, model=self.model.identity, scorer=self.scorer.identity)

    async def acall(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """:meth:`__call__`, in a thread of its own. What asks at the same time is decoded and scored together.

        A cancelled task ends generating within a token and drops the outcome; the attempt is still recorded.

        Raises:
            BusyError: if ``max_calls`` are under way.
        """
        return await self._apart(messages, call, thread_id, generation)

    def settle(self, seconds: float | None = None) -> bool:
        """Wait until no call or stream of an async method is under way, also none that was cancelled.

        Each has its record then. Not in the loop that a stream of :meth:`afollow` waits for.

        Args:
            seconds: at most; None for as long as it takes.

        Returns:
            Whether none is.
        """
        return self._under_way.empty(seconds)

    @property
    def under_way(self) -> int:
        """How many calls and streams of the async methods have not written their last record yet."""
        return len(self._under_way)

    async def abatch(
        self,
        prompts: Sequence[Messages],
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> list[Outcome]:
        """:meth:`batch` in a thread."""
        return await asyncio.to_thread(self.batch, prompts, call=call, thread_id=thread_id, **generation)

    # ---------------------------------------------------------------------------------------------- streams

    @property
    def streams(self) -> bool:
        """Whether an answer can leave sentence by sentence: the model streams, and the thresholds are of streams."""
        asks = getattr(self.policy, "needs_confidence", False) or getattr(self.policy, "needs_risk", None) is not None
        whole = self.calibration is not None and self.calibration.gate == "answer"
        edits = getattr(self.policy, "edits", False)
        return isinstance(self.model, StreamingModel) and not (asks and whole) and not edits

    def stream(
        self,
        messages: Messages,
        *,
        provisional: bool = False,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Iterator[Event]:
        """Answer one prompt sentence by sentence: each leaves when the answer up to its end was let through.

        What asks at the same time, in other threads, is decoded together. Closing the iterator ends generating within
        a token, and leaves a record.

        Args:
            messages: as for :meth:`__call__`.
            provisional: show text as it is drawn, as :class:`~hallucination_guard.values.Provisional` events; the
                policy has to allow it.
            call: as for :meth:`__call__`.
            thread_id: as for :meth:`__call__`.
            **generation: as for :meth:`__call__`.

        Returns:
            :class:`~hallucination_guard.values.Released` events, and the :class:`~hallucination_guard.values.Outcome`,
            which is the last.

        Raises:
            ConfigurationError: if the model cannot stream, the calibration is of whole answers, or the policy does not
                allow what ``provisional`` asks for.
            InputError: if the prompt cannot be used.
            AuditError: from the iterator, if the log cannot be written; then nothing more is let through.
        """
        return self._events(messages, call, thread_id, generation, provisional=provisional, gone=lambda: False)

    def astream(
        self,
        messages: Messages,
        *,
        provisional: bool = False,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Event, None]:
        """:meth:`stream`, in a thread of its own for each. A cancelled task ends generating within a token."""
        left = threading.Event()
        events = self._events(messages, call, thread_id, generation, provisional=provisional, gone=left.is_set)
        return in_a_thread(events, left, self._under_way.begin, self._under_way.end)

    def follow(
        self,
        messages: Messages,
        pieces: Iterable[Piece],
        *,
        unscorable: str = "",
        by: Generator | None = None,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Iterator[Event]:
        """Decide on an answer that something else is writing, sentence by sentence, as :meth:`stream` does.

        Further drafts, if the policy wants any, are the model's own and begin with what was released. The end of the
        answer is the end of the pieces: an answer that broke off has to raise. An error of theirs is an interruption,
        recorded and raised.

        Args:
            messages: what it is an answer to.
            pieces: of the answer, as they come: texts, or token ids in this model's vocabulary; one kind an answer.
                If they can be closed (a generator), they are when nothing more is wanted of them.
            unscorable: as for :meth:`review`; then it is decided on as a whole.
            by: as for :meth:`review`; the last piece may then be the answer's ``Ending``.
            call: as for :meth:`__call__`.
            thread_id: as for :meth:`__call__`.
            **generation: settings of further drafts; ``tools`` and ``response_schema`` as the answer was asked for.

        Returns:
            As :meth:`stream`.

        Raises:
            ConfigurationError: if the model cannot follow, or as for :meth:`stream`.
            InputError: if the prompt cannot be used; from the iterator, if a piece is none.
            ModelError: from the iterator, if the tokens of the text do not go on as they began.
            AuditError: from the iterator, if the log cannot be written; then nothing more is let through.
        """
        return self._following(messages, pieces, unscorable, by, call, thread_id, generation, gone=lambda: False)

    def afollow(
        self,
        messages: Messages,
        pieces: Iterable[Piece] | AsyncIterable[Piece],
        *,
        unscorable: str = "",
        by: Generator | None = None,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Event, None]:
        """:meth:`follow`, in a thread of its own. What is awaited of the pieces is awaited in the running loop."""
        left = threading.Event()
        come = from_the_loop(pieces, left) if isinstance(pieces, AsyncIterable) else pieces
        events = self._following(messages, come, unscorable, by, call, thread_id, generation, gone=left.is_set)
        return in_a_thread(events, left, self._under_way.begin, self._under_way.end)

    def _following(
        self,
        messages: Messages,
        pieces: Iterable[Piece],
        unscorable: str,
        by: Generator | None,
        call: Call | None,
        thread_id: str | None,
        generation: Mapping[str, object],
        *,
        gone: Callable[[], bool],
    ) -> Iterator[Event]:
        if not isinstance(self.model, FollowingModel):
            raise ConfigurationError(
                f"{type(self.model).__name__!r} cannot read an answer while it is written", hint="review it as a whole"
            )
        settings = GenerationSettings.of(generation).over(self.generation)
        streaming = self._streaming(gone)
        [progress] = self._progress([messages], _facts(call, thread_id), settings)
        progress.by = by
        heard = self.model.follow(
            progress.messages,
            pieces,
            gone=gone,
            unscorable=unscorable,
            question=settings.question,
            **settings.offered,
        )
        return self._streamed(streaming, progress, heard)

    def _events(
        self,
        messages: Messages,
        call: Call | None,
        thread_id: str | None,
        generation: Mapping[str, object],
        *,
        provisional: bool,
        gone: Callable[[], bool],
    ) -> Iterator[Event]:
        if provisional and not getattr(self.policy, "provisional", False):
            raise ConfigurationError(
                "the policy does not let text be shown before it is decided on",
                hint="say so: ShowProvisional(policy), or provisional: true in its document",
            )
        settings = GenerationSettings.of(generation).over(self.generation)
        [progress] = self._progress([messages], _facts(call, thread_id), settings)
        return self._streamed(self._streaming(gone, provisional=provisional), progress)

    def _streaming(self, gone: Callable[[], bool], *, provisional: bool = False) -> Streaming:
        if not isinstance(self.model, StreamingModel):
            raise ConfigurationError(f"{type(self.model).__name__!r} does not stream", hint="call the guard instead")
        if getattr(self.policy, "edits", False):
            raise ConfigurationError(
                "the policy marks or leaves out sentences, which it can only do when it has the whole answer",
                hint="call the guard instead, or stream with a policy without mark and redact",
            )
        if not self.streams:
            raise ConfigurationError(
                "the calibration is of whole answers, and a stream asks about their beginnings",
                hint="fit one for streams: calibrate --for stream; or give the policy score and limit",
            )
        loop = self._loop("stream")
        if self.calibration is not None and self.calibration.gate == "answer":  # the policy asks nothing of it
            loop = replace(
                loop,
                judging=replace(loop.judging, calibration=None, certificates=(), drift=None, novelty=None, watch=None),
            )
        return Streaming(loop=loop, model=self.model, gone=gone, provisional=provisional)

    def _streamed(self, streaming: Streaming, progress: Progress, heard: Heard | None = None) -> Iterator[Event]:
        failure: BaseException | None = None
        try:
            yield from streaming(progress, heard)
        except GeneratorExit:
            raise
        except BaseException as error:
            if self.debug:
                raise
            failure = error
        if failure is not None:
            del streaming, progress, heard  # this frame is in the traceback as well
            raise without_frames(failure)

    def _drained(self, all_progress: Sequence[Progress], gone: Callable[[], bool] | None) -> None:
        """Calls through the stream gate: their thresholds are of streams. Those of a batch are decoded together."""
        left = threading.Event()
        streaming = self._streaming(lambda: left.is_set() or (gone is not None and gone()))

        def drain(progress: Progress) -> None:
            for _ in streaming(progress):
                pass

        with ThreadPoolExecutor(self.batch_size, thread_name_prefix="hallucination-guard") as threads:
            calls = [threads.submit(contextvars.copy_context().run, drain, each) for each in all_progress]
            try:
                for each in calls:
                    each.result()
            except BaseException:  # an interruption as well: the others end within a token, and are recorded
                left.set()
                raise

    def _progress(self, prompts: Sequence[Messages], facts: Call, settings: GenerationSettings) -> list[Progress]:
        """Where each prompt begins. One that cannot be used is refused before anything is generated."""
        begun = []
        for prompt in prompts:
            messages = as_messages(prompt)
            self.model.prompt(messages, **settings.offered)
            begun.append(Progress(asked=messages, messages=messages, settings=settings, call=facts))
        return begun

    # ------------------------------------------------------------------------------------------------ calls

    def _run(
        self,
        prompts: Sequence[Messages],
        call: Call | None,
        thread_id: str | None,
        generation: Mapping[str, object],
        *,
        answers: Sequence[_Given] = (),
        gone: Callable[[], bool] | None = None,
    ) -> list[Outcome]:
        settings = GenerationSettings.of(generation).over(self.generation)
        facts = _facts(call, thread_id)
        if facts.request_id is not None and len(prompts) > 1:
            raise InputError(
                f"{len(prompts)} prompts were given one request_id, {facts.request_id!r}",
                hint="give each a call of its own",
            )
        streamed = self.calibration is not None and self.calibration.gate == "stream"
        loop = None if streamed else self._loop()
        if loop is not None and gone is not None and isinstance(self.model, StreamingModel):
            loop = replace(loop, joined=Joined(self.model, loop.scorer, gone, self._together))
        if streamed and answers:
            raise ConfigurationError(
                "the calibration is of streams, and an answer that something else wrote is judged as a whole",
                hint="give the guard a calibration of whole answers to review with",
            )
        all_progress = self._progress(prompts, facts, settings)
        for progress, answer in zip(all_progress, answers, strict=False):
            progress.by = answer.by
            progress.given, progress.unscorable = self._given(progress, answer)
        failure: BaseException | None = None
        try:
            self._drained(all_progress, gone) if loop is None else loop.run(all_progress)
        except BaseException as error:
            if self.debug:
                raise
            failure = error
        if failure is not None:
            all_progress.clear()  # this frame is in the traceback as well
            raise without_frames(failure)
        return [each.outcome for each in all_progress if each.outcome is not None]

    async def _apart(
        self,
        messages: Messages,
        call: Call | None,
        thread_id: str | None,
        generation: Mapping[str, object],
        *,
        answers: Sequence[_Given] = (),
    ) -> Outcome:
        """One call in a thread of its own, beside others."""
        left = threading.Event()

        def run() -> Outcome:
            return self._run([messages], call, thread_id, generation, answers=answers, gone=left.is_set)[0]

        self._under_way.take()  # until the thread has ended, which a cancelled task does not wait for
        return await result_of(run, left, self._under_way.back)

    def _given(self, progress: Progress, given: _Given) -> tuple[Generation, str]:
        """An answer that something else wrote, and why it cannot be scored: it was written, so it has a record.

        Raises:
            InputError: if it is no answer.
        """
        settings, answer = progress.settings, given.answer
        try:
            if given.unscorable:
                raise InputError(given.unscorable)
            read = self.model.read(progress.messages, answer=answer, question=settings.question, **settings.offered)
        except InputError as error:
            if not isinstance(answer, str):
                raise
            unread = Generation.unread(
                self.model.prompt(progress.messages, **settings.offered),
                answer,
                settings=GenerationSettings.of({"question": settings.question, **settings.offered}),
                model=self.model.identity,
                finish_reason=given.ended,
            )
            return unread, error.message
        return replace(read, finish_reason=given.ended), ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """An answer to be judged first, and what is known of it; see :meth:`Guard.review`."""

    answer: str | Sequence[int]
    unscorable: str
    by: Generator | None
    ended: FinishReason


def _facts(call: Call | None, thread_id: str | None) -> Call:
    if call is None:
        return Call(thread_id=thread_id)
    if thread_id is not None:
        raise InputError(f"thread_id {thread_id!r} was given beside {call!r}", hint="let the Call name it")
    return call
