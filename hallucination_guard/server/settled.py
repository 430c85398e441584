"""The end of a server: what is under way has records to write before the logs are closed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from hallucination_guard.guard import Guard

__all__ = ["settled"]


@contextmanager
def settled(guards: Sequence[Guard], seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """A server of these guards runs inside; at its end what is under way is waited for, as long as it takes.

    A score that is being computed cannot be stopped, and the interpreter waits for its thread anyway: logs that were
    closed before would only lose the record. A signal ends the process all the same, and then it is said what is lost.

    Args:
        guards: of the server; those under other policies of the same are counted with them.
        seconds: after which it is said that something is waited for.
        say: a line to whoever runs the server.
    """

    def under_way() -> int:
        return sum(each.under_way for each in guards)

    def give_up(number: int, _: FrameType | None) -> None:
        if lost := under_way():
            line = f"ended by a signal with {lost} under way, which may have no record"
            try:
                say(line)
            except RuntimeError:  # in the middle of another line: a buffer cannot be entered again
                os.write(2, f"{line}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    with _heeding(give_up):
        try:
            yield
        finally:
            end = time.monotonic() + seconds
            for each in guards:
                each.settle(max(0.0, end - time.monotonic()))
            if left := under_way():
                say(f"still under way: {left}; the logs are closed after their records, unless a signal ends it before")
                for each in guards:
                    each.settle()


@contextmanager
def _heeding(heed: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """What is done at a signal, except while the server itself takes it for the wish that it should end."""
    if threading.current_thread() is not threading.main_thread():  # which alone may
        yield
        return
    before = {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
