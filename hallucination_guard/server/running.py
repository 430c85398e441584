"""The HTTP server itself: uvicorn, which also gives up on heads that do not come, and says when it is closing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hallucination_guard.server.config import Settings

__all__ = ["Running", "running"]


class Running(uvicorn.Server):
    """A server that says first that it is closing, so that nobody new is let in.

    Args:
        config: of uvicorn.
        close: called first.
    """

    def __init__(self, config: uvicorn.Config, close: Callable[[], None]) -> None:
        super().__init__(config)
        self._close = close

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: what runs may finish, within its time."""
        self._close()
        await super().shutdown(sockets)


def running(app: Any, settings: Settings, close: Callable[[], None]) -> Running:
    """The server of an app; it listens once it is run."""
    limits = settings.limits
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=_patient(limits.head_seconds),
        ws="none",
        access_log=False,  # lines of our own say who asked, and nothing of what
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return Running(config, close)


def _patient(seconds: float) -> type[asyncio.Protocol]:
    """The protocol of uvicorn with a limit of time for a request's head, which it has none of its own for."""

    class Patient(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            if self._head is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            self._head = self.loop.call_later(seconds, self.transport.abort)

        def _forget(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

    return Patient
