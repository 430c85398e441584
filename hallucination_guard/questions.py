"""Questions with reference answers, and the judge of whether an answer is right."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

__all__ = ["PROMPT", "Question", "contains_match", "normal_form", "shipped"]

PROMPT = "Please directly answer the following question with one or few words:\n{query}"
"""The prompt of the paper's experiments."""


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


def contains_match(answer: str, references: Sequence[str]) -> bool:
    """Right if the answer contains a reference, word by word, after lower-casing and dropping punctuation."""
    words = f" {normal_form(answer)} "
    return any(f" {normal} " in words for normal in map(normal_form, references) if normal)


def normal_form(text: str) -> str:
    """Lower case, without accents and punctuation, single blanks between the words."""
    plain = "".join(
        character
        for character in unicodedata.normalize("NFKD", text.casefold())
        if not unicodedata.combining(character)
    )
    return " ".join(re.findall(r"\w+", plain))
