"""Reply: what a framework is handed of an outcome, the same in every integration.

Text and calls of what was let through, or the abstention; the verdict as plain JSON under :data:`KEY`. A reply holds
nothing of a draft that was not let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from hallucination_guard.errors import ConfigurationError, GuardError
from hallucination_guard.values import JSON, Outcome, ToolCall

__all__ = ["ABSTENTION", "KEY", "NotAnswered", "OnAbstain", "Reply", "Replying", "verdict_of"]

KEY = "hallucination_guard"
"""Where the verdict lies in a framework's metadata."""

ABSTENTION = "I am not sure enough to answer that."
"""What stands for a text that was not let through, unless the caller says otherwise."""

OnAbstain: TypeAlias = Literal["message", "error"]
"""What becomes of an outcome without a text: the abstention as an answer, or :class:`NotAnswered`."""


class NotAnswered(GuardError):
    """The policy let no answer through, and ``on_abstain="error"`` asked for an exception.

    Args:
        outcome: of the guarded call; its ``text`` is None.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(
            f"no answer was let through: {outcome.decision.reason}", hint=f"rule {outcome.decision.rule!r} fired"
        )
        self.outcome = outcome

    def __reduce__(self) -> tuple[type[NotAnswered], tuple[Outcome]]:
        return (type(self), (self.outcome,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a framework is handed.

    Args:
        text: what was let through, or the abstention.
        answered: whether a text was let through.
        tool_calls: the calls that were let through.
        finish_reason: how an accepted answer ended; otherwise the decision's verb.
        verdict: see :func:`verdict_of`.
        tokens_in: read, over all attempts.
        tokens_out: written, over all attempts.
    """

    text: str
    answered: bool
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str
    verdict: Mapping[str, JSON] = field(repr=False)
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def metadata(self) -> dict[str, JSON]:
        """The verdict under its key, the caller's to change."""
        return {KEY: dict(self.verdict)}

    @property
    def ended(self) -> Literal["stop", "length", "tool_calls", "content_filter"]:
        """The finish reason in the words of the chat APIs, for frameworks that take no others."""
        if not self.answered:
            return "content_filter"
        if self.tool_calls:
            return "tool_calls"
        return "length" if self.finish_reason == "length" else "stop"


@dataclass(frozen=True, slots=True)
class Replying:
    """From an outcome to the reply.

    Args:
        abstention: what stands for a text that was not let through.
        on_abstain: ``message`` gives the abstention as an answer, ``error`` raises :class:`NotAnswered`.

    Raises:
        ConfigurationError: on anything else.
    """

    abstention: str = ABSTENTION
    on_abstain: OnAbstain = "message"

    def __post_init__(self) -> None:
        if self.on_abstain not in get_args(OnAbstain):
            raise ConfigurationError(f"on_abstain is {self.on_abstain!r}", hint="message or error")
        if not isinstance(self.abstention, str):
            raise ConfigurationError(f"the abstention is {self.abstention!r}", hint="give a text")

    def __call__(self, outcome: Outcome) -> Reply:
        """The reply.

        Raises:
            NotAnswered: if there is none to give, and that is asked for.
        """
        if outcome.text is None and self.on_abstain == "error":
            raise NotAnswered(outcome)
        return Reply(
            text=self.abstention if outcome.text is None else outcome.text,
            answered=outcome.text is not None,
            tool_calls=outcome.tool_calls,
            finish_reason=outcome.generation.finish_reason if outcome.accepted else outcome.decision.action,
            verdict=verdict_of(outcome),
            tokens_in=outcome.tokens.get("in", 0),
            tokens_out=outcome.tokens.get("out", 0),
        )


def verdict_of(outcome: Outcome) -> dict[str, JSON]:
    """The outcome as plain JSON. It never holds the text of a draft."""
    score, decision = outcome.verdict.score, outcome.decision
    return {
        "decision": decision.action,
        "rule": decision.rule,
        "reason": decision.reason,
        "confidence": outcome.verdict.confidence,
        "certificate": outcome.verdict.certificate,
        "max_risk": outcome.verdict.max_risk,
        "suspended": outcome.verdict.suspended,
        "uncovered": outcome.verdict.uncovered,
        "status": score.status,
        "scores": dict(score.scores),
        "attempts": outcome.attempts,
        "audit_ids": list(outcome.audit_ids),
        "request_id": outcome.request_id,
        "retrieved": list(outcome.retrieved),
        "seconds": dict(outcome.seconds),
    }
