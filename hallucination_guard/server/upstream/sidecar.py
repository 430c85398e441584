"""The sidecar: a server draws the answers, and the guard's white-box model reads exactly those tokens and scores them.

An answer is scored if the server read the prompt that we read, id by id, and says which tokens it drew. Else it is
unscorable, with that reason, and the policy's ``on_unscorable`` decides: a text is never tokenised again to be scored.
Further drafts that a policy wants are drawn by the guard's own model, and their records name no server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar, Unpack, cast

from hallucination_guard.errors import CalibrationMismatch, ConfigurationError, InputError, UpstreamError
from hallucination_guard.guard import Guard
from hallucination_guard.server.upstream.asking import said_in_full
from hallucination_guard.server.upstream.exchange import NO_IDS, Exchange
from hallucination_guard.server.upstream.parity import MOST, ParityWatch, distance, tolerance
from hallucination_guard.server.upstream.part import LogprobsError, Part, Upstream
from hallucination_guard.server.upstream.status import Status
from hallucination_guard.values import (
    Call,
    Ending,
    Event,
    GenerationOptions,
    GenerationSettings,
    Generator,
    Messages,
    Outcome,
    Piece,
)

__all__ = ["PROBES", "Sidecar"]

PROBES = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Why is the sky blue?",
    "Write one sentence about a red bicycle.",
    "Who wrote Hamlet?",
    "How many days has a week?",
    "Say hello in Spanish, German and Italian.",
    "What do plants need to grow?",
)
"""What a server is asked at start to measure its parity by."""

_Given = TypeVar("_Given")


class Sidecar:
    """A guard whose answers a server draws. Its interface is the guard's own, without the synchronous half.

    Args:
        guard: its model is the copy that reads; its scorer, policy, calibration and log are used as they are.
        upstream: the server, see :func:`~hallucination_guard.server.upstream.connect`.
        probes: questions for measuring parity at start.
        probe_tokens: the length of their answers at most.

    Raises:
        ConfigurationError: if there are no probes.
    """

    def __init__(
        self, guard: Guard, upstream: Upstream, *, probes: Sequence[str] = PROBES, probe_tokens: int = 16
    ) -> None:
        if not probes:
            raise ConfigurationError("there are no probes", hint="parity is measured by some questions")
        self.guard = guard
        self.upstream = upstream
        self._probes, self._probe_tokens = tuple(probes), probe_tokens
        self._generator: Generator | None = None
        self._watch: ParityWatch | None = None
        self._found = "the sidecar was not started"  # why nothing can be scored, as of the start
        self._unreached = ""

    # ------------------------------------------------------------------------------------------ start and status

    async def start(self) -> Status:
        """Ask the server who it is, and measure parity by the probes.

        A server that answers and does not fit is no error: its answers are unscorable until a start finds otherwise.

        Raises:
            UpstreamError: if it does not answer.
            CalibrationMismatch: if the policy stands on a certificate, and the guard's are of another server's answers.
        """
        self._watch, self._found = None, "the sidecar is being started"
        self._generator = generator = await self.upstream.describe()
        self._check_calibration(generator)
        if not self.upstream.can.ids:
            self._found = NO_IDS
            return self.status()
        apart = []
        for question in self._probes:
            found = await self._probe(question)
            if isinstance(found, str):
                self._found = found
                return self.status()
            apart.append(found)
        if (mean := sum(apart) / len(apart)) > MOST:
            self._found = f"the server's log-probabilities are {mean:.2g} nats a token from ours: it runs another model"
            return self.status()
        if (within := tolerance(apart)) >= MOST:
            self._found = (
                f"one answer of the server is {max(apart):.2g} nats a token from ours, and twice that is no tolerance "
                "that another model would be beyond"
            )
            return self.status()
        self._watch, self._found = ParityWatch(within), ""
        return self.status()

    async def close(self) -> None:
        """Give the connections back."""
        await self.upstream.close()

    def status(self) -> Status:
        """How it is now."""
        why = self._unscorable() or self._unreached
        generator = None if self._generator is None else self._by()
        return Status(
            ready=not why,
            why=why,
            generator=generator,
            uncovered="" if self._generator is None else self._uncovered(self._generator),
        )

    # -------------------------------------------------------------------------------------------------- answers

    async def acall(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Answer one prompt, or not; as :meth:`Guard.acall <hallucination_guard.Guard.acall>`.

        Raises:
            InputError: if the prompt cannot be used, or the server does not draw by a setting.
            UpstreamError: if the server fails; then there was no answer to decide on.
            AuditError: if the log cannot be written; then nothing is let through.
        """
        settings = self._settings(generation)
        if self.guard.calibration is not None and self.guard.calibration.gate == "stream":
            return await self._drained(messages, call, thread_id, settings)
        exchange = await self._begun(messages, settings)
        part = await self._answered(exchange)
        heard = await asyncio.to_thread(exchange.heard, part)
        why = self._unscorable() or heard.unscorable
        outcome = await self.guard.areview(
            messages,
            heard.text if why else heard.ids,
            unscorable=why,
            by=self._by(),
            ended=heard.ended,
            call=call,
            thread_id=thread_id,
            **_options(settings),
        )
        self._compare(part.logprobs, outcome)
        return outcome

    async def astream(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Event, None]:
        """Answer one prompt sentence by sentence; as :meth:`Guard.astream <hallucination_guard.Guard.astream>`.

        Closing it ends the server's request. Where the server dies in mid-stream, what was drawn is recorded as
        interrupted, and nothing more leaves.

        Raises:
            InputError: as :meth:`acall`.
            UpstreamError: if the server fails.
            AuditError: if the log cannot be written; then nothing more is let through.
        """
        async with aclosing(self._events(messages, call, thread_id, self._settings(generation))) as events:
            async for event in events:
                yield event

    async def _events(
        self, messages: Messages, call: Call | None, thread_id: str | None, settings: GenerationSettings
    ) -> AsyncGenerator[Event, None]:
        exchange = await self._begun(messages, settings)
        parts = _Parts(self.upstream.stream(exchange.asked))
        try:
            first = await self._reached(parts.next())
            why = self._unscorable() or exchange.prompt_differs(first)
            logprobs: list[float | None] = []
            pieces = self._texts(first, parts) if why else self._ids(exchange, first, parts, logprobs)
            events = self.guard.afollow(
                messages,
                pieces,
                unscorable=why,
                by=self._by(),
                call=call,
                thread_id=thread_id,
                **_options(settings),
            )
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Outcome):
                        self._compare(logprobs, event)
                    yield event
        except InputError as error:  # not of the prompt, which was read: of ids that the server gave
            raise UpstreamError(error.message, hint="nothing more leaves") from None
        finally:
            await parts.close()

    async def _drained(
        self, messages: Messages, call: Call | None, thread_id: str | None, settings: GenerationSettings
    ) -> Outcome:
        """A call through the stream gate: the guard's thresholds are of streams."""
        async for event in self._events(messages, call, thread_id, settings):
            if isinstance(event, Outcome):
                return event
        raise UpstreamError("the stream ended without an outcome")

    async def _texts(self, first: Part, parts: _Parts) -> AsyncIterator[Piece]:
        """An answer that cannot be scored; it is decided on as a whole."""
        part = first
        while True:
            if part.text:
                yield part.text
            if part.ended is not None:
                yield Ending(part.ended)
                return
            part = await self._reached(parts.next())

    async def _ids(
        self, exchange: Exchange, first: Part, parts: _Parts, logprobs: list[float | None]
    ) -> AsyncIterator[Piece]:
        """An answer in tokens, as far as it is sure that they are delivered."""
        delivered, text, part = exchange.delivered(), "", first
        while True:
            if part.ids is None and (part.text or part.ended is None):
                raise UpstreamError("the server stopped saying which tokens it draws", hint="nothing more leaves")
            logprobs += part.logprobs or [None] * len(part.ids or ())
            text += part.text
            if sure := await asyncio.to_thread(delivered.feed, part.ids or ()):
                yield sure
            if part.ended is not None:
                break
            part = await self._reached(parts.next())
        rest, ended = delivered.end(part.ended)
        if why := await asyncio.to_thread(exchange.text_differs, delivered.ids, text, ended):
            raise UpstreamError(why, hint="nothing more leaves")
        if rest:
            yield rest
        yield Ending(ended)

    # --------------------------------------------------------------------------------------------------- inside

    def _settings(self, generation: GenerationOptions) -> GenerationSettings:
        if self._generator is None:
            raise ConfigurationError("the sidecar was not started", hint="await sidecar.start()")
        return said_in_full(GenerationSettings.of(generation).over(self.guard.generation))

    async def _begun(self, messages: Messages, settings: GenerationSettings) -> Exchange:
        return await asyncio.to_thread(Exchange.begin, self.guard, messages, settings, self.upstream)

    async def _answered(self, exchange: Exchange) -> Part:
        """A whole answer.

        Raises:
            UpstreamError: if the server gives none, or does not say how it ended: then it may not have.
        """
        part = await self._reached(self.upstream.answer(exchange.asked))
        if part.ended is None:
            raise UpstreamError("the server does not say how the answer ended", hint="what broke off is no answer")
        return part

    async def _reached(self, asking: Awaitable[_Given]) -> _Given:
        """What the server gives; whether it does is part of the status."""
        try:
            given = await asking
        except UpstreamError as error:
            self._unreached = error.message
            if isinstance(error, LogprobsError) and self._watch is not None:
                self._watch.observe(None)
            raise
        self._unreached = ""
        return given

    def _unscorable(self) -> str:
        """Why nothing can be scored at the moment."""
        return self._found or ("" if self._watch is None else self._watch.suspended)

    def _by(self) -> Generator:
        assert self._generator is not None
        if self._watch is None:
            return self._generator
        return replace(
            self._generator,
            tolerance=self._watch.tolerance,
            compared=self._watch.compared,
            beyond=self._watch.beyond,
        )

    def _compare(self, theirs: Sequence[float | None], outcome: Outcome) -> None:
        """Watch parity by an answer of the server's that was scored; not by a further draft of ours."""
        generation, ours = outcome.generation, outcome.verdict.score.token_logprobs
        if self._watch is None or outcome.attempts > 1 or not ours:
            return
        before = len(generation.response_token_ids) - len(ours)  # thinking, which is not scored
        self._watch.observe(distance(theirs[before:], ours))

    async def _probe(self, question: str) -> float | str:
        """The distance of one probe's answer, or why there is none."""
        settings = said_in_full(GenerationSettings(max_new_tokens=self._probe_tokens))
        exchange = await self._begun(question, settings)
        part = await self._answered(exchange)
        heard = await asyncio.to_thread(exchange.heard, part)
        if heard.unscorable:
            return heard.unscorable
        read = await asyncio.to_thread(exchange.read, heard.ids)
        [score] = await asyncio.to_thread(self.guard.scorer.batch, self.guard.model, [read])
        apart = distance(part.logprobs[len(heard.ids) - len(score.token_logprobs) :], score.token_logprobs)
        return "the server gives no log-probabilities to measure parity by" if apart is None else apart

    def _uncovered(self, generator: Generator) -> str:
        calibration = self.guard.calibration
        if calibration is None or calibration.conditions.generator == generator.mark:
            return ""
        of = calibration.conditions.generator or "the model here"
        return f"the calibration is of answers drawn by {of!r}, and these are drawn by {generator.mark!r}"

    def _check_calibration(self, generator: Generator) -> None:
        if getattr(self.guard.policy, "needs_risk", None) is not None and (why := self._uncovered(generator)):
            raise CalibrationMismatch(why, hint="label answers of this server in the log, and calibrate on them")


class _Parts:
    """The parts of an answer as they come; it can be closed while the next one is waited for and given up."""

    def __init__(self, parts: AsyncGenerator[Part, None]) -> None:
        self._parts, self._lock = parts, asyncio.Lock()

    async def next(self) -> Part:
        """The next part.

        Raises:
            UpstreamError: if there is none, or the server fails.
        """
        async with self._lock:
            async for part in self._parts:
                return part
        raise UpstreamError("the server broke off in mid-stream")

    async def close(self) -> None:
        """End the request."""
        async with self._lock:
            await self._parts.aclose()


def _options(settings: GenerationSettings) -> GenerationOptions:
    return cast("GenerationOptions", {**settings.drawing, "question": settings.question})
