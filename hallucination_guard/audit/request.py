"""The calls of a log: the records of each gathered, draft by draft, with how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hallucination_guard.audit.record import AuditRecord

__all__ = ["Final", "Request", "requests"]

Final: TypeAlias = Literal["accept", "abstain", "escalate"]
"""How a call can end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call, as the log has it.

    Args:
        id: ``request_id`` of its records.
        attempts: its drafts' records, from attempt 1 on without a gap; empty if the log does not have the first.
        last: the record of the last draft that the log has.
        parts: of streams, the records of what was let go before a draft's own, in order.
    """

    id: str
    attempts: tuple[AuditRecord, ...]
    last: AuditRecord
    parts: tuple[AuditRecord, ...] = ()

    def beginnings(self, record: AuditRecord) -> tuple[AuditRecord, ...]:
        """The records of a draft's beginnings, shortest first, its own last; of what was judged as a whole its own."""
        return (*(each for each in self.parts if each.attempt == record.attempt), record)

    @property
    def decided(self) -> Final | None:
        """How the call ended; None if the log does not say: it was interrupted, or the log ends within it."""
        if self.last.rule == "interrupted" or self.last.decision in ("retry", "retrieve"):
            return None
        return self.last.decision  # type: ignore[return-value]  # the two others of Action are ruled out above


def requests(records: Iterable[AuditRecord]) -> Iterator[Request]:
    """Gather the records of each call, which is given as soon as its end is seen: memory holds open calls only.

    The record of an escalation's answer is no draft of the model and is left out, and so is a human's approval.
    """
    open_calls: dict[str, list[AuditRecord]] = {}
    parts: dict[str, list[AuditRecord]] = {}
    escalated: set[str] = set()  # an escalation's answer has a record of its own, after the one that ends the call
    for record in records:
        name = record.request_id
        if record.rule == "require_approval_below":
            continue  # what a human says of a call that the policy accepted is not the policy's
        if record.part is not None:
            if record.rule != "provisional":  # which only says that text was shown
                _add_part(parts.setdefault(name, []), record)
            continue  # the attempt has a record of its own when it ends
        if name in escalated and record.decision == "escalate":
            escalated.discard(name)
            continue
        drafts = open_calls.setdefault(name, [])
        # A call that was lost before its end may be begun again: what it does then takes the place of what it did.
        drafts[:] = [*(each for each in drafts if each.attempt < record.attempt), record]
        if record.decision not in ("retry", "retrieve"):
            if record.decision == "escalate":
                escalated.add(name)
            yield _request(name, open_calls.pop(name), parts.pop(name, ()))
    for name, found in open_calls.items():
        yield _request(name, found, parts.pop(name, ()))


def _add_part(parts: list[AuditRecord], part: AuditRecord) -> None:
    """Take in what a stream let go, in the place of what it let go there before it was begun again."""
    begin = part.part["start"] if part.part else 0
    parts[:] = [each for each in parts if each.attempt != part.attempt or (each.part and each.part["stop"] <= begin)]
    parts.append(part)


def _request(name: str, found: Sequence[AuditRecord], parts: Sequence[AuditRecord]) -> Request:
    gap = next((at for at, record in enumerate(found) if record.attempt != at + 1), len(found))
    return Request(id=name, attempts=tuple(found[:gap]), last=found[-1], parts=tuple(parts))
