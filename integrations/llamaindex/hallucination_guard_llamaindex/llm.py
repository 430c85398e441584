"""GuardedLLM: a guard as LlamaIndex's LLM. No draft leaves it, and no handler, event or trace hears of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import BaseTool

from hallucination_guard.errors import InputError
from hallucination_guard.guard import ABSTENTION, Guard, OnAbstain, Reply, Replying
from hallucination_guard.values import options_of
from hallucination_guard_llamaindex.convert import as_chat_response, as_completion, as_guard_messages, calls_of

__all__ = ["GuardedLLM"]

_CONTEXT = 2048  # where the model does not say: what LlamaIndex packs a prompt into


class GuardedLLM(FunctionCallingLLM):
    """A guard, usable wherever LlamaIndex takes an LLM: query engines, chat engines, agents; sync, async, streamed.

    There is no token stream: what is not yet decided on must not leave. The ``stream_…`` methods give the decided text
    as one chunk. The verdict is plain JSON under ``"hallucination_guard"`` in ``additional_kwargs`` and in ``raw``.

    Args:
        guard: decides on every answer.
        abstention: what stands for a text that was not let through.
        on_abstain: ``message`` gives the abstention as an answer, ``error`` raises ``NotAnswered``.
        num_output: the room that LlamaIndex leaves for an answer, in tokens; the guard's ``max_new_tokens`` by default.
    """

    guard: Guard = Field(exclude=True, repr=False)
    abstention: str = ABSTENTION
    on_abstain: OnAbstain = "message"
    num_output: int | None = None

    def __init__(self, guard: Guard, **settings: Any) -> None:
        super().__init__(guard=guard, **settings)

    @classmethod
    def class_name(cls) -> str:
        """By which LlamaIndex names the kind of the model."""
        return "hallucination_guard"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex packs prompts by."""
        model = self.guard.model
        return LLMMetadata(
            context_window=model.context or _CONTEXT,
            num_output=self.num_output or self.guard.generation.max_new_tokens or 256,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=str(model.name),
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer, or not."""
        return as_chat_response(self._answer(messages, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer, or not, without blocking the loop."""
        return as_chat_response(await self._aanswer(messages, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """One chunk, after the decision."""

        def chunks() -> ChatResponseGen:
            yield as_chat_response(self._answer(messages, kwargs), streamed=True)

        return chunks()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """One chunk, after the decision, without blocking the loop."""

        async def chunks() -> ChatResponseAsyncGen:
            yield as_chat_response(await self._aanswer(messages, kwargs), streamed=True)

        return chunks()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a text, as the one turn of a conversation."""
        return as_completion(self._answer(self._turn(prompt, formatted), kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The same, without blocking the loop."""
        return as_completion(await self._aanswer(self._turn(prompt, formatted), kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """One chunk, after the decision."""

        def chunks() -> CompletionResponseGen:
            yield as_completion(self._answer(self._turn(prompt, formatted), kwargs), streamed=True)

        return chunks()

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """One chunk, after the decision, without blocking the loop."""

        async def chunks() -> CompletionResponseAsyncGen:
            yield as_completion(await self._aanswer(self._turn(prompt, formatted), kwargs), streamed=True)

        return chunks()

    def _answer(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> Reply:
        return self._reply(self.guard(as_guard_messages(messages), **options_of(kwargs)))

    async def _aanswer(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> Reply:
        return self._reply(await self.guard.acall(as_guard_messages(messages), **options_of(kwargs)))

    @property
    def _reply(self) -> Replying:
        return Replying(self.abstention, self.on_abstain)

    def _turn(self, prompt: str, formatted: bool) -> list[ChatMessage]:
        written = prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)
        return [ChatMessage(written, role=MessageRole.USER)]

    # ------------------------------------------------------------------------------------------------------ tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            asked = user_msg if isinstance(user_msg, ChatMessage) else ChatMessage(user_msg, role=MessageRole.USER)
            messages.append(asked)
        prepared = {"tool_choice": "required" if tool_required else "auto", **kwargs}
        return {
            **prepared,
            "messages": messages,
            "tools": [each.metadata.to_openai_tool(skip_length_check=True) for each in tools],
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls that were let through.

        Raises:
            InputError: if there are none, and that is asked for.
        """
        calls = calls_of(response.message)
        if error_on_no_tool_call and not calls:
            raise InputError("the answer calls no tool, or no call was let through", hint="see its verdict")
        return [ToolSelection(tool_id=each.id, tool_name=each.name, tool_kwargs=dict(each.arguments)) for each in calls]
