"""GuardedChatGenerator: a guard as Haystack's chat generator. No draft leaves it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from haystack import component
from haystack.dataclasses import (
    ChatMessage,
    ComponentInfo,
    StreamingCallbackT,
    StreamingChunk,
    ToolCallDelta,
    select_streaming_callback,
)
from haystack.tools import ToolsType, flatten_tools_or_toolsets

from hallucination_guard.errors import ConfigurationError
from hallucination_guard.guard import ABSTENTION, Guard, OnAbstain, Replying
from hallucination_guard.values import GenerationOptions, Outcome, options_of
from hallucination_guard_haystack.convert import as_chat_message, as_guard_messages

__all__ = ["GuardedChatGenerator"]


@component
class GuardedChatGenerator:
    """A guard, usable wherever Haystack takes a chat generator: pipelines and agents, sync and async.

    There is no token stream: what is not yet decided on must not leave. A ``streaming_callback`` gets the decided text
    as one chunk. The verdict is plain JSON in ``ChatMessage.meta["hallucination_guard"]``.

    Args:
        guard: decides on every answer.
        abstention: what stands for a text that was not let through.
        on_abstain: ``message`` gives the abstention as a reply, ``error`` raises ``NotAnswered``.
        generation_kwargs: settings of every call: ``max_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``,
            ``tool_choice``, ``response_schema``.
        tools: what an answer may call.
        streaming_callback: gets the decided text.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        abstention: str = ABSTENTION,
        on_abstain: OnAbstain = "message",
        generation_kwargs: dict[str, Any] | None = None,
        tools: ToolsType | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> None:
        self.guard = guard
        self.generation_kwargs = dict(generation_kwargs or {})
        self.tools = tools
        self.streaming_callback = streaming_callback
        self._reply = Replying(abstention, on_abstain)

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage] | str,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        tools: ToolsType | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answer, or not."""
        callback = select_streaming_callback(
            init_callback=self.streaming_callback, runtime_callback=streaming_callback, requires_async=False
        )
        outcome = self.guard(as_guard_messages(messages), **self._options(generation_kwargs, tools))
        message = self._message(outcome)
        if callback is not None:
            for chunk in self._chunks(message):
                callback(chunk)
        return {"replies": [message]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self,
        messages: list[ChatMessage] | str,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        tools: ToolsType | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answer, or not, without blocking the loop."""
        callback = select_streaming_callback(
            init_callback=self.streaming_callback, runtime_callback=streaming_callback, requires_async=True
        )
        outcome = await self.guard.acall(as_guard_messages(messages), **self._options(generation_kwargs, tools))
        message = self._message(outcome)
        if callback is not None:
            for chunk in self._chunks(message):
                heard = callback(chunk)
                if inspect.isawaitable(heard):
                    await heard
        return {"replies": [message]}

    def to_dict(self) -> dict[str, Any]:
        """Refused: weights and policies are objects.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError("a guarded generator cannot be written to YAML", hint="build the pipeline in Python")

    def _options(self, generation_kwargs: dict[str, Any] | None, tools: ToolsType | None) -> GenerationOptions:
        offered = [each.tool_spec for each in flatten_tools_or_toolsets(self.tools if tools is None else tools)]
        return options_of({**self.generation_kwargs, **(generation_kwargs or {}), "tools": offered or None})

    def _message(self, outcome: Outcome) -> ChatMessage:
        return as_chat_message(self._reply(outcome), model_name=str(self.guard.model.name))

    def _chunks(self, message: ChatMessage) -> Sequence[StreamingChunk]:
        info = ComponentInfo.from_component(self)
        texts = [{"content": message.text}] if message.text else []
        calls = [
            {
                "content": "",
                "tool_calls": [
                    ToolCallDelta(index=at, tool_name=each.tool_name, arguments=json.dumps(each.arguments), id=each.id)
                ],
            }
            for at, each in enumerate(message.tool_calls, start=len(texts))
        ]
        parts: list[dict[str, Any]] = [*texts, *calls] or [{"content": ""}]
        return [
            StreamingChunk(
                **part,
                component_info=info,
                index=at,
                start=True,
                meta=message.meta if at == len(parts) - 1 else {},
                finish_reason=message.meta["finish_reason"] if at == len(parts) - 1 else None,
            )
            for at, part in enumerate(parts)
        ]
