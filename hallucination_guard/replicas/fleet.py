"""Who asks the replicas: each request one of them, and once more another one where it is lost.

A request keeps its id when it is asked again, so that a record which the lost replica has written already and that of
the next are of one deed, see :mod:`hallucination_guard.audit.folder`. Nothing here knows of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Protocol, Unpack
from uuid import uuid4

from hallucination_guard.errors import GuardError, ReplicaLost
from hallucination_guard.replicas.said import About, Asked, Broken, Said
from hallucination_guard.server.answering import Answering
from hallucination_guard.server.config import Alias
from hallucination_guard.server.refusals import Refusal
from hallucination_guard.server.requests import Tightening
from hallucination_guard.server.upstream.status import Status
from hallucination_guard.values import (
    Call,
    Event,
    FinishReason,
    GenerationOptions,
    Messages,
    Outcome,
    as_messages,
)

__all__ = ["Fleet", "Handle", "Remote"]

_log = logging.getLogger("hallucination_guard.server")
_LOOK = 2.0  # seconds after which somebody is asked how it is
_PATIENCE = 10.0  # seconds that it may take to say so
_STALE = 60.0  # seconds after which what a replica has said of itself is not counted any more: it may be gone


class Handle(Protocol):
    """How replicas are reached."""

    async def about(self) -> Said:
        """How one of them is.

        Raises:
            ReplicaLost: if it was lost before it said so.
        """
        ...

    async def answer(self, asked: Asked) -> Said:
        """What one of them answers.

        Raises:
            ReplicaLost: likewise.
        """
        ...

    async def review(self, asked: Asked) -> Said:
        """What one of them makes of a given answer.

        Raises:
            ReplicaLost: likewise.
        """
        ...

    def stream(self, asked: Asked) -> AsyncGenerator[Said, None]:
        """What one of them answers, event by event; closing it ends generating there.

        Raises:
            ReplicaLost: from the generator, if it was lost before the last event.
        """
        ...


class Fleet:
    """Replicas of one server, seen from the process that asks them.

    Args:
        handle: reaches them.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self.why = "the replicas were not asked yet"
        self._heard: dict[str, tuple[float, dict[str, About]]] = {}
        self._watching: asyncio.Task[None] | None = None

    async def look(self) -> None:
        """Ask one of them how it is.

        Raises:
            ReplicaLost: if none says so; then ``why`` has the words.
        """
        try:
            async with asyncio.timeout(_PATIENCE):
                self._hear(await self._handle.about())
        except (TimeoutError, ReplicaLost):
            self.why = "no replica answers"
            raise ReplicaLost(self.why) from None
        self.why = ""

    async def start(self) -> None:
        """Ask one of them how it is, and go on doing so.

        Raises:
            ReplicaLost: if none says so.
        """
        await self.look()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Ask no more."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def answer(self, asked: Asked) -> Outcome:
        """Have one request answered, or not.

        Raises:
            ReplicaLost: if two replicas were lost over it.
        """
        try:
            return self._outcome(await self._handle.answer(asked))
        except ReplicaLost:
            _again(asked)
            return self._outcome(await self._handle.answer(asked))

    async def review(self, asked: Asked) -> Outcome:
        """Have a given answer judged.

        Raises:
            ReplicaLost: likewise.
        """
        try:
            return self._outcome(await self._handle.review(asked))
        except ReplicaLost:
            _again(asked)
            return self._outcome(await self._handle.review(asked))

    async def stream(self, asked: Asked) -> AsyncGenerator[Event, None]:
        """Have one request answered sentence by sentence. Where one has left, the rest cannot be another's.

        Raises:
            ReplicaLost: if a replica was lost after a sentence had left, or two were before.
        """
        for further in (True, False):
            begun = False
            try:
                async with aclosing(self._handle.stream(asked)) as all_said:
                    async for said in all_said:
                        event = self._event(said)
                        begun = True
                        yield event
                return
            except ReplicaLost:
                if begun or not further:
                    raise
                _again(asked)

    def of(self, alias: str) -> About | None:
        """How an alias is, as the replica that was heard last has it; None before one was."""
        return max(self._heard.values(), key=lambda each: each[0])[1][alias] if self._heard else None

    def suspended(self, alias: str) -> str:
        """Why certificates or scores do not hold in some replica; empty while they do in all that were heard lately."""
        since = time.monotonic() - _STALE
        said = [about[alias].suspended for at, about in self._heard.values() if at >= since]
        return next(filter(None, said), "")

    def heard_lately(self) -> int:
        """How many replicas were."""
        since = time.monotonic() - _STALE
        return sum(at >= since for at, _ in self._heard.values())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            with suppress(ReplicaLost):  # `why` says so
                await self.look()

    def _hear(self, said: Said) -> None:
        now = time.monotonic()
        self._heard = {name: each for name, each in self._heard.items() if each[0] >= now - _STALE}
        self._heard[said.replica] = (now, said.about)

    def _event(self, said: Said) -> Event:
        self._hear(said)
        if isinstance(said.value, GuardError | Refusal):
            raise said.value
        if isinstance(said.value, Broken) or said.value is None:
            kind = "nothing" if said.value is None else said.value.kind
            raise RuntimeError(f"replica {said.replica} gave {kind}")
        return said.value

    def _outcome(self, said: Said) -> Outcome:
        event = self._event(said)
        if not isinstance(event, Outcome):
            raise RuntimeError(f"replica {said.replica} gave a {type(event).__name__}")
        return event


def _again(asked: Asked) -> None:
    _log.warning("server.replica_lost: asked again: %s", asked.call.request_id)


@dataclass(frozen=True, slots=True)
class Remote:
    """What stands behind an alias, where that is replicas.

    Args:
        alias: as the settings have it.
        fleet: the replicas.
    """

    alias: Alias
    fleet: Fleet

    @property
    def why(self) -> str:
        """Why it is not ready; empty once it is."""
        about = self.fleet.of(self.alias.alias)
        return self.fleet.why or ("" if about is None else about.why)

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return self._about().fingerprint

    @property
    def streams(self) -> bool:
        """Whether answers can leave sentence by sentence."""
        return self._about().streams

    @property
    def suspended(self) -> str:
        """Why certificates or scores do not hold in some replica; empty while they do."""
        return self.fleet.suspended(self.alias.alias)

    @property
    def drift(self) -> tuple[bool, int] | None:
        """Nothing: each replica tests its own scores; ``suspended`` says what they found."""
        return None

    def status(self) -> Status:
        """How it is now."""
        return Status(ready=not self.why, why=self.why)

    async def start(self) -> None:
        """See that it is ready.

        Raises:
            GuardError: if it is not.
        """
        await self.fleet.start()
        if self.why:
            raise GuardError(self.why)

    async def close(self) -> None:
        """Ask no more."""
        await self.fleet.close()

    def answering(self, tightening: Tightening) -> Answering:
        """Who answers a request; whether it asks for less than the policy, the replica says."""
        return _Asking(self, tightening)

    async def review(
        self,
        tightening: Tightening,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        ended: FinishReason,
        call: Call,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Judge a given answer by the policy; nothing is drawn."""
        given = answer if isinstance(answer, str) else tuple(answer)
        asked = self.asked(tightening, messages, call, generation)
        return await self.fleet.review(replace(asked, answer=given, ended=ended))

    def asked(self, tightening: Tightening, messages: Messages, call: Call, options: GenerationOptions) -> Asked:
        """A request to this alias."""
        # It has an id before it is asked for the first time: who answers it again answers the same request.
        facts = call if call.request_id is not None else replace(call, request_id=uuid4().hex)
        return Asked(
            alias=self.alias.alias,
            tightening=tightening,
            messages=as_messages(messages),
            call=facts,
            options=options,
        )

    def _about(self) -> About:
        about = self.fleet.of(self.alias.alias)
        if about is None:
            raise ReplicaLost("no replica was heard yet")
        return about


@dataclass(frozen=True, slots=True)
class _Asking:
    """The door of a guard, with replicas behind it."""

    remote: Remote
    tightening: Tightening

    async def acall(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Answer one prompt, or not."""
        return await self.remote.fleet.answer(self._asked(messages, call, thread_id, generation))

    def astream(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Event, None]:
        """Answer one prompt sentence by sentence; closing it ends generating."""
        return self.remote.fleet.stream(self._asked(messages, call, thread_id, generation))

    def _asked(self, messages: Messages, call: Call | None, thread_id: str | None, options: GenerationOptions) -> Asked:
        facts = Call(thread_id=thread_id) if call is None else call
        return self.remote.asked(self.tightening, messages, facts, options)
