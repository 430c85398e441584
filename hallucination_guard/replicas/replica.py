"""One process that answers: models, guards and chains of its own, made of plain settings. Nothing here knows of Ray."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import ExitStack, aclosing
from typing import Any

from hallucination_guard.errors import GuardError
from hallucination_guard.replicas.opening import opened
from hallucination_guard.replicas.said import About, Asked, Broken, Said, leaving
from hallucination_guard.server.config import Settings
from hallucination_guard.server.house import Served
from hallucination_guard.server.refusals import Refusal
from hallucination_guard.values import Outcome

__all__ = ["Replica"]

_log = logging.getLogger("hallucination_guard.server")


class Replica:
    """Answers and judges for a server that stands elsewhere.

    What is asked at the same time meets in the guard's own batches, as in a server of one process.

    Args:
        settings: of the server, as plain JSON.
        name: of this replica, which no other has or had: its chains are called so.

    Raises:
        GuardError: if something cannot be loaded.
    """

    def __init__(self, settings: Mapping[str, Any], name: str) -> None:
        self.name = name
        self._settings = Settings.of(dict(settings))
        self._starting = asyncio.Lock()
        with ExitStack() as stack:
            self._served = opened(self._settings, stack, chain=name)
            self._stack = stack.pop_all()

    async def about(self) -> Said:
        """How every alias is. What is not ready yet is tried to be got ready."""
        for each in self._served.values():
            if each.why:
                try:
                    await self._start(each)
                except GuardError as error:  # `why` says so
                    _log.warning("server.not_ready %s: %s", each.alias.alias, type(error).__name__)
        return self._said(None)

    async def answer(self, asked: Asked) -> Said:
        """Answer one prompt, or not."""

        async def outcome() -> Outcome:
            served = await self._ready(asked.alias)
            answering = served.answering(asked.tightening)
            return await answering.acall(asked.messages, call=asked.call, **asked.options)

        return await self._tried(outcome())

    async def review(self, asked: Asked) -> Said:
        """Judge a given answer."""

        async def outcome() -> Outcome:
            served = await self._ready(asked.alias)
            return await served.review(
                asked.tightening, asked.messages, asked.answer, ended=asked.ended, call=asked.call, **asked.options
            )

        return await self._tried(outcome())

    async def stream(self, asked: Asked) -> AsyncGenerator[Said, None]:
        """Answer one prompt sentence by sentence. Closing it ends generating."""
        try:
            served = await self._ready(asked.alias)
            answering = served.answering(asked.tightening)
            async with aclosing(answering.astream(asked.messages, call=asked.call, **asked.options)) as events:
                async for each in events:
                    yield self._said(leaving(each))
        except (GuardError, Refusal) as error:
            yield self._said(_travelling(error))
        except Exception as error:
            yield self._said(_broken(error))

    def close(self) -> None:
        """Wait for what is under way, which has a record to write, and close the logs."""
        for each in self._served.values():
            each.guard.settle(self._settings.limits.shutdown_seconds)
        self._stack.close()

    async def _tried(self, work: Awaitable[Outcome]) -> Said:
        try:
            return self._said(leaving(await work))
        except (GuardError, Refusal) as error:
            return self._said(_travelling(error))
        except Exception as error:
            return self._said(_broken(error))

    async def _ready(self, alias: str) -> Served:
        served = self._served[alias]
        if served.why:
            await self._start(served)
        return served

    async def _start(self, served: Served) -> None:
        async with self._starting:
            if served.why:
                await served.start()

    def _said(self, value: Any) -> Said:
        about = {
            alias: About(
                fingerprint=each.fingerprint, streams=each.streams, why=each.status().why, suspended=each.suspended
            )
            for alias, each in self._served.items()
        }
        return Said(replica=self.name, value=value, about=about)


def _travelling(error: GuardError | Refusal) -> GuardError | Refusal:
    """The error without the frames that it came from, which hold prompt and draft."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _broken(error: Exception) -> Broken:
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("server.unexpected %s\n%s", type(error).__name__, frames)
    return Broken(kind=type(error).__name__)
