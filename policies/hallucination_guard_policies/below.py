"""What every rule has in common that acts below a threshold: it accepts above, and its attempts are counted."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import JSON, Action, Decision, Move, Situation, Verdict
from hallucination_guard_policies._check import count
from hallucination_guard_policies.compose import Composable
from hallucination_guard_policies.threshold import Threshold

__all__ = ["ActBelow", "Below", "name_of"]

# Rules that say something about the verdict or the call; a log in which they could mean a user's rule would not.
_TAKEN = frozenset(
    [
        "accept_all",
        "budget",
        "escalate_failed",
        "interrupted",
        "max_attempts",
        "on_error",
        "on_unscorable",
        "provisional",
        "retrieve_failed",
        "suspended",
        "uncalibrated",
        "unknown_score",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Below(Threshold, Composable):
    """A threshold, and what is done with a verdict that fails it.

    Args:
        confidence: accepts from here up, in (0, 1].
        score: or: name of a raw score that is higher where the model is less certain.
        limit: accepts up to here.
        max_risk: or: accepts what a certificate of at most this risk lets through, in (0, 1).
        name: of the rule, for the log; the class name in snake case when not given.
    """

    name: str = ""

    def __post_init__(self) -> None:
        Threshold.__post_init__(self)  # not super(): a slotted dataclass is another class than the one in the cell
        if self.name in _TAKEN or not re.fullmatch(r"[a-z][a-z0-9_]*", self.rule):
            raise PolicyError(
                f"name is {self.name!r}",
                hint=f"give lower-case letters, digits and underscores, and none of {', '.join(sorted(_TAKEN))}",
            )

    @property
    def rule(self) -> str:
        """The stable name under which its decisions are logged and counted."""
        return self.name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        reading = self.read(verdict)
        if reading.blind:
            return Decision(action="abstain", rule=reading.blind, reason=reading.words)
        if reading.passed:
            return Decision(action="accept", rule=self.rule, reason=reading.words)
        return self._object(reading.words, situation)

    @abstractmethod
    def _object(self, words: str, situation: Situation) -> Decision:
        """What is done with a verdict that failed the threshold."""

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on; live objects by their name."""
        own = {field.name for field in fields(self)} - {field.name for field in fields(Below)}
        settings = {name: _plain(getattr(self, name)) for name in sorted(own)}
        return {"policy": type(self).__name__, "rule": self.rule, **self.written(), **settings}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActBelow(Below):
    """A rule that tries to repair what fails its threshold, ``times`` times in a call; then it is spent."""

    action: ClassVar[Action]
    times: int = 1

    def __post_init__(self) -> None:
        Below.__post_init__(self)
        count("times", self.times)

    @property
    def redraws(self) -> bool:
        """Whether it makes further attempts."""
        return self.action in ("retry", "retrieve")

    @property
    def counted(self) -> str:
        """Its rule: how often it fired is read from the situation."""
        return self.rule

    def _object(self, words: str, situation: Situation) -> Decision:
        fired = situation.fired(self.rule)
        if fired >= self.times:
            reason = f"{words}, and {self.rule} has fired {fired} of {self.times} times"
            return Decision(action="abstain", rule=self.rule, reason=reason, spent=True)
        return Decision(action=self.action, rule=self.rule, reason=words, move=self._move())

    @abstractmethod
    def _move(self) -> Move:
        """How the action is carried out."""


def name_of(value: object) -> str | None:
    """What stands for a live object in a description: the name of the function, or of the object's class."""
    return None if value is None else str(getattr(value, "__qualname__", type(value).__qualname__))


def _plain(value: object) -> JSON:
    return value if isinstance(value, int | float | str) else name_of(value)
