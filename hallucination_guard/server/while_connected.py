"""Work for a client that may leave: when it does, the work is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response

__all__ = ["ClientGone", "Events", "while_connected"]

_Result = TypeVar("_Result")


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of the work, which ends with its client; whatever it was doing is over when this returns.

    Raises:
        ClientGone: if the client left.
    """

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for each in (working, leaving):
            if not each.done():
                each.cancel()
        for each in (working, leaving):
            # What it says is told above, or is that it was cancelled: this only waits until it is.
            with suppress(BaseException):
                await each


class Events(Response):
    """Server-sent events. The iterator is closed however it ends, also by the client's leaving.

    Args:
        events: encoded; the first may have been taken already.
        first: what was taken.
        gone: called when the client left.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, first: bytes, gone: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._first, self._gone = events, first, gone

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""

        async def sending() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for each in self._events:
                await send({"type": "http.response.body", "body": each, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_connected(receive, sending())
        except ClientGone:
            self._gone()
        finally:
            await self._events.aclose()
