"""The HTTP server itself: uvicorn, which also gives up on heads that do not come, and says when it is closing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but that the signal is not raised again at the end.

        It would end the process before the last records are written and the logs are closed.
        """
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def running(app: Any, settings: Settings, close: Callable[[], None]) -> Running:
    """The server of an app; it listens once it is run."""
    limits = settings.limits
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=_patient(limits.head_seconds, limits.write_seconds),
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


def _patient(head: float, write: float) -> type[asyncio.Protocol]:
    """The protocol of uvicorn with limits of time that it has none of its own for.

    Args:
        head: seconds until a request's head has come.
        write: seconds that a client may read nothing, once as much waits for it as buffers hold.
    """

    class Patient(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

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
            self._is_read()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(write, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._is_read()

        def _is_read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _await_head(self) -> None:
            self._head = self.loop.call_later(head, self.transport.abort)

        def _forget(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

    return Patient
