"""Calling what users hand in (retrievers, escalation targets): sync or async, never longer than agreed."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tenacity import RetryError, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from hallucination_guard.errors import CallError, CallTimeout
from hallucination_guard.values import Answerer, Message, Passage, Retrieve

__all__ = ["ask", "look_up"]

_MOST = 64
_PLACES = threading.BoundedSemaphore(_MOST)  # a call that hangs keeps its thread: without a bound they would pile up


def look_up(move: Retrieve, query: str) -> tuple[Passage, ...]:
    """The passages that a retriever finds, at most ``move.k``.

    Raises:
        CallError: if it raises ``move.tries`` times, finds nothing, or finds what is not text.
        CallTimeout: if it does not answer within ``move.timeout`` seconds; it is not asked again.
    """
    # A lookup that fails may be a hiccup; one that hangs has already cost all the time there was.
    again = Retrying(
        stop=stop_after_attempt(move.tries),
        wait=wait_exponential(multiplier=0.05, max=1.0),
        retry=retry_if_exception(lambda error: isinstance(error, CallError) and not isinstance(error, CallTimeout)),
    )
    try:
        found = again(_within, _callable(move.retriever), query, move.timeout)
    except RetryError as error:
        raise error.last_attempt.exception() from None  # type: ignore[misc]  # a RetryError has one
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise CallError(f"the retriever gave a {type(found).__name__}", hint="it must give a list of passages")
    passages = tuple(_passage(each) for each in found[: move.k])
    if not passages:
        raise CallError("the retriever found nothing", hint="add documents, or let the policy abstain")
    return passages


def ask(to: Answerer, messages: Sequence[Message], *, timeout: float) -> str:
    """The answer of an escalation target.

    Raises:
        CallError: if it raises or gives no text.
        CallTimeout: if it does not answer within ``timeout`` seconds.
    """
    plain = [message.to_json_dict() for message in messages]
    answer = _within(_callable(to), plain, timeout)
    text = getattr(answer, "content", answer)
    if not isinstance(text, str) or not text.strip():
        raise CallError(f"the escalation target gave {type(answer).__name__} without a text", hint="it must answer")
    return text


def _callable(target: object) -> Callable[[Any], Any]:
    found = getattr(target, "invoke", target)
    if not callable(found):
        raise CallError(
            f"{type(target).__name__!r} cannot be called", hint="give a function, or an object with invoke()"
        )
    return found


def _within(call: Callable[[Any], Any], argument: object, timeout: float) -> Any:
    """The result of ``call(argument)``, awaited if need be.

    It runs in a thread of its own: only so can it be left behind when it hangs, and only so can an async one be awaited
    from a thread that already has a running loop. The thread is a daemon, so that a hung call cannot hold up the exit.
    """
    places = _PLACES
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            value = call(argument)
            results.put((asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value, None))
        except BaseException as error:  # handed to the caller's thread, which raises
            results.put((None, error))
        finally:
            places.release()

    context = contextvars.copy_context()
    name = getattr(call, "__qualname__", type(call).__name__)
    if not places.acquire(blocking=False):
        raise CallError(
            f"{name} was not called: {_MOST} calls are under way or hang",
            hint="look for a retriever or an escalation target that does not come back",
        )
    try:
        threading.Thread(target=context.run, args=(run,), daemon=True, name="hallucination-guard-call").start()
    except RuntimeError:
        places.release()
        raise CallError(f"{name} was not called: no thread can be started") from None
    try:
        value, error = results.get(timeout=timeout)
    except queue.Empty:
        raise CallTimeout(f"{name} did not answer within {timeout:g} s", hint="raise the timeout, or fix it") from None
    if isinstance(error, Exception):
        # Only the kind of error: its message may quote the question, which a log need not be allowed to hold.
        raise CallError(f"{name} raised {type(error).__name__}") from error
    if error is not None:
        raise error
    return value


async def _awaited(value: Awaitable[object]) -> Any:
    return await value


def _passage(found: object) -> Passage:
    """A passage from a string, a Passage or a LangChain document."""
    if isinstance(found, Passage):
        return found
    text = found if isinstance(found, str) else getattr(found, "page_content", None)
    if not isinstance(text, str) or not text.strip():
        raise CallError(
            f"the retriever gave a list of {type(found).__name__}",
            hint="give strings, passages or documents with a text",
        )
    metadata = getattr(found, "metadata", None)
    metadata = metadata if isinstance(metadata, Mapping) else {}
    own = getattr(found, "id", None) or metadata.get("id") or metadata.get("source")
    return Passage(id=str(own or hashlib.sha256(text.encode()).hexdigest()[:12]), text=text)
