"""A human's part in a call: what waits for it, how it is asked by LangGraph's ``interrupt``, and what it settles.

What is asked has the form of LangChain's own human-in-the-loop middleware: one decision an action, ``approve``,
``edit`` or ``reject``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from langchain_core.messages import BaseMessage
from langchain_core.runnables.config import ensure_config
from langgraph.types import interrupt

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.guard import Guard, Review
from hallucination_guard.values import Call, Generation, ToolCall
from hallucination_guard_langchain.convert import as_guard_messages, thread_of, without_media

__all__ = [
    "ANSWER",
    "ReviewDecision",
    "Said",
    "Waiting",
    "actions_of",
    "asked_of_a_human",
    "checked_decisions",
    "record",
    "record_settled",
    "waiting_of",
]

ReviewDecision: TypeAlias = Literal["approve", "edit", "reject"]
Settled: TypeAlias = Literal["approved", "edited", "rejected"]
Said: TypeAlias = Literal["held", "approved", "edited", "rejected"]

ANSWER = "answer"
"""The name of the action under which a human reviews a text."""


class Waiting(TypedDict):
    """What waits for a human, as plain JSON: the process that resumes needs nothing else."""

    request_id: str
    attempt: int
    rule: str
    reason: str
    text: str
    tool_calls: list[dict[str, Any]]
    shaky: list[int]


def waiting_of(
    generation: Generation, *, request_id: str, attempt: int, rule: str, reason: str, shaky: Sequence[int] = ()
) -> Waiting:
    """A draft as what waits.

    Args:
        generation: the draft.
        request_id: of the call.
        attempt: which draft of the call it is.
        rule: why it waits.
        reason: the same in words; no text of prompt or answer.
        shaky: which of its calls are asked about; by default all of it.
    """
    calls = [{"name": each.name, "args": dict(each.arguments), "id": each.id} for each in generation.tool_calls]
    return Waiting(
        request_id=request_id,
        attempt=attempt,
        rule=rule,
        reason=reason,
        text=generation.content,
        tool_calls=calls,
        shaky=list(shaky),
    )


def actions_of(waiting: Waiting) -> list[dict[str, Any]]:
    """What a human is asked about: the calls that are not sure enough, all calls of an answer, or its text."""
    calls = waiting["tool_calls"]
    chosen = [calls[at] for at in waiting["shaky"]] or calls
    return [{"name": each["name"], "args": each["args"]} for each in chosen] or [
        {"name": ANSWER, "args": {"text": waiting["text"]}}
    ]


def checked_decisions(allowed: Sequence[ReviewDecision]) -> list[ReviewDecision]:
    """What a human may decide.

    Raises:
        ConfigurationError: if that is nothing, or something else.
    """
    if not allowed or not set(allowed) <= {"approve", "edit", "reject"}:
        raise ConfigurationError(f"allowed_decisions is {allowed!r}", hint="approve, edit, reject")
    return list(allowed)


def asked_of_a_human(
    waiting: Waiting, allowed: Sequence[ReviewDecision], *, shown: bool = True
) -> tuple[str, list[dict[str, Any]], Settled]:
    """Interrupt the graph, and say on resuming what the human settled: the text and the calls that leave, and a word.

    A review that cannot be used is asked for again, with the reason: LangGraph keeps every answer to an interrupt, so
    an exception would be raised by the same answer for ever.

    Args:
        waiting: what waits.
        allowed: what the human may decide.
        shown: whether the request shows what waits; it is kept in the checkpoint. Without it, it names the call alone.
    """
    asked = actions_of(waiting)
    seen = asked if shown else [{"name": ANSWER, "args": {"request_id": waiting["request_id"]}} for _ in asked]
    request: dict[str, Any] = {
        "action_requests": [{**each, "description": waiting["reason"]} for each in seen],
        "review_configs": [{"action_name": each["name"], "allowed_decisions": list(allowed)} for each in seen],
    }
    given = interrupt(request)
    while True:
        try:
            return _settled(waiting, _decisions(given, asked, allowed))
        except InputError as error:
            unusable = str(error)
        given = interrupt({**request, "error": unusable})


def record(
    guard: Guard,
    messages: Sequence[BaseMessage],
    waiting: Waiting,
    *,
    said: Said,
    by: str,
    reason: str,
    answer: str | None = None,
) -> None:
    """Write down that an answer waits, or what a human said of it; see :class:`~hallucination_guard.guard.Review`.

    Raises:
        AuditError: if the log cannot be written; then nothing may leave.
    """
    guard.record_review(
        as_guard_messages(without_media(messages)),
        Review(
            request_id=waiting["request_id"],
            attempt=waiting["attempt"],
            rule=waiting["rule"],
            said=said,
            by=by,
            reason=reason,
            answer=answer,
            call=Call(thread_id=thread_of(ensure_config())),
        ),
    )


def record_settled(
    guard: Guard,
    messages: Sequence[BaseMessage],
    waiting: Waiting,
    text: str,
    calls: Sequence[Mapping[str, Any]],
    said: Settled,
) -> None:
    """Write down what a human settled, with what leaves.

    Raises:
        AuditError: if the log cannot be written; then nothing may leave.
    """
    answer = None if said == "rejected" else guard.model.write(text, [ToolCall.of(each) for each in calls])
    record(guard, messages, waiting, said=said, by="a human", reason=f"{said} by a human", answer=answer)


def _decisions(given: object, asked: Sequence[Mapping[str, Any]], allowed: Sequence[str]) -> list[Mapping[str, Any]]:
    """One decision an action.

    Raises:
        InputError: if there are more or fewer, or one that may not be; nothing is then let through.
    """
    decisions = given.get("decisions") if isinstance(given, Mapping) else None
    if not isinstance(decisions, Sequence) or len(decisions) != len(asked):
        raise InputError("the review does not have one decision for each action", hint="{'decisions': [{'type': …}]}")
    for each in decisions:
        if not isinstance(each, Mapping) or each.get("type") not in allowed:
            raise InputError("the review has a decision that is not allowed", hint=f"one of {', '.join(allowed)}")
        if each["type"] == "edit":
            edited = each.get("edited_action")
            if not isinstance(edited, Mapping) or not isinstance(edited.get("args"), Mapping):
                raise InputError(
                    "an edit has no action in it", hint="{'type': 'edit', 'edited_action': {'name', 'args'}}"
                )
            ToolCall.of({"name": edited.get("name"), "args": edited["args"]})
    return list(decisions)


def _settled(waiting: Waiting, decisions: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]], Settled]:
    """The text and the calls that leave, and in a word what the human said: one rejection rejects the answer."""
    kinds = {each["type"] for each in decisions}
    if "reject" in kinds:
        return "", [], "rejected"
    text, calls = waiting["text"], [dict(each) for each in waiting["tool_calls"]]
    for at, each in zip(waiting["shaky"] or range(len(decisions)), decisions, strict=True):
        if each["type"] == "edit":
            edited = each["edited_action"]
            if calls:
                calls[at] |= {"name": edited["name"], "args": dict(edited["args"])}
            else:
                text = str(edited["args"].get("text", ""))
    if not text.strip() and not calls:
        raise InputError("the edited answer is empty", hint="reject it instead")
    return text, calls, "edited" if "edit" in kinds else "approved"
