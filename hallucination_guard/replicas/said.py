"""What travels between who asks and a replica. An error travels as a value: it arrives as itself, and nobody logs it.

Of an outcome only what leaves travels: a draft that was not let through stays in the replica that drew it, like the
numbers of its tokens, its states and its sentences.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hallucination_guard.errors import GuardError
from hallucination_guard.server.refusals import Refusal
from hallucination_guard.server.requests import Tightening
from hallucination_guard.values import Call, Event, FinishReason, GenerationOptions, Message, Outcome, Released, Verdict

__all__ = ["About", "Asked", "Broken", "Said", "leaving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request to an alias.

    Args:
        alias: that is asked.
        tightening: what is asked for beyond its policy.
        messages: the turns.
        call: the facts; its ``request_id`` makes who answers it again answer the same request.
        options: how it is drawn, and what is offered.
        answer: to be judged instead of drawing one.
        ended: how that answer ended.
    """

    alias: str
    tightening: Tightening
    messages: tuple[Message, ...]
    call: Call
    options: GenerationOptions = field(default_factory=GenerationOptions)
    answer: str | tuple[int, ...] = ""
    ended: FinishReason = "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """How an alias is in one replica.

    Args:
        fingerprint: of the model.
        streams: whether answers can leave sentence by sentence.
        why: it is not ready; empty if it is.
        suspended: why certificates or scores do not hold; empty while they do.
    """

    fingerprint: str
    streams: bool
    why: str
    suspended: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A defect: of which kind. Where, stands in the replica's log; its words may hold a prompt and stand nowhere."""

    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a replica says.

    Args:
        replica: its name.
        value: what was asked for; an event of a stream; or why there is none.
        about: how every alias is there.
    """

    replica: str
    value: Event | GuardError | Refusal | Broken | None
    about: dict[str, About]


def leaving(event: Event) -> Event:
    """An event without what is not to leave."""
    if isinstance(event, Released):
        return replace(event, verdict=_plain(event.verdict))
    if isinstance(event, Outcome):
        generation = replace(
            event.generation, messages=(), prompt_token_ids=(), response_token_ids=(), text="", anchor=None, _trace=None
        )
        if not event.accepted:
            generation = replace(generation, written_calls=())
        return replace(event, generation=generation, verdict=_plain(event.verdict))
    return event


def _plain(verdict: Verdict) -> Verdict:
    score = replace(verdict.score, token_entropies=(), token_logprobs=(), states=None, sentences=(), anchor=None)
    return replace(verdict, score=score)
