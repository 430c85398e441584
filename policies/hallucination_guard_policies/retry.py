"""Whether it is worth another draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import Action, Redraw
from hallucination_guard_policies._check import count, number
from hallucination_guard_policies.below import ActBelow

__all__ = ["RetryBelow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBelow(ActBelow):
    """Draw another answer, with sampling: ``RetryBelow(confidence=0.7, times=2)``.

    Args:
        confidence: accepts from here up, in (0, 1].
        score: or: name of a raw score that is higher where the model is less certain.
        limit: accepts up to here.
        max_risk: or: accepts what a certificate of at most this risk lets through, in (0, 1).
        name: of the rule, for the log; ``retry_below`` when not given.
        times: redraws in one call; then it is spent.
        temperature: of the redraw, above 0: a greedy redraw would repeat the draft.
        top_p: nucleus of the redraw, in (0, 1].
        seed: of the first redraw.
        keep: which draft is judged next: the ``best`` (most certain) so far or the ``last`` one.
    """

    action: ClassVar[Action] = "retry"
    times: int = 2
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        ActBelow.__post_init__(self)
        number("temperature", self.temperature, above=0)
        number("top_p", self.top_p, above=0, most=1)
        count("seed", self.seed, least=0)
        if self.keep not in ("best", "last"):
            raise PolicyError(f"keep is {self.keep!r}", hint="give 'best' or 'last'")

    def _move(self) -> Redraw:
        return Redraw(temperature=self.temperature, top_p=self.top_p, seed=self.seed, keep=self.keep)
