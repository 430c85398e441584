"""What a process of a job does with one batch of a file: plain classes, from a JSON text to a JSON text. No Ray here.

Whoever makes them may do a batch twice, and lose one that was half done: they keep nothing, and whoever asked keeps the
rows by their number or id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from hallucination_guard.evaluation.answers import answer_rows
from hallucination_guard.evaluation.data import Item, Prompting
from hallucination_guard.model.choice import ModelChoice
from hallucination_guard.rows import Line, planned, score_batch
from hallucination_guard.scoring import HybridGrad

__all__ = ["Answers", "Job", "Plan", "Scores", "plan", "text_of"]

Plan = tuple[list[Any], list[str]]
"""What a model and a scorer are, as JSON, and the batches of a file."""


class Job(Protocol):
    """Does one batch."""

    def __call__(self, batch: str) -> str:
        """From its questions to its rows."""
        ...


class Scores:
    """Scores lines, as ``score`` does.

    Args:
        choice: the model.
        max_new_tokens: of a generated answer.
    """

    def __init__(self, choice: ModelChoice, max_new_tokens: int) -> None:
        self._model, self._scorer, self._most = choice.load(), HybridGrad(), max_new_tokens

    def __call__(self, batch: str) -> str:
        """Numbers and rows."""
        part = [Line.from_json_dict(each) for each in json.loads(batch)]
        found = score_batch(self._model, part, scorer=self._scorer, max_new_tokens=self._most)
        return json.dumps([each for rows in found for each in rows])


class Answers:
    """Answers and scores questions, as ``evaluate`` does.

    Args:
        choice: the model.
        prompting: how they are asked.
        max_new_tokens: of an answer.
        beginnings: whether to score every beginning that ends with a sentence, too.
    """

    def __init__(self, choice: ModelChoice, prompting: Prompting, max_new_tokens: int, *, beginnings: bool) -> None:
        self._model, self._scorer, self._prompting = choice.load(), HybridGrad(), prompting
        self._most, self._beginnings = max_new_tokens, beginnings

    def __call__(self, batch: str) -> str:
        """Rows."""
        items = [Item(**{**each, "answers": tuple(each["answers"])}) for each in json.loads(batch)]
        rows = answer_rows(self._model, items, self._prompting, self._scorer, self._most, self._beginnings)
        return json.dumps(rows)


def plan(
    choice: ModelChoice, lines: Sequence[Line], *, batch_size: int, batch_tokens: int, max_new_tokens: int
) -> Plan:
    """What rows of a file depend on, and the batches in which it is scored: those of a run in one process."""
    model, scorer = choice.load(), HybridGrad()
    parts = planned(
        model, lines, batch_size=batch_size, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens, by_length=True
    )
    identity = [
        [model.identity.fingerprint, model.identity.structure, model.identity.template],
        [scorer.identity.name, scorer.identity.version, dict(scorer.identity.settings)],
    ]
    return identity, [text_of([line.to_json_dict() for line in part]) for part in parts]


def text_of(values: Sequence[Any]) -> str:
    """A batch as it travels."""
    return json.dumps(list(values))
