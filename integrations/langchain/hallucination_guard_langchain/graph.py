"""A guarded call as nodes of a LangGraph graph: generate, score, decide, and review by a human.

What stands between two nodes is checkpointed, so the state has where a call stands and never a draft: those lie in
:class:`HeldAnswers` until they are decided on. Each node writes there what it did before it gives it to the graph, so
one that runs again (a retry policy, a crash before the checkpoint, another process) gives what it gave: no draft is
generated twice. A draft is read again to be scored, since the tensors that generating kept cannot be written down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import Any, NotRequired

from langchain_core.messages import AIMessage, message_to_dict
from langchain_core.runnables.config import ensure_config
from langgraph.errors import GraphBubbleUp
from langgraph.graph import END, MessagesState
from langgraph.graph.state import StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import RetryPolicy

from hallucination_guard.errors import InputError, without_frames
from hallucination_guard.guard import Guard, Kept, Steps
from hallucination_guard.values import Call, Outcome
from hallucination_guard_langchain.convert import KEY, as_ai_message, as_guard_messages, thread_of, verdict_of
from hallucination_guard_langchain.held import Held, HeldAnswers, Standing, Way
from hallucination_guard_langchain.quiet import unheard
from hallucination_guard_langchain.review import (
    ReviewDecision,
    asked_of_a_human,
    checked_decisions,
    record_settled,
    waiting_of,
)

__all__ = ["GuardNodes", "GuardState", "add_guard", "way_on"]


class GuardState(MessagesState):
    """The state of a graph with a guard: messages, and where the guarded call stands, in plain JSON."""

    hallucination_guard: NotRequired[Standing]


def way_on(state: GuardState) -> Way:
    """Where the call goes on, for conditional edges: the next node's name, ``answered`` or ``abstained``."""
    return state["hallucination_guard"]["way"]


def _without_drafts(node: Callable[[GuardNodes, GuardState], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The node, whose errors leave without the frames that hold a draft: LangGraph hands them on and logs them."""

    @wraps(node)
    def run(self: GuardNodes, state: GuardState) -> dict[str, Any]:
        try:
            return node(self, state)
        except GraphBubbleUp:  # no error: this is how a node interrupts
            raise
        except BaseException as error:
            if self.guard.debug:
                raise
            failure = error
        raise without_frames(failure)

    return run


class GuardNodes:
    """The nodes, for a graph that is wired by hand; :func:`add_guard` wires them.

    A new call begins where ``generate`` is reached with a message that it has not answered. They are synchronous, and
    LangGraph runs them in a thread in async graphs.

    Args:
        guard: generates, scores and decides.
        held: where drafts and waiting answers lie; of the same file in every process that resumes the graph.
        abstention_message: what stands for an answer that was not let through.
        allowed_decisions: what a human may decide on what waits.

    Raises:
        ConfigurationError: if a human may decide nothing.
    """

    def __init__(
        self,
        guard: Guard,
        held: HeldAnswers,
        *,
        abstention_message: str = "I am not sure enough to answer that.",
        allowed_decisions: Sequence[ReviewDecision] = ("approve", "edit", "reject"),
    ) -> None:
        self.guard = guard
        self.held = held
        self.abstention_message = abstention_message
        self.allowed_decisions = checked_decisions(allowed_decisions)
        self._steps = Steps(guard)

    @_without_drafts
    def generate(self, state: GuardState) -> dict[str, Any]:
        """Draw the next draft of a call, or the first of a new one.

        Raises:
            InputError: if the messages cannot be used, or the call is not held any more.
        """
        standing, asked = state.get("hallucination_guard"), state["messages"][-1].id or ""
        again = standing is not None and standing["way"] == "generate" and standing["answers"] == asked
        if standing is not None and again:
            held = self._found(standing)
        else:
            # By the task, which is the same when it runs again: a draft that it has drawn is found and not drawn again.
            request_id = hashlib.sha256(_task_id().encode()).hexdigest()[:32]
            held = self.held.find(request_id) or self._begun(state, request_id, asked)
        if held.standing["way"] == "generate":
            attempts = held.standing["attempts"] + 1
            kept = self._steps.draw(_kept(held))
            drawn: Standing = {**held.standing, "attempts": attempts, "verdict": {}, "way": "score"}
            held = Held(thread_id=held.thread_id, standing=drawn, kept=kept)
            self.held.keep(held)
        return held.update

    @_without_drafts
    def score(self, state: GuardState) -> dict[str, Any]:
        """Measure the newest draft."""
        held = self._found(state["hallucination_guard"])
        if held.standing["way"] == "score":
            kept, verdict = self._steps.score(_kept(held))
            known = {
                "status": verdict.score.status,
                "scores": dict(verdict.score.scores),
                "confidence": verdict.confidence,
            }
            held = Held(
                thread_id=held.thread_id, standing={**held.standing, "verdict": known, "way": "decide"}, kept=kept
            )
            self.held.keep(held)
        return held.update

    @_without_drafts
    def decide(self, state: GuardState) -> dict[str, Any]:
        """Let the policy decide, carry it out and record it. Only what is let through becomes a message.

        Raises:
            AuditError: if the log cannot be written. The draft stays held, and the node can run again.
        """
        held = self._found(state["hallucination_guard"])
        if held.standing["way"] == "decide":
            with unheard():  # a retriever or a target that is a graph itself must not write into this one's checkpoint
                kept, outcome = self._steps.decide(_kept(held))
            held = self._decided(held, kept, outcome)
            self.held.keep(held)
        return held.update

    @_without_drafts
    def review(self, state: GuardState) -> dict[str, Any]:
        """Ask a human about what waits. The interrupt names the call; what is asked about is in the held answers."""
        held = self._found(state["hallucination_guard"])
        if held.waiting is not None:
            text, calls, said = asked_of_a_human(held.waiting, self.allowed_decisions, shown=False)
            record_settled(self.guard, state["messages"], held.waiting, text, calls, said)
            standing = held.standing
            verdict = {**standing["verdict"], "reviewed": said}
            message = AIMessage(
                content=self.abstention_message if said == "rejected" else text,
                tool_calls=calls,
                id=standing["request_id"],
                response_metadata={
                    "model_name": str(self.guard.model.name),
                    "model_provider": "hallucination_guard",
                    "finish_reason": "escalate",
                    KEY: verdict,
                },
            )
            way: Way = "abstained" if said == "rejected" else "answered"
            held = Held(
                thread_id=held.thread_id,
                standing={**standing, "verdict": verdict, "way": way},
                message=message_to_dict(message),
            )
            self.held.keep(held)
        return held.update

    def _begun(self, state: GuardState, request_id: str, asked: str) -> Held:
        thread_id = thread_of(ensure_config())
        kept = self._steps.begin(
            as_guard_messages(state["messages"]), request_id=request_id, call=Call(thread_id=thread_id)
        )
        self.held.forget_ended(thread_id)
        standing = Standing(request_id=request_id, answers=asked, attempts=0, way="generate", verdict={})
        return Held(thread_id=thread_id, standing=standing, kept=kept)

    def _found(self, standing: Standing) -> Held:
        held = self.held.find(standing["request_id"])
        if held is None:
            raise InputError(
                f"nothing is held of the call {standing['request_id']!r}",
                hint="resume with the file that it was held in, or ask again",
            )
        return held

    def _decided(self, held: Held, kept: Kept, outcome: Outcome) -> Held:
        standing: Standing = {**held.standing, "verdict": verdict_of(outcome)}
        decision = outcome.decision
        if decision.action in ("retry", "retrieve"):
            return Held(thread_id=held.thread_id, standing={**standing, "way": "generate"}, kept=kept)
        if decision.action == "escalate" and outcome.text is None:
            waiting = waiting_of(
                outcome.generation,
                request_id=outcome.request_id,
                attempt=outcome.attempts,
                rule=decision.rule,
                reason=decision.reason,
            )
            return Held(thread_id=held.thread_id, standing={**standing, "way": "review"}, waiting=waiting)
        message = as_ai_message(
            outcome, abstention=self.abstention_message, model_name=str(self.guard.model.name)
        ).model_copy(update={"id": outcome.request_id})
        way: Way = "abstained" if outcome.text is None else "answered"
        return Held(thread_id=held.thread_id, standing={**standing, "way": way}, message=message_to_dict(message))


def add_guard(
    builder: StateGraph[Any, Any, Any, Any],
    guard: Guard,
    held: HeldAnswers,
    *,
    answered: str = END,
    abstained: str = END,
    abstention_message: str = "I am not sure enough to answer that.",
    allowed_decisions: Sequence[ReviewDecision] = ("approve", "edit", "reject"),
    retry_policy: RetryPolicy | None = None,
) -> None:
    """Add the nodes ``generate``, ``score``, ``decide`` and ``review`` to a graph; an edge to ``generate`` is yours.

    Args:
        builder: of a graph whose state is a :class:`GuardState`, or one with more. To wait for a human it needs a
            checkpointer.
        guard: as for :class:`GuardNodes`.
        held: as for :class:`GuardNodes`.
        answered: where the graph goes on after an answer was let through, by the policy or by a human.
        abstained: where it goes on after an abstention.
        abstention_message: as for :class:`GuardNodes`.
        allowed_decisions: as for :class:`GuardNodes`.
        retry_policy: of the first three nodes. A failed log, for example, lets ``decide`` run again, on the same draft.
    """
    nodes = GuardNodes(guard, held, abstention_message=abstention_message, allowed_decisions=allowed_decisions)
    builder.add_node("generate", nodes.generate, retry_policy=retry_policy)
    builder.add_node("score", nodes.score, retry_policy=retry_policy)
    builder.add_node("decide", nodes.decide, retry_policy=retry_policy)
    builder.add_node("review", nodes.review)
    ends: dict[Hashable, str] = {"answered": answered, "abstained": abstained}
    builder.add_edge("generate", "score")
    builder.add_edge("score", "decide")
    builder.add_conditional_edges("decide", way_on, {"generate": "generate", "review": "review", **ends})
    builder.add_conditional_edges("review", way_on, ends)


def _kept(held: Held) -> Kept:
    assert held.kept is not None  # it is there wherever one of the first three nodes is next
    return held.kept


def _task_id() -> str:
    execution = get_runtime().execution_info
    if execution is None:
        raise InputError("the node runs outside of a graph", hint="compile the graph, and invoke that")
    return execution.task_id
