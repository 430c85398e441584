"""GuardRunnable: a guard around a chain's model step, whatever runs that step."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable, run_in_executor
from pydantic import ConfigDict, Field

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Guard
from hallucination_guard.types import Outcome
from hallucination_guard_langchain.convert import KEY, LowConfidenceError, as_ai_message, as_guard_messages

__all__ = ["GuardRunnable"]


class GuardRunnable(RunnableSerializable[LanguageModelInput, Any]):
    """Let a model step run, score what it wrote with a white-box model, and let the policy decide.

    The step may be anything that answers a prompt with a text or a message: a served copy of the same weights, a
    ``ChatHuggingFace``, an API. Its draft is scored by teacher forcing; further attempts, if the policy wants any, are
    drawn from the guard's own model. Its callbacks are cut, since they would let the draft out.

    Args:
        bound: the model step.
        guard: decides; its model reads.
        abstention: what follows instead of a text that was not let through.
        on_abstain: ``message`` or ``error``, as for the guarded chat model.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    bound: Runnable[Any, Any]
    guard: Guard = Field(exclude=True, repr=False)
    abstention: str = "I am not sure enough to answer that."
    on_abstain: Literal["message", "error"] = "message"

    def __init__(self, bound: Runnable[Any, Any], guard: Guard, **settings: Any) -> None:
        super().__init__(**{"bound": bound, "guard": guard, **settings})

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Weights are not."""
        return False

    @property
    def InputType(self) -> Any:
        """Of the step."""
        return self.bound.InputType

    @property
    def OutputType(self) -> Any:
        """Of the step: a message stays a message, a text a text."""
        return self.bound.OutputType

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the step and decide."""

        def run(value: LanguageModelInput, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> Any:
            return self._decide(value, self.bound.invoke(value, _silent(config), **kwargs), config)

        return self._call_with_config(run, input, config, run_type="chain")

    async def ainvoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the step and decide, without blocking the loop."""

        async def run(
            value: LanguageModelInput, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> Any:
            written = await self.bound.ainvoke(value, _silent(config), **kwargs)
            return await run_in_executor(config, self._decide, value, written, config)

        return await self._acall_with_config(run, input, config, run_type="chain")

    def _decide(self, value: LanguageModelInput, written: Any, config: RunnableConfig) -> Any:
        text = written.text if isinstance(written, BaseMessage) else written
        if not isinstance(text, str):
            raise InputError(
                f"the guarded step gave a {type(written).__name__}", hint="guard the step that gives a text or message"
            )
        thread_id = (config.get("configurable") or {}).get("thread_id")
        outcome = self.guard.review(
            as_guard_messages(_as_messages(value)),
            answer=str(text),
            thread_id=None if thread_id is None else str(thread_id),
        )
        if outcome.text is None and self.on_abstain == "error":
            raise LowConfidenceError(outcome)
        return self._like(written, outcome)

    def _like(self, written: Any, outcome: Outcome) -> Any:
        message = as_ai_message(outcome, abstention=self.abstention, model_name=str(self.guard.model.name))
        if not isinstance(written, BaseMessage):
            return message.content
        if not isinstance(written, AIMessage):
            return message
        # Only the verdict is carried over: logprobs and the like would hold the draft's words.
        kept = {key: written.response_metadata[key] for key in _KEPT if key in written.response_metadata}
        return AIMessage(
            content=message.content,
            id=written.id,
            response_metadata={**message.response_metadata, **kept, KEY: message.response_metadata[KEY]},
            usage_metadata=written.usage_metadata or message.usage_metadata,
        )


_KEPT = ("model_name", "model_provider")


def _silent(config: RunnableConfig) -> RunnableConfig:
    return {**config, "callbacks": []}


def _as_messages(value: LanguageModelInput) -> list[BaseMessage]:
    if isinstance(value, PromptValue):
        return value.to_messages()
    return convert_to_messages([("user", value)] if isinstance(value, str) else value)
