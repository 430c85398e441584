"""The demo: a small model that makes things up, with and without a guard, on questions with known answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hallucination_guard.audit import AuditLog, AuditRecord
from hallucination_guard.bm25 import BM25Retriever
from hallucination_guard.calibration import Calibration, fit_calibration
from hallucination_guard.errors import CalibrationMismatch
from hallucination_guard.guard import Guard, with_passages
from hallucination_guard.questions import Question, contains_match, shipped
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.template import as_messages, question_of
from hallucination_guard.types import Message, Outcome, Score
from hallucination_guard_policies import load_policy
from hallucination_guard_policies.retrieve import TEMPLATE

__all__ = [
    "MAX_NEW_TOKENS",
    "SCORE",
    "Row",
    "Summary",
    "calibrated",
    "documents",
    "fit",
    "prompts_to_fit",
    "run",
    "summarise",
]

MAX_NEW_TOKENS = 24
SCORE = "paragrad"
"""Of the scores that one pass gives, the one that separates right from wrong best on the calibration questions."""
_BATCH = 16


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


def documents() -> BM25Retriever:
    """The search over the package's own passages."""
    with resources.as_file(resources.files("hallucination_guard").joinpath("data/documents.jsonl")) as path:
        return BM25Retriever.from_path(path, k=1)


def prompts_to_fit() -> list[tuple[Question, tuple[Message, ...]]]:
    """The calibration questions, each with and, where documents are found, after retrieval: as the rag pack asks."""
    search = documents()
    prompts = []
    for question in shipped("calibration"):
        plain = as_messages(question.query)
        prompts.append((question, plain))
        if found := search.invoke(question_of(plain)):
            prompts.append((question, with_passages(plain, found, TEMPLATE)))
    return sorted(prompts, key=lambda each: len(each[1][0].content))  # a batch is as slow as its longest prompt


def fit(model: Any) -> Iterator[int | Calibration]:
    """Fit a calibration on other questions than the demo's; yields how far it is, then the calibration."""
    scorer, prompts = HybridGrad(), prompts_to_fit()
    scores: list[Score] = []
    correct: list[bool] = []
    for begin in range(0, len(prompts), _BATCH):
        part = prompts[begin : begin + _BATCH]
        generations = model.generate([messages for _, messages in part], max_new_tokens=MAX_NEW_TOKENS)
        scores += scorer.batch(model, generations)
        correct += [
            contains_match(each.text, question.answers) for each, (question, _) in zip(generations, part, strict=True)
        ]
        yield min(begin + _BATCH, len(prompts))
    yield fit_calibration(scores, correct, model=model.identity, score=SCORE)


def calibrated(model: Any) -> Calibration | None:
    """The shipped calibration if it was fitted on this very model, else None: it then has to be fitted here."""
    calibration = Calibration.of_demo()
    try:
        calibration.check(model.identity, HybridGrad().identity)
    except CalibrationMismatch:
        return None
    return calibration


def run(model: Any, calibration: Calibration, audit: Path, *, confidence: float) -> Iterator[Row]:
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
