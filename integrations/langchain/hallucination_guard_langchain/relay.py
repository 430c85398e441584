"""The relay: a served model's answer leaves as the stream of a model of its own, which says only what was let through.

Graphs, tracers and streams of events hear of a model's tokens by its run. The served model's run is heard by the guard
alone (:mod:`hallucination_guard_langchain.ear`); outside there is this one, a chunk for each sentence.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import Field, PrivateAttr

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Guard
from hallucination_guard.values import Event, Outcome
from hallucination_guard_langchain.chat import last_chunk
from hallucination_guard_langchain.convert import LLM_TYPE, as_guard_messages
from hallucination_guard_langchain.ear import Ear, StartOver
from hallucination_guard_langchain.quiet import unheard

__all__ = ["Following", "Relay"]


class Following:
    """A guard that follows what an ear hears.

    Args:
        guard: decides.
        asked: what the model was asked.
        thread_id: of the conversation.
        offered: the tools that it may call.
        said: from the outcome to what of the message is still to be said; may raise in its place.
    """

    def __init__(
        self,
        guard: Guard,
        asked: Sequence[BaseMessage],
        *,
        thread_id: str | None,
        offered: Mapping[str, Any],
        said: Callable[[Outcome], AIMessage],
    ) -> None:
        self.ear = Ear(asked, guard)
        self.asked = list(asked)
        self.outcome: Outcome | None = None
        self._guard, self._thread_id, self._offered, self._said = guard, thread_id, offered, said

    def chunks(self) -> Iterator[ChatGenerationChunk | None]:
        """What leaves, each chunk after its decision; one None where the model said all at once: nothing is decided.

        Raises:
            BaseException: what the model raised.
        """
        if not self.ear.streams():
            yield None
            return
        left: list[str] = []
        while self.outcome is None:
            try:
                yield from self._followed(left)
            except StartOver:  # what was heard of it is in the log
                self.ear.streams()

    def _followed(self, left: list[str]) -> Iterator[ChatGenerationChunk]:
        turns = as_guard_messages(self.asked)
        pieces = self.ear.pieces(left)
        events = self._guard.follow(turns, pieces, thread_id=self._thread_id, **self._offered)
        with closing(cast("Generator[Event, None, None]", events)):
            while self.outcome is None:
                # Not around the yield: what is silenced here would be silenced for the one who reads as well.
                with unheard():
                    event = next(events)
                    if isinstance(event, Outcome):
                        self.outcome = self._whole(event)
                        said = self._said(self.outcome)
                if isinstance(event, Outcome):
                    yield last_chunk(said, released="" if event.accepted else event.released)
                else:
                    left.append(event.text)
                    yield ChatGenerationChunk(message=AIMessageChunk(content=event.text))

    def _whole(self, outcome: Outcome) -> Outcome:
        """What waits for a human is the whole answer, also where the guard has read only its beginning."""
        if outcome.text is not None or outcome.decision.action != "escalate" or outcome.attempts > 1:
            return outcome
        draft = self.ear.draft
        written = self.ear.written(draft, str(draft.text))
        try:
            read = self._guard.model.read(as_guard_messages(self.asked), written, **self._offered_to_read)
        except InputError:  # it is longer than the context: what the guard has read waits
            return outcome
        return replace(outcome, generation=read) if read.content.startswith(outcome.released) else outcome

    @property
    def _offered_to_read(self) -> dict[str, Any]:
        return {name: value for name, value in self._offered.items() if name == "tools"}


class Relay(BaseChatModel):
    """Says what it is handed, a chunk at a time.

    Args:
        model_name: of the guard's model, for traces.
    """

    said_for: str
    cache: Any = Field(default=False, exclude=True)
    _chunks: Any = PrivateAttr(default=())

    @classmethod
    def of(cls, chunks: object, *, said_for: str, model: BaseChatModel) -> Relay:
        """One in the place of a model, whose tags and metadata it has: a ``nostream`` holds for it as well.

        Args:
            chunks: what it says: an iterator, or an async one.
            said_for: the name of the guard's model.
            model: in whose place it speaks.
        """
        relay = cls(said_for=said_for, tags=model.tags, metadata=model.metadata)
        relay._chunks = chunks
        return relay

    @property
    def _llm_type(self) -> str:
        return LLM_TYPE

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(ls_provider="hallucination_guard", ls_model_name=self.said_for, ls_model_type="chat")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._chunks:
            if run_manager is not None:
                run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for chunk in self._chunks:
            if run_manager is not None:
                await run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
            yield chunk
