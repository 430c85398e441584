"""GuardedModel: a guard as pydantic-ai's model. No draft leaves it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic_ai import RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse, ModelResponseStreamEvent, TextPart, ToolCallPart
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.profiles import ModelProfileSpec
from pydantic_ai.settings import ModelSettings

from hallucination_guard.guard import ABSTENTION, Guard, NotAnswered, OnAbstain, Replying
from hallucination_guard.values import options_of
from hallucination_guard_pydantic_ai.convert import as_guard_messages, as_model_response
from hallucination_guard_pydantic_ai.tools import offered_tools

__all__ = ["GuardedModel"]

_SYSTEM = "hallucination_guard"


class GuardedModel(Model):
    """A guard, usable wherever pydantic-ai takes a model: agents, direct requests, inside of other models.

    A stream gives the decided text at once. The verdict is plain JSON in ``ModelResponse.metadata``. Where the output
    has to be an object, there is none that could stand for an answer that was not let through: :class:`NotAnswered` is
    raised, whatever ``on_abstain`` says. A ``FallbackModel`` takes it with ``fallback_on=(NotAnswered,)``.

    Args:
        guard: decides on every answer.
        abstention: what stands for a text that was not let through.
        on_abstain: ``message`` gives the abstention as an answer, ``error`` raises ``NotAnswered``.
        settings: of every request: ``max_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop_sequences``,
            ``tool_choice``.
        profile: what pydantic-ai is to know of the model; that it can be held to a schema is known.
    """

    unsupported_settings = frozenset(
        {
            "citations", "extra_body", "extra_headers", "frequency_penalty", "logit_bias", "max_retries",
            "parallel_tool_calls", "presence_penalty", "service_tier", "timeout", "top_k",
        }
    )  # fmt: skip

    def __init__(
        self,
        guard: Guard,
        *,
        abstention: str = ABSTENTION,
        on_abstain: OnAbstain = "message",
        settings: ModelSettings | None = None,
        profile: ModelProfileSpec | None = None,
    ) -> None:
        super().__init__(settings=settings, profile=profile or {"supports_json_schema_output": True})
        self.guard = guard
        self._reply = Replying(abstention, on_abstain)

    @property
    def model_name(self) -> str:
        """Of the guard's model."""
        return str(self.guard.model.name)

    @property
    def system(self) -> str:
        """By which pydantic-ai names the kind of the model."""
        return _SYSTEM

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """Answer, or not."""
        settings, parameters = self.prepare_request(model_settings, model_request_parameters)
        return await self._answer(messages, settings or ModelSettings(), parameters)

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        """One event a part, after the decision: what is streamed cannot be taken back."""
        settings, parameters = self.prepare_request(model_settings, model_request_parameters)
        response = await self._answer(messages, settings or ModelSettings(), parameters)
        yield _Decided(model_request_parameters=parameters, response=response)

    async def _answer(
        self, messages: list[ModelMessage], settings: ModelSettings, parameters: ModelRequestParameters
    ) -> ModelResponse:
        tools, choice = offered_tools(settings, parameters)
        wanted = parameters.output_object
        named = ("max_tokens", "temperature", "top_p", "seed", "stop_sequences")
        options = options_of(
            {
                **{name: settings.get(name) for name in named},
                "tools": tools,
                "tool_choice": choice,
                "response_schema": wanted.json_schema if wanted and parameters.output_mode == "native" else None,
            }
        )
        asked = as_guard_messages(messages, self._get_instruction_parts(messages, parameters) or [])
        threads = (each.conversation_id for each in reversed(messages) if each.conversation_id)
        outcome = await self.guard.acall(asked, thread_id=next(threads, None), **options)
        if outcome.text is None and (wanted or not parameters.allow_text_output):
            raise NotAnswered(outcome)
        return as_model_response(self._reply(outcome), model_name=self.model_name, provider_name=_SYSTEM)


@dataclass
class _Decided(StreamedResponse):
    """A response that is all there when its stream begins."""

    response: ModelResponse

    def __post_init__(self) -> None:
        self._usage = self.response.usage
        self.finish_reason = self.response.finish_reason
        self.metadata = self.response.metadata

    async def _get_event_iterator(self) -> AsyncIterator[ModelResponseStreamEvent]:
        for at, part in enumerate(self.response.parts):
            if isinstance(part, TextPart):
                for event in self._parts_manager.handle_text_delta(vendor_part_id=at, content=part.content):
                    yield event
            elif isinstance(part, ToolCallPart):
                yield self._parts_manager.handle_tool_call_part(
                    vendor_part_id=at,
                    tool_name=part.tool_name,
                    args=part.args_as_dict(),
                    tool_call_id=part.tool_call_id,
                )

    async def close_stream(self) -> None:
        """Nothing is open."""

    @property
    def model_name(self) -> str:
        """Of the guard's model."""
        return str(self.response.model_name)

    @property
    def provider_name(self) -> str:
        """The same for every guarded model."""
        return _SYSTEM

    @property
    def provider_url(self) -> None:
        """None: the model is in this process."""

    @property
    def timestamp(self) -> datetime:
        """When it was decided."""
        timestamp: datetime = self.response.timestamp
        return timestamp
