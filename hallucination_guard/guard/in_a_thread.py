"""A stream of events, read by a thread of its own for a reader in an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from hallucination_guard.values import Event

__all__ = ["in_a_thread"]


async def in_a_thread(events: Iterator[Event], left: threading.Event) -> AsyncGenerator[Event, None]:
    """The same events. When the reader leaves, ``left`` is set, and the thread ends with its record written."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | _Over] = asyncio.Queue()

    def tell(event: Event | _Over) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody reads
            left.set()

    def run() -> None:
        failed: BaseException | None = None
        try:
            for event in events:
                tell(event)
        except BaseException as error:  # the reader's task raises it
            failed = error
        tell(_Over(failed))

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), daemon=True, name="hallucination-guard-reader").start()
    over = False
    try:
        while True:
            event = await queue.get()
            if isinstance(event, _Over):
                over = True
                if event.error is not None:
                    raise event.error
                return
            yield event
    finally:
        left.set()
        while not over:  # until the record of what was interrupted is written
            over = isinstance(await queue.get(), _Over)


@dataclass(frozen=True, slots=True)
class _Over:
    error: BaseException | None
