"""What is to happen with an answer, and how: the verbs, and the moves that carry three of them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

from hallucination_guard.values.plain import JSON
from hallucination_guard.values.sentence import Edit

__all__ = [
    "Action",
    "Answerer",
    "Decision",
    "Escalate",
    "Invoked",
    "Move",
    "Passage",
    "Redraw",
    "Retrieve",
    "Retriever",
    "Situation",
]

Action: TypeAlias = Literal["accept", "abstain", "retry", "retrieve", "escalate"]

_Argument = TypeVar("_Argument", contravariant=True)


class Invoked(Protocol[_Argument]):
    """What LangChain calls a runnable: it has ``invoke``."""

    def invoke(self, argument: _Argument, /) -> object:
        """Its result, or an awaitable of it."""
        ...


Retriever: TypeAlias = Callable[[str], object] | Invoked[str]
"""From a query to strings, :class:`Passage` objects or LangChain documents; it may be async."""

Answerer: TypeAlias = Callable[[list[dict[str, JSON]]], object] | Invoked[list[dict[str, JSON]]]
"""From role/content messages to a text, or a message with ``.content``; it may be async."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of text that a retriever found, and the id under which it can be found again."""

    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraw:
    """Draw another answer to the same prompt.

    Args:
        temperature: of the redraw, > 0: a greedy redraw would repeat the draft.
        top_p: nucleus of the redraw, in (0, 1].
        seed: of the first redraw; the n-th redraw of a call uses ``seed + n - 1``.
        keep: which draft is judged next: the ``last`` one or the ``best`` (most certain) so far.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    keep: Literal["last", "best"] = "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieve:
    """Look something up, put it into the prompt, generate and score again.

    Args:
        retriever: ``callable(query)`` or an object with ``invoke(query)``; it may be async. Gives strings,
            :class:`Passage` objects or LangChain documents.
        k: at most this many passages are used.
        timeout: seconds for one call.
        tries: calls in all when the retriever raises.
        template: has ``{passages}`` and ``{question}``.
    """

    retriever: Retriever
    k: int
    timeout: float
    tries: int
    template: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalate:
    """Hand the question to something else.

    Args:
        to: ``callable(messages)`` or an object with ``invoke(messages)``, messages being a list of role/content
            dicts; it may be async. Gives a string or a message with ``.content``. None hands over to the caller
            (a human, a queue): the outcome then has no text.
        timeout: seconds for the call.
    """

    to: Answerer | None
    timeout: float


Move: TypeAlias = Redraw | Retrieve | Escalate
"""How a decision that is neither ``accept`` nor ``abstain`` is carried out."""

_MOVES: Mapping[Action, type | None] = {
    "accept": None,
    "abstain": None,
    "retry": Redraw,
    "retrieve": Retrieve,
    "escalate": Escalate,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to happen with an answer, by which rule, and why.

    Args:
        action: the verb.
        rule: the rule that fired, for example ``abstain_below``; stable, for counting and for the log.
        reason: the same in words, with the numbers.
        move: how to carry it out; present exactly for ``retry``, ``retrieve`` and ``escalate``.
        spent: an abstention only because this rule has used up its attempts; a following rule may still accept.
        edit: which sentences of the accepted answer are doubtful, and how they are delivered; None where it leaves as
            it is.
    """

    action: Action
    rule: str
    reason: str
    move: Move | None = None
    spent: bool = False
    edit: Edit | None = None

    def __post_init__(self) -> None:
        if self.edit is not None and self.action != "accept":
            raise ValueError(f"only what is accepted is edited, not {self.action!r}")
        if not self.rule or not self.reason:
            raise ValueError(f"a decision needs a rule and a reason: {self.rule!r}, {self.reason!r}")
        kind = _MOVES[self.action]
        if not (self.move is None if kind is None else isinstance(self.move, kind)):
            raise ValueError(f"action {self.action!r} does not go with the move {self.move!r}")
        if self.spent and self.action != "abstain":
            raise ValueError(f"only an abstention can be spent, not {self.action!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a policy may know besides the verdict.

    Args:
        attempt: 1 for the first draft.
        rules: the rules that fired so far in this call, in order.
        seconds: since the call began.
    """

    attempt: int = 1
    rules: tuple[str, ...] = ()
    seconds: float = 0.0

    def fired(self, rule: str) -> int:
        """How often ``rule`` has fired in this call."""
        return self.rules.count(rule)
