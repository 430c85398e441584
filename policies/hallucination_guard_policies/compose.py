"""What several policies say together: ``a | b`` and ``a & b``.

A decision is one of three things here: it *accepts*, it *objects* (any other action), or it is *spent* (an abstention
only because its rule has used up its attempts).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import JSON, Decision, Policy, Situation, Verdict
from hallucination_guard_policies.threshold import Threshold

__all__ = ["BothObject", "Composable", "FirstObjection"]


class Composable(ABC):
    """A policy with the operators ``|`` and ``&``; subclass it to write a policy of your own."""

    __slots__ = ()

    final: ClassVar[bool] = False
    """Whether its objections end the call, so that nothing asked after it is heard."""

    @abstractmethod
    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""

    @abstractmethod
    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies that this one is made of."""
        return ()

    @property
    def counted(self) -> str:
        """The rule whose firings it counts in a :class:`Situation`; empty when it counts none."""
        return ""

    @property
    def needs_confidence(self) -> bool:
        """Whether it can only read verdicts that were calibrated."""
        return any(getattr(part, "needs_confidence", False) for part in self.parts)

    @property
    def needs_risk(self) -> float | None:
        """The smallest risk that a certificate has to keep for it; None if it does not speak of risk."""
        return min(
            (risk for part in self.parts if (risk := getattr(part, "needs_risk", None)) is not None), default=None
        )

    @property
    def redraws(self) -> bool:
        """Whether it makes further attempts; a part that does not say is taken to."""
        return any(getattr(part, "redraws", True) for part in self.parts)

    @property
    def provisional(self) -> bool:
        """Whether a stream may show text before it is decided on."""
        return any(getattr(part, "provisional", False) for part in self.parts)

    @property
    def edits(self) -> bool:
        """Whether it changes the text that is let through."""
        return any(getattr(part, "edits", False) for part in self.parts)

    @property
    def needs_backoff(self) -> bool:
        """Whether it reads a calibration of sentences."""
        return any(getattr(part, "needs_backoff", False) for part in self.parts)

    @property
    def unnamed(self) -> str:
        """What it depends on and cannot tell from another of its kind, in words; empty when there is nothing."""
        return next((words for part in self.parts if (words := getattr(part, "unnamed", ""))), "")

    @property
    def uncertified(self) -> str:
        """What it lets through that no certificate of its ``max_risk`` covers, in words; empty when there is nothing.

        A certificate is about the answers that one threshold lets through, no more and no fewer.
        """
        risk = self.needs_risk
        return "" if risk is None else self.unnamed or _uncertified(self, risk)

    def __or__(self, other: Policy) -> FirstObjection:
        return FirstObjection((self, other)) if _is_policy(other) else NotImplemented

    def __ror__(self, other: Policy) -> FirstObjection:
        return FirstObjection((other, self)) if _is_policy(other) else NotImplemented

    def __and__(self, other: Policy) -> BothObject:
        return BothObject(self, other) if _is_policy(other) else NotImplemented

    def __rand__(self, other: Policy) -> BothObject:
        return BothObject(other, self) if _is_policy(other) else NotImplemented


@dataclass(frozen=True, slots=True)
class FirstObjection(Composable):
    """Ask in order; the first that objects decides, and without an objection the last one does: ``a | b``.

    A policy that is spent passes the question on: what follows it is the floor for answers that it could not repair.
    Nobody following, the answer is not accepted.

    Args:
        policies: at least one; nested ones are flattened, which changes no decision.

    Raises:
        PolicyError: when two policies count the same rule, or one can never be heard.
    """

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        nested = ((p.policies if isinstance(p, FirstObjection) else (p,)) for p in self.policies)
        object.__setattr__(self, "policies", tuple(p for group in nested for p in group))
        if not self.policies:
            raise PolicyError("a chain of no policies", hint="give at least one policy")
        _refuse_shared_counts(self)
        if sum(bool(getattr(each, "edits", False)) for each in self.policies) > 1:
            raise _two_edit()
        for first, later in combinations(self.policies, 2):
            if _silences(first, later):
                raise PolicyError(
                    f"{_label(later)} can never act: {_label(first)} is asked before it and always decides",
                    hint="ask it first, or give it the stricter threshold",
                )

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies, in the order in which they are asked."""
        return self.policies

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide.

        Raises:
            PolicyError: if two of them edit sentences, and one did not say so: one edit would undo the other.
        """
        heard: list[Decision] = []
        for policy in self.policies:
            decision = policy(verdict, situation)
            if decision.action != "accept" and not decision.spent:
                return decision
            heard.append(decision)
        # No objection: the last one is an acceptance, or spent and therefore an abstention.
        edits = [each.edit for each in heard if each.edit is not None]
        if len(edits) > 1:  # one of them did not say so when the chain was made
            raise _two_edit()
        edit = edits[0] if edits and heard[-1].action == "accept" else None
        return replace(heard[-1], reason=_joined(heard), edit=edit)

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        return {"policy": "FirstObjection", "of": [policy.describe() for policy in self.policies]}


@dataclass(frozen=True, slots=True)
class BothObject(Composable):
    """Object only when both do, and then as the first that is not spent; one acceptance is enough: ``a & b``.

    A side without the number it needs (unscored, uncalibrated, unknown score) accepts nothing, so it can only make
    the whole stricter.

    Args:
        first: decides when both object.
        second: decides when both object and ``first`` is spent.

    Raises:
        PolicyError: when both count the same rule.
    """

    first: Policy
    second: Policy

    def __post_init__(self) -> None:
        _refuse_shared_counts(self)
        if any(getattr(each, "edits", False) for each in self.parts):  # the other's acceptance would undo the edit
            raise _edits_under_both()

    @property
    def parts(self) -> tuple[Policy, ...]:
        """Both policies."""
        return (self.first, self.second)

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide.

        Raises:
            PolicyError: if one of them edits sentences and did not say so: the other's acceptance would undo it.
        """
        both = (self.first(verdict, situation), self.second(verdict, situation))
        if any(each.edit is not None for each in both):
            raise _edits_under_both()
        accepting = [decision for decision in both if decision.action == "accept"]
        objecting = [decision for decision in both if not decision.spent]
        return replace((accepting or objecting or both)[0], reason=_joined(both))

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        return {"policy": "BothObject", "of": [policy.describe() for policy in self.parts]}


def _edits_under_both() -> PolicyError:
    return PolicyError("a rule that edits sentences under '&'", hint="put it into a chain: a | b")


def _two_edit() -> PolicyError:
    return PolicyError("two rules of a chain edit sentences", hint="let one rule say which are doubtful")


def _is_policy(value: object) -> bool:
    return isinstance(value, Policy) and not isinstance(value, type)


def _joined(decisions: list[Decision] | tuple[Decision, ...]) -> str:
    return "; ".join(dict.fromkeys(decision.reason for decision in decisions))


def _walk(policy: Policy) -> Iterator[Composable]:
    if isinstance(policy, Composable):
        yield policy
        for part in policy.parts:
            yield from _walk(part)


def _refuse_shared_counts(policy: Composable) -> None:
    """Two policies under one rule would use up each other's attempts."""
    for rule, times in Counter(part.counted for part in _walk(policy) if part.counted).items():
        if times > 1:
            raise PolicyError(
                f"{times} rules are called {rule!r} and would count each other's attempts",
                hint="give one of them a name of its own, for example name='second_look'",
            )


def _silences(first: Policy, later: Policy) -> bool:
    """Whether ``first`` ends the call wherever ``later`` would object."""
    if isinstance(first, BothObject):
        return all(_silences(part, later) for part in first.parts)
    if isinstance(later, BothObject):
        return any(_silences(first, part) for part in later.parts)
    if not (isinstance(first, Threshold) and isinstance(later, Threshold)):
        return False
    return isinstance(first, Composable) and first.final and first.covers(later)


def _uncertified(policy: Policy, risk: float) -> str:
    if isinstance(policy, Threshold):
        return "" if policy.max_risk == risk else f"{_label(policy)} stands beside max_risk {risk:g}"
    for name in ("on_unscorable", "on_error"):
        if getattr(policy, name, None) == "accept":
            return f"{name} accepts answers without a score, beside max_risk {risk:g}"
    parts = getattr(policy, "parts", ())
    if isinstance(policy, BothObject):  # one acceptance is enough here, so each side has to be certified
        for part in parts:
            if getattr(part, "needs_risk", None) is None:
                return f"{_label(part)} accepts by itself, beside max_risk {risk:g}"
    if isinstance(policy, FirstObjection):
        # What is spent passes the question on, and then the last one alone lets through.
        *before, last = policy.policies
        held = any(getattr(part, "needs_risk", None) is not None and not _may_be_spent(part) for part in before)
        if getattr(last, "needs_risk", None) is None and not held:
            return f"{_label(last)} accepts what a spent rule could not repair, beside max_risk {risk:g}"
    return next((words for part in parts if (words := _uncertified(part, risk))), "")


def _may_be_spent(policy: Policy) -> bool:
    return not isinstance(policy, Composable) or any(part.counted for part in _walk(policy))


def _label(policy: Policy) -> str:
    if isinstance(policy, BothObject):
        return " & ".join(map(_label, policy.parts))
    if not isinstance(policy, Threshold):
        return type(policy).__name__
    if policy.confidence is not None:
        return f"{getattr(policy, 'rule', '')} (confidence below {policy.confidence:g})"
    if policy.max_risk is not None:
        return f"{getattr(policy, 'rule', '')} (risk above {policy.max_risk:g})"
    return f"{getattr(policy, 'rule', '')} ({policy.score} above {policy.limit:g})"
