"""Between an event loop and a thread: events of a thread for the loop, and what the loop awaits for a thread."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from hallucination_guard.errors import GuardError

__all__ = ["ReaderGone", "from_the_loop", "in_a_thread", "result_of"]

_Item = TypeVar("_Item")
_LOOK = 0.05  # seconds after which a thread that waits for the loop looks whether its reader is gone


class ReaderGone(GuardError):
    """Nobody waits for the answer any more."""


async def result_of(work: Callable[[], _Item], left: threading.Event, ended: Callable[[], None]) -> _Item:
    """What ``work`` gives, in a thread of its own. When the task is cancelled, ``left`` is set, and the thread ends.

    A pool would have an end, and those beyond it would wait without being decoded together. The interpreter waits for
    the thread, which has a record to write; ``ended`` is called when it has, or when it could not begin.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[_Item] = loop.create_future()

    def tell(result: _Item | None, failed: BaseException | None) -> None:
        if found.done():  # cancelled
            return
        if failed is None:
            found.set_result(result)  # type: ignore[arg-type]  # it is one, where nothing failed
        else:
            found.set_exception(failed)

    def run() -> None:
        result: _Item | None = None
        failed: BaseException | None = None
        try:
            result = work()
        except StopIteration as error:  # no future can hold it
            failed = RuntimeError(f"a step raised {type(error).__name__}")
        except BaseException as error:  # the task raises it
            failed = error
        ended()
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(tell, result, failed)

    context = contextvars.copy_context()
    try:
        threading.Thread(target=context.run, args=(run,), name="hallucination-guard-call").start()
    except BaseException:
        ended()
        raise
    try:
        return await found
    finally:
        left.set()


async def in_a_thread(
    events: Iterator[_Item],
    left: threading.Event,
    begun: Callable[[], None] = lambda: None,
    ended: Callable[[], None] = lambda: None,
) -> AsyncGenerator[_Item, None]:
    """The same events. When the reader leaves, ``left`` is set, and the thread ends with its record written.

    The interpreter waits for the thread. ``begun`` is called before it begins, ``ended`` when it has ended or could not
    begin.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[_Item | _Over] = asyncio.Queue()

    def tell(event: _Item | _Over) -> None:
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
        ended()
        tell(_Over(failed))

    context = contextvars.copy_context()
    begun()
    try:
        threading.Thread(target=context.run, args=(run,), name="hallucination-guard-reader").start()
    except BaseException:
        ended()
        raise
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


def from_the_loop(items: AsyncIterable[_Item], left: threading.Event) -> Iterator[_Item]:
    """What the running loop awaits, for a thread. Once the reader has ``left`` it raises: it has not ended.

    Args:
        items: awaited one after the other, and closed at the end if they can be.
        left: whether the reader is gone.
    """
    loop, source = asyncio.get_running_loop(), aiter(items)

    async def following() -> tuple[_Item, ...]:
        async for each in source:
            return (each,)
        return ()

    async def close() -> None:
        if (closing := getattr(source, "aclose", None)) is not None:
            await closing()

    return _awaited(loop, following, close, left)


def _awaited(
    loop: asyncio.AbstractEventLoop,
    following: Callable[[], Coroutine[Any, Any, tuple[_Item, ...]]],
    close: Callable[[], Coroutine[Any, Any, None]],
    left: threading.Event,
) -> Iterator[_Item]:
    def nobody() -> bool:
        # A loop that was dropped as it stood sets nothing, and the interpreter would wait for this thread for ever.
        dropped = loop.is_closed() or not (loop.is_running() or threading.main_thread().is_alive())
        return left.is_set() or dropped

    try:
        while True:
            coming = asyncio.run_coroutine_threadsafe(following(), loop)
            while not coming.done() and not nobody():
                wait([coming], timeout=_LOOK)
            if not coming.done():
                coming.cancel()
                raise ReaderGone("the reader left the stream")
            if not (item := coming.result()):
                return
            yield item[0]
    finally:
        if not loop.is_closed():
            asyncio.run_coroutine_threadsafe(close(), loop)
