"""Whether there is time for another attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hallucination_guard.values import JSON, Decision, Policy, Situation, Verdict
from hallucination_guard_policies._check import count, number
from hallucination_guard_policies.compose import Composable

__all__ = ["Budget", "Within"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one call may spend.

    Args:
        attempts: answers generated, the first draft included.
        seconds: after which no further attempt is begun; an attempt under way is not cut short.
    """

    attempts: int = 6
    seconds: float = 120.0

    def __post_init__(self) -> None:
        count("attempts", self.attempts)
        number("seconds", self.seconds, above=0)


@dataclass(frozen=True, slots=True)
class Within(Composable):
    """Ask ``policy``, and abstain where it would begin an attempt that the budget does not have.

    Args:
        policy: decides.
        budget: of one call.
    """

    policy: Policy
    budget: Budget = field(default_factory=Budget)

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policy that decides."""
        return (self.policy,)

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        decision = self.policy(verdict, situation)
        if decision.action not in ("retry", "retrieve"):
            return decision
        if situation.attempt >= self.budget.attempts:
            used = f"{situation.attempt} of {self.budget.attempts} attempts"
        elif situation.seconds >= self.budget.seconds:
            used = f"{situation.seconds:.1f} of {self.budget.seconds:g} seconds"
        else:
            return decision
        reason = f"no budget for {decision.rule}: {used} are used up; {decision.reason}"
        return replace(decision, action="abstain", rule="budget", reason=reason, move=None)

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        budget = {"attempts": self.budget.attempts, "seconds": self.budget.seconds}
        return {"policy": "Within", "budget": budget, "of": self.policy.describe()}
