"""What becomes of an answer without a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias, assert_never

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import JSON, Answerer, Decision, Escalate, Policy, Situation, Verdict
from hallucination_guard_policies._check import number, target
from hallucination_guard_policies.below import name_of
from hallucination_guard_policies.compose import Composable
from hallucination_guard_policies.threshold import Reading, unscored

__all__ = ["Fallback", "Unscored"]

Fallback: TypeAlias = Literal["abstain", "accept", "escalate"]


@dataclass(frozen=True, slots=True)
class Unscored(Composable):
    """Ask ``policy`` about scored answers, and do with the others what the caller says.

    Args:
        policy: is asked about answers with a score.
        on_unscorable: for an answer in which there is nothing to measure, or whose sentences were not scored where a
            rule asks for them.
        on_error: for an answer whose scoring failed.
        to: what an escalation goes to; None hands over to the caller.
        timeout: seconds for the escalation.
    """

    policy: Policy
    _: KW_ONLY
    on_unscorable: Fallback = "abstain"
    on_error: Fallback = "abstain"
    to: Answerer | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, value in (("on_unscorable", self.on_unscorable), ("on_error", self.on_error)):
            if value not in ("abstain", "accept", "escalate"):
                raise PolicyError(f"{name} is {value!r}", hint="give 'abstain', 'accept' or 'escalate'")
        if self.to is not None:
            target("to", self.to)
        number("timeout", self.timeout, above=0)

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policy that is asked about scored answers."""
        return (self.policy,)

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        blind = unscored(verdict.score)
        if blind is None:
            decision = self.policy(verdict, situation)
            if decision.rule != "on_unscorable":  # only of sentences that were not scored
                return decision
            blind = Reading(passed=False, words=decision.reason, blind=decision.rule)
        rule = blind.blind
        word = self.on_unscorable if rule == "on_unscorable" else self.on_error
        match word:
            case "abstain":
                return Decision(action="abstain", rule=rule, reason=blind.words)
            case "accept":
                reason = f"accepted unscored because {rule}: accept; {blind.words}"
                return Decision(action="accept", rule=rule, reason=reason)
            case "escalate":
                if situation.fired(rule):
                    return Decision(action="abstain", rule=rule, reason=f"escalated already; {blind.words}")
                move = Escalate(to=self.to, timeout=self.timeout)
                return Decision(action="escalate", rule=rule, reason=blind.words, move=move)
            case _:
                assert_never(word)

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        return {
            "policy": "Unscored",
            "on_unscorable": self.on_unscorable,
            "on_error": self.on_error,
            "to": name_of(self.to),
            "timeout": self.timeout,
            "of": self.policy.describe(),
        }
