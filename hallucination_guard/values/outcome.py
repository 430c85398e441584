"""What the caller gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hallucination_guard.values.decision import Decision
from hallucination_guard.values.generation import Generation
from hallucination_guard.values.tools import ToolCall
from hallucination_guard.values.verdict import Verdict

__all__ = ["Outcome"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the caller gets.

    Args:
        text: the answer let through, without the calls of tools in it and as ``decision.edit`` has it; None when there
            is none.
        decision: the last one taken.
        verdict: the one that was judged last.
        attempts: how many answers were generated.
        audit_ids: one id an attempt, in order, and one for an escalation's answer; empty without an audit log.
        seconds: ``generate`` and ``score``, over all attempts, and ``total``.
        generation: the draft that was judged last, for inspection; its text is *not* cleared by an abstention.
        tokens: ``in`` and ``out``, over all attempts.
        retrieved: ids of the passages in the prompt of the judged draft.
        request_id: of this call, for the log.
        released: what a stream had given before this decision; of an accepted answer all of it.
    """

    text: str | None
    decision: Decision
    verdict: Verdict
    attempts: int
    generation: Generation = field(repr=False)
    audit_ids: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    retrieved: tuple[str, ...] = ()
    request_id: str = ""
    released: str = ""

    def __post_init__(self) -> None:
        if self.text is not None and self.decision.action not in ("accept", "escalate"):
            raise ValueError(f"an outcome decided {self.decision.action!r} must not carry a text")
        if self.text is None and self.decision.action == "accept":
            raise ValueError("an accepted outcome must carry a text")

    def __str__(self) -> str:
        """One line for people: the text or that there is none, what was decided, how sure, and the record."""
        said = (
            f"[{self.decision.action}: no answer was let through]" if self.text is None else " ".join(self.text.split())
        )
        if self.tool_calls:
            said = " ".join([said, *(f"[calls {each.name}]" for each in self.tool_calls)]).strip()
        sure = "uncalibrated" if self.confidence is None else f"confidence {self.confidence:.2f}"
        record = f"record {self.audit_ids[-1][:12]}" if self.audit_ids else "no record"
        return f"{said}  ({self.decision.action} by {self.decision.rule}, {sure}, {record})"

    @property
    def accepted(self) -> bool:
        """Whether the model's own answer was let through."""
        return self.decision.action == "accept"

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that were let through."""
        return self.generation.tool_calls if self.accepted else ()

    @property
    def retention(self) -> float | None:
        """The share of the sentences that are in ``text`` without a mark; None where no rule looked at them."""
        return None if self.decision.edit is None else self.decision.edit.retention

    @property
    def confidence(self) -> float | None:
        """Calibrated P(correct) of the judged answer; None when uncalibrated or unscored."""
        return self.verdict.confidence
