"""Whether a verdict is too uncertain to be said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hallucination_guard.values import Decision, Situation
from hallucination_guard_policies.below import Below

__all__ = ["AbstainBelow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbstainBelow(Below):
    """Say nothing rather than something uncertain: ``AbstainBelow(confidence=0.7)``.

    Args:
        confidence: accepts from here up, in (0, 1].
        score: or: name of a raw score that is higher where the model is less certain.
        limit: accepts up to here.
        max_risk: or: accepts what a certificate of at most this risk lets through, in (0, 1).
        name: of the rule, for the log; ``abstain_below`` when not given.
    """

    final: ClassVar[bool] = True

    def _object(self, words: str, situation: Situation) -> Decision:
        return Decision(action="abstain", rule=self.rule, reason=words)
