"""What was measured of one generation: finite numbers, or a reason why there are none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self, TypeAlias

from hallucination_guard.values.generation import Anchor
from hallucination_guard.values.identity import ScorerIdentity
from hallucination_guard.values.plain import FrozenDict
from hallucination_guard.values.sentence import Sentence
from hallucination_guard.values.states import States

__all__ = ["LOWER_IS_LESS_CERTAIN", "Prefix", "Score", "Status"]

Status: TypeAlias = Literal["scored", "unscorable", "error"]
Prefix: TypeAlias = Literal["kept", "reread", "whole"]

LOWER_IS_LESS_CERTAIN = frozenset({"min_token_logprob"})
"""The scores that fall where the model is less certain; all others rise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was measured of one generation; higher = less certain, but for :data:`LOWER_IS_LESS_CERTAIN`.

    Args:
        status: ``scored``; ``unscorable`` (there is nothing to measure); ``error`` (measuring failed).
        reason: why there is no score; empty when there is one.
        scorer: who measured.
        scores: by name, finite; empty unless ``scored``.
        anchor: t* if a gradient was taken.
        prefix: if a gradient was taken, where what comes before t* was read: ``kept`` from generating; ``reread`` in
            one pass without a graph; ``whole`` where no cache can be cut at t*: the deep half's graph spans it all.
        token_entropies: H(p_t) in nats, length T.
        token_logprobs: log p_t[ŷ_t], length T.
        states: what a probe can read of the answer; None where the pass had none.
        seconds: wall time of scoring.
        sentences: of the answer, in order, where they were measured; empty where they were not.
        sentence_scorer: what measured these; None where there are none, or a record does not say.

    Raises:
        ValueError: on a non-finite number, a score without ``scored``, or a missing reason.
    """

    status: Status
    scorer: ScorerIdentity
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    anchor: Anchor | None = None
    prefix: Prefix | None = None
    token_entropies: tuple[float, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    states: States | None = field(default=None, repr=False)
    seconds: float = 0.0
    sentences: tuple[Sentence, ...] = ()
    sentence_scorer: ScorerIdentity | None = None

    def __post_init__(self) -> None:
        if self.status != "scored" and self.sentences:
            raise ValueError(f"an answer that is {self.status!r} has scores of its sentences")
        if self.status not in ("scored", "unscorable", "error"):
            raise ValueError(f"a score is {self.status!r}, which is no status")
        if (self.status == "scored") == bool(self.reason):
            raise ValueError(f"a score is {self.status!r} and its reason is {self.reason!r}")
        if (self.status == "scored") != bool(self.scores):
            raise ValueError(f"a score is {self.status!r} and its numbers are {dict(self.scores)!r}")
        for name, value in self.scores.items():
            if not math.isfinite(value):
                raise ValueError(f"score {name!r} is {value!r}, not a finite number")
        if not all(map(math.isfinite, (*self.token_entropies, *self.token_logprobs))):
            raise ValueError("a token entropy or log probability is not finite")
        object.__setattr__(self, "scores", FrozenDict(self.scores))

    @classmethod
    def unscorable(cls, reason: str, *, scorer: ScorerIdentity) -> Self:
        """There is nothing to measure, for example in an empty answer."""
        return cls(status="unscorable", reason=reason, scorer=scorer)

    @classmethod
    def failed(cls, reason: str, *, scorer: ScorerIdentity) -> Self:
        """Measuring was tried and failed."""
        return cls(status="error", reason=reason, scorer=scorer)
