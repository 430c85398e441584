"""GuardedModel: a guard as the model of a smolagents agent. No draft leaves it."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import Any

from smolagents import Tool
from smolagents.models import (
    ChatMessage,
    ChatMessageStreamDelta,
    ChatMessageToolCallFunction,
    ChatMessageToolCallStreamDelta,
    Model,
    get_tool_json_schema,
)

from hallucination_guard.guard import ABSTENTION, Guard, OnAbstain, Replying
from hallucination_guard.values import options_of
from hallucination_guard_smolagents.convert import as_chat_message, as_guard_messages, schema_of

__all__ = ["GuardedModel"]


class GuardedModel(Model):
    """A guard, usable wherever smolagents takes a model.

    A call of a tool is an answer: the policy decides on it before the agent runs it. An abstention in front of tools is
    the agent's final answer; a ``CodeAgent``, whose answers are code, needs ``on_abstain="error"``, or it asks again.
    ``generate_stream`` gives the decided text at once. The verdict is plain JSON in ``ChatMessage.raw``.

    Args:
        guard: decides on every answer.
        abstention: what stands for a text that was not let through.
        on_abstain: ``message`` gives the abstention as an answer, ``error`` raises ``NotAnswered``, which ends the run.
        tool_choice: ``required``, as smolagents asks of every model: an answer is a call, if need be of
            ``final_answer``; or ``auto``.
        **kwargs: settings of every call: ``max_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        abstention: str = ABSTENTION,
        on_abstain: OnAbstain = "message",
        tool_choice: str = "required",
        **kwargs: Any,
    ) -> None:
        super().__init__(model_id=str(guard.model.name), **kwargs)
        self.guard = guard
        self.tool_choice = tool_choice
        self._reply = Replying(abstention, on_abstain)

    def generate(
        self,
        messages: Sequence[ChatMessage | dict[str, Any]],
        stop_sequences: list[str] | None = None,
        response_format: dict[str, Any] | None = None,
        tools_to_call_from: list[Tool] | None = None,
        **kwargs: Any,
    ) -> ChatMessage:
        """Answer, or not."""
        offered = [get_tool_json_schema(each) for each in tools_to_call_from or ()]
        asked = {
            "stop_sequences": stop_sequences,
            "response_schema": schema_of(response_format),
            "tools": offered or None,
            "tool_choice": self.tool_choice,
        }
        # As in smolagents: what the model was made with goes before what a call says.
        outcome = self.guard(as_guard_messages(messages), **options_of({**asked, **kwargs, **self.kwargs}))
        return as_chat_message(self._reply(outcome), offered=[each["function"]["name"] for each in offered])

    def generate_stream(
        self,
        messages: Sequence[ChatMessage | dict[str, Any]],
        stop_sequences: list[str] | None = None,
        response_format: dict[str, Any] | None = None,
        tools_to_call_from: list[Tool] | None = None,
        **kwargs: Any,
    ) -> Generator[ChatMessageStreamDelta]:
        """One delta, after the decision: what is streamed cannot be taken back."""
        message = self.generate(messages, stop_sequences, response_format, tools_to_call_from, **kwargs)
        calls = [
            ChatMessageToolCallStreamDelta(
                index=at,
                id=each.id,
                type="function",
                function=ChatMessageToolCallFunction(
                    name=each.function.name, arguments=json.dumps(each.function.arguments)
                ),
            )
            for at, each in enumerate(message.tool_calls or ())
        ]
        text = str(message.content)  # a text it is, and its type in smolagents is wider
        yield ChatMessageStreamDelta(content=text, tool_calls=calls or None, token_usage=message.token_usage)
