"""GuardRunnable: a guard around a chain's model step, whatever runs that step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableParallel,
    RunnableSequence,
    RunnableSerializable,
    run_in_executor,
)
from langchain_core.runnables.base import RunnableBindingBase
from pydantic import ConfigDict, Field

from hallucination_guard.errors import CallError, ConfigurationError, GuardError, InputError, without_frames
from hallucination_guard.guard import ABSTENTION, Guard, OnAbstain
from hallucination_guard.values import Message, Outcome
from hallucination_guard_langchain.convert import (
    LowConfidenceError,
    as_ai_message,
    as_guard_messages,
    as_let_through,
    thread_of,
)
from hallucination_guard_langchain.quiet import refuse_listeners, unheard

__all__ = ["GuardRunnable"]


class GuardRunnable(RunnableSerializable[LanguageModelInput, Any]):
    """Let a model step run, score what it wrote with a white-box model, and let the policy decide.

    The step may be anything that answers a prompt with a text or a message: a served copy of the same weights, a
    ``ChatHuggingFace``, an API. Its draft is scored by teacher forcing; further attempts, if the policy wants any, are
    drawn from the guard's own model. No callback, trace or graph around the guard hears of the step, since they would
    let the draft out; callbacks that sit on the step itself still do. Where something in the process hears every run,
    or a global cache would keep the draft, the call is refused.

    The guard has to see the prompt that the model sees: a prompt template goes before it,
    ``prompt | GuardRunnable(model, guard)``, and not into the step.

    Args:
        bound: the model step; it is given what a chat model takes.
        guard: decides; its model reads.
        abstention: what follows instead of a text that was not let through.
        on_abstain: ``message`` or ``error``, as for the guarded chat model.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    bound: Runnable[Any, Any]
    guard: Guard = Field(exclude=True, repr=False)
    abstention: str = ABSTENTION
    on_abstain: OnAbstain = "message"

    def __init__(self, bound: Runnable[Any, Any], guard: Guard, **settings: Any) -> None:
        first = _first_of(bound)
        if isinstance(first, BasePromptTemplate | RunnableParallel):
            raise ConfigurationError(
                f"the guarded step begins with a {type(first).__name__}, so the guard would not see the model's prompt",
                hint="put it before the guard: prompt | GuardRunnable(model, guard)",
            )
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
            asked = self._asked(value)
            with unheard(config) as silent:
                self._see_that_nobody_listens()
                written, failure = None, None
                try:
                    written = self.bound.invoke(value, silent, **kwargs)
                except Exception as error:
                    if self.guard.debug or isinstance(error, GuardError):
                        raise
                    failure = self._by_its_kind(error)
                if failure is not None:  # raised here, so that it does not carry the error as its context
                    raise failure
                return self._decide(asked, written, silent)

        return self._call_with_config(run, input, config, run_type="chain")

    async def ainvoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the step and decide, without blocking the loop."""

        async def run(
            value: LanguageModelInput, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> Any:
            asked = self._asked(value)
            with unheard(config) as silent:
                self._see_that_nobody_listens()
                written, failure = None, None
                try:
                    written = await self._awritten(value, silent, kwargs)
                except Exception as error:
                    if self.guard.debug or isinstance(error, GuardError):
                        raise
                    failure = self._by_its_kind(error)
                if failure is not None:
                    raise failure
                return await run_in_executor(silent, self._decide, asked, written, silent)

        return await self._acall_with_config(run, input, config, run_type="chain")

    async def _awritten(self, value: LanguageModelInput, config: RunnableConfig, kwargs: dict[str, Any]) -> Any:
        try:
            return await self.bound.ainvoke(value, config, **kwargs)
        except NotImplementedError:  # a local HuggingFacePipeline has no async of its own
            return await run_in_executor(config, self.bound.invoke, value, config, **kwargs)

    def _see_that_nobody_listens(self) -> None:
        if not self.guard.debug:
            refuse_listeners(self.bound)

    def _by_its_kind(self, error: Exception) -> CallError:
        """A step's own error without its words: a parser, for example, quotes what it could not parse."""
        return CallError(
            f"the guarded step raised {type(error).__name__}",
            hint="Guard(debug=True) shows the error, which may quote the draft",
        )

    def _asked(self, value: LanguageModelInput) -> list[Message]:
        """What the step is asked, before it runs: a prompt that the guard cannot read must not become a draft."""
        asked = as_guard_messages(_as_messages(value))
        self.guard.model.prompt(asked)
        return asked

    def _decide(self, asked: list[Message], written: object, config: RunnableConfig) -> Any:
        text = written.text if isinstance(written, BaseMessage) else written
        if not isinstance(text, str):
            raise InputError(
                f"the guarded step gave a {type(written).__name__}", hint="guard the step that gives a text or message"
            )
        if getattr(written, "tool_calls", None):
            raise InputError("the guarded step called a tool", hint="guard the step that answers, not one that acts")
        outcome, failure = None, None
        try:
            outcome = self.guard.review(asked, answer=str(text), thread_id=thread_of(config))
        except BaseException as error:
            if self.guard.debug:
                raise
            failure = error
        if outcome is None:
            assert failure is not None
            del written, text  # this frame is in the traceback as well
            raise without_frames(failure)
        if outcome.text is None and self.on_abstain == "error":
            del written, text
            raise LowConfidenceError(outcome)
        return self._like(written, outcome)

    def _like(self, written: object, outcome: Outcome) -> Any:
        named = {"abstention": self.abstention, "model_name": str(self.guard.model.name)}
        if isinstance(written, AIMessage) and outcome.accepted and outcome.attempts == 1:
            return as_let_through(outcome, written, **named)
        message = as_ai_message(outcome, **named)  # later drafts are the guard's own
        if not isinstance(written, BaseMessage):
            return message.content
        if isinstance(written, AIMessage) and outcome.attempts == 1:
            message.usage_metadata = written.usage_metadata or message.usage_metadata
        return message


def _as_messages(value: object) -> list[BaseMessage]:
    """What a chat model takes, and nothing else: of a mapping only the keys would be read.

    Raises:
        InputError: on anything but a text, a prompt value or a list of messages.
    """
    if isinstance(value, PromptValue):
        return value.to_messages()
    if isinstance(value, str):
        return [HumanMessage(value)]
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise InputError(
            f"the guarded step was given a {type(value).__name__}",
            hint="give what a chat model takes, a text or messages; a template goes before: prompt | GuardRunnable(…)",
        )
    try:
        return convert_to_messages(value)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"the guarded step was given no messages: {type(error).__name__}") from None


def _first_of(step: Runnable[Any, Any]) -> Runnable[Any, Any]:
    """The step that the input of a chain goes to."""
    while True:
        if isinstance(step, RunnableSequence):
            step = step.first
        elif isinstance(step, RunnableBindingBase):
            step = step.bound
        else:
            return step
