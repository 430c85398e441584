"""Whether a stream may show text before it is decided on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hallucination_guard.values import JSON, Decision, Policy, Situation, Verdict
from hallucination_guard_policies.compose import Composable

__all__ = ["ShowProvisional"]


@dataclass(frozen=True, slots=True)
class ShowProvisional(Composable):
    """Ask ``policy``, and allow ``stream(…, provisional=True)``: tokens are shown as they are drawn, marked as such.

    The log says so before the first of them is shown. What becomes of them is said by the events that follow.

    Args:
        policy: decides.
    """

    policy: Policy

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policy that decides."""
        return (self.policy,)

    @property
    def provisional(self) -> bool:
        """It allows it."""
        return True

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        return self.policy(verdict, situation)

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        return {"policy": "ShowProvisional", "of": self.policy.describe()}
