"""GuardedChatModel: a chat model whose drafts do not leave it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, Literal, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseRunManager, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough, ensure_config
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field

from hallucination_guard.errors import InputError
from hallucination_guard.guard import ABSTENTION, Guard, OnAbstain
from hallucination_guard.values import Event, Outcome, tool_choice_of
from hallucination_guard_langchain.convert import (
    LLM_TYPE,
    LowConfidenceError,
    as_ai_message,
    as_guard_messages,
    thread_of,
)
from hallucination_guard_langchain.quiet import unheard
from hallucination_guard_langchain.structured import json_schema, whole_object

__all__ = ["GuardedChatModel", "last_chunk", "outcomes_of"]

_OUTCOMES: ContextVar[list[Outcome] | None] = ContextVar("hallucination_guard_outcomes", default=None)


@contextmanager
def outcomes_of() -> Iterator[list[Outcome]]:
    """The outcomes of the guarded models that are called inside, for the middleware in front of one."""
    found: list[Outcome] = []
    token = _OUTCOMES.set(found)
    try:
        yield found
    finally:
        _OUTCOMES.reset(token)


class GuardedChatModel(BaseChatModel):
    """A guard, usable wherever LangChain takes a chat model: chains, agents, RAG, sync and async, streamed or not.

    What is not yet decided on does not leave. ``stream`` gives a chunk for each sentence that was let through, where
    the guard's thresholds are of streams (``Guard.streams``), else the decided text as one chunk; no callback sees a
    draft. The verdict is plain JSON in ``response_metadata["hallucination_guard"]``, of a stream in its last chunk.

    Args:
        guard: decides on every answer.
        abstention: what the chain gets instead of a text that was not let through.
        on_abstain: ``message`` gives the abstention as an answer, ``error`` raises :class:`LowConfidenceError`.
        model: name, for logs and traces; the guard's model's by default.
        temperature: of the first draft; the guard's own setting by default.
        max_tokens: of an answer; the guard's own setting by default.
        stop: texts that end an answer.
        cache: off, also where a global cache is set: a cached answer would leave without a record.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    guard: Guard = Field(exclude=True, repr=False)
    abstention: str = ABSTENTION
    on_abstain: OnAbstain = "message"
    model: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    cache: Any = Field(default=False, exclude=True)

    @property
    def _llm_type(self) -> str:
        return LLM_TYPE

    @property
    def _name(self) -> str:
        return self.model or str(self.guard.model.name)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """With these a cache, if one is switched on, tells policies and calibrations apart."""
        calibration = self.guard.calibration
        return {
            "model": self._name,
            "fingerprint": self.guard.model.identity.fingerprint,
            "policy": self.guard.policy.describe(),
            "scorer": repr(self.guard.scorer.identity),
            "calibration": None if calibration is None else calibration.model_dump(),
            "settings": self._settings(None, {}),
            "abstention": self.abstention,
            "on_abstain": self.on_abstain,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        settings = self._settings(stop, kwargs)
        params = LangSmithParams(
            ls_provider="hallucination_guard", ls_model_name=kwargs.get("model") or self._name, ls_model_type="chat"
        )
        if "temperature" in settings:
            params["ls_temperature"] = settings["temperature"]
        if "max_new_tokens" in settings:
            params["ls_max_tokens"] = settings["max_new_tokens"]
        if settings.get("stop"):
            params["ls_stop"] = settings["stop"]
        return params

    def _settings(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The guard's generation settings; what a call says goes before what the model was made with."""
        asked = {
            "temperature": kwargs.get("temperature", self.temperature),
            "max_new_tokens": kwargs.get("max_tokens", self.max_tokens),
            "stop": stop if stop is not None else self.stop,
            "seed": kwargs.get("seed"),
            "top_p": kwargs.get("top_p"),
            "tools": kwargs.get("tools") or None,
            "tool_choice": kwargs.get("tool_choice") if kwargs.get("tools") else None,
            "strict_tools": kwargs.get("strict") if kwargs.get("tools") else None,
            "response_schema": kwargs.get("response_schema"),
        }
        return {name: value for name, value in asked.items() if value is not None}

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The same model, which may call these tools; the policy decides on a call as on any other answer.

        Args:
            tools: functions, tools, pydantic models, or mappings as the chat APIs have them.
            tool_choice: ``auto``, ``none``, ``any`` or ``required`` (one call), or the name of the tool to be called.
            strict: whether a call that the model begins on its own can only be written as its schema says. What
                ``tool_choice`` demands always is. Both need the extra ``grammar``.
            **kwargs: bound as well.

        Raises:
            InputError: if ``tool_choice`` names no tool.
        """
        offered = [convert_to_openai_tool(each) for each in tools]
        bound: dict[str, Any] = {"tools": offered, "tool_choice": tool_choice_of(tool_choice)}
        if strict is not None:
            bound["strict"] = strict
        if bound["tool_choice"] not in ("auto", "none", "required", *(each["function"]["name"] for each in offered)):
            raise InputError(f"tool_choice is {tool_choice!r}", hint="auto, none, any, or the name of a tool")
        return cast("Runnable[LanguageModelInput, AIMessage]", self.bind(**bound, **kwargs))

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["function_calling", "json_schema", "json_mode"] = "json_schema",
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The same model, whose answers fit a schema. Needs the extra ``grammar``.

        An answer that is not let through raises :class:`LowConfidenceError`: there is no object that could stand for
        it. With ``include_raw`` it is the raw message beside a ``parsing_error``.

        Args:
            schema: a pydantic model, a typed dict, or JSON Schema with a ``title``.
            include_raw: give ``raw``, ``parsed`` and ``parsing_error``.
            method: ``json_schema``: the answer is the object, and so it is with ``json_mode``; ``function_calling``: it
                is a call's arguments.
            **kwargs: bound as well.
        """
        model = self if include_raw else self.model_copy(update={"on_abstain": "error"})
        if method == "function_calling":
            # Not super() of the copy: the base class binds the tool with tool_choice="any".
            return BaseChatModel.with_structured_output(model, schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode"):
            raise InputError(f"the method is {method!r}", hint="json_schema, json_mode or function_calling")
        described = {"kwargs": {"method": method}, "schema": convert_to_openai_tool(schema)}
        asked = model.bind(response_schema=json_schema(schema), ls_structured_output_format=described, **kwargs)
        parser = RunnableLambda(whole_object(schema))
        if not include_raw:
            return asked | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        ).with_fallbacks([RunnablePassthrough.assign(parsed=lambda _: None)], exception_key="parsing_error")
        return RunnableMap(raw=asked) | parsed

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        message = self._answer(messages, stop, run_manager, kwargs)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        """A chunk for each sentence, after its decision: what is streamed cannot be taken back."""
        if not self.guard.streams:
            chunk = last_chunk(self._answer(messages, stop, run_manager, kwargs), released="")
            if run_manager is not None:
                run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
            yield chunk
            return
        with unheard():
            events = self.guard.stream(
                as_guard_messages(messages), thread_id=_thread(run_manager), **self._settings(stop, kwargs)
            )
        while True:
            # Not around the yield: what is silenced here would be silenced for the one who reads as well.
            with unheard():
                event = next(events)
            chunk = self._chunk(event, kwargs)
            if run_manager is not None:
                run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
            yield chunk
            if isinstance(event, Outcome):
                return

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        """The same, without blocking the loop; what asks at the same time is decoded together."""
        if not self.guard.streams:
            async for whole in super()._astream(messages, stop, run_manager, **kwargs):
                yield whole
            return
        events = self.guard.astream(
            as_guard_messages(messages), thread_id=_thread(run_manager), **self._settings(stop, kwargs)
        )
        async with aclosing(events):
            while True:
                with unheard():
                    event = await anext(events)
                chunk = self._chunk(event, kwargs)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(str(chunk.text), chunk=chunk)
                yield chunk
                if isinstance(event, Outcome):
                    return

    def _chunk(self, event: Event, kwargs: dict[str, Any]) -> ChatGenerationChunk:
        """An event as LangChain streams it; the outcome is the last chunk."""
        if isinstance(event, Outcome):
            said = self._said(event, kwargs)
            if event.accepted:  # all of it was released
                said = said.model_copy(update={"content": ""})
            return last_chunk(said, released="" if event.accepted else event.released)
        return ChatGenerationChunk(message=AIMessageChunk(content=event.text))

    def _answer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: CallbackManagerForLLMRun | None,
        kwargs: dict[str, Any],
    ) -> AIMessage:
        with unheard():
            outcome = self.guard(
                as_guard_messages(messages), thread_id=_thread(run_manager), **self._settings(stop, kwargs)
            )
        return self._said(outcome, kwargs)

    def _said(self, outcome: Outcome, kwargs: dict[str, Any]) -> AIMessage:
        """What the chain gets."""
        if (into := _OUTCOMES.get()) is not None:
            into.append(outcome)
        if outcome.text is None and self.on_abstain == "error":
            raise LowConfidenceError(outcome)
        return as_ai_message(outcome, abstention=self.abstention, model_name=str(kwargs.get("model") or self._name))


def _thread(run_manager: BaseRunManager | None) -> str | None:
    # A stream is given no run manager; inside a chain or a graph the config is there all the same.
    return thread_of(ensure_config({"metadata": run_manager.metadata} if run_manager is not None else None))


def last_chunk(message: AIMessage, *, released: str) -> ChatGenerationChunk:
    """The end of a stream: what of the message was not released before, its calls, and the verdict.

    Args:
        message: what of it is not said yet.
        released: what was.
    """
    text = str(message.text)
    # An abstention, or the answer of an escalation's target, is a paragraph of its own behind what was released.
    rest = f"\n\n{text}" if released else text
    whole = AIMessageChunk(
        content=rest,
        response_metadata=message.response_metadata,
        usage_metadata=message.usage_metadata,
        tool_call_chunks=[
            tool_call_chunk(name=each["name"], args=json.dumps(each["args"]), id=each["id"], index=at)
            for at, each in enumerate(message.tool_calls)
        ],
        chunk_position="last",
    )
    return ChatGenerationChunk(message=whole)
