"""How a decision that is not final is carried out: draw again, look something up, hand the question on.

Each move is a step of its own, from the move and the prompt to what happens next: :class:`Again` or :class:`Ended`. A
new move adds a value, a step and a line in :func:`carry_out`; the loop does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from hallucination_guard.guard.calls import ask, look_up
from hallucination_guard.values import (
    Escalate,
    GenerationSettings,
    Message,
    Model,
    Move,
    Passage,
    Redraw,
    Retrieve,
    question_of,
)

__all__ = ["Again", "Ended", "carry_out", "with_passages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Another attempt.

    Args:
        redraw: how it is drawn; None for a first draft of another prompt.
        messages: the prompt, where it is another one: its drafts are judged afresh.
        retrieved: ids of the passages in that prompt.
    """

    redraw: Redraw | None = None
    messages: tuple[Message, ...] | None = None
    retrieved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The call is over.

    Args:
        text: what the caller gets; None where a human or a queue takes over.
        answered_by: who wrote it; empty where there is no text.
    """

    text: str | None = None
    answered_by: str = ""


Next: TypeAlias = Again | Ended


def carry_out(move: Move, *, model: Model, asked: tuple[Message, ...], settings: GenerationSettings) -> Next:
    """Do it.

    Args:
        move: of the decision.
        model: that the next prompt has to fit.
        asked: the caller's own prompt.
        settings: of the call.

    Raises:
        CallError: if a retriever or an escalation target fails.
        InputError: if the next prompt cannot be used.
    """
    match move:
        case Redraw():
            return Again(redraw=move)
        case Retrieve():
            return _retrieve(move, model, asked, settings)
        case Escalate():
            return _escalate(move, asked)
        case _:
            assert_never(move)


def _retrieve(move: Retrieve, model: Model, asked: tuple[Message, ...], settings: GenerationSettings) -> Again:
    passages = look_up(move, question_of(asked))
    messages = with_passages(asked, passages, move.template)
    model.prompt(messages, **settings.offered)  # with the passages it may exceed the context
    return Again(messages=messages, retrieved=tuple(passage.id for passage in passages))


def _escalate(move: Escalate, asked: tuple[Message, ...]) -> Ended:
    if move.to is None:
        return Ended()
    name = getattr(move.to, "__qualname__", type(move.to).__qualname__)
    return Ended(text=ask(move.to, asked, timeout=move.timeout), answered_by=name)


def with_passages(messages: tuple[Message, ...], passages: Sequence[Passage], template: str) -> tuple[Message, ...]:
    """The turns with the passages written into the last user turn."""
    last = max(at for at, message in enumerate(messages) if message.role == "user")
    numbered = "\n".join(f"[{at}] {passage.text}" for at, passage in enumerate(passages, start=1))
    content = template.format(passages=numbered, question=messages[last].content)
    return (*messages[:last], Message(role="user", content=content), *messages[last + 1 :])
