"""The ear: what a served model says while it says it, heard by the guard and by nobody else.

It follows one run, the newest that was asked exactly what the guard was asked: what else is called inside (a model that
chooses tools) answers something else. The model runs in a thread or a task of its own, and ends at its next token once
nothing more is wanted of it.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeAlias
from uuid import UUID

from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tracers._streaming import _StreamingCallbackHandler

from hallucination_guard.errors import GuardError, InputError, ModelError
from hallucination_guard.guard import Guard
from hallucination_guard.values import ToolCall
from hallucination_guard_langchain.quiet import unheard

__all__ = ["Ear", "StartOver"]


class StartOver(GuardError):
    """What was heard is not the answer, and nothing of it has left."""


class _NotWanted(BaseException):
    """Ends the model's run at a token. An ordinary error would have middleware ask the model again."""


@dataclass(frozen=True, slots=True)
class _Began:
    run: UUID


@dataclass(frozen=True, slots=True)
class _Said:
    run: UUID
    text: str


@dataclass(frozen=True, slots=True)
class _Failed:
    run: UUID
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Over:
    """The call of the model, with all middleware inside, is over."""

    response: ModelResponse[Any] | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Left:
    """Nothing more is wanted."""


_Heard: TypeAlias = _Began | _Said | _Failed | _Over | _Left


class _Leaving(threading.Event):
    """Set when nothing more is wanted; who waits for the next token wakes up."""

    def __init__(self, heard: SimpleQueue[_Heard]) -> None:
        super().__init__()
        self._heard = heard

    def set(self) -> None:
        super().set()
        self._heard.put(_Left())


class Ear(BaseCallbackHandler, _StreamingCallbackHandler[Any]):
    """Hears a model in one thread, for a guard in another.

    Args:
        asked: what the model is asked.
        guard: whose model reads the answer.
    """

    run_inline = True  # in the order in which it is said
    raise_error = True

    def __init__(self, asked: Sequence[BaseMessage], guard: Guard) -> None:
        self._asked, self._guard = list(asked), guard
        self._heard: SimpleQueue[_Heard] = SimpleQueue()
        self._run: UUID | None = None
        self._first: _Said | None = None
        self._over: _Over | None = None
        self.left = _Leaving(self._heard)

    # ------------------------------------------------------------------------------------- where the model runs

    def listen(self, handler: Callable[[ModelRequest[Any]], ModelResponse[Any]], request: ModelRequest[Any]) -> None:
        """Let the model answer; what it raises is raised where it is read."""
        try:
            with unheard(but_by=[self]):
                self._heard.put(_Over(handler(request)))
        except BaseException as error:
            self._heard.put(_Over(error=error))

    async def alisten(
        self, handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]], request: ModelRequest[Any]
    ) -> None:
        """The same in a task."""
        try:
            with unheard(but_by=[self]):
                self._heard.put(_Over(await handler(request)))
        except BaseException as error:
            self._heard.put(_Over(error=error))

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """A model is asked."""
        self._check_wanted()
        if messages == [self._asked]:
            self._heard.put(_Began(run_id))

    def on_llm_new_token(self, token: Any, *, run_id: UUID, chunk: Any = None, **kwargs: Any) -> None:
        """It says something; a block that is no text is none of the answer."""
        self._check_wanted()
        text = str(chunk.message.text) if isinstance(chunk, ChatGenerationChunk) else str(token)
        if text:
            self._heard.put(_Said(run_id, text))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """It broke off."""
        self._heard.put(_Failed(run_id, error))

    def tap_output_iter(self, run_id: UUID, output: Iterator[Any]) -> Iterator[Any]:
        """Nothing is heard of other steps."""
        return output

    def tap_output_aiter(self, run_id: UUID, output: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The same."""
        return output

    def _check_wanted(self) -> None:
        if self.left.is_set():
            raise _NotWanted

    # ------------------------------------------------------------------------------------------ where it is read

    def streams(self) -> bool:
        """Wait until the model says something, which is then to be followed; False once all was said at once.

        Raises:
            BaseException: what the call raised.
        """
        while self._over is None and self._first is None:
            heard = self._next()
            if isinstance(heard, _Said):
                self._first = heard
        return self._over is None

    @property
    def response(self) -> ModelResponse[Any]:
        """What the call gave, once it is over.

        Raises:
            BaseException: what it raised.
        """
        while self._over is None:
            self._next()
        assert self._over.response is not None  # what it raised was raised
        return self._over.response

    @property
    def draft(self) -> AIMessage:
        """The model's message in it.

        Raises:
            InputError: if there is none.
        """
        draft = next((each for each in reversed(self.response.result) if isinstance(each, AIMessage)), None)
        if draft is None:
            raise InputError("the model gave no message of its own", hint="put the guard inside of what replaces it")
        return draft

    def written(self, draft: AIMessage, text: str) -> str:
        """A text with the calls of a message, as the guard's model writes them."""
        calls = [ToolCall.of(each) for each in draft.tool_calls]
        return self._guard.model.write(text, calls) if calls else text

    def pieces(self, left_already: Sequence[str]) -> Iterator[str]:
        """The answer as it comes: of the run that began to speak, or the whole where the call is over.

        Args:
            left_already: what of it was let go, as far as it is.

        Raises:
            StartOver: when it turns out not to be the answer, and nothing of it has left.
            ModelError: the same, when something has.
            BaseException: what the model raised.
        """
        said = ""
        while self._over is None:
            heard, self._first = self._first or self._next(), None
            if isinstance(heard, _Said):
                said += heard.text
                yield heard.text
            elif isinstance(heard, _Failed) and any(left_already):
                raise heard.error
            elif not isinstance(heard, _Over):
                raise _no_answer(left_already, "began another answer")
        text = str(self.draft.text)
        if said and not text.startswith(said):
            if text.rstrip() != said.rstrip():
                raise _no_answer(left_already, "was heard to say something else")
            text = said
        yield self.written(self.draft, text)[len(said) :]

    def _next(self) -> _Heard:
        """The next thing that concerns the answer."""
        while True:
            heard = self._heard.get()
            match heard:
                case _Left():
                    raise GuardError("the reader left")
                case _Over():
                    if heard.error is not None:
                        raise heard.error
                    self._over = heard
                    return heard
                case _Began():
                    self._run = heard.run
                    return heard
                case _ if heard.run == self._run:
                    return heard


def _no_answer(left_already: Sequence[str], why: str) -> GuardError:
    if not any(left_already):
        return StartOver(f"the served model {why}")
    return ModelError(
        f"the served model {why} after sentences of its answer had left",
        hint="put the middleware that asks again, or rewrites, outside of the guard",
    )
