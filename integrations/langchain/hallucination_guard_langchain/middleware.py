"""HallucinationGuardMiddleware: the guard in front of an agent's model, whatever serves it.

The model's call runs unheard inside ``wrap_model_call``: no stream, tracer or checkpoint hears of a draft. What the
policy lets through becomes the model's message; what it does not, an abstention without tool calls, which ends the
agent's turn. Where somebody listens to tokens, sentences leave one by one, each after its decision
(:mod:`hallucination_guard_langchain.relay`). What waits for a human lies in private state until ``after_model``, a node
of its own, interrupts: on resuming neither the model nor the scorer is called again.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from contextvars import copy_context
from itertools import chain
from typing import Annotated, Any, Literal, NotRequired, TypeAlias, TypeVar, cast

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse, ToolCallRequest
from langchain.agents.middleware.types import ExtendedModelResponse, PrivateStateAttr, hook_config
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, run_in_executor
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.runtime import Runtime
from langgraph.types import Command

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.guard import ABSTENTION, KEY, Guard, verdict_of
from hallucination_guard.guard.in_a_thread import in_a_thread
from hallucination_guard.values import FollowingModel, Generation, Outcome, ToolCall, as_tools, tool_choice_of
from hallucination_guard_langchain.chat import GuardedChatModel, outcomes_of
from hallucination_guard_langchain.convert import (
    LowConfidenceError,
    as_ai_message,
    as_guard_messages,
    as_let_through,
    thread_of,
    unreadable,
    without_media,
)
from hallucination_guard_langchain.quiet import tokens_are_heard, unheard
from hallucination_guard_langchain.relay import Following, Relay
from hallucination_guard_langchain.review import (
    ReviewDecision,
    Waiting,
    asked_of_a_human,
    checked_decisions,
    record,
    record_settled,
    waiting_of,
)

__all__ = ["HallucinationGuardMiddleware", "unsure_call"]

Doubt: TypeAlias = Callable[[Generation], Sequence[float]]
"""From a generation to one confidence a tool call, in [0, 1]."""

STATE = "hallucination_guard_review"


class _State(AgentState[Any]):
    hallucination_guard_review: NotRequired[Annotated[Waiting | None, PrivateStateAttr]]


def unsure_call(below: float) -> Callable[[ToolCallRequest], bool]:
    """A ``when`` for ``HumanInTheLoopMiddleware``: whether a call is less sure than ``below``, or nobody said how sure.

    It reads what a :class:`HallucinationGuardMiddleware` with a ``confidence`` wrote into the message, so it says the
    same when a run resumes.

    Args:
        below: the confidence, in [0, 1].
    """

    def unsure(request: ToolCallRequest) -> bool:
        name = request.tool_call["id"]
        messages = request.state["messages"] if isinstance(request.state, Mapping) else ()
        calling = (
            each
            for each in reversed(messages)
            if isinstance(each, AIMessage) and any(call["id"] == name for call in each.tool_calls)
        )
        message = next(calling, None)
        sure = {} if message is None else message.response_metadata.get(KEY, {}).get("calls", {})
        return not (name in sure and sure[name] >= below)

    return unsure


class HallucinationGuardMiddleware(AgentMiddleware[_State, Any, Any]):
    """Scores every answer and every tool call of an agent's model, and lets the policy decide.

    In front of a chat model that serves the same weights as the guard's model, which reads what it wrote; further
    drafts, if the policy wants any, are the guard's own. A :class:`GuardedChatModel` of the same guard has decided by
    itself: it is not judged twice, and the middleware adds the human's part.

    Args:
        guard: decides; its model reads.
        exit_behavior: ``end`` puts the abstention in the place of the answer, ``error`` raises
            :class:`LowConfidenceError`, which retry middleware does not retry and fallback middleware catches.
        abstention_message: what stands for an answer that was not let through.
        require_approval_below: tools by name, and the confidence below which a call of one waits for a human, in
            [0, 1]; needs ``confidence``. Calls of other tools pass.
        confidence: from a generation to a confidence for each of its tool calls.
        allowed_decisions: what a human may decide on what waits.
        served: the chat model whose weights the guard's model has; an answer of any other one (a router or a fallback
            swapped it in) is unscorable. By default every model's answers are read.

    Raises:
        ConfigurationError: if these do not go together.
    """

    state_schema = _State

    def __init__(
        self,
        guard: Guard,
        *,
        exit_behavior: Literal["end", "error"] = "end",
        abstention_message: str = ABSTENTION,
        require_approval_below: Mapping[str, float] | None = None,
        confidence: Doubt | None = None,
        allowed_decisions: Sequence[ReviewDecision] = ("approve", "edit", "reject"),
        served: BaseChatModel | None = None,
    ) -> None:
        super().__init__()
        if exit_behavior not in ("end", "error"):
            raise ConfigurationError(f"exit_behavior is {exit_behavior!r}", hint="end or error")
        if require_approval_below and confidence is None:
            raise ConfigurationError(
                "calls wait below a confidence, and nothing says how sure a call is",
                hint="give confidence=call_confidence(model)",
            )
        for name, limit in (require_approval_below or {}).items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0.0 <= limit <= 1.0:
                raise ConfigurationError(f"the limit of {name!r} is {limit!r}", hint="a number from 0 to 1")
        self.guard = guard
        self.exit_behavior = exit_behavior
        self.abstention_message = abstention_message
        self.require_approval_below = dict(require_approval_below or {})
        self.confidence = confidence
        self.allowed_decisions = checked_decisions(allowed_decisions)
        self.served = served

    @property
    def name(self) -> str:
        """Unique for a policy: one agent may have several."""
        policy = self.guard.policy.describe()
        return f"{type(self).__name__}[{policy.get('id') or type(self.guard.policy).__name__}]"

    # ------------------------------------------------------------------------------------------- the model's call

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Let the model answer unheard, and decide."""
        self._check(request)
        if self._follows(request):
            return self._followed(request, handler)
        with self._hearing(request), outcomes_of() as outcomes:
            written = handler(request)
            return self._decided(request, written, outcomes)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """The same, without blocking the loop."""
        self._check(request)
        if self._follows(request):
            return await self._afollowed(request, handler)
        with self._hearing(request), outcomes_of() as outcomes:
            written = await handler(request)
            return await run_in_executor(None, self._decided, request, written, outcomes)

    def _check(self, request: ModelRequest[Any]) -> None:
        if isinstance(request.model, GuardedChatModel) and request.model.guard is not self.guard:
            raise ConfigurationError(
                "the agent's model has a guard of its own, and the middleware another one",
                hint="give both the same guard",
            )

    def _hearing(self, request: ModelRequest[Any]) -> AbstractContextManager[object]:
        """Nobody hears the model, but a guarded one whose sentences stream: it has decided on what it says.

        Not where its calls may have to wait for a human.
        """
        guarded = isinstance(request.model, GuardedChatModel) and self.guard.streams
        return nullcontext() if guarded and not self.require_approval_below else unheard()

    def _decided(
        self, request: ModelRequest[Any], written: ModelResponse[Any], outcomes: Sequence[Outcome]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        draft = next((each for each in reversed(written.result) if isinstance(each, AIMessage)), None)
        if draft is None:
            raise InputError("the model gave no message of its own", hint="put the guard inside of what replaces it")
        outcome = self._outcome(request, draft, outcomes)
        if isinstance(request.model, GuardedChatModel) and outcome.decision.action == "abstain":
            if self.exit_behavior == "error":
                raise LowConfidenceError(outcome)
            return written  # as it was streamed
        if outcome.accepted:
            sure = self._sure(outcome)
            message = self._with_verdict(self._let_through(request, draft, outcome), outcome, sure)
            shaky = self._shaky(outcome, sure)
            if not shaky:
                # Then what LangChain made of it (a structured response) holds as well.
                if message.content == draft.text and message.tool_calls == draft.tool_calls:
                    result = [message if each is draft else each for each in written.result]
                    return ModelResponse(result=result, structured_response=written.structured_response)
                return ModelResponse(result=[message])
            return self._waits(request, outcome, shaky)
        if outcome.decision.action == "escalate":
            if outcome.text is not None:
                return ModelResponse(result=[self._message(outcome)])
            return self._waits(request, outcome, [])
        if self.exit_behavior == "error":
            raise LowConfidenceError(outcome)
        return ModelResponse(result=[self._message(outcome)])

    def _let_through(self, request: ModelRequest[Any], draft: AIMessage, outcome: Outcome) -> AIMessage:
        """The message that was decided on."""
        # A guarded model's is the outcome's already.
        return draft if isinstance(request.model, GuardedChatModel) else self._of_served(draft, outcome)

    def _of_served(self, draft: AIMessage, outcome: Outcome) -> AIMessage:
        if outcome.attempts > 1:  # later drafts are the guard's own
            return self._message(outcome)
        return as_let_through(
            outcome,
            draft,
            said=self._written(draft) if draft.tool_calls else "",
            abstention=self.abstention_message,
            model_name=str(self.guard.model.name),
        )

    def _written(self, draft: AIMessage) -> str:
        """A draft as the guard's model would have written it."""
        calls = [ToolCall.of(each) for each in draft.tool_calls]
        return self.guard.model.write(str(draft.text), calls) if calls else str(draft.text)

    def _outcome(self, request: ModelRequest[Any], draft: AIMessage, outcomes: Sequence[Outcome]) -> Outcome:
        if isinstance(request.model, GuardedChatModel):  # it has decided
            if not outcomes:
                raise InputError("the guarded model gave a message and no outcome", hint="switch its cache off")
            return outcomes[-1]
        return self.guard.review(
            as_guard_messages(without_media(_turns(request))),
            self._written(draft),
            unscorable=self._unscorable(request),
            thread_id=thread_of(ensure_config()),
            **_offered(request),
        )

    def _unscorable(self, request: ModelRequest[Any]) -> str:
        """Why an answer to this cannot be scored; empty if it can."""
        if self.served is not None and request.model is not self.served:
            return f"the answer is of a {type(request.model).__name__} that is not the model that was named as served"
        return unreadable(_turns(request))

    def _message(self, outcome: Outcome) -> AIMessage:
        return as_ai_message(outcome, abstention=self.abstention_message, model_name=str(self.guard.model.name))

    def _with_verdict(self, message: AIMessage, outcome: Outcome, sure: Sequence[float]) -> AIMessage:
        """The message with its verdict, and how sure each of its calls is, by the id that the call has there."""
        verdict = verdict_of(outcome)
        if sure and len(sure) == len(message.tool_calls):
            verdict["calls"] = {str(call["id"]): each for call, each in zip(message.tool_calls, sure, strict=True)}
        return message.model_copy(update={"response_metadata": {**message.response_metadata, KEY: verdict}})

    # ------------------------------------------------------------------------------------- sentence by sentence

    def _follows(self, request: ModelRequest[Any]) -> bool:
        """Whether the answer is to leave sentence by sentence: somebody listens, and nothing asks for the whole."""
        return (
            self.guard.streams
            and isinstance(self.guard.model, FollowingModel)
            and not isinstance(request.model, GuardedChatModel)
            and not self.require_approval_below
            and request.response_format is None
            and "response_format" not in request.model_settings
            and not self._unscorable(request)
            and tokens_are_heard()
        )

    def _following(self, request: ModelRequest[Any]) -> Following:
        thread_id = thread_of(ensure_config())
        following = Following(
            self.guard,
            _turns(request),
            thread_id=thread_id,
            offered=_offered(request),
            said=lambda outcome: self._said(outcome, following),
        )
        return following

    def _relay(self, request: ModelRequest[Any], chunks: object) -> Relay:
        return Relay.of(chunks, said_for=str(self.guard.model.name), model=request.model)

    def _followed(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        following = self._following(request)
        ear, chunks = following.ear, cast("Generator[Any, None, None]", following.chunks())
        model = threading.Thread(
            target=copy_context().run, args=(ear.listen, handler, request), daemon=True, name="hallucination-guard-ear"
        )
        try:
            model.start()
            if (first := next(chunks)) is None:
                with unheard():
                    return self._decided(request, ear.response, [])
            relay = self._relay(request, chain([first], chunks))
            message = relay.invoke(following.asked, _named(request))
        finally:
            ear.left.set()
            chunks.close()
        return self._delivered(request, following, message)

    async def _afollowed(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        following = self._following(request)
        ear = following.ear
        model = asyncio.create_task(ear.alisten(handler, request))
        try:
            async with aclosing(in_a_thread(following.chunks(), ear.left)) as chunks:
                if (first := await anext(chunks)) is None:
                    with unheard():
                        return await run_in_executor(None, self._decided, request, ear.response, [])
                relay = self._relay(request, _achain(first, chunks))
                message = await relay.ainvoke(following.asked, _named(request))
        finally:
            ear.left.set()
            model.cancel()
            await asyncio.wait([model])
        return self._delivered(request, following, message)

    def _said(self, outcome: Outcome, following: Following) -> AIMessage:
        """What is still to be said of the message: of an accepted answer its text has left."""
        if not outcome.accepted:
            if outcome.decision.action == "abstain" and self.exit_behavior == "error":
                raise LowConfidenceError(outcome)
            return self._message(outcome)
        # Its id is that of the chunks that have left.
        message = self._of_served(following.ear.draft, outcome).model_copy(update={"content": "", "id": None})
        return self._with_verdict(message, outcome, self._sure(outcome))

    def _delivered(
        self, request: ModelRequest[Any], following: Following, message: AIMessage
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """What was said, as the agent's message."""
        outcome = following.outcome
        assert outcome is not None
        if outcome.decision.action == "escalate" and outcome.text is None:
            return self._waits(request, outcome, [], said=message)
        if not outcome.accepted or outcome.attempts > 1:
            return ModelResponse(result=[message])
        draft, written = following.ear.draft, following.ear.response
        message = message.model_copy(update={"name": draft.name})
        return ModelResponse(
            result=[message if each is draft else each for each in written.result],
            structured_response=written.structured_response,
        )

    # ------------------------------------------------------------------------------------------------ a human's

    def _sure(self, outcome: Outcome) -> list[float]:
        """How sure each call is; empty where that is not asked for, or not said of every call."""
        calls = outcome.tool_calls
        if self.confidence is None or not calls:
            return []
        found = [float(each) for each in self.confidence(outcome.generation)]
        whole = len(found) == len(calls) and all(0.0 <= each <= 1.0 for each in found)  # also false for NaN
        return found if whole else []

    def _shaky(self, outcome: Outcome, sure: Sequence[float]) -> list[int]:
        """Which calls wait for a human; where nothing is known of them, they do."""
        limits = self.require_approval_below
        return [
            at
            for at, each in enumerate(outcome.tool_calls)
            if each.name in limits and not (sure and sure[at] >= limits[each.name])
        ]

    def _waits(
        self, request: ModelRequest[Any], outcome: Outcome, shaky: Sequence[int], *, said: AIMessage | None = None
    ) -> ExtendedModelResponse[Any]:
        """The abstention for now, or what was ``said``; what a human is to see lies in private state, as plain JSON."""
        drafted = outcome.generation
        names = sorted({drafted.tool_calls[at].name for at in shaky})
        rule = "require_approval_below" if shaky else outcome.decision.rule
        reason = f"a call of {', '.join(names)} is not sure enough" if shaky else outcome.decision.reason
        review = waiting_of(
            drafted,
            request_id=outcome.request_id,
            attempt=outcome.attempts,
            rule=rule,
            reason=reason,
            shaky=shaky,
        )
        if shaky:  # the policy's own escalation is in the log already
            record(self.guard, request.messages, review, said="held", by="the middleware", reason=reason)
        message = self._message(outcome)
        metadata = {**message.response_metadata, KEY: {**message.response_metadata[KEY], "decision": "escalate"}}
        held = said or AIMessage(content=self.abstention_message, response_metadata=metadata)
        return ExtendedModelResponse(
            model_response=ModelResponse(result=[held]),
            command=Command(update={STATE: json.loads(json.dumps(review))}),
        )

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Ask a human about what waits, and end after an abstention. On resuming, this node alone runs again."""
        review = state.get("hallucination_guard_review")
        if not review:
            verdict = state["messages"][-1].response_metadata.get(KEY, {})
            # Otherwise an agent that has to give a structured response would ask the model again, without end.
            return {"jump_to": "end"} if verdict.get("decision") == "abstain" else None
        text, calls, said = asked_of_a_human(review, self.allowed_decisions)
        held = next(each for each in reversed(state["messages"]) if isinstance(each, AIMessage))
        record_settled(self.guard, state["messages"][:-1], review, text, calls, said)
        if said == "rejected":
            return {STATE: None, "jump_to": "end"}  # the abstention that stands there already
        verdict = {**held.response_metadata[KEY], "reviewed": said}
        message = AIMessage(
            content=text, tool_calls=calls, id=held.id, response_metadata={**held.response_metadata, KEY: verdict}
        )
        return {STATE: None, "messages": [message]}

    async def aafter_model(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same."""
        return await run_in_executor(None, self.after_model, state, runtime)


_Item = TypeVar("_Item")


def _turns(request: ModelRequest[Any]) -> list[BaseMessage]:
    return [*([request.system_message] if request.system_message else []), *request.messages]


def _offered(request: ModelRequest[Any]) -> dict[str, Any]:
    if not request.tools:
        return {}
    return {
        "tools": as_tools([convert_to_openai_tool(each) for each in request.tools]),
        "tool_choice": tool_choice_of(request.tool_choice),
    }


def _named(request: ModelRequest[Any]) -> RunnableConfig:
    """In traces the run has the name of the model in whose place it speaks."""
    return {"run_name": request.model.get_name()}


async def _achain(first: _Item, rest: AsyncIterator[_Item]) -> AsyncIterator[_Item]:
    yield first
    async for each in rest:
        yield each
