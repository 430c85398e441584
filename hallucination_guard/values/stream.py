"""What a guarded stream gives: cleared sentences, live tokens where the policy allows them, at last the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hallucination_guard.values.outcome import Outcome
from hallucination_guard.values.verdict import Verdict

__all__ = ["Event", "Provisional", "Released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The next sentence of an answer, which the policy let through.

    Args:
        text: of it. All texts of a stream, one after the other, are a beginning of one answer.
        verdict: on the answer up to the end of this sentence.
        audit_id: of the record that was written before; empty without an audit log.
    """

    text: str
    verdict: Verdict
    audit_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisional:
    """Text that nobody has decided on yet. A later event says what became of it.

    Args:
        text: what was drawn since the last event of this kind.
        begins: with this text a draft begins, which takes the place of whatever of the one before was not released.
    """

    text: str
    begins: bool = False


Event: TypeAlias = Released | Provisional | Outcome
"""What a stream gives; an :class:`~hallucination_guard.values.Outcome` is the last."""
