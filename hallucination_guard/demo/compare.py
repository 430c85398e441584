"""The demo: a small model that makes things up, with and without a guard, on questions with known answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hallucination_guard.audit import AuditLog, AuditRecord
from hallucination_guard.calibration import Calibration
from hallucination_guard.demo.documents import documents
from hallucination_guard.demo.fitting import MAX_NEW_TOKENS
from hallucination_guard.demo.questions import Question, shipped
from hallucination_guard.evaluation.matching import contains_match
from hallucination_guard.guard import Guard
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.values import Outcome
from hallucination_guard_policies import load_policy

__all__ = ["Row", "Summary", "run", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question of the demo.

    Args:
        question: what was asked.
        bare: the answer of the model without a guard: its first, greedy draft.
        bare_correct: whether that was right.
        bare_seconds: time that took.
        outcome: what the guard made of it.
        correct: whether the text let through was right; None when there is none.
    """

    question: Question
    bare: str
    bare_correct: bool
    bare_seconds: float
    outcome: Outcome
    correct: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the guard changed, counted over the rows of one run.

    Args:
        questions: rows.
        wrong_without: wrong answers the model alone would have given.
        wrong_with: wrong answers that passed the guard.
        right_without: right answers of the model alone.
        right_with: right answers that passed the guard.
        withheld_right: questions that the model alone answers rightly and the guard left unanswered.
        retrieved: questions for which documents were looked up.
        seconds_without: seconds a question takes without a guard (generating the first draft).
        seconds_with: seconds a question takes with it.
        score_share: time for scoring over time for generating, over all attempts.
    """

    questions: int
    wrong_without: int
    wrong_with: int
    right_without: int
    right_with: int
    withheld_right: int
    retrieved: int
    seconds_without: float
    seconds_with: float
    score_share: float


def run(model: WhiteBoxModel, calibration: Calibration, audit: Path, *, confidence: float) -> Iterator[Row]:
    """Ask the demo questions, one after the other, and give each row as soon as it is there."""
    policy = load_policy("rag", retriever=documents(), confidence=confidence)
    with AuditLog(audit) as log:
        records: list[AuditRecord] = []

        def keep(record: AuditRecord) -> str:
            records.append(record)
            return log(record)

        guard = Guard(
            model, policy=policy, calibration=calibration, audit=keep, generation={"max_new_tokens": MAX_NEW_TOKENS}
        )
        for question in shipped("demo"):
            outcome = guard(question.query)
            # Without a guard the model would have said its first draft: greedy, from memory.
            first = next(record for record in records if record.request_id == outcome.request_id)
            bare = str(first.answer)
            yield Row(
                question=question,
                bare=bare,
                bare_correct=contains_match(bare, question.answers),
                bare_seconds=first.seconds["generate"],
                outcome=outcome,
                correct=None if outcome.text is None else contains_match(outcome.text, question.answers),
            )


def summarise(rows: list[Row]) -> Summary:
    """Count."""
    generating = sum(row.outcome.seconds["generate"] for row in rows)
    return Summary(
        questions=len(rows),
        wrong_without=sum(not row.bare_correct for row in rows),
        wrong_with=sum(row.correct is False for row in rows),
        right_without=sum(row.bare_correct for row in rows),
        right_with=sum(row.correct is True for row in rows),
        withheld_right=sum(row.bare_correct and row.correct is None for row in rows),
        retrieved=sum(row.outcome.attempts > 1 for row in rows),
        seconds_without=sum(row.bare_seconds for row in rows) / len(rows),
        seconds_with=sum(row.outcome.seconds["total"] for row in rows) / len(rows),
        score_share=sum(row.outcome.seconds["score"] for row in rows) / generating,
    )
