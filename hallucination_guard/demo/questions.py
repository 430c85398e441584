"""The package's own questions with reference answers: those that the demo shows and those that it is fitted on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

__all__ = ["Question", "shipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question and every form of answer that counts as right."""

    id: str
    query: str
    answers: tuple[str, ...]


def shipped(name: str) -> list[Question]:
    """The package's own questions: ``demo`` (shown) or ``calibration`` (fitted on); they share no fact."""
    text = resources.files("hallucination_guard").joinpath(f"data/{name}_questions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [Question(id=row["id"], query=row["query"], answers=tuple(row["answers"])) for row in rows]
