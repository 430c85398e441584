"""Whether there is anything to ask at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hallucination_guard.values import JSON, Decision, Situation, Verdict
from hallucination_guard_policies.compose import Composable
from hallucination_guard_policies.threshold import unscored

__all__ = ["Accept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept(Composable):
    """Let everything through that has a score: to observe, or as the explicit floor of a chain."""

    rule: ClassVar[str] = "accept_all"

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        if blind := unscored(verdict.score):
            return Decision(action="abstain", rule=blind.blind, reason=blind.words)
        return Decision(action="accept", rule=self.rule, reason="everything with a score is accepted")

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        return {"policy": "Accept", "rule": self.rule}
