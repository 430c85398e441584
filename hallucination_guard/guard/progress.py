"""One prompt on its way to an outcome: what was drawn, judged, decided and recorded so far. The loop's only state."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from uuid import uuid4

from hallucination_guard.guard.moves import Again
from hallucination_guard.values import (
    Call,
    Conditions,
    Decision,
    Drawing,
    Generation,
    GenerationSettings,
    Generator,
    Message,
    Outcome,
    Redraw,
    Situation,
    Verdict,
)

__all__ = ["Draft", "Progress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One attempt's answer and what it means."""

    attempt: int
    generation: Generation
    verdict: Verdict


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a prompt stands.

    Args:
        asked: the caller's own prompt.
        messages: the prompt of the next attempt; another one after a retrieval.
        settings: what was said about generating.
        call: the facts of the call, for the record.
        request_id: of the call; by default the one that its facts name, or a new one.
        given: an answer that something else wrote, to be judged first.
        unscorable: why the answer given cannot be scored; empty where it can.
        by: the server that drew the answer given, where that is known; further ones are the model's own.
        streamed: whether it is judged sentence by sentence.
        released_ids: of a stream, the beginning of the answer that was let go.
        released: its text.
        doubt: of a stream, the greatest value that the calibration read of a beginning that was let go.
    """

    asked: tuple[Message, ...]
    messages: tuple[Message, ...]
    settings: GenerationSettings
    call: Call
    given: Generation | None = None
    unscorable: str = ""
    by: Generator | None = None
    request_id: str = ""
    began: float = field(default_factory=time.perf_counter)
    drawn: set[tuple[int, ...]] = field(default_factory=set)
    attempt: int = 0
    drawn_under: Conditions | None = None
    rules: list[str] = field(default_factory=list)
    redraw: Redraw | None = None
    redraws: int = 0
    retrieved: tuple[str, ...] = ()
    newest: Draft | None = None
    judged: Draft | None = None
    recorded: int = 0
    audit_ids: list[str] = field(default_factory=list)
    generating: float = 0.0
    scoring: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    streamed: bool = False
    released_ids: tuple[int, ...] = ()
    released: str = ""
    doubt: float = 0.0
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.request_id = self.request_id or self.call.request_id or uuid4().hex

    @property
    def drawing(self) -> Drawing:
        """How the next attempt is drawn: a redraw samples, each time with another seed."""
        drawing = self.settings.drawing
        if self.redraw is not None:
            drawing |= Drawing(
                temperature=self.redraw.temperature, top_p=self.redraw.top_p, seed=self.redraw.seed + self.redraws - 1
            )
        return drawing

    def conditions(self, generation: Generation) -> Conditions:
        """Those of a draft: drawn as the call's first, since what is changed is the policy's, and its own end."""
        assert self.drawn_under is not None
        ended = replace(
            self.drawn_under.ended(generation.finish_reason), generator=None if self.by is None else self.by.mark
        )
        if generation.finish_reason != "length":
            return ended
        # The context may have cut it earlier; of what a server drew, only the answer says how early.
        most = generation.settings.max_new_tokens if self.by is None else len(generation.response_token_ids)
        return replace(ended, max_new_tokens=most)

    @property
    def situation(self) -> Situation:
        """What the policy may know."""
        return Situation(attempt=self.attempt, rules=tuple(self.rules), seconds=time.perf_counter() - self.began)

    def begin(self, generation: Generation, unfinished: Verdict) -> None:
        """Take in the answer of the next attempt: from here on an interruption records it."""
        self.given = None
        self.drawn.add(generation.response_token_ids)
        self.attempt += 1
        drawn = generation if self.by is None else replace(generation, settings=self.settings)
        self.drawn_under = self.drawn_under or Conditions.of(drawn)
        self.newest = Draft(attempt=self.attempt, generation=generation, verdict=unfinished)

    def replace(self, generation: Generation) -> None:
        """Take in another answer for the same attempt."""
        assert self.newest is not None
        self.drawn.add(generation.response_token_ids)
        self.newest = Draft(attempt=self.attempt, generation=generation, verdict=self.newest.verdict)

    def release(self, generation: Generation, text: str) -> None:
        """Take note that a stream lets the answer up to here go, of which ``text`` is new."""
        self.released_ids = generation.response_token_ids
        self.released += text

    def take_up(self, next: Again) -> None:
        """Set up another attempt."""
        self.redraw, self.by = next.redraw, None
        if next.messages is None:
            self.redraws += 1
        else:  # another prompt: its drafts are judged afresh
            self.messages, self.retrieved = next.messages, next.retrieved
            self.redraws, self.judged = 0, None

    def end(self, decision: Decision, text: str | None) -> Outcome:
        """The outcome, which ends the call."""
        assert self.judged is not None
        self.outcome = Outcome(
            text=text,
            decision=decision,
            verdict=self.judged.verdict,
            attempts=self.attempt,
            generation=self.judged.generation,
            audit_ids=tuple(self.audit_ids),
            seconds={
                "generate": self.generating,
                "score": self.scoring,
                "total": time.perf_counter() - self.began,
            },
            tokens={"in": self.tokens_in, "out": self.tokens_out},
            retrieved=self.retrieved,
            request_id=self.request_id,
            released=self.released,
        )
        return self.outcome
