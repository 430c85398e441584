"""Whether something stronger should answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hallucination_guard.values import Action, Answerer, Escalate
from hallucination_guard_policies._check import number, target
from hallucination_guard_policies.below import ActBelow

__all__ = ["EscalateBelow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EscalateBelow(ActBelow):
    """Hand the question to another model or to a human: ``EscalateBelow(confidence=0.5, to=bigger_model)``.

    Args:
        confidence: accepts from here up, in (0, 1].
        score: or: name of a raw score that is higher where the model is less certain.
        limit: accepts up to here.
        max_risk: or: accepts what a certificate of at most this risk lets through, in (0, 1).
        name: of the rule, for the log; ``escalate_below`` when not given.
        times: escalations in one call; then it is spent.
        to: ``callable(messages)`` or an object with ``invoke(messages)``; it may be async. None hands over to the
            caller (a human, a queue).
        timeout: seconds for the call.
    """

    action: ClassVar[Action] = "escalate"
    to: Answerer | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        ActBelow.__post_init__(self)
        if self.to is not None:
            target("to", self.to)
        number("timeout", self.timeout, above=0)

    def _move(self) -> Escalate:
        return Escalate(to=self.to, timeout=self.timeout)
